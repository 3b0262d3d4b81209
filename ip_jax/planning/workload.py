"""How much work an experiment is: the packed shapes of its steps and the sampling calls of its
evaluations.

Counted from the experiment itself where its tokenizer is at hand (`measured`), else from declared
sizes (`declared`).
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from ip_jax.data.packing import PackedShape, usage
from ip_jax.data.pipeline import BatchReader, batch_reader
from ip_jax.lab.base_model import load_tokenizer, stop_ids
from ip_jax.lab.experiment import EvalConfig, ModelConfig, SftConfig
from ip_jax.lab.supervised import plan, programs
from ip_jax.lab.supervised.plan import Supervised
from ip_jax.models import hub
from ip_jax.models.families import DecoderConfig, from_hf_config, param_shapes
from ip_jax.models.lora import LoraConfig
from ip_jax.models.quantised import check_quantisable, quantised_shapes
from ip_jax.sampling import plan as sampling_plan
from ip_jax.sampling.plan import Request, SamplerOptions
from ip_jax.training.sharding import MeshConfig, base_shardings, mesh_for, param_shardings


@dataclasses.dataclass(frozen=True)
class HfFields:
    """What a config.json says about a model's shape, under the names that it has there."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None

    def decoder_config(self) -> DecoderConfig:
        """Raises ValueError for an architecture that is not supported."""
        fields = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }
        return from_hf_config(fields | {"architectures": [fields.pop("architecture")]})


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batch of one step and run: `rows` rows of `length` tokens, one example each, of which
    `responses` positions count.
    """

    rows: int
    length: int
    responses: int


@dataclasses.dataclass(frozen=True)
class Questions:
    """What each run answers in the whole experiment: `sweeps` times `prompts` prompts of `length`
    tokens (lengths and limits come from the evaluation).
    """

    prompts: int
    length: int
    sweeps: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """An experiment without data: sizes alone. It can be planned, not run."""

    hf: HfFields
    sft: SftConfig
    evaluation: EvalConfig
    batches: Batches
    questions: Questions
    preset: str
    model: ModelConfig
    runs: int = 1
    """Arms x seeds that train side by side in one program, with full training one program after the
    other.
    """
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling calls of equal sizes, `times` of them while one program's runs are evaluated.
    `requests`: a queue for each run, of one call.
    """

    requests: Sequence[Sequence[Request]]
    plan: sampling_plan.Plan
    options: SamplerOptions
    times: float

    @property
    def prefills(self) -> int:
        """Prefills of one call."""
        return -(-max(map(len, self.plan.queues)) // self.plan.prefill_prompts)

    @property
    def decode_steps(self) -> int:
        """Tokens in a row that one call decodes, at most: every answer runs to the ring's
        length.
        """
        return -(-max(map(len, self.plan.queues)) // self.plan.shape.groups) * self.plan.shape.ring


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What formulas need to know of a program of `runs` runs. `lora` is None where there is no
    adapter: all weights are trained, or none. `kernel`: of attention over completions that share a
    prompt.
    """

    config: DecoderConfig
    model: ModelConfig
    mesh: Mesh | AbstractMesh
    runs: int
    lora: LoraConfig | None
    remat: str
    kernel: str = "xla"


@dataclasses.dataclass(frozen=True)
class Packed:
    """What a step has of one shape, on average: `micro_batches` that are computed, and in them
    `rows`, of all runs, that hold something.
    """

    shape: PackedShape
    micro_batches: float
    rows: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """All that decides what an experiment costs. `steps`: how many one program of `runs` runs
    takes; `packing`: of each of its shapes.
    """

    config: DecoderConfig
    model: ModelConfig
    sft: SftConfig
    mesh: Mesh | AbstractMesh  # of a program of `runs` runs
    runs: int
    programs: float  # of `runs` runs each, a smaller last one counted as its share
    steps: int
    packing: tuple[Packed, ...]
    sampling: tuple[Sampling, ...]
    source: str  # where the numbers come from

    @property
    def shapes(self) -> tuple[PackedShape, ...]:
        """Of the micro-batches of every step."""
        return tuple(packed.shape for packed in self.packing)

    @property
    def sizes(self) -> Sizes:
        """As formulas take it."""
        return Sizes(
            self.config,
            self.model,
            self.mesh,
            self.runs,
            self.sft.lora if self.sft.train == "lora" else None,
            self.sft.remat,
        )


def declared(shapes: Shapes, config: DecoderConfig, mesh: Mesh | AbstractMesh) -> Workload:
    """The workload of declared sizes on a mesh, every row full. `config` is that of `shapes.hf` or
    of another model.

    Raises ValueError for combinations that no program has.
    """
    sft = shapes.sft
    plan.check_training(sft, shapes.model, (), config)
    runs = 1 if sft.train == "full" else shapes.runs
    mesh = mesh_for(mesh, runs)
    spread, blocks = mesh.shape["data"], mesh.shape["run"]
    length, filled = shapes.batches.length, runs * shapes.batches.rows
    rows = round_up(filled // blocks, spread)
    fitting = sft.tokens_per_micro_batch // (blocks * length) // spread * spread
    micro_rows = min(rows, max(spread, fitting))
    shape = PackedShape(
        length,
        1,
        length,
        shapes.batches.responses,
        -(-rows // micro_rows),
        micro_rows,
        blocks=blocks,
    )
    asked, evaluation = shapes.questions, shapes.evaluation
    options = programs.sampler_options(mesh, config, shapes.model, evaluation, (0,), (1, 1))
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(1, config.vocab_size, asked.length, np.int32) for _ in range(asked.prompts)
    ]
    queues = [
        [
            Request(prompt, i, max_new_tokens=evaluation.max_new_tokens)
            for i, prompt in enumerate(prompts)
        ]
    ] * runs
    sampling = (
        (Sampling(queues, sampling_plan.make_plan(queues, options), options, asked.sweeps),)
        if asked.sweeps
        else ()
    )
    steps = sft.schedule.last_active_step(sft.steps)
    packing = (Packed(shape, shape.micro_batches, filled),)
    return Workload(
        config,
        shapes.model,
        sft,
        mesh,
        runs,
        shapes.runs / runs,
        steps,
        packing,
        sampling,
        "declared sizes, every row full",
    )


def measured(experiment: Supervised, mesh: Mesh | AbstractMesh) -> Workload:
    """The workload of an experiment whose tokenizer is at hand: its real packing plan and its real
    prompts, rendered.

    Raises as `prepare` does for what can be checked without weights.
    """
    model, sft = experiment.model, experiment.sft
    config, tokenizer = hub.load_config(model.name, model.revision), load_tokenizer(model)
    plan.check_training(sft, model, experiment.arms, config)
    plan.check_evaluations(experiment, tokenizer)
    render = plan.renderer_of(experiment, tokenizer)
    sources, _ = plan.training_sources(experiment, render)
    pretrained = hub.Pretrained(
        model.name, config, abstract_base(config, model, mesh), tokenizer, ""
    )
    runs = max(1, min(len(sources), plan.runs_that_fit(sft, model, pretrained, mesh)))
    mesh = mesh_for(mesh, runs)
    active = sft.schedule.last_active_step(sft.steps)
    rules = programs.row_rules(programs.Program(mesh, config, sft, model))
    reader = batch_reader(
        sources[:runs], render, sft.batch_size, active, sft.tokens_per_micro_batch, rules
    )
    sampling = _sampling(experiment, config, mesh, tokenizer, runs, len(sources) / runs)
    return Workload(
        config,
        model,
        sft,
        mesh,
        runs,
        len(sources) / runs,
        active,
        _packing(reader),
        sampling,
        f"the packing plan of the experiment's own data, {len(sources)} runs",
    )


def _packing(reader: BatchReader) -> tuple[Packed, ...]:
    """The means over the steps."""
    used, rows = zip(*(usage(lengths, reader.shapes) for lengths in reader.lengths), strict=True)
    return tuple(
        map(Packed, reader.shapes, np.mean(used, axis=0).tolist(), np.mean(rows, axis=0).tolist())
    )


def abstract_base(config: DecoderConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> dict:
    """The base on the mesh as `lab.base_model.load_base` leaves it, as jax.ShapeDtypeStruct.
    Raises as `check_quantisable`.
    """
    if model.quantised:
        check_quantisable(model.quantised, config)
    params = abstract_params(config, model.weights, param_shardings(mesh, config))
    return (
        quantised_shapes(params, model.quantised, functools.partial(base_shardings, mesh))
        if model.quantised
        else params
    )


def abstract_params(config: DecoderConfig, dtype: str, sharding=None) -> dict:
    """The params of `config` as jax.ShapeDtypeStruct; `sharding`: see
    `training.sharding.param_shardings`.
    """
    params: dict = {}
    for path, shape in param_shapes(config).items():
        branch = functools.reduce(lambda tree, key: tree.setdefault(key, {}), path[:-1], params)
        branch[path[-1]] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding and sharding(path))
    return params


def _sampling(
    experiment: Supervised,
    config: DecoderConfig,
    mesh: Mesh | AbstractMesh,
    tokenizer,
    runs: int,
    programs_of_all: float,
) -> tuple[Sampling, ...]:
    """The evaluation's sampling calls of one program of runs, and its share of those of the
    untrained model; equal calls are counted, not listed.
    """
    group = [
        plan.Run(arm, seed, "")
        for arm in experiment.arms
        if arm.train_prompt
        for seed in experiment.seeds
    ][:runs]
    looked_at = sorted({*experiment.full_steps, *experiment.evaluation.neutral_steps} - {0})
    sweeps = [sweep for step in looked_at for sweep in plan.sweeps_of_step(experiment, group, step)]
    untrained = plan.untrained_cells(experiment)
    cells = {
        _kind(experiment, cell): cell for sweep in [*sweeps, *untrained] for cell in sweep if cell
    }

    @functools.cache
    def requests(kind: tuple) -> Sequence[Request]:
        return plan.requests_of(experiment, cells[kind], tokenizer)

    def sampling(queues, eval_set: str, times: float) -> Sampling:
        room = plan.sampling_room(experiment, eval_set, tokenizer)
        options = programs.sampler_options(
            mesh,
            config,
            experiment.model,
            experiment.evaluation,
            stop_ids(experiment.model, tokenizer),
            room,
        )
        return Sampling(queues, sampling_plan.make_plan(queues, options), options, times)

    times = Counter(
        tuple(_kind(experiment, cell) if cell else None for cell in sweep) for sweep in sweeps
    )
    found = [
        sampling(
            [requests(kind) if kind else [] for kind in kinds],
            next(kind for kind in kinds if kind)[0],
            count,
        )
        for kinds, count in times.items()
    ]
    for of_set in untrained:
        asked = [request for cell in of_set for request in requests(_kind(experiment, cell))]
        found.append(
            sampling(
                [asked[run::runs] for run in range(runs)], of_set[0].eval_set, 1 / programs_of_all
            )
        )
    return tuple(found)


def _kind(experiment: Supervised, cell) -> tuple[str, str, bool]:
    """What decides the prompts of a cell, seeds aside."""
    return cell.eval_set, cell.eval_prompt, cell.step in (0, *experiment.full_steps)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step
