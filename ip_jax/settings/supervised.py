"""Runs a supervised experiment: arms x seeds over one frozen base, trained as one program, evaluated on the leak grid, resumable.

A setting gives its rows and verdicts; this module decides what is still to be done, checks it, does it and records it.
"""
import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from etils import epath
from flax import nnx
from safetensors.numpy import save as to_safetensors

from ip_jax.data.pipeline import RunSource, batch_reader, fitting_examples
from ip_jax.data.sources import Example
from ip_jax.evals import leak_grid
from ip_jax.evals.leak_grid import Cell, Decoding
from ip_jax.models import hub
from ip_jax.models.decoder import split_decoder
from ip_jax.models.lora import init_lora, projection_shapes
from ip_jax.prompts import library
from ip_jax.prompts.chat import end_of_turn_id, render_prompt
from ip_jax.sampling.sampler import SamplerOptions, sample
from ip_jax.settings.display import Display
from ip_jax.settings.experiment import Arm, EvalConfig, ModelConfig, SftConfig, stable_id
from ip_jax.training import checkpoint, loop
from ip_jax.training.results import MetricsLog, claim_folder, digest, write_binary, write_json, write_whole
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import base_shardings, batch_sharding, make_mesh, state_shardings
from ip_jax.training.state import TrainState, init_state

NEUTRAL = "neutral"


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Everything that a setting hands over. `shared` is the JSON of all that is not a list of arms or seeds."""

    name: str
    preset: str
    shared: dict
    model: ModelConfig
    sft: SftConfig
    evaluation: EvalConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    training: Mapping[str, Sequence[Example]]  # data kind -> rows, paired by index
    eval_sets: Mapping[str, Sequence[Example]]
    provenance: str
    verdicts: leak_grid.Verdicts
    verdict_types: Mapping[str, pa.DataType]


@dataclasses.dataclass(frozen=True)
class Run:
    """An arm with a seed. `key` names its definition: a run of another definition is never taken for it."""

    arm: Arm
    seed: int
    key: str

    @property
    def name(self) -> str:
        """Its folder below runs/."""
        return f"{self.arm.name}-s{self.seed}"


def run_supervised(experiment: Supervised, folder: epath.Path, display: Display) -> None:
    """Trains and evaluates what is not complete yet in `folder`, then merges the transcripts.

    Raises ValueError or OSError, each with one sentence, for everything that can be checked before the model is loaded.
    """
    started = time.monotonic()
    tokenizer = hub.load_tokenizer(experiment.model.name, experiment.model.revision)
    runs = [Run(arm, seed, _run_key(experiment, arm, seed)) for arm in experiment.arms for seed in experiment.seeds if arm.train_prompt]
    sources, dropped = fitting_examples(
        [RunSource(run.name, experiment.training[run.arm.data], run.arm.transform, run.seed) for run in runs],
        tokenizer, experiment.sft.max_length, experiment.sft.drop_long,
    ) if runs else ([], 0)
    _check_prompt_lengths(experiment, tokenizer)
    claim_folder(folder, _record(experiment))
    for run in runs:
        _claim_run(folder, run)

    pending = [run for run in runs if not (folder / "runs" / run.name / "run.json").exists()]
    untrained = [cell for cell in _untrained_cells(experiment) if not (folder / "transcripts" / cell.part).exists()]
    if pending or untrained:
        with display.console.status(f"loading {experiment.model.name}"):
            model = hub.load_pretrained(experiment.model.name, jnp.dtype(experiment.model.weights), experiment.model.revision)
        evaluator = Evaluator(experiment, folder, model, display)
        if untrained:
            evaluator([], [untrained], 0)
        groups = _groups(folder, pending, model, experiment)
        if len(groups) > 1:
            display.console.print(f"{len(pending)} runs do not fit in memory_gb together: they are cut into {len(groups)} groups")
        for group in groups:
            own = [source for source in sources if source.name in {run.name for run in group}]
            _train_group(experiment, folder, group, own, dropped, model, evaluator, display)
    else:
        display.console.print("every run is complete: nothing to train or evaluate")
    table = leak_grid.merge_parts(folder / "transcripts")
    write_binary(folder / "transcripts.parquet", leak_grid.parquet_writer(table.to_pylist(), table.schema))
    if pending or untrained:
        _write_environment(folder, time.monotonic() - started)


class Evaluator:
    """Samples and judges cells with one compiled sampler; called with the adapters of a group's runs (none: untrained)."""

    def __init__(self, experiment: Supervised, folder: epath.Path, model: hub.Pretrained, display: Display):
        self.experiment, self.folder, self.model, self.display = experiment, folder, model, display
        self.bare = split_decoder(model.config, model.params)
        evaluation = experiment.evaluation
        self.options = SamplerOptions(
            stop_ids=(end_of_turn_id(model.tokenizer),), slots=evaluation.slots, dtype=experiment.model.activations
        )
        self.decoding = Decoding(evaluation.max_new_tokens, evaluation.temperature, evaluation.top_p)

    def __call__(self, decoder: Sequence, cells: Sequence[Sequence[Cell]], step: int) -> None:
        """`decoder`: (graphdef, lora, base) of R runs, or empty for the untrained model; `cells`: one queue a run."""
        experiment, tokenizer = self.experiment, self.model.tokenizer
        queues = [
            [r for cell in queue for r in leak_grid.requests_for(cell, experiment.eval_sets[cell.eval_set], tokenizer, stable_id, self.decoding)]
            for queue in cells
        ]
        name = f"evaluating step {step}" if decoder else "evaluating the untrained model"
        done = 0
        with self.display.phase(name, sum(map(len, queues)), "completions") as advance:
            def progress(finished: int, _total: int):
                nonlocal done
                advance(finished - done)
                done = finished

            completions = sample(*(decoder or self.bare), queues, self.options, progress)
        table_schema = leak_grid.schema(experiment.verdict_types)
        for queue, answers in zip(cells, completions, strict=True):
            answers = iter(answers)
            for cell in queue:
                examples = experiment.eval_sets[cell.eval_set]
                own = [next(answers)[0] for _ in examples]
                rows = leak_grid.rows_of(experiment.name, cell, examples, own, tokenizer, experiment.verdicts)
                write_binary(self.folder / "transcripts" / cell.part, leak_grid.parquet_writer(rows, table_schema))


