"""The programs of a run, lowered and compiled from shapes alone for devices that need not be
there.
"""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from ip_jax.data.packing import PackedShape, positions_of
from ip_jax.lab.supervised import programs
from ip_jax.models.moe import BLOCK
from ip_jax.models.quantised import item_bytes
from ip_jax.planning.hlo import Cost, program_cost
from ip_jax.planning.workload import Sampling, Workload, abstract_base
from ip_jax.sampling import slots as sampling
from ip_jax.sampling.plan import make_refill
from ip_jax.training.sft import decoder_states
from ip_jax.training.sharding import base_shardings, batch_sharding, state_shardings
from ip_jax.training.state import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a program runs, from its memory analysis. `kept`: of the results,
    those that are no argument's own memory.
    """

    arguments: float
    kept: float
    temporaries: float

    @property
    def peak(self) -> float:
        """All of it at once."""
        return self.arguments + self.kept + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about one program; `seconds`: what lowering and compiling took
    here.
    """

    cost: Cost
    memory: Memory
    seconds: float


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refused because it does not fit: bytes that it needs and may
    have, 0 where it does not say.
    """

    needed: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class Initial:
    """What a run has on its mesh before the first step, as jax.ShapeDtypeStruct with shardings."""

    graphdef: object
    state: TrainState
    frozen: object
    # what a step computes with: `frozen`, or with full training the cast copy of what is trained
    weights: object


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sampling programs of one workload, lowered, and the arrays that lie on the devices
    meanwhile.
    """

    prefill: jax.stages.Lowered
    decode: jax.stages.Lowered
    slots: sampling.Slots
    layers: tuple


def initial(workload: Workload) -> Initial:
    """The state and the weights of a program of `workload.runs` runs. The mesh may be abstract:
    then the shardings only tell sizes.
    """
    mesh, program = workload.mesh, _program(workload)
    params = abstract_base(workload.config, workload.model, mesh)
    graphdef, state, frozen = programs.initial_state(
        program, params, range(workload.runs), evaluate=jax.eval_shape
    )
    state = placed(state, state_shardings(mesh, state, workload.sft.train))
    if workload.sft.train == "lora":
        return Initial(graphdef, state, frozen, frozen)
    _, weights = jax.eval_shape(_decoder_states(program), state.trained, frozen)
    return Initial(graphdef, state, frozen, placed(weights, base_shardings(mesh, weights)))


def _program(workload: Workload) -> programs.Program:
    return programs.Program(workload.mesh, workload.config, workload.sft, workload.model)


def _decoder_states(program: programs.Program) -> Callable:
    """(trained, frozen) -> (adapters, weights) as they are sampled from."""
    return functools.partial(decoder_states, options=programs.step_options(program))


