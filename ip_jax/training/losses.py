"""Cross-entropy of chosen positions without [B, T, V] logits: the gradient is made in the pass that makes the loss."""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import BY_ROW, EVERYWHERE, constrain
from ip_jax.models.products import product, row_sum

CHUNK_ROWS = 256  # rows of float32 logits alive at once


def response_hidden(hidden: Float[Array, "R B T D"], index: Int[Array, "R B P"]) -> Float[Array, "R B P D"]:
    """The hidden states that predict response tokens. The gather stays within a row, so rows may lie on different devices."""
    return jnp.take_along_axis(hidden, index[..., None], axis=2)


def cross_entropy_sum(
    hidden: Float[Array, "R B P D"], vocabulary: Float[Array, "V D"], targets: Int[Array, "R B P"], weights: Float[Array, "R B P"],
    *, train_vocabulary: bool = False,
) -> Float[Array, " R"]:
    """Sum over B and P of weight * -log p(target), for each run, in float32.

    No gradient reaches the vocabulary unless `train_vocabulary`. While it is frozen, a chunk's logits live only inside one loop body, where both the loss
    and d loss / d hidden = (softmax - onehot) @ vocabulary are taken from them, so that the backward pass has no product left to do.
    """
    if train_vocabulary:
        return -jnp.sum(token_log_probs(hidden, vocabulary, targets) * weights, axis=(1, 2))
    return _cross_entropy_sum(hidden, jax.lax.stop_gradient(vocabulary), targets, weights)


@functools.partial(jax.custom_vjp)
def _cross_entropy_sum(hidden, vocabulary, targets, weights):
    return _forward(hidden, vocabulary, targets, weights, with_gradient=False)[0]


def _forward(hidden, vocabulary, targets, weights, with_gradient: bool):
    runs, rows, length, _ = hidden.shape
    chunk = min(length, max(1, CHUNK_ROWS // (runs * rows)))
    pad = -length % chunk
    dtype = vocabulary.dtype

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 3))
        return jnp.moveaxis(a.reshape(runs, rows, -1, chunk, *a.shape[3:]), 2, 0)

    def chunk_loss(h, target, weight):
        logits = product("rbpd,vd->rbpv", h, vocabulary, dtype)
        largest = logits.max(axis=-1)
        log_normaliser = jnp.log(row_sum(jnp.exp(logits - largest[..., None]))[..., 0]) + largest
        target_logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        loss = jnp.sum((log_normaliser - target_logit) * weight, axis=(1, 2))
        if not with_gradient:
            return loss, None
        is_target = target[..., None] == jnp.arange(logits.shape[-1])
        pull = jnp.exp(logits - log_normaliser[..., None]) - is_target
        gradient = product("rbpv,vd->rbpd", pull * weight[..., None], vocabulary, dtype)
        return loss, constrain(gradient.astype(h.dtype), BY_ROW)

    def body(total, scanned):
        h, target, weight = (constrain(a, EVERYWHERE) for a in scanned)  # each device has all rows and its part of the vocabulary
        nothing = jnp.zeros_like(total), jnp.zeros_like(h) if with_gradient else None
        loss, gradient = jax.lax.cond(jnp.any(weight > 0), chunk_loss, lambda *_: nothing, h, target, weight)
        return total + loss, gradient

    total, gradient = jax.lax.scan(body, jnp.zeros(runs, jnp.float32), (split(hidden), split(targets), split(weights)))
    if with_gradient:
        gradient = jnp.moveaxis(gradient, 0, 2).reshape(runs, rows, length + pad, -1)[:, :, :length]
    return total, gradient


def _cross_entropy_fwd(hidden, vocabulary, targets, weights):
    return _forward(hidden, vocabulary, targets, weights, with_gradient=True)


def _cross_entropy_bwd(gradient, cotangent):
    return gradient * cotangent[:, None, None, None].astype(gradient.dtype), None, None, None


_cross_entropy_sum.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def token_log_probs(
    hidden: Float[Array, "R B P D"], vocabulary: Float[Array, "V D"], targets: Int[Array, "R B P"]
) -> Float[Array, "R B P"]:
    """log p(target) in float32 for each position, a row of logits at a time."""

    def row(scanned):
        h, target = scanned
        logits = product("rpd,vd->rpv", h, vocabulary, vocabulary.dtype)
        return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), target[..., None], axis=-1)[..., 0]

    return jnp.moveaxis(jax.lax.map(row, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0))), 0, 1)
