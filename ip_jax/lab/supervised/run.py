"""Runs a supervised experiment: arms x seeds over one frozen base, trained as one program,
evaluated on the leak grid, resumable.

A setting gives its rows and verdicts, `supervised_plan` says what is still to be done; this module
does it and records it. With several processes, what depends on the folder is decided, and what is
recorded is written, by the first one (`hosts.by_first`).
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import jax
import numpy as np
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ip_jax.data.pipeline import BatchReader, Render, RunSource, batch_reader
from ip_jax.evals import leak_grid
from ip_jax.lab.base_model import load_base, load_tokenizer, stop_ids
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import decided
from ip_jax.lab.observer import UNWATCHED, Watch, observer_of
from ip_jax.lab.supervised import plan, programs
from ip_jax.lab.supervised.plan import Run, Supervised, Sweep
from ip_jax.lab.trained import write_run
from ip_jax.models import hub
from ip_jax.models.decoder import params_of
from ip_jax.prompts.chat import default_system_text
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.training import checkpoint, hosts, loop
from ip_jax.training.meter import Compilations, Meter, peak_memory, step_size
from ip_jax.training.profile import traced_steps
from ip_jax.training.results import MetricsLog, claim_folder, digest, write_binary, write_json
from ip_jax.training.sft import decoder_states
from ip_jax.training.sharding import base_shardings, batch_sharding, make_mesh, mesh_for, mesh_sizes
from ip_jax.training.state import Batch, TrainState
from ip_jax.training.stopping import heed

__all__ = ["Supervised", "run_supervised"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An experiment that has passed every check that needs no weights, and owns its folder."""

    runs: list[Run]
    sources: dict[str, RunSource]  # by the run's name
    dropped: list[int]  # indices of examples that are too long
    render: Render
    mesh: dict[str, int]  # devices of each axis
    starts: dict[str, plan.Start]  # by the arm's name


@dataclasses.dataclass(frozen=True)
class Session:
    """What one call of `run_supervised` works with. The model's weights lie on the mesh."""

    experiment: Supervised
    folder: epath.Path
    display: Display
    prepared: Prepared
    model: hub.Pretrained
    mesh: Mesh
    watch: Watch
    compilations: Compilations


def run_supervised(
    experiment: Supervised, folder: epath.Path, display: Display, watch: Watch = UNWATCHED
) -> None:
    """Trains and evaluates what is not complete yet in `folder`, then merges the transcripts.
    `watch`: what to observe besides.

    Raises ValueError or OSError, each with one sentence, for everything that can be checked before
    the model is loaded.
    """
    with Compilations() as compilations:
        _run(experiment, folder, display, watch, compilations)


def _run(
    experiment: Supervised,
    folder: epath.Path,
    display: Display,
    watch: Watch,
    compilations: Compilations,
) -> None:
    started, experiment = (
        time.monotonic(),
        dataclasses.replace(experiment, model=decided(experiment.model)),
    )
    prepared = prepare(experiment, folder)
    left = hosts.by_first(lambda: [run for run in prepared.runs if not run.is_complete(folder)])
    untrained = hosts.by_first(
        lambda: plan.incomplete(folder, plan.untrained_sweeps(experiment, folder))
    )
    if left or untrained:
        session = Session(
            experiment,
            folder,
            display,
            prepared,
            *_load(experiment, display, prepared),
            watch,
            compilations,
        )
        fit = plan.runs_that_fit(experiment.sft, experiment.model, session.model, session.mesh)
        groups = hosts.by_first(lambda: plan.groups_of(folder, prepared.runs, fit))
        for sweep in untrained:
            _evaluate_untrained(session, sweep, runs=len(groups[0]) if groups else 1)
        if len(groups) > 1:
            named = "; ".join(", ".join(run.name for run in group) for group in groups)
            cut = experiment.sft.train == "lora" and fit < len(left)
            held = (
                f" (sft.memory_gb {experiment.sft.memory_gb:g} holds {fit} at once; fewer"
                " --sft.tokens-per-micro-batch or more --sft.remat may hold more)"
            )
            display.console.print(
                f"{sum(map(len, groups))} runs are trained as {len(groups)} programs:"
                f" {named}{held if cut else ''}"
            )
        for group in groups:
            _train_group(session, group)
    else:
        display.console.print("every run is complete: nothing to train or evaluate")
    hosts.by_first(lambda: _finish(folder))
    if left or untrained:
        hosts.by_first(lambda: _write_environment(session, time.monotonic() - started))


