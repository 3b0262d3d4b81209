"""Runs a text experiment in reinforcement learning: arms x seeds over one frozen base, one program
for each algorithm, resumable to the bit.

One iteration: roll out (or replay) -> grade -> score -> advantages and gate -> record -> update,
each a short function elsewhere: `rl.rollout`, `lab.reinforced.grading`, `rl.policy`, `rl.batch`,
`lab.reinforced.records`, `rl.step`. With several processes, what depends on the folder is
decided, and what is recorded is written, by the first one.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ip_jax.evals import leak_grid
from ip_jax.lab.base_model import load_base, load_tokenizer, stop_ids
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import decided
from ip_jax.lab.live_table import ArmRow, live_arms, over_seeds
from ip_jax.lab.observer import UNWATCHED, Watch, observer_of
from ip_jax.lab.reinforced import plan, programs, tables
from ip_jax.lab.reinforced.gate_reference import reference_scoring
from ip_jax.lab.reinforced.grading import TooManyFailures, check_failures
from ip_jax.lab.reinforced.measuring import measuring_couplings
from ip_jax.lab.reinforced.plan import Reinforced
from ip_jax.lab.reinforced.records import (
    Grader,
    Recorded,
    part_path,
    read_iteration,
    roll_out,
    write_iteration,
)
from ip_jax.lab.supervised.plan import Run, Sweep, begun_programs, incomplete
from ip_jax.lab.supervised.programs import layers_fit_whole, with_experts
from ip_jax.lab.supervised.programs import sampler_options as eval_sampler_options
from ip_jax.lab.trained import write_run
from ip_jax.models import hub
from ip_jax.models.decoder import split_decoder
from ip_jax.models.lora import check_targets
from ip_jax.models.quantised import check_quantisable
from ip_jax.prompts.chat import default_system_text
from ip_jax.rl.advantages import update_moving_mean
from ip_jax.rl.algorithm import Algorithm, passes_needed
from ip_jax.rl.batch import Rollout, make_batch, rows_to_score
from ip_jax.rl.diagnostics import sample_metrics
from ip_jax.rl.estimators import WARNINGS
from ip_jax.rl.guards import accepts_nothing, collapses
from ip_jax.rl.rollout import RolloutPlan, generate, sampler_options
from ip_jax.rl.rows import to_samples
from ip_jax.rl.step import RlBatch
from ip_jax.sampling.sampler import sample
from ip_jax.training import checkpoint, hosts, loop
from ip_jax.training.meter import peak_memory
from ip_jax.training.profile import traced_steps
from ip_jax.training.results import MetricsLog, claim_folder, digest, write_binary
from ip_jax.training.sharding import (
    base_shardings,
    make_mesh,
    mesh_for,
    mesh_sizes,
)
from ip_jax.training.state import TrainState

__all__ = ["Reinforced", "run_reinforced"]


@dataclasses.dataclass(frozen=True)
class Session:
    """What one call of `run_reinforced` works with. The model's weights lie on the mesh; `room`:
    (prompt tokens, new tokens) of an evaluation.
    """

    experiment: Reinforced
    folder: epath.Path
    display: Display
    model: hub.Pretrained
    mesh: Mesh
    room: tuple[int, int]
    watch: Watch


@dataclasses.dataclass(frozen=True)
class Program:
    """Runs of one algorithm, their rollouts, and the decoders. `records`: where its rollouts are
    kept.
    """

    runs: tuple[Run, ...]
    kind: programs.Kind
    rollouts: RolloutPlan
    records: epath.Path
    decoders: programs.Decoders


def run_reinforced(
    experiment: Reinforced, folder: epath.Path, display: Display, watch: Watch = UNWATCHED
) -> None:
    """Trains and evaluates what is not complete yet in `folder`, then writes its tables. `watch`:
    what to observe besides.

    Raises ValueError or OSError, each with one sentence, for everything that can be checked before
    the model is loaded.
    """
    experiment = dataclasses.replace(experiment, model=decided(experiment.model))
    runs, mesh, room = prepare(experiment, folder)
    groups = hosts.by_first(lambda: plan.programs_of(folder, runs, experiment.rl.runs_per_program))
    untrained = hosts.by_first(lambda: incomplete(folder, plan.untrained_sweeps(experiment)))
    if groups or untrained:
        with display.console.status(f"loading {experiment.model.name}"):
            model = load_base(experiment.model, mesh)
        session = Session(experiment, folder, display, model, mesh, room, watch)
        listed = "; ".join(", ".join(run.name for run in group) for group in groups) or "nothing"
        display.console.print(
            f"to train, one program for each algorithm: {listed}", highlight=False
        )
        if max(map(len, groups), default=0) > experiment.rl.runs_per_program:
            display.console.print(
                "what was begun as one program goes on as one, of more runs than"
                " rl.runs_per_program: with another --out it is cut"
            )
        if untrained:
            alone = dataclasses.replace(session, mesh=mesh_for(mesh, 1))
            graphdef, adapters, weights = split_decoder(
                with_experts(alone.mesh, model.config, experiment.model), model.params
            )
            weights = jax.device_put(weights, base_shardings(alone.mesh, weights))
            for sweep in untrained:
                _evaluate(alone, functools.partial(sample, graphdef, adapters, weights), sweep)
        with live_arms(display.console, every=1) as show:
            for group in groups:
                _train(session, group, show)
    else:
        display.console.print("every run is complete: nothing to train or evaluate")
    hosts.by_first(lambda: _finish(experiment, folder, runs))


def prepare(experiment: Reinforced, folder: epath.Path) -> tuple[list[Run], Mesh, tuple[int, int]]:
    """(runs, mesh, room of an evaluation): every check that needs no weights, then the claim on the
    folder.
    """
    model = experiment.model
    tokenizer, config = load_tokenizer(model), hub.load_config(model.name, model.revision)
    plan.check(experiment)
    check_targets(config, experiment.rl.lora)
    if model.quantised:
        check_quantisable(model.quantised, config)
    mesh = make_mesh(**mesh_sizes(experiment.mesh, jax.devices(), config.n_heads))
    programs.attention_kernel(mesh, config, model, experiment.rl)  # both refuse what cannot be
    with_experts(mesh, config, model)
    record = plan.folder_record(
        experiment,
        hub.fingerprint(model.name, model.revision),
        default_system_text(tokenizer),
        tokenizer.convert_ids_to_tokens(list(stop_ids(model, tokenizer))),
    )
    runs = plan.runs_of(experiment, record["identity"])
    # renders everything once: what does not fit is refused here
    plan.rollout_plan(experiment, runs, tokenizer)
    room = plan.evaluation_room(experiment, runs, tokenizer)
    keys = {run.name: run.key for run in runs}
    hosts.check_alike(digest([str(folder), record["identity"], keys]), "config, model or data")
    hosts.by_first(lambda: claim_folder(folder, record, keys))
    return runs, mesh, room


def _finish(experiment: Reinforced, folder: epath.Path, runs: Sequence[Run]) -> None:
    """Clears the checkpoints of complete programs away and writes the tables."""
    for checkpoints, begun in begun_programs(folder):
        if all((folder / "runs" / name / "run.json").exists() for name in begun):
            checkpoints.rmtree()
    tables.write_tables(experiment, folder, runs)


def _train(session: Session, group: Sequence[Run], show: Callable[[list[ArmRow]], None]) -> None:
    """Trains the runs of `group` as one program from wherever it stopped, and records each as
    complete.
    """
    experiment, folder, console = session.experiment, session.folder, session.display.console
    iterations = experiment.rl.iterations
    session = dataclasses.replace(session, mesh=mesh_for(session.mesh, len(group)))
    if group[0].arm.algorithm.estimator.name in WARNINGS:
        console.print(f"warning: {WARNINGS[group[0].arm.algorithm.estimator.name]}")
    origin = {"runs": {run.name: run.key for run in group}, "model": session.model.fingerprint}
    checkpoints = checkpoint.open_checkpoints(folder / "checkpoints" / digest(origin), origin)
    program, fresh = _program(session, group, digest(origin))
    state = checkpoints.restore_latest(fresh()) or fresh()
    first = int(state.step)
    if first:
        console.print(f"going on from the checkpoint of iteration {first}")
    logs = (
        [MetricsLog(folder / "runs" / run.name / "metrics.jsonl", first) for run in group]
        if hosts.is_first()
        else []
    )
    eval_steps = tuple(sorted({*experiment.evaluation.steps, iterations}))
    configs = {
        run.name: {**plan.config_of(experiment), "arm": run.arm.name, "seed": run.seed}
        for run in group
    }
    # there more is measured
    traced = traced_steps(
        [step in eval_steps for step in range(iterations)], first, iterations, eval_steps
    )
    observer = observer_of(session.watch, folder, digest(origin), configs, traced, console)
    past, clock, answers_for = (
        hosts.by_first(lambda: [list(log.rows) for log in logs]),
        {},
        plan.untrained_seeds(experiment),
    )

    def evaluate(state: TrainState, step: int):
        all_sweeps = plan.sweeps_of(experiment, [(run.arm, run.seed) for run in group], step)
        for sweep in hosts.by_first(lambda: incomplete(folder, all_sweeps)):
            _evaluate(
                session,
                functools.partial(
                    sample, program.decoders.policy, state.trained, program.decoders.frozen
                ),
                sweep,
            )
        if observer.wandb:
            begun = plan.sweeps_of(experiment, [(None, answers_for[run.seed]) for run in group], 0)[
                :1
            ]
            hosts.by_first(
                lambda: observer.evaluated(
                    step, tables.evaluation_rates(folder, all_sweeps or begun)
                )
            )

    def on_step(step: int, metrics: dict, _: dict):
        seconds = clock.pop(step)
        observer.end(step, metrics, seconds, console)
        show(_live_rows(group, metrics, seconds, step, iterations))

    options = loop.LoopOptions(iterations, eval_steps, experiment.rl.checkpoint_every)
    step = observer.around(_iteration(session, program, fresh, past, clock))
    with observer:
        state = loop.train(
            state, step, logs, checkpoints, options, loop.Hooks(evaluate, on_step, observer.save)
        )
    layers, alive = hosts.fetch((nnx.to_pure_dict(state.trained)["layers"], state.alive))
    learned = {
        f"{name}.{kind}": layers[name][f"lora_{kind}"] for name in layers for kind in ("a", "b")
    }
    for r, run in enumerate(group):
        about = {
            "arm": run.arm.name,
            "seed": run.seed,
            "key": run.key,
            "steps": iterations,
            "finished_finite": bool(alive[r]),
            "model": experiment.model.name,
            "fingerprint": session.model.fingerprint,
            "lora": dataclasses.asdict(experiment.rl.lora),
        }
        hosts.by_first(
            lambda run=run, about=about, r=r: write_run(
                folder / "runs" / run.name, about, {k: v[r] for k, v in learned.items()}, "adapter"
            )
        )


def _program(
    session: Session, group: Sequence[Run], name: str
) -> tuple[Program, Callable[[], TrainState]]:
    """(the program of some runs, a function that gives their state at iteration 0), everything on
    the mesh.
    """
    experiment, model, mesh = session.experiment, session.model, session.mesh
    rl, algorithm = experiment.rl, group[0].arm.algorithm
    kind = programs.Kind(mesh, model.config, rl, experiment.model, algorithm)
    rates = [run.arm.learning_rate or rl.learning_rate for run in group]
    decoders, fresh = programs.decoders(kind, model.params, [run.seed for run in group], rates)

    def placed(weights):
        return jax.device_put(weights, base_shardings(mesh, weights))

    decoders = dataclasses.replace(
        decoders, frozen=placed(decoders.frozen), reference_frozen=placed(decoders.reference_frozen)
    )
    rollouts = plan.rollout_plan(experiment, group, model.tokenizer)
    return (
        Program(tuple(group), kind, rollouts, session.folder / "rollouts" / name, decoders),
        fresh,
    )


def _iteration(
    session: Session,
    program: Program,
    fresh: Callable[[], TrainState],
    past: list[list[dict]],
    clock: dict[int, dict],
) -> loop.RunStep:
    """One iteration of a program as the loop runs it. `past`: the rows that its runs have in
    metrics.jsonl, from which a resumed run knows what came before; `clock` gets the seconds and the
    memory of each iteration, which are no part of the metrics.
    """
    experiment, algorithm, rl, mesh = (
        session.experiment,
        program.kind.algorithm,
        session.experiment.rl,
        program.kind.mesh,
    )
    guided = any(run.guidance > 0 for run in program.rollouts.runs)
    grader = Grader(experiment.environment, rl.grading_workers)
    ends = stop_ids(experiment.model, session.model.tokenizer)
    whole_layers = layers_fit_whole(mesh, program.kind.config, experiment.model)

    def sampling_of(rollouts):
        return sampler_options(
            rollouts, ends, experiment.model.activations, rl.slots, mesh, whole_layers
        )

    sampling, reference_of = (
        sampling_of(program.rollouts),
        reference_scoring(program.rollouts, algorithm.gate, sampling_of),
    )
    decide = jax.jit(functools.partial(make_batch, algorithm=algorithm, layout=program.kind.layout))
    measure = jax.jit(functools.partial(sample_metrics, guided=guided))
    scores_of, update = _scoring(program), _updating(program)
    needed, looks = passes_needed(algorithm), {0, *experiment.evaluation.steps} - {rl.iterations}
    for_llr = {"policy_training", "policy_generation"} if guided else {"policy_training"}
    policy = program.decoders.policy, program.decoders.frozen
    couplings = measuring_couplings(
        program.rollouts,
        looks,
        policy,
        mesh,
        experiment.model.activations,
        rl.remat,
        program.kind.kernel,
    )
    moving = _moving_mean(program, len(past[0]))
    history = [list(rows) for rows in past]

    def run_step(state: TrainState, step: int):
        nonlocal moving
        reason = halting_reason(
            [run.name for run in program.runs], history, algorithm, rl.gate_patience
        )
        if reason:
            raise loop.Halted(reason)
        started, replayed = (
            time.monotonic(),
            hosts.by_first(lambda: part_path(program.records, step).exists()),
        )
        decoder = program.decoders.policy, state.trained, program.decoders.frozen
        with jax.profiler.TraceAnnotation("rollout"):
            recorded = roll_out(
                program.records,
                program.rollouts,
                step,
                grader,
                lambda asked: generate(decoder, program.rollouts, asked, sampling),
            )
        try:
            hosts.by_first(
                lambda: check_failures(
                    recorded.grades, [run.name for run in program.runs], rl.max_failed
                )
            )
        except TooManyFailures as failures:
            raise loop.Halted(
                f"{failures}; what was done so far is saved, and goes on where rl.max_failed is"
                " raised"
            ) from failures
        sampled = time.monotonic()
        rollout = _rollout(program, recorded)
        measured, scores = {}, scores_of(state, rollout, needed)
        # by the state that sampled it; likelihood ratios need the pass at x_t, which few algorithms
        # do
        if step in looks:
            measured, scores = (
                couplings(state.trained, rollout, step),
                scores | scores_of(state, rollout, for_llr - needed),
            )
        reference = reference_of(decoder, recorded.rollout.asked)
        batch, decisions = decide(
            rollout, {name: scores[name] for name in needed}, moving, reference
        )
        recorded = dataclasses.replace(
            recorded,
            advantage=np.asarray(decisions.advantage),
            gate_weight=np.asarray(decisions.gate_weight),
        )
        hosts.by_first(lambda: write_iteration(program.records, program.rollouts, recorded))
        moving = update_moving_mean(moving, rollout.rewards, rollout.valid, jnp.asarray(step))
        if algorithm.selection and algorithm.selection.restart_from_base:
            state = fresh().replace(step=state.step, alive=state.alive)
        with jax.profiler.TraceAnnotation("update"):
            state, metrics = update(state, batch)
            metrics = {name: np.asarray(value) for name, value in hosts.fetch(metrics).items()}
        metrics["clip_fraction"] = metrics.pop("clipped", np.zeros(len(history)))
        metrics |= (
            tables.iteration_metrics(recorded, measure(rollout, decisions, scores)) | measured
        )
        metrics |= {} if reference is None else {"gate_reference": reference}
        for r, rows in enumerate(history):
            rows.append({name: value[r].item() for name, value in metrics.items()})
        tokens = int(rollout.samples.length.sum())
        spent = {"rollout_seconds": sampled - started, "update_seconds": time.monotonic() - sampled}
        clock[step] = {
            "tokens": tokens,
            "replayed": replayed,
            **spent,
            "peak_memory_bytes": peak_memory(),
        }
        return state, metrics, {}

    return run_step


def _rollout(program: Program, recorded: Recorded) -> Rollout:
    """What was recorded as the arrays of an update."""
    sampled, grades, rollouts = recorded.rollout, recorded.grades, program.rollouts
    shape = grades.reward.shape
    return Rollout(
        sampled.samples,
        rollouts.prompts(sampled.asked, "gen"),
        rollouts.prompts(sampled.asked, "train"),
        np.array([run.temperature for run in rollouts.runs], np.float32),
        grades.reward,
        grades.valid,
        tables.labels_of(grades),
        plan.uniforms_of([run.seed for run in program.runs], sampled.asked.iteration, *shape[1:]),
    )


def _scoring(program: Program) -> Callable[[TrainState, Rollout, Set[str]], dict[str, np.ndarray]]:
    """(state, rollout, names of `algorithm.passes_needed`) -> these passes without a gradient, [R,
    Q, G, C] each, in every process.
    """
    kind, decoders = program.kind, program.decoders
    passes = {
        "policy": programs.score_pass(kind, decoders.policy),
        "reference": programs.score_pass(kind, decoders.reference),
    }

    def scores_of(state: TrainState, rollout: Rollout, needed: Set[str]):
        found, shape = {}, rollout.rewards.shape[1:]
        models = {
            "policy": (state.trained, decoders.frozen),
            "reference": ({}, decoders.reference_frozen),
        }
        for name in sorted(needed):
            who, where = name.split("_")
            rows = rows_to_score(
                rollout.training if where == "training" else rollout.generation,
                rollout,
                kind.layout,
            )
            found[name] = hosts.fetch(
                to_samples(
                    passes[who](
                        *models[who], hosts.place(rows, programs.rows_sharding(kind.mesh, rows))
                    ),
                    *shape,
                )
            )
        return found

    return scores_of


def _updating(program: Program) -> Callable[[TrainState, RlBatch], tuple[TrainState, dict]]:
    """The step (state, batch) -> (state, metrics), compiled for each way that rows lie on the
    mesh.
    """
    kind, decoders = program.kind, program.decoders
    steps: dict[NamedSharding, Callable] = {}  # the rows' places are known with the first batch

    def update(state: TrainState, batch: RlBatch):
        places = programs.rows_sharding(kind.mesh, batch)
        if places not in steps:
            steps[places] = programs.update_step(
                kind, decoders.policy, state, decoders.frozen, batch
            )
        return steps[places](state, decoders.frozen, hosts.place(batch, places))

    return update


def _moving_mean(program: Program, first: int) -> jax.Array:
    """The runs' mean rewards before iteration `first`, from the recorded rollouts; only the
    baseline moving_mean looks at them.
    """
    moving = jnp.zeros(len(program.runs))
    for step in range(first if program.kind.algorithm.baseline == "moving_mean" else 0):
        grades = hosts.by_first(
            lambda step=step: read_iteration(
                program.records, program.rollouts, program.rollouts.ask(step)
            )
        ).grades
        moving = update_moving_mean(moving, grades.reward, grades.valid, jnp.asarray(step))
    return moving


def halting_reason(
    names: Sequence[str], history: Sequence[Sequence[dict]], algorithm: Algorithm, patience: int
) -> str | None:
    """Why runs should not go on, one sentence, or None. `history`: for each run the metrics of its
    iterations so far.
    """
    for name, rows in zip(names, history, strict=True):
        shut = accepts_nothing(name, rows, algorithm, patience)
        if shut:
            return (
                f"{shut}: raise rl.gate_patience to go on, or loosen the gate in an arm of another"
                " name"
            )
        collapsed = collapses(name, rows[-1], algorithm) if rows else None
        if collapsed:
            return collapsed
    return None


def _evaluate(session: Session, sample_queues: Callable, sweep: Sweep) -> None:
    """Samples a sweep, judges it and writes its part files. `sample_queues`: `sample` with its
    decoder given.
    """
    experiment, tokenizer = session.experiment, session.model.tokenizer
    cells = [cell for cell in sweep if cell]
    prompts = " / ".join(dict.fromkeys(cell.eval_prompt for cell in cells))
    options = eval_sampler_options(
        session.mesh,
        session.model.config,
        experiment.model,
        experiment.evaluation,
        stop_ids(experiment.model, tokenizer),
        session.room,
    )
    started = time.monotonic()
    completions = sample_queues(
        [plan.requests_of(experiment, cell, tokenizer) if cell else [] for cell in sweep], options
    )
    arms, seconds = ", ".join(dict.fromkeys(cell.arm for cell in cells)), time.monotonic() - started
    session.display.console.print(
        f"evaluated {arms} after {cells[0].step} iterations under {prompts}: {seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    examples = [plan.example_of(experiment, task) for task in experiment.eval_tasks]

    def record():
        for cell, answers in zip(sweep, completions, strict=True):
            if cell:
                rows = leak_grid.rows_of(
                    experiment.name,
                    cell,
                    examples,
                    [answer for (answer,) in answers],
                    tokenizer,
                    experiment.columns,
                )
                verdicts = tables.verdicts_of(
                    experiment, f"{cell.arm}-s{cell.seed}", [row["completion"] for row in rows]
                )
                rows = [row | verdict for row, verdict in zip(rows, verdicts, strict=True)]
                write_binary(
                    session.folder / "transcripts" / cell.part,
                    leak_grid.parquet_writer(leak_grid.table_of(rows)),
                )

    hosts.by_first(record)


def _live_rows(
    group: Sequence[Run], metrics: dict[str, np.ndarray], seconds: dict, step: int, steps: int
) -> list[ArmRow]:
    found = []
    for arm in dict.fromkeys(run.arm for run in group):
        of_arm = [r for r, run in enumerate(group) if run.arm == arm]
        shown = {name: values[of_arm].astype(float) for name, values in metrics.items()}
        if "n_hack" in shown:
            of = shown.get("n_hackable", shown["n"])
            shown["hack"] = np.divide(
                shown["n_hack"], of, out=np.full(len(of), np.nan), where=of > 0
            )
        if "n_correct" in shown:
            shown["correct"] = shown["n_correct"] / shown["n"]
        rates = [
            seconds["tokens"] / max(seconds[f"{what}_seconds"], 1e-9)
            for what in ("rollout", "update")
        ]
        left = (seconds["rollout_seconds"] + seconds["update_seconds"]) * (steps - step - 1)
        found.append(
            ArmRow(
                arm.label,
                len(of_arm),
                step + 1,
                steps,
                over_seeds(shown),
                None if seconds["replayed"] else rates[0],
                rates[1],
                left,
            )
        )
    return found
