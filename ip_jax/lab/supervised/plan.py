"""What a supervised experiment consists of and what of it is still to be done: runs, evaluation
sweeps, programs, checks.

Nothing here needs the model's weights. `supervised` does what this module plans.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ip_jax.data.pipeline import Render, RunSource, fitting_examples, renderer
from ip_jax.data.rows import check_ids
from ip_jax.data.sources import Example
from ip_jax.evals import leak_grid
from ip_jax.evals.leak_grid import Cell, Decoding
from ip_jax.evals.scorers import Scorer
from ip_jax.lab.experiment import (
    NEUTRAL,
    Arm,
    EvalConfig,
    ModelConfig,
    SftConfig,
    check_runs,
    stable_id,
)
from ip_jax.models import hub, peft
from ip_jax.models.activations import kept_bytes, layer_bytes
from ip_jax.models.families import DecoderConfig
from ip_jax.models.lora import check_targets, projection_shapes
from ip_jax.models.quantised import check_quantisable, item_bytes
from ip_jax.prompts.chat import render_prompt
from ip_jax.prompts.prompt import Prompt
from ip_jax.prompts.transforms import Selective, Transform
from ip_jax.sampling.sampler import Request
from ip_jax.training.losses import CHUNK_ROWS
from ip_jax.training.results import digest, write_json
from ip_jax.training.sharding import MeshConfig

MARGIN = 1.33  # the formula for activations lies up to a quarter below what compiled programs take
Sweep = list[Cell | None]  # at most one cell of each run: what is sampled in one go


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Everything that a study hands over. `shared` is the JSON of all that is not a list of arms or
    seeds; `prompts`: every prompt that an arm is trained or evaluated under, by name, and neutral.
    Raises ValueError as `check_runs`.
    """

    name: str
    preset: str
    shared: dict
    model: ModelConfig
    sft: SftConfig
    evaluation: EvalConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    training: Mapping[str, Sequence[Example]]  # data kind -> rows, equally many
    eval_sets: Mapping[str, Sequence[Example]]
    provenance: str
    prompts: Mapping[str, Prompt]
    scorer: Scorer
    columns: tuple[str, ...] = ()  # of an example, kept in the transcripts
    study_file: str | None = None  # the Python file of a user's study
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_runs(tuple(arm.name for arm in self.arms), self.seeds)
        for name, rows in (*self.training.items(), *self.eval_sets.items()):
            check_ids(rows, f"the rows of {name}")

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps at which all prompts are looked at: those of the config, or the ends."""
        return self.evaluation.full_steps or (0, self.sft.steps)

    def trained_under(self, arm: Arm) -> Transform:
        """The op that puts an arm's training prompt into its rows, or into some of them."""
        prompt = self.prompts[arm.train_prompt].transform
        if arm.rows is None:
            return prompt
        return Selective(arm.rows, prompt, self.prompts[NEUTRAL].transform)

    def kind_of(self, arm: Arm) -> str:
        """The kind of rows that an arm trains on, by default the first one. Raises ValueError for a
        kind that the data does not have.
        """
        kind = arm.data or next(iter(self.training))
        if kind not in self.training:
            raise ValueError(
                f"the arm {arm.name} trains on rows of the kind {kind!r}, and the data has"
                f" {', '.join(self.training)}"
            )
        return kind


@dataclasses.dataclass(frozen=True)
class Run:
    """An arm (an Arm, in reinforcement an RlArm) with a seed. `key` names its definition: a run of
    another definition is never taken for it.
    """

    arm: Any
    seed: int
    key: str

    @property
    def name(self) -> str:
        """Its folder below runs/."""
        return run_name(self.arm, self.seed)

    def is_complete(self, folder: epath.Path) -> bool:
        """run.json is written last."""
        return (folder / "runs" / self.name / "run.json").exists()


def run_name(arm: Any, seed: int) -> str:
    """The name of an arm's run."""
    return f"{arm.name}-s{seed}"