def _finish(folder: epath.Path) -> None:
    """Clears the checkpoints of complete programs away and merges the transcripts."""
    for checkpoints, begun in plan.begun_programs(folder):
        if all((folder / "runs" / name / "run.json").exists() for name in begun):
            checkpoints.rmtree()
    write_binary(
        folder / "transcripts.parquet",
        leak_grid.parquet_writer(leak_grid.merge_parts(folder / "transcripts")),
    )


def prepare(experiment: Supervised, folder: epath.Path) -> Prepared:
    """Every check that needs no weights, then the claim on the folder. Raises ValueError or
    OSError, with one sentence.
    """
    tokenizer = load_tokenizer(experiment.model)
    fingerprint = hub.fingerprint(experiment.model.name, experiment.model.revision)
    config = hub.load_config(experiment.model.name, experiment.model.revision)
    plan.check_training(experiment.sft, experiment.model, experiment.arms, config)
    plan.check_evaluations(experiment, tokenizer)
    mesh = mesh_sizes(experiment.mesh, jax.devices(), config.n_heads)
    program = programs.Program(make_mesh(**mesh), config, experiment.sft, experiment.model)
    programs.attention_kernel(program)  # both refuse what cannot be
    programs.with_experts(program.mesh, config, experiment.model)
    render = plan.renderer_of(experiment, tokenizer)
    sources, dropped = plan.training_sources(experiment, render)
    starts = plan.starts_of(experiment)
    ends = tokenizer.convert_ids_to_tokens(list(stop_ids(experiment.model, tokenizer)))
    record = plan.folder_record(
        experiment, fingerprint, dropped, starts, default_system_text(tokenizer), ends
    )
    runs = plan.runs_of(experiment, record["identity"], starts)
    keys = {run.name: run.key for run in runs}
    hosts.check_alike(
        digest([os.fspath(folder), record["identity"], keys]), "config, model or data"
    )
    hosts.by_first(lambda: claim_folder(folder, record, keys))
    return Prepared(
        runs, {source.name: source for source in sources}, dropped, render, mesh, starts
    )


def _load(
    experiment: Supervised, display: Display, prepared: Prepared
) -> tuple[hub.Pretrained, Mesh]:
    mesh = make_mesh(**prepared.mesh)
    with display.console.status(f"loading {experiment.model.name}"):
        return load_base(experiment.model, mesh), mesh


def _train_group(session: Session, group: Sequence[Run]) -> None:
    """Trains the runs of `group` as one program from wherever it stopped, and records each as
    complete.
    """
    session = dataclasses.replace(session, mesh=mesh_for(session.mesh, len(group)))
    experiment, folder, display, model = (
        session.experiment,
        session.folder,
        session.display,
        session.model,
    )
    sft = experiment.sft
    origin = {"runs": {run.name: run.key for run in group}, "model": model.fingerprint}
    program = digest(origin)
    checkpoints = checkpoint.open_checkpoints(folder / "checkpoints" / program, origin)
    graphdef, state, frozen = _initial(
        session,
        [run.seed for run in group],
        [session.prepared.starts.get(run.arm.name) for run in group],
    )
    state = checkpoints.restore_latest(state) or state
    first = int(state.step)
    if first:
        display.console.print(f"going on from the checkpoint of step {first}")
    logs = (
        [MetricsLog(folder / "runs" / run.name / "metrics.jsonl", first) for run in group]
        if hosts.is_first()
        else []
    )
    active = sft.schedule.last_active_step(sft.steps)
    eval_steps = tuple(
        s for s in sorted({*experiment.full_steps, *experiment.evaluation.neutral_steps}) if s > 0
    )
    reader = _reader(session, group)
    traced = (
        traced_steps([reader.shapes] * active, first, active, eval_steps)
        if session.watch.profile
        else range(0)
    )
    configs = {
        run.name: {**experiment.shared, "arm": run.arm.name, "seed": run.seed} for run in group
    }
    observer = observer_of(session.watch, folder, program, configs, traced, display.console)
    meter = Meter(session.mesh.devices.flatten().tolist(), session.compilations)

    def evaluate(state: TrainState, step: int):
        sweeps = hosts.by_first(
            lambda: plan.incomplete(folder, plan.sweeps_of_step(experiment, group, step))
        )
        decoder = (
            functools.partial(sample, graphdef, *_sampled(session, state, frozen))
            if sweeps
            else None
        )
        for sweep in sweeps:
            _evaluate(session, decoder, sweep, f"step {step}")

    with observer, display.phase(f"training {len(group)} runs", active - first, "steps") as advance:

        def on_step(step: int, metrics: dict, facts: dict):
            observer.end(step, metrics, meter.ended(step), display.console)
            losses = " ".join(
                f"{run.name} {loss:.3f}" for run, loss in zip(group, metrics["loss"], strict=True)
            )
            advance(1, f"{losses}, {meter.rates()}")

        run_step = observer.around(_step_of(session, reader, (graphdef, state, frozen), meter))
        options = loop.LoopOptions(active, eval_steps, sft.checkpoint_every)
        state = loop.train(
            state,
            run_step,
            logs,
            checkpoints,
            options,
            loop.Hooks(evaluate, on_step, observer.save),
        )
    if meter.rows:
        display.console.print(f"trained: {meter.summary()}", highlight=False, soft_wrap=True)
    learned, alive = hosts.fetch((_learned(session, state, frozen), state.alive))
    for r, run in enumerate(group):
        hosts.by_first(
            functools.partial(
                _record_run,
                session,
                run,
                learned if sft.train == "full" else {k: v[r] for k, v in learned.items()},
                alive[r],
            )
        )


