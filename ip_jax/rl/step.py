"""The policy-gradient step: pure, one program for all runs of a kind; one call is one iteration,
with all its epochs and minibatches.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.estimators import kl_estimate, policy_loss
from ip_jax.rl.policy import completion_log_probs, completion_stats
from ip_jax.rl.rows import Rows
from ip_jax.training.schedules import Schedule
from ip_jax.training.state import TrainState
from ip_jax.training.update import apply_gradients, compile_step


@dataclasses.dataclass(frozen=True)
class RlOptions:
    """What is code rather than data in a step. `dtype` is the activations'; `remat` names what the
    backward pass keeps (`models.remat`), `kernel` attention's (`models.kernels`).
    """

    algorithm: Algorithm
    schedule: Schedule
    dtype: str = "float32"
    remat: str = "products"
    kernel: str = "xla"


@flax.struct.dataclass
class RlBatch:
    """One iteration's rows. `policy`: under the training prompt. `kl`: under the generation prompt,
    for a penalty gg in the loss. `auxiliary`: the samples that a supervised loss copies, under the
    training prompt.
    """

    policy: Rows
    kl: Rows | None = None
    auxiliary: Rows | None = None


def rl_step(
    state: TrainState, frozen, batch: RlBatch, *, graphdef, options: RlOptions
) -> tuple[TrainState, dict]:
    """One iteration of R runs: (state, frozen weights, batch) -> (state, metrics [R], those of the
    last update; means are over tokens that count in their term of the loss, and NaN where none
    does).

    The weights of tokens travel with them and sum up to a run's loss, so the result does not depend
    on micro-batches, padding or devices. A run whose loss or gradient is not finite is frozen from
    then on. `loss` is the surrogate's value: what counts is its gradient (of a selection, or of
    plain with weights that are fixed, the value itself says nothing).
    """
    algorithm = options.algorithm

    def update(state: TrainState, batch: RlBatch):
        gradients, sums = rl_gradients(
            state.trained, frozen, batch, graphdef=graphdef, options=options
        )
        # weights sum up over all of them
        gradients, loss = jax.tree.map(
            lambda x: x * algorithm.minibatches, (gradients, sums["loss"])
        )
        state, metrics = apply_gradients(
            state, gradients, loss, options.schedule, algorithm.max_grad_norm, algorithm.betas
        )
        return state, metrics | sums | {"loss": loss}

    if algorithm.updates == 1:
        state, metrics = update(state, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(algorithm.minibatches, -1, *x.shape[1:]), batch)

        def in_turn(state, i):
            return update(state, jax.tree.map(lambda x: x[i % algorithm.minibatches], parts))

        state, metrics = jax.lax.scan(in_turn, state, jnp.arange(algorithm.updates))
        metrics = jax.tree.map(lambda x: x[-1], metrics)
    counted = {"entropy": "tokens", "ratio": "tokens", "clipped": "tokens", "kl": "kl_tokens"}
    means = {
        name: metrics[name] / metrics[tokens] for name, tokens in counted.items() if name in metrics
    }
    return state.replace(step=state.step + 1), metrics | means


def rl_gradients(trained, frozen, batch: RlBatch, *, graphdef, options: RlOptions) -> tuple:
    """(gradients of the runs' losses, sums {name: [R]}) of one update's rows, all terms of the loss
    together.
    """
    estimator, kl, how = (
        options.algorithm.estimator_of_update,
        options.algorithm.kl,
        (options.dtype, options.remat, options.kernel),
    )

    def loss_sum(trained, rows: Rows, term: str):
        decoder, signal = nnx.merge(graphdef, trained, frozen), rows.signal
        mask = (jnp.arange(rows.tokens.shape[-1]) < rows.length[..., None]) & (signal.weight > 0)

        def per_run(x):
            return jnp.sum(jnp.where(mask, x, 0), axis=(1, 2, 3))

        if term == "auxiliary":
            loss = per_run(
                -estimator.auxiliary.factor
                * signal.weight
                * completion_log_probs(decoder, rows, *how)
            )
            return loss.sum(), {"loss": loss, "auxiliary": loss}
        log_probs, entropy = completion_stats(decoder, rows, *how)
        divergence = kl_estimate(log_probs, signal.reference_log_probs, kl.estimator)
        if term == "kl":
            loss = per_run(kl.beta * signal.weight * divergence)
            return loss.sum(), {"loss": loss, "kl": per_run(divergence), "kl_tokens": per_run(1.0)}
        loss, ratio, clipped = policy_loss(
            log_probs, signal.old_log_probs, signal.advantage, mask, estimator
        )
        sums = {
            "entropy": entropy,
            "ratio": ratio,
            "clipped": clipped,
            "surviving": signal.weight * signal.advantage * ~clipped,
            "tokens": mask,
        }
        loss -= options.algorithm.entropy_bonus * entropy
        if options.algorithm.penalty_shares_rows:
            sums |= {"kl": divergence, "kl_tokens": mask}
            loss += kl.beta * divergence
        sums = {
            name: per_run(x.astype(jnp.float32))
            for name, x in (sums | {"loss": signal.weight * loss}).items()
        }
        return sums["loss"].sum(), sums  # the gradient of the sum over runs is each run's own

    gradients, sums = jax.tree.map(jnp.zeros_like, trained), {}
    for term in ("policy", "kl", "auxiliary"):
        rows = getattr(batch, term)
        if rows is not None:
            of_term, more = _accumulate(functools.partial(loss_sum, term=term), trained, rows)
            gradients = jax.tree.map(jnp.add, gradients, of_term)
            sums |= {name: sums.get(name, 0) + value for name, value in more.items()}
    return gradients, sums


def _accumulate(loss_sum, trained, rows: Rows):
    """(gradients, sums) of `loss_sum(trained, rows) -> (scalar, sums {name: [R]})` over
    micro-batches; those in which nothing counts cost nothing.
    """
    gradient = jax.value_and_grad(loss_sum, has_aux=True)
    _, sums = jax.eval_shape(loss_sum, trained, jax.tree.map(lambda x: x[0], rows))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (trained, sums))

    def one(total, micro: Rows):
        def add(total):
            (_, sums), gradients = gradient(trained, micro)
            return jax.tree.map(jnp.add, total, (gradients, sums))

        return jax.lax.cond(jnp.any(micro.signal.weight > 0), add, lambda total: total, total), None

    return jax.lax.scan(one, zero, rows)[0]


def compile_rl_step(graphdef, options: RlOptions, *shardings):
    """The jitted step (see `update.compile_step`)."""
    return compile_step(functools.partial(rl_step, graphdef=graphdef, options=options), *shardings)