def _train_group(experiment, folder, group, sources, dropped, model, evaluator: Evaluator, display: Display) -> None:
    """Trains the runs of `group` as one program from wherever it stopped, and records each as complete."""
    sft, devices = experiment.sft, jax.device_count()
    seeds = jnp.array([run.seed for run in group])
    adapters = init_lora(seeds, model.config, sft.lora)
    graphdef, lora, base = split_decoder(model.config, model.params, adapters, sft.lora)
    state = init_state(lora, jnp.full(len(group), sft.learning_rate), jnp.full(len(group), sft.weight_decay), seeds)
    mesh = make_mesh(data=devices)
    base = jax.device_put(base, base_shardings(mesh, base))
    state = jax.device_put(state, state_shardings(mesh, state))
    options = SftOptions(sft.schedule, sft.lora.dropout, sft.max_grad_norm, experiment.model.activations, sft.remat)
    active = sft.schedule.last_active_step(sft.steps)
    reader = batch_reader(sources, model.tokenizer, sft.batch_size, active, sft.tokens_per_micro_batch)
    origin = {"runs": {run.name: run.key for run in group}, "model": model.fingerprint}
    checkpoints = checkpoint.open_checkpoints(folder / "checkpoints" / digest(origin))
    state = checkpoint.restore_latest(checkpoints, state, origin) or state
    first = int(state.step)
    if first:
        display.console.print(f"going on from the checkpoint of step {first}")
    logs = [MetricsLog(folder / "runs" / run.name / "metrics.jsonl", first) for run in group]
    started, seen = time.monotonic(), 0

    with display.phase(f"training {len(group)} runs", sft.steps - first, "steps") as advance:
        def on_step(step: int, metrics: dict, density: float, tokens: int):
            nonlocal seen
            seen += tokens
            losses = " ".join(f"{run.name} {loss:.3f}" for run, loss in zip(group, metrics["loss"], strict=True))
            advance(1, f"{losses}, {seen / (time.monotonic() - started):.0f} tokens/s, {density:.0%} real")

        hooks = loop.Hooks(evaluate=functools.partial(_evaluate_step, experiment, folder, group, graphdef, base, evaluator), on_step=on_step)
        step_fn = compile_sft_step(graphdef, options)
        eval_steps = tuple(s for s in sorted({*experiment.evaluation.full_steps, *experiment.evaluation.neutral_steps}) if s > 0)
        loop_options = loop.LoopOptions(sft.steps, active, eval_steps, sft.checkpoint_every)
        state = loop.train(state, base, step_fn, reader, logs, checkpoints, origin, loop_options, hooks, batch_sharding(mesh))
    checkpoints.close()
    for r, run in enumerate(group):
        _record_run(folder, run, r, state, model, experiment, dropped)
    (folder / "checkpoints" / digest(origin)).rmtree()