def _program(session: Session) -> programs.Program:
    return programs.Program(
        session.mesh, session.model.config, session.experiment.sft, session.experiment.model
    )


def _initial(
    session: Session, seeds: Sequence[int], starts: Sequence[plan.Start | None] = ()
) -> tuple:
    """(graphdef, state at step 0, frozen weights) of a program's runs, all on the mesh (see
    `programs.initial_state`).
    """
    adapters = [start and start.adapter for start in starts]
    graphdef, state, frozen = programs.initial_state(
        _program(session), session.model.params, seeds, adapters
    )
    return graphdef, state, jax.device_put(frozen, base_shardings(session.mesh, frozen))


def _reader(session: Session, group: Sequence[Run]) -> BatchReader:
    sft, sources = session.experiment.sft, [session.prepared.sources[run.name] for run in group]
    steps, rules = sft.schedule.last_active_step(sft.steps), programs.row_rules(_program(session))
    return batch_reader(
        sources, session.prepared.render, sft.batch_size, steps, sft.tokens_per_micro_batch, rules
    )


def _step_of(session: Session, reader: BatchReader, initial: tuple, meter: Meter) -> loop.RunStep:
    """Reads a step's batch and runs the compiled step on it. `initial`: what `_initial` returns."""
    sft, config = session.experiment.sft, session.model.config
    rows, lora, (graphdef, state, frozen) = (
        batch_sharding(session.mesh),
        None if sft.train == "full" else sft.lora,
        initial,
    )
    compiled = programs.train_step(_program(session), graphdef, state, frozen, reader.shared)

    def run_step(state: TrainState, step: int):
        begun = meter.mark()
        packed, density = reader(step)
        size = step_size(config, lora, packed)
        facts = {"tokens": size.tokens, "real_over_padded": round(density, 4)}
        meter.begun(begun, size)
        return (
            *compiled(
                state, frozen, hosts.place(tuple(Batch(**arrays) for arrays in packed), rows)
            ),
            facts,
        )

    return run_step


def _evaluate_untrained(session: Session, sweep: Sweep, runs: int) -> None:
    """The untrained model is any run at step 0, where B is zero: `runs` of them share the work,
    with the sampling program of the trained ones.
    """
    session = dataclasses.replace(session, mesh=mesh_for(session.mesh, runs))
    graphdef, state, frozen = _initial(session, [0] * runs)
    adapters, weights = _sampled(session, state, frozen)

    def sample_alike(
        queues: list[list[Request]], options: SamplerOptions, on_progress
    ) -> list[list]:
        """Deals the requests to the runs, so that all have prompts of like lengths, and puts the
        answers back into their places.
        """
        places = [(cell, i) for cell, queue in enumerate(queues) for i in range(len(queue))]
        by_length = sorted(places, key=lambda place: len(queues[place[0]][place[1]].prompt_ids))
        hands = [by_length[run::runs] for run in range(runs)]
        answers = sample(
            graphdef,
            adapters,
            weights,
            [[queues[cell][i] for cell, i in hand] for hand in hands],
            options,
            on_progress,
        )
        found = {
            place: answer
            for hand, of_hand in zip(hands, answers, strict=True)
            for place, answer in zip(hand, of_hand, strict=True)
        }
        return [[found[cell, i] for i in range(len(queue))] for cell, queue in enumerate(queues)]

    _evaluate(session, sample_alike, sweep, "the untrained model")


