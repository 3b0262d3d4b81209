"""Gradient coupling: how far an update on a completion under one prompt also moves the policy under
another, to first order.

kappa(p, q) = cos(grad log pi(y | p), grad log pi(y | q)), with gradients by the trained parameters.
At 1 an update that makes y likelier under p makes it likelier under q as if it had been trained
there, at 0 it leaves q alone. While LoRA's B is zero (step 0) so is the gradient by A, and B's
alone counts. Dims: R runs, Q groups, G samples of a group, N chosen samples, C completion slots, X
prompt slots.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ip_jax.rl.batch import Rollout
from ip_jax.rl.diagnostics import CORRECT, HACK, LABELS
from ip_jax.rl.policy import completion_log_probs
from ip_jax.rl.rows import Prompts, Rows, Samples, lay_out

SAMPLES = 8  # of a label, for each run
COUPLED = (HACK, CORRECT)


def coupling_rows(rollout: Rollout, neutral: Prompts, count: int = SAMPLES) -> Rows:
    """The first `count` valid hacks of each run, then as many correct samples, in the order of the
    rollout, each under its training prompt and under `neutral`, x_0 of each group: leaves [N, 2, R,
    1, 1, ...]. A run with fewer of them has empty completions in their place.
    """
    valid = rollout.valid & (rollout.samples.length > 0)
    of_labels = [
        _first_of(valid & (rollout.labels == label), rollout, neutral, count) for label in COUPLED
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_labels)


def _first_of(chosen: Bool[Array, "R Q G"], rollout: Rollout, neutral: Prompts, count: int) -> Rows:
    runs, samples = len(chosen), rollout.samples
    width = max(rollout.training.tokens.shape[-1], neutral.tokens.shape[-1])
    flat = chosen.reshape(runs, -1)
    index = jnp.argsort(~flat, axis=1, stable=True)[:, :count]
    found = jnp.take_along_axis(flat, index, axis=1)[..., None]  # [R, N, 1]

    def pick(x, index):
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    tokens, length = (
        pick(x.reshape(runs, -1, *x.shape[3:]), index)[:, :, None]
        for x in (samples.tokens, samples.length)
    )
    picked = Samples(tokens, jnp.where(found, length, 0), jnp.zeros(tokens.shape, jnp.float32))

    def under(prompts: Prompts) -> Rows:
        # one prompt a group, or one a completion
        own = index // (flat.shape[1] // prompts.length.shape[1])
        tokens = jnp.pad(
            pick(prompts.tokens, own), ((0, 0), (0, 0), (0, width - prompts.tokens.shape[-1]))
        )
        return lay_out(
            Prompts(tokens, pick(prompts.length, own)),
            picked,
            rollout.temperature,
            None,
            index.shape[1],
        )

    return jax.tree.map(
        lambda *pair: jnp.stack(pair, axis=1), under(rollout.training), under(neutral)
    )


def coupling(
    trained,
    frozen,
    rows: Rows,
    *,
    graphdef,
    dtype: str = "float32",
    remat: str = "none",
    kernel: str = "xla",
) -> Float[Array, "R N"]:
    """kappa of every sample of `coupling_rows`, NaN for an empty one and where a gradient is zero;
    all runs side by side, one sample at a time.

    log pi is taken at the sampling temperature. Two passes with a gradient for each sample that
    some run has.
    """

    def gradient(micro: Rows):
        def log_prob(trained):
            return completion_log_probs(
                nnx.merge(graphdef, trained, frozen), micro, dtype, remat, kernel
            ).sum()

        return jax.grad(log_prob)(trained)  # of the sum over runs: each run's own

    def of_sample(pair: Rows):
        gradients = jax.lax.map(gradient, pair)
        (pp, pq), (_, qq) = ([_dot(gradients, i, j) for j in (0, 1)] for i in (0, 1))
        defined = (pp > 0) & (qq > 0)
        return jnp.where(
            defined,
            pq / jnp.sqrt(jnp.where(defined, pp, 1)) / jnp.sqrt(jnp.where(defined, qq, 1)),
            jnp.nan,
        )

    def one(pair: Rows):
        nothing = jnp.full(pair.length.shape[1], jnp.nan, jnp.float32)
        return jax.lax.cond(jnp.any(pair.length > 0), of_sample, lambda _: nothing, pair)

    return jax.lax.map(one, rows).T


def _dot(gradients, i: int, j: int) -> Float[Array, " R"]:
    """Of each run's gradients under two of the prompts, over all parameters [2, R, ...]."""
    return sum(
        jnp.sum(g[i] * g[j], axis=tuple(range(1, g.ndim - 1)), dtype=jnp.float32)
        for g in jax.tree.leaves(gradients)
    )


def coupling_metrics(kappa: Float[Array, "R N"]) -> dict[str, Float[Array, " R"]]:
    """{quantity: [R]} named as in `evals.rl_tables`: the mean over each run's samples of a label,
    NaN where it has none.
    """
    parts = jnp.split(kappa, len(COUPLED), axis=1)
    return {
        f"coupling_{LABELS[label]}": jnp.nanmean(part, axis=1)
        for label, part in zip(COUPLED, parts, strict=True)
    }
