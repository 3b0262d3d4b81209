"""The programs of a supervised experiment: what `run` executes on arrays and `ip-jax plan` compiles
from shapes alone.

Both call these functions, so that what is planned is what runs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ip_jax.data.packing import ROW_QUANTUM, RowRules
from ip_jax.lab.experiment import EvalConfig, ModelConfig, SftConfig
from ip_jax.models import kernels
from ip_jax.models.chips import chip_of
from ip_jax.models.decoder import split_decoder
from ip_jax.models.expert_kernel import choose_experts
from ip_jax.models.families import DecoderConfig, param_shapes
from ip_jax.models.lora import init_lora
from ip_jax.models.peft import Adapter, replace_runs
from ip_jax.sampling.plan import buckets_up_to
from ip_jax.sampling.sampler import SamplerOptions
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import base_shardings, batch_sharding, replicated, state_shardings
from ip_jax.training.state import TrainState, full_weights, init_state

# of a device's memory: beside them lie its part of the base, adapters, Adam's moments and the
# caches
WHOLE_LAYERS = 0.5


@dataclasses.dataclass(frozen=True)
class Program:
    """What the code of a training program depends on, its runs and its data aside."""

    mesh: Mesh
    config: DecoderConfig
    sft: SftConfig
    model: ModelConfig


def call(function: Callable, *arguments):
    """function(*arguments): computes. `jax.eval_shape` in its place gives the shapes alone."""
    return function(*arguments)


def initial_state(
    program: Program,
    params: dict,
    seeds: Sequence[int],
    starts: Sequence[Adapter | None] = (),
    evaluate: Callable = call,
) -> tuple:
    """(graphdef, TrainState at step 0 on the mesh, frozen weights): for each seed its start or a
    fresh adapter over `params`, or, with full training, these weights as the one run's own and
    nothing frozen. The leaves of `params` may be jax.ShapeDtypeStruct.
    """
    sft, runs, numbers, full = (
        program.sft,
        len(seeds),
        jnp.array(seeds),
        program.sft.train == "full",
    )
    adapters = (
        None
        if full
        else evaluate(functools.partial(init_lora, config=program.config, lora=sft.lora), numbers)
    )
    config = with_experts(program.mesh, program.config, program.model)
    graphdef, adapters, weights = split_decoder(
        config, params, adapters and replace_runs(adapters, starts), sft.lora
    )

    def start(trained) -> TrainState:
        trained = full_weights(trained) if full else trained
        return init_state(
            trained, jnp.full(runs, sft.learning_rate), jnp.full(runs, sft.weight_decay), numbers
        )

    trained, frozen = (weights, adapters) if full else (adapters, weights)
    places = state_shardings(program.mesh, jax.eval_shape(start, trained), sft.train)
    return graphdef, evaluate(jax.jit(start, out_shardings=places), trained), frozen


def with_experts(
    mesh: Mesh | AbstractMesh, config: DecoderConfig, model: ModelConfig
) -> DecoderConfig:
    """`config` with the products of a mixture of experts as the experiment wants them. Raises
    ValueError as `expert_kernel.choose_experts`.
    """
    chosen = choose_experts(
        model.experts, _device(mesh), config, model.weights, mesh.shape["tensor"]
    )
    return dataclasses.replace(config, experts_kernel=chosen)


def attention_kernel(program: Program) -> str:
    """The kernel of `models.kernels` that attends over packed rows, or "xla". Raises as
    `chosen_kernel`.
    """
    return chosen_kernel(program.mesh, program.config, program.model)


def chosen_kernel(
    mesh: Mesh | AbstractMesh, config: DecoderConfig, model: ModelConfig, longest: int | None = None
) -> str:
    """The kernel of `models.kernels` that training's attention runs on, or "xla": one for all
    layers. `longest`: the most positions of a prompt and one of the completions that share it, None
    for packed rows.

    Raises ValueError where the config names a kernel that the devices or the model's layers do not
    allow.
    """
    heads = config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim

    def window(kind):
        return None if longest and kind.window and kind.window >= longest else kind.window

    cases = [
        kernels.AttentionCase(
            model.weights,
            kernels.ROW_QUANTUM,
            *heads,
            window(kind),
            kind.softcap,
            mesh.shape["tensor"],
            shared_prompt=longest is not None,
        )
        for kind in config.attention
    ]
    chosen = {kernels.choose_attention(model.attention, _device(mesh), case) for case in cases}
    return chosen.pop() if len(chosen) == 1 else "xla"


def _device(mesh: Mesh | AbstractMesh):
    """One of the mesh's devices, or what an abstract mesh is made of."""
    return mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]


def row_rules(program: Program) -> RowRules:
    """How rows are to be packed for the kernel of attention. A shared prefix is XLA's alone, and
    the router's loss counts each example's own tokens.
    """
    kernel = attention_kernel(program)
    quantum = (
        kernels.ROW_QUANTUM
        if _device(program.mesh).platform == "tpu" or kernel in ("splash", "pallas")
        else ROW_QUANTUM
    )
    shared = kernel == "xla" and not program.sft.router_aux_loss_coef
    return RowRules(program.mesh.shape["data"], quantum, shared, blocks=program.mesh.shape["run"])


def step_options(program: Program, shared: int = 0, kernel: str = "xla") -> SftOptions:
    """The options of the step; `shared` tokens begin all segments of a row."""
    sft, model = program.sft, program.model
    return SftOptions(
        sft.schedule,
        sft.lora.dropout if sft.train == "lora" else 0.0,
        sft.max_grad_norm,
        model.activations,
        sft.remat,
        sft.train,
        model.weights,
        sft.router_aux_loss_coef,
        shared,
        kernel,
    )


def train_step(program: Program, graphdef, state: TrainState, frozen, shared: int):
    """The jitted step (state, frozen, batch) -> (state, metrics), its shardings pinned to the
    mesh.
    """
    mesh, options = program.mesh, step_options(program, shared, attention_kernel(program))
    places = (
        state_shardings(mesh, state, program.sft.train),
        base_shardings(mesh, frozen),
        batch_sharding(mesh),
        replicated(mesh),
    )
    return compile_sft_step(graphdef, options, *places)


def sampler_options(
    mesh: Mesh | AbstractMesh,
    config: DecoderConfig,
    model: ModelConfig,
    evaluation: EvalConfig,
    stop_ids: tuple[int, ...],
    room: tuple[int, int],
) -> SamplerOptions:
    """How an evaluation samples; `room`: (prompt tokens, new tokens) that every sweep of its set
    has at least.
    """
    return SamplerOptions(
        stop_ids,
        evaluation.slots,
        prompt_buckets=buckets_up_to(config.max_positions),
        room=room,
        dtype=model.activations,
        mesh=mesh,
        whole_layers=layers_fit_whole(mesh, config, model),
    )


def layers_fit_whole(mesh: Mesh | AbstractMesh, config: DecoderConfig, model: ModelConfig) -> bool:
    """Whether devices sample with whole layers: a device's part of them by tensor takes at most
    WHOLE_LAYERS of the memory that its maker publishes.
    """
    chip = chip_of(_device(mesh).device_kind)
    whole = sum(
        math.prod(shape)
        for path, shape in param_shapes(config).items()
        if path[0] == "layers" and "expert" not in path[1]
    )
    bits = {"int8": 8, "nf4": 4, None: 8 * jnp.dtype(model.weights).itemsize}[model.quantised]
    return (
        chip is not None and whole * bits / 8 / mesh.shape["tensor"] <= WHOLE_LAYERS * chip.memory
    )