def _evaluate_step(experiment, folder, group, graphdef, base, evaluator: Evaluator, state: TrainState, step: int) -> None:
    """Evaluates the cells of a step that are not on the disk yet, one sweep for each set and prompt slot."""
    for sweep in _sweeps(experiment, group, step):
        missing = [[cell for cell in queue if not (folder / "transcripts" / cell.part).exists()] for queue in sweep]
        if any(missing):
            evaluator((graphdef, state.lora, base), missing, step)


def _sweeps(experiment: Supervised, group: Sequence[Run], step: int) -> list[list[list[Cell]]]:
    """Cells of a step as sweeps: each holds one queue (of at most one cell) for every run, so that all runs decode together."""
    full = step in experiment.evaluation.full_steps
    prompts = [_eval_prompts(run.arm) if full else [NEUTRAL] for run in group]
    sweeps = []
    for eval_set in experiment.eval_sets:
        for slot in range(max(map(len, prompts))):
            sweeps.append([
                [_cell(experiment, run, step, eval_set, prompt) for prompt in names[slot : slot + 1]] for run, names in zip(group, prompts, strict=True)
            ])
    return sweeps


def _eval_prompts(arm: Arm) -> list[str]:
    """Neutral, the arm's own training prompt put back, and what else the arm asks for."""
    return list(dict.fromkeys([NEUTRAL, arm.train_prompt, *arm.also_evaluated_under]))


def _cell(experiment: Supervised, run: Run, step: int, eval_set: str, prompt: str) -> Cell:
    own = prompt == run.arm.train_prompt
    transform = run.arm.transform if own else library.get(prompt).transform
    return Cell(run.arm.name, run.seed, step, step * experiment.sft.batch_size, eval_set, prompt, own, transform)


def _untrained_cells(experiment: Supervised) -> list[Cell]:
    """The untrained model under every prompt that some arm is evaluated under; once for greedy decoding, else for every seed."""
    arms = [arm for arm in experiment.arms if arm.train_prompt is None]
    prompts: dict[str, Any] = {NEUTRAL: library.get(NEUTRAL).transform}
    for arm in experiment.arms:
        if arm.train_prompt is not None:
            prompts |= {name: library.get(name).transform for name in arm.also_evaluated_under} | {arm.train_prompt: arm.transform}
    seeds = experiment.seeds if experiment.evaluation.temperature > 0 else experiment.seeds[:1]
    return [
        Cell(arm.name, seed, 0, 0, eval_set, name, False, transform)
        for arm in arms for seed in seeds for eval_set in experiment.eval_sets for name, transform in prompts.items()
    ]


def _check_prompt_lengths(experiment: Supervised, tokenizer) -> None:
    """Renders the longest evaluation prompts once, so that a template's or a slot's refusal comes before the model is loaded."""
    limit = SamplerOptions(stop_ids=()).prompt_buckets[-1]
    for arm in experiment.arms:
        if arm.train_prompt is None:
            continue
        for eval_set, examples in experiment.eval_sets.items():
            example = max(examples, key=lambda e: len(e["messages"][0]["content"]))
            cell = Cell(arm.name, 0, 0, 0, eval_set, arm.train_prompt, True, arm.transform)
            length = len(render_prompt(tokenizer, leak_grid.prompted(example, cell)["messages"]))
            if length > limit:
                raise ValueError(f"the prompt of {example['id']} in {eval_set} has {length} tokens under arm {arm.name}: at most {limit} are allowed")


def _groups(folder: epath.Path, pending: Sequence[Run], model: hub.Pretrained, experiment: Supervised) -> list[list[Run]]:
    """Pending runs as programs: what was begun together goes on together, the rest is cut by the memory estimate."""
    pending, groups = list(pending), []
    for origin_file in sorted(folder.glob("checkpoints/*/*/origin/metadata")):
        begun = set(json.loads(origin_file.read_text())["runs"].items())
        group = [run for run in pending if (run.name, run.key) in begun]
        if len(group) == len(begun):
            groups.append(group)
            pending = [run for run in pending if run not in group]
    fit = runs_that_fit(experiment.sft, model)
    return groups + [pending[i : i + fit] for i in range(0, len(pending), fit)]


def runs_that_fit(sft: SftConfig, model: hub.Pretrained) -> int:
    """How many runs one program can hold in `memory_gb`: base + micro-batch activations + R times (adapter, gradient, sum, Adam).

    An estimate: activations are counted as 24 float32 values per token, layer and model or hidden dimension that is kept for the backward pass.
    """
    config = model.config
    base = sum(a.nbytes for a in jax.tree.leaves(model.params))
    shapes = projection_shapes(config)
    adapter = 4 * sft.lora.rank * config.n_layers * sum(sum(shapes[target]) for target in sft.lora.targets)
    per_token = 4 * config.n_layers * (10 * config.d_model + 5 * config.d_ff)
    activations = sft.tokens_per_micro_batch * (4 * 24 * config.d_model if sft.remat else per_token)
    return max(1, int((sft.memory_gb * 1e9 - base - activations) / (6 * adapter)))


def _record_run(folder, run: Run, r: int, state: TrainState, model, experiment: Supervised, dropped: int) -> None:
    """The adapter first, run.json last: where it stands, the run is complete."""
    layers = nnx.to_pure_dict(state.lora)["layers"]
    arrays = {f"{name}.{kind}": np.asarray(layers[name][f"lora_{kind}"][r]) for name in layers for kind in ("a", "b")}
    target = folder / "runs" / run.name
    lora = experiment.sft.lora
    metadata = {"model": experiment.model.name, "fingerprint": model.fingerprint, "rank": str(lora.rank), "scale": str(lora.scale)}
    write_whole(target / "adapter.safetensors", to_safetensors(arrays, metadata))
    write_json(target / "run.json", {
        "arm": run.arm.name, "seed": run.seed, "key": run.key, "steps": experiment.sft.steps, "dropped_examples": dropped,
        "finished_finite": bool(state.alive[r]), "model": experiment.model.name, "fingerprint": model.fingerprint,
    })


def _run_key(experiment: Supervised, arm: Arm, seed: int) -> str:
    texts = {name: library.get(name).text for name in arm.also_evaluated_under}
    own = arm.text if arm.text is not None else library.get(arm.train_prompt).text
    return digest({"shared": experiment.shared, "train_prompt": own, "data": arm.data, "seed": seed, "also": texts})


def _claim_run(folder: epath.Path, run: Run) -> None:
    """Marks the run's folder with its key, or checks that it is this run's."""
    path = folder / "runs" / run.name / "key.json"
    if path.exists() and json.loads(path.read_text())["key"] != run.key:
        raise ValueError(f"run {run.name} in {folder} was made with another definition of its arm: choose another folder with --out")
    if not path.exists():
        write_json(path, {"key": run.key})


def _record(experiment: Supervised) -> dict:
    arms = {arm.name: {"label": arm.label, "train_prompt": arm.train_prompt, "data": arm.data} for arm in experiment.arms}
    return {
        "experiment": experiment.name, "preset": experiment.preset, "identity": digest(experiment.shared), "config": experiment.shared,
        "arms": arms, "seeds": list(experiment.seeds), "provenance": experiment.provenance,
    }


def _write_environment(folder: epath.Path, seconds: float) -> None:
    from importlib.metadata import version

    packages = ("ip_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "grain", "numpy")
    path = folder / "environment.json"
    sessions = json.loads(path.read_text())["sessions"] if path.exists() else []
    sessions.append({
        "seconds": round(seconds, 1), "devices": [str(d.device_kind) for d in jax.devices()], "processes": jax.process_count(),
        "versions": {name: version(name) for name in packages},
    })
    write_json(path, {"sessions": sessions})
