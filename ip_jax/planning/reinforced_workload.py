"""How much work a text experiment in reinforcement learning is: the rows of its updates, the
sampling calls of rollouts and evaluations.

Counted from the experiment itself where its tokenizer is at hand (`measured`), else from declared
sizes (`declared`). Dims as in `rl.rows`: R runs, Q groups, G completions of a group, C completion
slots, X prompt slots.
"""

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AbstractMesh, Mesh

from ip_jax.lab.base_model import load_tokenizer, stop_ids
from ip_jax.lab.experiment import ModelConfig
from ip_jax.lab.reinforced import plan
from ip_jax.lab.reinforced.plan import Reinforced, RlConfig, RlEval
from ip_jax.lab.reinforced.programs import Kind
from ip_jax.lab.supervised import programs as supervised_programs
from ip_jax.lab.supervised.plan import Run, Sweep
from ip_jax.models import hub
from ip_jax.models.families import DecoderConfig
from ip_jax.models.lora import check_targets
from ip_jax.planning.workload import HfFields, Questions, Sampling, Sizes, round_up
from ip_jax.rl import rollout as rollouts
from ip_jax.rl.algorithm import Algorithm, passes_needed
from ip_jax.rl.batch import Layout, Rollout, make_batch, rows_to_score
from ip_jax.rl.rows import Prompts, Rows, Samples
from ip_jax.rl.step import RlBatch
from ip_jax.sampling import plan as sampling_plan
from ip_jax.sampling.plan import Request, SamplerOptions
from ip_jax.training.sharding import MeshConfig, mesh_for


@dataclasses.dataclass(frozen=True)
class PromptLengths:
    """Tokens of every prompt, as it is sampled under and as it is trained under."""

    generation: int
    training: int


@dataclasses.dataclass(frozen=True)
class RlShapes:
    """An experiment in reinforcement learning without tasks or arms: sizes alone. It can be
    planned, not run.
    """

    hf: HfFields
    rl: RlConfig
    evaluation: RlEval
    prompts: PromptLengths
    questions: Questions
    preset: str
    model: ModelConfig
    algorithm: tyro.conf.Fixed[Algorithm] = Algorithm()
    runs: int = 1
    """Arms x seeds; `rl.runs_per_program` of them train side by side."""
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Program:
    """Runs of one algorithm that train side by side. `count`: how many such programs there are, a
    smaller last one counted as its share.

    `rollout` holds jax.ShapeDtypeStruct. `sampling` is that of all its iterations, `evaluations`
    those of its runs.
    """

    kind: Kind
    runs: int
    count: float
    arms: tuple[str, ...]
    rollout: Rollout
    sampling: Sampling
    evaluations: tuple[Sampling, ...]

    @property
    def sizes(self) -> Sizes:
        """As formulas take it."""
        kind = self.kind
        return Sizes(
            kind.config, kind.model, kind.mesh, self.runs, kind.rl.lora, kind.rl.remat, kind.kernel
        )

    @property
    def in_use(self) -> Layout:
        """That of the rows that hold something alone: one micro-batch for each minibatch, on one
        device.
        """
        return dataclasses.replace(self.kind.layout, tokens_per_micro_batch=sys.maxsize, multiple=1)

    def scored(self, layout: Layout | None = None) -> dict[str, Rows]:
        """The rows of each pass without a gradient, by its name in `passes_needed`, without
        shardings; laid out as on the mesh or by `layout`.
        """
        sides = {"training": self.rollout.training, "generation": self.rollout.generation}

        def rows(side):
            return jax.eval_shape(
                functools.partial(rows_to_score, layout=layout or self.kind.layout),
                sides[side],
                self.rollout,
            )

        return {
            name: rows(name.split("_")[1]) for name in sorted(passes_needed(self.kind.algorithm))
        }

    def batch(self, layout: Layout | None = None) -> RlBatch:
        """The rows of an update, without shardings; laid out as on the mesh or by `layout`."""
        each = jax.ShapeDtypeStruct(self.rollout.samples.tokens.shape, jnp.float32)
        of_run, algorithm = jax.ShapeDtypeStruct((self.runs,), jnp.float32), self.kind.algorithm
        decide = functools.partial(
            make_batch, algorithm=algorithm, layout=layout or self.kind.layout
        )
        reference = of_run if algorithm.gate.needs_reference else None
        return jax.eval_shape(
            decide, self.rollout, dict.fromkeys(passes_needed(algorithm), each), of_run, reference
        )[0]