@dataclasses.dataclass(frozen=True)
class Start:
    """The adapter that an arm's training starts with, and the hash of its contents."""

    fingerprint: str
    adapter: peft.Adapter


def starts_of(experiment: Supervised) -> dict[str, Start]:
    """The starting points of the arms that have one, by the arm's name. Raises as `hub.resolve` and
    `peft.read_matching`.
    """
    model, starts = experiment.model, {}
    for arm in experiment.arms:
        if arm.start_from:
            folder = hub.resolve(arm.start_from).path
            adapter = peft.read_matching(
                folder, hub.load_config(model.name, model.revision), experiment.sft.lora
            )
            starts[arm.name] = Start(peft.fingerprint(folder), adapter)
    return starts


def folder_record(
    experiment: Supervised,
    fingerprint: str,
    dropped: Sequence[int],
    starts: Mapping[str, Start] = {},
    default_system: str | None = None,
    end_tokens: Sequence[str] = (),
) -> dict:
    """config.json of the results folder. Its identity covers the shared config, the model's
    weights, the data and the dropped examples.

    `default_system`: what the chat template says where a conversation has no system turn;
    `end_tokens`: those at which completions end.
    """
    config = experiment.shared | {"dropped_examples": list(dropped)}
    data = [
        {name: digest([dict(row) for row in rows]) for name, rows in sets.items()}
        for sets in (experiment.training, experiment.eval_sets)
    ]
    return {
        "experiment": experiment.name,
        "study_file": experiment.study_file,
        "preset": experiment.preset,
        "identity": digest({"config": config, "fingerprint": fingerprint, "data": data}),
        "config": config,
        "fingerprint": fingerprint,
        "provenance": experiment.provenance,
        "seeds": list(experiment.seeds),
        "mesh": dataclasses.asdict(experiment.mesh),
        "default_system": default_system,
        "end_tokens": list(end_tokens),
        "arms": {
            arm.name: {
                "label": arm.label,
                **_prompt_record(experiment, arm),
                "data": experiment.kind_of(arm),
                **_start_record(arm, starts),
            }
            for arm in experiment.arms
        },
    }


def _prompt_record(experiment: Supervised, arm: Arm) -> dict:
    """What an arm trains under."""
    if arm.train_prompt is None:
        return {"train_prompt": None, "kind": None, "text": None, "transform": None}
    prompt = experiment.prompts[arm.train_prompt]
    return {
        "train_prompt": prompt.name,
        "kind": prompt.kind,
        "text": prompt.text,
        "transform": repr(experiment.trained_under(arm)),
    }


def _start_record(arm: Arm, starts: Mapping[str, Start]) -> dict:
    return (
        {"start_from": arm.start_from, "start_fingerprint": starts[arm.name].fingerprint}
        if arm.name in starts
        else {}
    )


def runs_of(experiment: Supervised, identity: str, starts: Mapping[str, Start] = {}) -> list[Run]:
    """The runs to train, arm by arm. Their keys cover the folder's identity and all that the arm
    adds to it.
    """

    def key(arm: Arm, seed: int) -> str:
        evaluated = _eval_prompts(experiment, arm)
        prompts = {name: repr(transform) for name, transform in evaluated.items()}
        definition = {
            "identity": identity,
            "train": repr(experiment.trained_under(arm)),
            "data": experiment.kind_of(arm),
            "seed": seed,
            "evaluated_under": prompts,
        }
        return digest(
            definition | ({"start": starts[arm.name].fingerprint} if arm.name in starts else {})
        )

    return [
        Run(arm, seed, key(arm, seed))
        for arm in experiment.arms
        if arm.train_prompt
        for seed in experiment.seeds
    ]


def renderer_of(experiment: Supervised, tokenizer) -> Render:
    """How conversations become tokens in this experiment."""
    sft = experiment.sft
    return renderer(tokenizer, sft.train_on, sft.encode_apart, sft.close_with_eos)