def batch_of(mesh: Mesh | AbstractMesh, shape: PackedShape) -> Batch:
    """One step's micro-batches of a shape as `data.packing.pack_step` makes them."""
    place = batch_sharding(mesh)

    def array(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(
            (shape.micro_batches, shape.blocks, shape.micro_rows, *dims), dtype, sharding=place
        )

    row, response = array(shape.length), array(shape.responses)
    return Batch(
        runs=array(),
        row_numbers=array(),
        tokens=row,
        segment_ids=row,
        positions=row,
        segment_index=array(shape.segments, shape.segment_length),
        response_index=response,
        response_target=response,
        response_weight=array(shape.responses, dtype=jnp.float32),
    )


def lower_step(workload: Workload) -> jax.stages.Lowered:
    """The training step that `run` compiles."""
    begun = initial(workload)
    step = programs.train_step(
        _program(workload), begun.graphdef, begun.state, begun.frozen, workload.shapes[-1].shared
    )
    return step.lower(
        begun.state,
        begun.frozen,
        tuple(batch_of(workload.mesh, shape) for shape in workload.shapes),
    )


def lower_sampler(workload: Workload, work: Sampling) -> Sampler:
    """The sampling programs of a supervised workload."""
    begun = initial(workload)
    states = begun.state.trained, begun.frozen
    if workload.sft.train == "full":
        states = _outputs(jax.jit(_decoder_states(_program(workload))).lower(*states))
    return lower_sampling((begun.graphdef, *states), workload.mesh, work)


def lower_sampling(decoder: tuple, mesh: Mesh, work: Sampling) -> Sampler:
    """The prefill of the longest prompts and the decoding loop that `sampling.sampler.sample`
    calls, in the order in which it calls them. `decoder`: (graphdef, adapters, weights).
    """
    plan, dtype, options = work.plan, work.options.dtype, work.options
    with jax.set_mesh(mesh) if options.mesh else contextlib.nullcontext():
        layers = _outputs(sampling.separate_layers.lower(*decoder, whole=options.whole_layers))
        slots = _outputs(
            sampling.start_slots.lower(*decoder, plan.prefix, shape=plan.shape, dtype=dtype)
        )
        longest = [
            sorted(queue, key=lambda group: max(map(len, group.prompts)))[-plan.prefill_prompts :]
            for queue in plan.queues
        ]
        refill = make_refill(plan, [list(enumerate(groups)) for groups in longest], work.requests)
        prefill = sampling.prefill.lower(
            *decoder, slots, refill, prefix=len(plan.prefix), dtype=dtype
        )
        wanted, stop_ids = (
            np.zeros(len(plan.queues), np.int32),
            np.array(options.stop_ids, np.int32),
        )
        decode = sampling.decode.lower(
            *decoder, layers, slots, wanted, stop_ids, dtype=dtype, candidates=options.candidates
        )
    return Sampler(prefill, decode, slots, layers)


def compile_step(workload: Workload) -> Compiled | TooLarge:
    """The compiled training step, at the cost of an average one: empty micro-batches, which it
    skips, are none. Its loops over blocks of the experts' tokens turn as if all experts got equally
    many.
    """
    found = compile_lowered(lambda: lower_step(workload), _expert_blocks(workload))
    if isinstance(found, TooLarge):
        return found
    used, most = (
        [packed.micro_batches for packed in workload.packing],
        [shape.micro_batches for shape in workload.shapes],
    )
    share = positions_of(used, workload.shapes) / positions_of(most, workload.shapes)
    return dataclasses.replace(found, cost=found.cost.times(share))


def _expert_blocks(workload: Workload) -> int:
    """Blocks of tokens by expert that each device has in a layer and micro-batch (`models.moe`),
    the most of any shape; 1 without experts.
    """
    config, mesh = workload.config, workload.mesh
    tokens = max(shape.positions for shape in workload.shapes) // (
        mesh.shape["run"] * mesh.shape["data"]
    )
    return max(1, -(-tokens * config.experts_per_token // BLOCK))


def compile_lowered(
    lower: Callable[[], jax.stages.Lowered], open_turns: int = 1
) -> Compiled | TooLarge:
    """Compiles and reads what the compiler tells, loops that end by the data turning `open_turns`
    times. A program that does not fit the devices is a result too.
    """
    started = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(str(error))
    found = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )
    return Compiled(
        program_cost(compiled.as_text(), open_turns), memory, time.monotonic() - started
    )


def _too_large(message: str) -> TooLarge:
    """XLA:TPU says "Used 18.51G of 15.75G hbm" or "... required for HLO temporaries (37.29G)
    exceeds available HBM (15.75G)"; its G is 2^30.
    """
    found = re.search(
        r"(?:Used |\()([\d.]+)([KMG])\)?(?: of | exceeds available HBM \()([\d.]+)([KMG])", message
    )
    if not found:
        return TooLarge(0.0, 0.0)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    return TooLarge(
        float(found.group(1)) * unit[found.group(2)], float(found.group(3)) * unit[found.group(4)]
    )


def per_device(tree) -> float:
    """Bytes of a tree's arrays (jax.ShapeDtypeStruct with shardings) on one device."""
    return float(
        sum(
            np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64) * item_bytes(x.dtype)
            for x in jax.tree.leaves(tree)
        )
    )


def _outputs(lowered: jax.stages.Lowered):
    """What a program returns, as shapes with the shardings that the compiler gives them."""
    return placed(lowered.out_info, lowered.compile().output_shardings)


def placed(tree, shardings):
    """`tree` as jax.ShapeDtypeStruct of these shardings (one for each leaf)."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )
