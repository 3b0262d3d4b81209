"""Gradient coupling: how far an update on a completion under one prompt also moves the policy under another, to first order.

kappa(p, q) = cos(grad log pi(y | p), grad log pi(y | q)), with gradients by the trained parameters. At 1 an update that makes y likelier under p
makes it likelier under q as if it had been trained there, at 0 it leaves q alone. While LoRA's B is zero (step 0) so is the gradient by A, and B's alone
counts. Dims: R runs, Q groups, G samples of a group, N chosen samples, C completion slots, X prompt slots.
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


def coupling_rows(rollout: Rollout, neutral: Prompts, count: int = SAMPLES) -> tuple[Rows, Rows]:
    """The first `count` valid hacks of each run, then as many correct samples, in the order of the rollout: under the training prompts, and under
    `neutral`, x_0 of each group. One sample a micro-batch [N, R, 1, 1, C]; a run with fewer of them has empty completions in their place.
    """
    valid = rollout.valid & (rollout.samples.length > 0)
    of_labels = [_first_of(valid & (rollout.labels == label), rollout, neutral, count) for label in COUPLED]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_labels)


def _first_of(chosen: Bool[Array, "R Q G"], rollout: Rollout, neutral: Prompts, count: int) -> tuple[Rows, Rows]:
    runs, samples = len(chosen), rollout.samples
    flat = chosen.reshape(runs, -1)
    index = jnp.argsort(~flat, axis=1, stable=True)[:, :count]
    found = jnp.take_along_axis(flat, index, axis=1)[..., None]  # [R, N, 1]
    pick = lambda x, index: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)  # noqa: E731
    tokens, length = (pick(x.reshape(runs, -1, *x.shape[3:]), index)[:, :, None] for x in (samples.tokens, samples.length))
    picked = Samples(tokens, jnp.where(found, length, 0), jnp.zeros(tokens.shape, jnp.float32))

    def under(prompts: Prompts) -> Rows:
        own = index // (flat.shape[1] // prompts.length.shape[1])  # one prompt a group, or one a completion
        return lay_out(Prompts(pick(prompts.tokens, own), pick(prompts.length, own)), picked, rollout.temperature, None, index.shape[1])

    return under(rollout.training), under(neutral)


def coupling(trained, frozen, rows: tuple[Rows, Rows], *, graphdef, dtype: str = "float32", remat: str = "none") -> Float[Array, "R N"]:
    """kappa of every sample of `coupling_rows`, NaN for an empty one and where a gradient is zero; all runs side by side, one sample at a time.

    log pi is taken at the sampling temperature. Two passes with a gradient for each sample that some run has.
    """

    def log_prob(trained, micro: Rows):
        return completion_log_probs(nnx.merge(graphdef, trained, frozen), micro, dtype, remat).sum()  # the gradient of the sum is each run's own

    def of_sample(under: tuple[Rows, Rows]):
        p, q = (jax.grad(log_prob)(trained, micro) for micro in under)
        norms = jnp.sqrt(_dot(p, p)), jnp.sqrt(_dot(q, q))
        defined = (norms[0] > 0) & (norms[1] > 0)
        cosine = _dot(p, q) / jnp.where(defined, norms[0], 1) / jnp.where(defined, norms[1], 1)
        return jnp.where(defined, cosine, jnp.nan)

    def one(under: tuple[Rows, Rows]):
        nothing = jnp.full(under[0].length.shape[0], jnp.nan, jnp.float32)
        return jax.lax.cond(jnp.any(under[0].length > 0), of_sample, lambda _: nothing, under)

    return jax.lax.map(one, rows).T


def _dot(p, q) -> Float[Array, " R"]:
    """Of each run's gradients, over all parameters."""
    return sum(jnp.sum(a * b, axis=tuple(range(1, a.ndim)), dtype=jnp.float32) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True))


def coupling_metrics(kappa: Float[Array, "R N"]) -> dict[str, Float[Array, " R"]]:
    """{quantity: [R]} named as in `evals.rl_tables`: the mean over each run's samples of a label, NaN where it has none."""
    parts = jnp.split(kappa, len(COUPLED), axis=1)
    return {f"coupling_{LABELS[label]}": jnp.nanmean(part, axis=1) for label, part in zip(COUPLED, parts, strict=True)}