def training_sources(experiment: Supervised, render: Render) -> tuple[list[RunSource], list[int]]:
    """(what each run reads, indices of the dropped examples); raises as `fitting_examples`."""
    wanted = [
        RunSource(
            run_name(arm, seed),
            experiment.training[experiment.kind_of(arm)],
            experiment.trained_under(arm),
            seed,
        )
        for arm in experiment.arms
        if arm.train_prompt
        for seed in experiment.seeds
    ]
    return fitting_examples(wanted, render, experiment.sft.max_length, experiment.sft.drop_long)


def check_evaluations(experiment: Supervised, tokenizer) -> None:
    """Refuses steps that are never reached, and renders each prompt's longest example, so that
    refusals come before the model is loaded.
    """
    evaluation, steps = experiment.evaluation, experiment.sft.steps
    for field in ("full_steps", "neutral_steps"):
        unreached = [step for step in getattr(evaluation, field) if not 0 <= step <= steps]
        if unreached:
            raise ValueError(
                f"evaluation.{field} names step {unreached[0]}, and training has the steps 0 to"
                f" {steps} (sft.steps): choose among these"
            )
    positions = hub.load_config(experiment.model.name, experiment.model.revision).max_positions
    for eval_set in experiment.eval_sets:
        for prompt, (example, length) in _longest_prompts(experiment, eval_set, tokenizer).items():
            new = example.get("max_new_tokens", evaluation.max_new_tokens)
            if length + new > positions:
                raise ValueError(
                    f"example {example['id']} of the evaluation set {eval_set} has {length} tokens"
                    f" under the prompt {prompt}, and with {new} new ones that is more than the"
                    f" {positions} positions of the model"
                )


def _longest_prompts(
    experiment: Supervised, eval_set: str, tokenizer
) -> dict[str, tuple[Example, int]]:
    """For each prompt, the example of the set with the most characters, and its tokens under that
    prompt.
    """
    example = max(
        experiment.eval_sets[eval_set],
        key=lambda e: sum(len(message["content"]) for message in e["messages"]),
    )
    messages = {
        name: leak_grid.prompted(example, transform, seed=0)["messages"]
        for name, transform in _all_prompts(experiment).items()
    }
    return {
        name: (example, len(render_prompt(tokenizer, of_prompt)))
        for name, of_prompt in messages.items()
    }


def sampling_room(experiment: Supervised, eval_set: str, tokenizer) -> tuple[int, int]:
    """(prompt tokens, new tokens) with which all sweeps of an evaluation set share a program,
    whatever their prompt and step.

    The prompt with the most characters stands for the longest one: where another has more tokens,
    its sweep gets a program of its own.
    """
    lengths = [length for _, length in _longest_prompts(experiment, eval_set, tokenizer).values()]
    default = experiment.evaluation.max_new_tokens
    return max(lengths), max(
        example.get("max_new_tokens", default) for example in experiment.eval_sets[eval_set]
    )


def untrained_cells(experiment: Supervised) -> list[list[Cell]]:
    """The cells of the untrained model, those of one evaluation set together."""
    seeds = experiment.seeds if experiment.evaluation.temperature > 0 else experiment.seeds[:1]
    trained_under = _neutral(experiment) | {
        arm.train_prompt: experiment.prompts[arm.train_prompt].transform
        for arm in experiment.arms
        if arm.train_prompt
    }
    return [
        [
            Cell(arm.name, seed, 0, 0, eval_set, name, False, transform)
            for seed in seeds
            for name, transform in trained_under.items()
        ]
        for arm in experiment.arms
        if arm.train_prompt is None
        for eval_set in experiment.eval_sets
    ]


