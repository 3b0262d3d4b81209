"""The programs of a supervised experiment: what `run` executes on arrays and `ip-jax plan` compiles from shapes alone.

Both call these functions, so that what is planned is what runs.
"""
import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig
from ip_jax.models.lora import init_lora
from ip_jax.sampling.sampler import SamplerOptions
from ip_jax.settings.experiment import EvalConfig, ModelConfig, SftConfig
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import base_shardings, batch_sharding, replicated, state_shardings
from ip_jax.training.state import TrainState, init_state


def call(function: Callable, *arguments):
    """function(*arguments): computes. `jax.eval_shape` in its place gives the shapes alone."""
    return function(*arguments)


def initial_state(config: DecoderConfig, params: dict, sft: SftConfig, seeds: Sequence[int], evaluate: Callable = call) -> tuple:
    """(graphdef, TrainState at step 0, base): for each seed a fresh adapter over `params`, whose leaves may be jax.ShapeDtypeStruct."""
    runs, numbers = len(seeds), jnp.array(seeds)
    lora = evaluate(functools.partial(init_lora, config=config, lora=sft.lora), numbers)
    graphdef, lora, base = split_decoder(config, params, lora, sft.lora)
    state: TrainState = evaluate(init_state, lora, jnp.full(runs, sft.learning_rate), jnp.full(runs, sft.weight_decay), numbers)
    return graphdef, state, base


def train_step(mesh: Mesh, graphdef, state: TrainState, base, sft: SftConfig, model: ModelConfig):
    """The jitted step (state, base, batch) -> (state, metrics), its shardings pinned to the mesh."""
    options = SftOptions(sft.schedule, sft.lora.dropout, sft.max_grad_norm, model.activations, sft.remat)
    return compile_sft_step(graphdef, options, state_shardings(mesh, state), base_shardings(mesh, base), batch_sharding(mesh), replicated(mesh))


def sampler_options(mesh: Mesh, model: ModelConfig, evaluation: EvalConfig, stop_ids: tuple[int, ...], room: tuple[int, int]) -> SamplerOptions:
    """How an evaluation samples; `room`: (prompt tokens, new tokens) that every sweep of its set has at least."""
    return SamplerOptions(stop_ids, evaluation.slots, room=room, dtype=model.activations, mesh=mesh)