def _evaluate(session: Session, sample_queues: Callable, sweep: Sweep, what: str) -> None:
    """Samples a sweep, judges it and writes its part files. `sample_queues`: `sample` with its
    decoder given.
    """
    experiment, tokenizer = session.experiment, session.model.tokenizer
    room = plan.sampling_room(experiment, next(cell for cell in sweep if cell).eval_set, tokenizer)
    options = programs.sampler_options(
        session.mesh,
        session.model.config,
        experiment.model,
        experiment.evaluation,
        stop_ids(experiment.model, tokenizer),
        room,
    )
    queues = [plan.requests_of(experiment, cell, tokenizer) if cell else [] for cell in sweep]
    cells = [cell for cell in sweep if cell]
    name = (
        f"evaluating {what}, {cells[0].eval_set} under"
        f" {' / '.join(dict.fromkeys(cell.eval_prompt for cell in cells))}"
    )
    with session.display.phase(name, sum(map(len, queues)), "completions") as advance:

        def on_progress(done: int, _: int):
            advance(to=done)
            heed()

        completions = sample_queues(queues, options, on_progress)

    def record():
        for cell, answers in zip(sweep, completions, strict=True):
            if cell:
                examples = plan.examples_of(experiment, cell)
                rows = leak_grid.rows_of(
                    experiment.name,
                    cell,
                    examples,
                    [answer for (answer,) in answers],
                    tokenizer,
                    experiment.columns,
                )
                texts = [row["completion"] for row in rows]
                verdicts = leak_grid.scored_all(experiment.scorer, examples, texts)
                rows = [row | verdict for row, verdict in zip(rows, verdicts, strict=True)]
                write_binary(
                    session.folder / "transcripts" / cell.part,
                    leak_grid.parquet_writer(leak_grid.table_of(rows)),
                )

    hosts.by_first(record)


def _sampled(session: Session, state: TrainState, frozen) -> tuple:
    """(adapters, weights) of the runs as they are sampled from, on the mesh. A jitted function
    would return frozen weights as a copy.
    """
    split = functools.partial(decoder_states, options=programs.step_options(_program(session)))
    return (jax.jit(split) if session.experiment.sft.train == "full" else split)(
        state.trained, frozen
    )


def _learned(session: Session, state: TrainState, frozen) -> dict[str, jax.Array]:
    """What the runs' files hold: adapters [R, ...] by target and kind, or with full training all
    weights of the one run by path.
    """
    if session.experiment.sft.train == "full":
        return flatten_dict(params_of(_sampled(session, state, frozen)[1]), sep=".")
    layers = nnx.to_pure_dict(state.trained)["layers"]
    return {
        f"{name}.{kind}": layers[name][f"lora_{kind}"] for name in layers for kind in ("a", "b")
    }


def _record_run(session: Session, run: Run, learned: dict[str, np.ndarray], alive: bool) -> None:
    """The adapter, or all weights, first, run.json last: where it stands, the run is complete."""
    target, sft = session.folder / "runs" / run.name, session.experiment.sft
    about = {
        "arm": run.arm.name,
        "seed": run.seed,
        "key": run.key,
        "steps": sft.steps,
        "dropped_examples": len(session.prepared.dropped),
        "finished_finite": bool(alive),
        "model": session.experiment.model.name,
        "fingerprint": session.model.fingerprint,
    }
    if sft.train == "lora":
        about |= {"lora": dataclasses.asdict(sft.lora)}
    write_run(target, about, learned, "adapter" if sft.train == "lora" else "weights")


def _write_environment(session: Session, seconds: float) -> None:
    """Adds this session to environment.json."""
    packages = (
        "ip_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "tokenizers",
        "grain",
        "numpy",
    )
    path, model = session.folder / "environment.json", session.experiment.model
    sessions = json.loads(path.read_text())["sessions"] if path.exists() else []
    sessions.append(
        {
            "seconds": round(seconds, 1),
            "devices": [d.device_kind for d in jax.devices()],
            "processes": jax.process_count(),
            "compiled": dataclasses.asdict(session.compilations.so_far),
            "peak_memory_bytes": peak_memory(),
            "weights": model.weights,
            "activations": model.activations,
            "versions": {name: version(name) for name in packages},
        }
    )
    write_json(path, {"sessions": sessions})