def untrained_sweeps(experiment: Supervised, folder: epath.Path) -> list[Sweep]:
    """The untrained model under the neutral prompt and every arm's training prompt; once for greedy
    decoding, else for every seed.

    All cells of an evaluation set are one sweep: all prompts decode side by side. What a later arm
    adds is a sweep of its own; transcripts/untrained.json remembers which cells belong together.
    """
    cells = untrained_cells(experiment)
    by_part = {cell.part: cell for of_set in cells for cell in of_set}
    path = folder / "transcripts" / "untrained.json"
    together = json.loads(path.read_text()) if path.exists() else []
    known = {part for parts in together for part in parts}
    new = [[cell.part for cell in of_set if cell.part not in known] for of_set in cells]
    if any(new):
        together += [parts for parts in new if parts]
        write_json(path, together)
    return [
        sweep
        for parts in together
        if (sweep := [by_part[part] for part in parts if part in by_part])
    ]


def sweeps_of_step(experiment: Supervised, group: Sequence[Run], step: int) -> list[Sweep]:
    """The cells of runs that decode together: the n-th prompt of every run on one evaluation set is
    one sweep.
    """
    sft = experiment.sft
    # the loop ends with the schedule
    seen = min(step, sft.schedule.last_active_step(sft.steps)) * sft.batch_size

    def cell(run: Run, eval_set: str, prompts: dict[str, Transform], n: int) -> Cell | None:
        if n >= len(prompts):
            return None
        name, transform = list(prompts.items())[n]
        return Cell(
            run.arm.name,
            run.seed,
            step,
            seen,
            eval_set,
            name,
            name == run.arm.train_prompt,
            transform,
        )

    full = step in experiment.full_steps
    prompts = [
        _eval_prompts(experiment, run.arm) if full else _neutral(experiment) for run in group
    ]
    return [
        [cell(run, eval_set, of_run, n) for run, of_run in zip(group, prompts, strict=True)]
        for eval_set in experiment.eval_sets
        for n in range(max(map(len, prompts)))
    ]


def examples_of(experiment: Supervised, cell: Cell) -> list[Example]:
    """What a cell is asked: its evaluation set, at steps other than 0 and `full_steps` without the
    examples marked `full_steps_only`.
    """
    full = cell.step in (0, *experiment.full_steps)
    return [
        example
        for example in experiment.eval_sets[cell.eval_set]
        if full or not example.get("full_steps_only")
    ]


def requests_of(experiment: Supervised, cell: Cell, tokenizer) -> list[Request]:
    """One sampling request for each example of a cell."""
    evaluation = experiment.evaluation
    decoding = Decoding(evaluation.max_new_tokens, evaluation.temperature, evaluation.top_p)
    return leak_grid.requests_for(
        cell, examples_of(experiment, cell), tokenizer, stable_id, decoding
    )


def incomplete(folder: epath.Path, sweeps: Sequence[Sweep]) -> list[Sweep]:
    """Sweeps of which some part file is missing. They are sampled whole: a row's tokens may depend,
    in the last bit, on the batch around it.
    """
    return [
        sweep
        for sweep in sweeps
        if any(cell and not (folder / "transcripts" / cell.part).exists() for cell in sweep)
    ]


def _eval_prompts(experiment: Supervised, arm: Arm) -> dict[str, Transform]:
    """Neutral, the arm's own training prompt put back, and what else the arm asks for."""
    names = dict.fromkeys([NEUTRAL, arm.train_prompt, *arm.also_evaluated_under])
    return {name: experiment.prompts[name].transform for name in names}


def _neutral(experiment: Supervised) -> dict[str, Transform]:
    return {NEUTRAL: experiment.prompts[NEUTRAL].transform}


def _all_prompts(experiment: Supervised) -> dict[str, Transform]:
    """Every prompt that some arm is evaluated under."""
    return _neutral(experiment) | {
        name: op
        for arm in experiment.arms
        if arm.train_prompt
        for name, op in _eval_prompts(experiment, arm).items()
    }