@dataclasses.dataclass(frozen=True)
class RlWorkload:
    """All that decides what an experiment costs. `untrained`: the evaluations of the model as it
    comes, on `untrained_mesh`.
    """

    config: DecoderConfig
    model: ModelConfig
    rl: RlConfig
    mesh: Mesh | AbstractMesh
    programs: tuple[Program, ...]
    untrained: tuple[Sampling, ...]
    source: str  # where the numbers come from

    @property
    def untrained_mesh(self) -> Mesh | AbstractMesh:
        """Of the untrained model, whose prompts are asked one after another."""
        return mesh_for(self.mesh, 1)


def declared(shapes: RlShapes, config: DecoderConfig, mesh: Mesh | AbstractMesh) -> RlWorkload:
    """The workload of declared sizes. `config` is that of `shapes.hf` or of another model. Raises
    as `measured`.
    """
    rl, evaluation = shapes.rl, shapes.evaluation
    check_targets(config, rl.lora)
    _check(shapes)
    runs = min(shapes.runs, rl.runs_per_program)
    of_program = mesh_for(mesh, runs)
    kind = Kind(of_program, config, rl, shapes.model, shapes.algorithm)
    slots = [
        round_up(length, rollouts.PROMPT_QUANTUM)
        for length in (shapes.prompts.generation, shapes.prompts.training)
    ]
    rng = np.random.default_rng(0)

    def prompts(count, length):
        return [rng.integers(1, config.vocab_size, length, np.int32) for _ in range(count)]

    queue = [
        Request(
            prompt,
            q,
            temperature=rl.temperature,
            top_p=rl.top_p,
            max_new_tokens=rl.max_new_tokens,
            first_sample=i,
        )
        for q, prompt in enumerate(prompts(rl.groups, shapes.prompts.generation))
        for i in range(rl.samples)
    ]
    sized = rollouts.RolloutPlan(
        (), (), None, rl.rollout, None, {"gen": slots[0], "train": slots[1], "guide": 0}
    )
    sampling = _sampling(
        config, [queue] * runs, _sampler_options(sized, (0,), kind), _calls(rl, shapes.algorithm)
    )
    asked = [
        Request(
            prompt,
            i,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            max_new_tokens=evaluation.max_new_tokens,
        )
        for i, prompt in enumerate(prompts(shapes.questions.prompts, shapes.questions.length))
    ]
    options = supervised_programs.sampler_options(
        of_program, config, shapes.model, evaluation, (0,), (1, 1)
    )
    evaluations = (
        (_sampling(config, [asked] * runs, options, shapes.questions.sweeps),)
        if shapes.questions.sweeps
        else ()
    )
    rollout = rollout_of(runs, rl, *((rl.groups, size) for size in slots))
    program = Program(kind, runs, shapes.runs / runs, (), rollout, sampling, evaluations)
    return RlWorkload(
        config,
        shapes.model,
        rl,
        mesh,
        (program,),
        (),
        "declared sizes, every completion as long as its limit",
    )


def _check(shapes: RlShapes) -> None:
    longest, rl, asked = (
        max(shapes.prompts.generation, shapes.prompts.training),
        shapes.rl,
        shapes.questions,
    )
    sizes = {
        "runs": shapes.runs,
        "prompts.generation": shapes.prompts.generation,
        "prompts.training": shapes.prompts.training,
    }
    sizes |= (
        {"questions.prompts": asked.prompts, "questions.length": asked.length}
        if asked.sweeps
        else {}
    )
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    if longest + rl.max_new_tokens > rl.max_length:
        raise ValueError(
            f"prompts of {longest} tokens and {rl.max_new_tokens} new tokens (rl.max_new_tokens)"
            f" are more than rl.max_length = {rl.max_length}: raise that, or shorten"
            " prompts.generation and prompts.training"
        )
    plan.check_algorithm("this config", shapes.algorithm, rl)


def measured(experiment: Reinforced, mesh: Mesh | AbstractMesh) -> RlWorkload:
    """The workload of an experiment whose tokenizer is at hand: its prompts rendered, as a run
    renders them.

    Raises as `lab.reinforced.run.prepare` does for what can be checked without weights.
    """
    model = experiment.model
    config, tokenizer = hub.load_config(model.name, model.revision), load_tokenizer(model)
    plan.check(experiment)
    check_targets(config, experiment.rl.lora)
    runs = plan.runs_of(experiment, "")
    room = plan.evaluation_room(experiment, runs, tokenizer)
    programs = tuple(
        _program(experiment, of_kind, config, mesh, tokenizer, room)
        for of_kind in plan.by_kind(runs)
    )
    untrained = _evaluations(
        experiment, config, plan.untrained_sweeps(experiment), mesh_for(mesh, 1), tokenizer, room
    )
    source = (
        f"the experiment's own prompts, every completion as long as its limit; {len(runs)} runs"
    )
    return RlWorkload(config, model, experiment.rl, mesh, programs, untrained, source)


