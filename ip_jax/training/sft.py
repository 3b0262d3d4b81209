"""The supervised step: pure, one program for all runs, per-run losses normalised once over a run's
whole batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ip_jax.models.decoder import packed_attend
from ip_jax.models.moe import load_balancing_loss
from ip_jax.models.run_rows import of_each_row, sum_of_each_run
from ip_jax.training.losses import cross_entropy_sum, response_hidden
from ip_jax.training.schedules import Schedule
from ip_jax.training.state import Batch, TrainState
from ip_jax.training.update import apply_gradients, compile_step, per_run


@dataclasses.dataclass(frozen=True)
class SftOptions:
    """What is code rather than data in a step: runs that differ here need another program.

    `train`: "lora" trains adapters over a frozen base, "full" every weight of one run; it computes
    with the weights in `weights` and keeps them in float32. `dtype` is the activations'; `remat`
    names what the backward pass keeps (`models.remat`). `router_aux_loss_coef` of the load
    balancing loss of a mixture of experts is added to the loss; 0 leaves it out. `shared` is the
    number of tokens with which all segments of a row begin (see data.packing), `kernel` attention's
    (see models.kernels).
    """

    schedule: Schedule
    dropout: float = 0.0
    max_grad_norm: float | None = None
    dtype: str = "float32"
    remat: str = "products"
    train: str = "lora"
    weights: str = "float32"
    router_aux_loss_coef: float = 0.0
    shared: int = 0
    kernel: str = "xla"


def decoder_states(trained, frozen, options: SftOptions) -> tuple:
    """(adapters, weights) of the decoder, as `nnx.merge(graphdef, *these)` and `sample(graphdef,
    *these, ...)` take them.
    """
    if options.train == "lora":
        return trained, frozen
    return frozen, jax.tree.map(lambda weight: weight[0].astype(options.weights), trained)


def sft_step(
    state: TrainState, frozen, batches: tuple[Batch, ...], *, graphdef, options: SftOptions
) -> tuple[TrainState, dict]:
    """One optimizer step of R runs on micro-batches of one or several shapes: (state, frozen
    weights, a batch of each shape) -> (state, metrics [R]).

    Only response tokens count. Sums and weights travel separately and are divided once, so the
    result does not depend on micro-batch size, padding, packing or devices (but for the router's
    loss, which is one of micro-batches). A run whose loss or gradient is not finite is frozen from
    then on.
    """
    runs, blocks = len(state.alive), batches[0].runs.shape[1]

    def loss_sum(trained, micro: Batch):
        decoder = nnx.merge(graphdef, *decoder_states(trained, frozen, options))
        of_run = functools.partial(sum_of_each_run, runs=micro.runs, count=runs)
        hidden, emitted = decoder(
            micro.tokens,
            micro.positions,
            packed_attend(
                micro.segment_ids,
                micro.positions,
                micro.segment_index,
                options.shared,
                options.kernel,
            ),
            # else a block's rows have one adapter
            dtype=jnp.dtype(options.dtype),
            remat=options.remat,
            runs=micro.runs if runs > blocks else None,
            dropout=(options.dropout, dropout_keys(state, micro)) if options.dropout else None,
        )
        losses = of_run(
            cross_entropy_sum(
                response_hidden(hidden, micro.response_index),
                decoder.vocabulary(),
                micro.response_target,
                micro.response_weight,
                softcap=decoder.config.logit_softcap,
                train_vocabulary=options.train == "full",
            )
        )
        balance = jnp.zeros_like(losses)
        if options.router_aux_loss_coef:  # of a micro-batch, and weighed as its responses are
            balance = load_balancing_loss(
                emitted.router, micro.segment_ids > 0, decoder.config.experts_per_token, of_run
            )
            balance *= of_run(micro.response_weight.sum(axis=-1))
        total = losses + options.router_aux_loss_coef * balance
        # the gradient of the sum over runs is each run's own gradient
        return total.sum(), (losses, balance)

    def accumulate(total, micro: Batch):
        def add(total):
            (_, sums), gradients = jax.value_and_grad(loss_sum, has_aux=True)(state.trained, micro)
            return jax.tree.map(jnp.add, total, (sums, gradients))

        # empty ones cost nothing
        return (
            jax.lax.cond(jnp.any(micro.response_weight > 0), add, lambda total: total, total),
            None,
        )

    total = (
        (jnp.zeros_like(state.learning_rate),) * 2,
        jax.tree.map(jnp.zeros_like, state.trained),
    )
    for batch in batches:
        total, _ = jax.lax.scan(accumulate, total, batch)
    (losses, balance), gradients = total
    of_runs = jax.vmap(functools.partial(sum_of_each_run, count=runs))
    tokens = sum(
        of_runs(batch.response_weight.sum(axis=-1), batch.runs).sum(axis=0) for batch in batches
    )
    loss = losses / jnp.maximum(tokens, 1)
    gradients = jax.tree.map(lambda g: g / per_run(jnp.maximum(tokens, 1), g), gradients)
    state, metrics = apply_gradients(
        state, gradients, loss, options.schedule, options.max_grad_norm
    )
    metrics |= {"loss": loss, "response_tokens": tokens}
    if options.router_aux_loss_coef:
        metrics["router_aux_loss"] = balance / jnp.maximum(tokens, 1)
    return state.replace(step=state.step + 1), metrics


def dropout_keys(state: TrainState, micro: Batch) -> jax.Array:
    """A key for each row [blocks * B]: by its run's seed, the step and its number among the run's
    rows. Neighbours have no part in it.
    """

    def key(seed, number):
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step), number
        )

    return jax.vmap(key)(of_each_row(state.dropout_seed, micro.runs), micro.row_numbers.reshape(-1))


def compile_sft_step(graphdef, options: SftOptions, *shardings):
    """The jitted step (see `update.compile_step`)."""
    return compile_step(functools.partial(sft_step, graphdef=graphdef, options=options), *shardings)