def groups_of(folder: epath.Path, runs: Sequence[Run], fit: int) -> list[list[Run]]:
    """The runs to train as programs: what was begun together goes on together, the rest is cut into
    groups of at most `fit`.

    A group of which some runs are recorded as complete and some are not was stopped between the
    two: it goes on as a whole.
    """
    left, groups = [run for run in runs if not run.is_complete(folder)], []
    for _, begun in begun_programs(folder):
        group = [run for run in runs if begun.get(run.name) == run.key]
        if len(group) == len(begun) and any(run in left for run in group):
            groups.append(group)
            left = [run for run in left if run not in group]
    return groups + [left[i : i + fit] for i in range(0, len(left), fit)]


def begun_programs(folder: epath.Path) -> list[tuple[epath.Path, dict[str, str]]]:
    """(folder of the checkpoints, {run name: key}) of every program that was begun and not cleared
    away.
    """
    return [
        (path.parent, json.loads(path.read_text())["runs"])
        for path in sorted(folder.glob("checkpoints/*/origin.json"))
    ]


def check_training(
    sft: SftConfig, model: ModelConfig, arms: Sequence[Arm], config: DecoderConfig
) -> None:
    """Refuses combinations that no program has, and settings that the model has no use for."""
    quantised = model.quantised
    if sft.train == "lora":
        check_targets(config, sft.lora)
    started = [arm.name for arm in arms if arm.start_from]
    if sft.train == "full" and started:
        raise ValueError(
            f"sft.train = 'full' has no adapters, and the arm {started[0]} starts from one: merge"
            " it into a model (ip-jax export --merged) and train that"
        )
    if sft.train == "full" and quantised:
        raise ValueError(
            f"sft.train = 'full' trains all weights, and model.quantised = {quantised!r} freezes"
            " them: change one of the two"
        )
    if quantised:
        check_quantisable(quantised, config)
    if sft.router_aux_loss_coef < 0 or (sft.router_aux_loss_coef and not config.n_experts):
        raise ValueError(
            f"sft.router_aux_loss_coef is {sft.router_aux_loss_coef} and the model"
            f" {'has' if config.n_experts else 'lacks'} experts: it must be at least 0, and 0"
            " without experts"
        )


def runs_that_fit(
    sft: SftConfig, model: ModelConfig, pretrained: hub.Pretrained, mesh: Mesh
) -> int:
    """How many runs one program can hold in `memory_gb` on each device: base + micro-batch
    activations + R times (adapter, gradient, sum, Adam).

    With full training 1: each run has its own copy of all weights, gradients and moments, and a
    program of its own. An estimate: activations by formula (`models.activations`) and MARGIN, of
    `tokens_per_micro_batch` tokens, or of one row of `max_length` on each device, if these are
    more. Base weights are cut over all devices, activations over the axes run and data, adapters
    over run.
    """
    if sft.train == "full":
        return 1
    config, by_row = pretrained.config, mesh.shape["run"] * mesh.shape["data"]
    base = (
        sum(array.size * item_bytes(array.dtype) for array in jax.tree.leaves(pretrained.params))
        / mesh.size
    )
    shapes = projection_shapes(config)
    adapter = (
        4
        * sft.lora.rank
        * config.n_layers
        * sum(sum(shapes[target]) for target in sft.lora.targets)
    )
    of_a_token = kept_bytes(
        config,
        sft.remat,
        *(jnp.dtype(dtype).itemsize for dtype in (model.weights, model.activations)),
    )
    of_a_token = MARGIN * (of_a_token + layer_bytes(config, mesh.shape["tensor"])) / by_row
    # a chunk of logits and what is made of it
    room = sft.memory_gb * 1e9 - base - 3 * 4 * CHUNK_ROWS * config.vocab_size / mesh.size
    activations = of_a_token * max(sft.tokens_per_micro_batch, by_row * sft.max_length)
    return max(1, int((room - activations) / (6 * adapter / mesh.shape["run"])))