def _program(
    experiment: Reinforced,
    runs: Sequence[Run],
    config: DecoderConfig,
    mesh: Mesh | AbstractMesh,
    tokenizer,
    room: tuple[int, int],
) -> Program:
    """The program of all `runs`, which are of one kind; of several, that with the longest prompts
    stands for all.
    """
    rl, most, model = experiment.rl, experiment.rl.runs_per_program, experiment.model
    groups = [runs[i : i + most] for i in range(0, len(runs), most)]
    planned = [
        (plan.rollout_plan(experiment, group, tokenizer), group)
        for group in groups
        if len(group) == len(groups[0])
    ]
    longest, group = max(planned, key=lambda found: sum(found[0].slots.values()))
    mesh, algorithm = mesh_for(mesh, len(group)), group[0].arm.algorithm
    asked, ends = longest.ask(0), stop_ids(experiment.model, tokenizer)
    sides = (longest.prompts(asked, side).tokens.shape[1:] for side in ("gen", "train"))
    steps = sorted({*experiment.evaluation.steps, rl.iterations})
    sweeps = [
        sweep
        for step in steps
        for sweep in plan.sweeps_of(experiment, [(run.arm, run.seed) for run in group], step)
    ]
    kind = Kind(mesh, config, rl, model, algorithm)
    return Program(
        kind,
        len(group),
        len(runs) / len(group),
        tuple(dict.fromkeys(run.arm.name for run in runs)),
        rollout_of(len(group), rl, *sides),
        _sampling(
            config,
            rollouts.requests_of(longest, asked),
            _sampler_options(longest, ends, kind),
            _calls(rl, algorithm),
        ),
        _evaluations(experiment, config, sweeps, mesh, tokenizer, room),
    )


def _calls(rl: RlConfig, algorithm: Algorithm) -> int:
    """Of the sampler, for rollouts. An absolute gate's own samples, under the training prompts,
    count as another rollout.
    """
    return rl.iterations * (2 if algorithm.gate.needs_reference else 1)


def rollout_of(
    runs: int, rl: RlConfig, generation: tuple[int, int], training: tuple[int, int]
) -> Rollout:
    """One iteration's rollout as jax.ShapeDtypeStruct; each side is (prompts of a run, prompt
    slots).
    """

    def array(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((runs, *dims), dtype)

    def prompts(count, slots):
        return Prompts(array(count, slots, dtype=jnp.int32), array(count, dtype=jnp.int32))

    each = rl.groups, rl.samples
    samples = Samples(
        array(*each, rl.max_new_tokens, dtype=jnp.int32),
        array(*each, dtype=jnp.int32),
        array(*each, rl.max_new_tokens),
    )
    return Rollout(
        samples,
        prompts(*generation),
        prompts(*training),
        array(),
        array(*each),
        array(*each, dtype=jnp.bool_),
        array(*each, dtype=jnp.int32),
        array(*each),
    )


def _sampler_options(
    of: rollouts.RolloutPlan, stop_ids: tuple[int, ...], kind: Kind
) -> SamplerOptions:
    """How a run of this kind samples its rollouts."""
    whole_layers = supervised_programs.layers_fit_whole(kind.mesh, kind.config, kind.model)
    return rollouts.sampler_options(
        of, stop_ids, kind.model.activations, kind.rl.slots, kind.mesh, whole_layers
    )


def _evaluations(
    experiment: Reinforced,
    config: DecoderConfig,
    sweeps: Sequence[Sweep],
    mesh: Mesh | AbstractMesh,
    tokenizer,
    room: tuple[int, int],
) -> tuple[Sampling, ...]:
    """The sampling calls of `sweeps`; those that ask the same are counted, not listed."""
    cells = {_asked(cell): cell for sweep in sweeps for cell in sweep if cell}
    requests = {
        asked: plan.requests_of(experiment, cell, tokenizer) for asked, cell in cells.items()
    }
    options = supervised_programs.sampler_options(
        mesh,
        config,
        experiment.model,
        experiment.evaluation,
        stop_ids(experiment.model, tokenizer),
        room,
    )
    times = Counter(tuple(cell and _asked(cell) for cell in sweep) for sweep in sweeps)
    return tuple(
        _sampling(config, [requests[asked] if asked else [] for asked in of_sweep], options, count)
        for of_sweep, count in times.items()
    )


def _asked(cell) -> tuple[str, str]:
    """What decides the prompts of a cell, seeds aside."""
    return cell.eval_prompt, repr(cell.transform)


def _sampling(
    config: DecoderConfig,
    queues: Sequence[Sequence[Request]],
    options: SamplerOptions,
    times: float,
) -> Sampling:
    sampling_plan.check_lengths(queues, options, config.max_positions)
    return Sampling(queues, sampling_plan.make_plan(queues, options), options, times)
