"""The vocabulary projection without [B, T, V] logits: cross-entropy, token log-probabilities and
entropies, a chunk of positions at a time.

`cross_entropy_sum` makes its gradient in the pass that makes the loss, which saves a product
(supervised training on a frozen vocabulary). `token_log_probs` makes a chunk's logits again in the
backward pass: it serves whatever weighs tokens by more than a constant (policy gradients), and a
vocabulary that is trained. Logits are z = cap(h v) / temperature, cap(x) = c tanh(x / c) (Gemma 2).
Dims: R runs, B rows, P positions, D model, V vocabulary, C positions of a chunk. On a mesh each
device has all rows of a chunk and its part of V.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import BY_ROW, EVERYWHERE, constrain
from ip_jax.models.products import product, row_sum

CHUNK_ROWS = 256  # rows of float32 logits alive at once


def response_hidden(
    hidden: Float[Array, "R B T D"], index: Int[Array, "R B P"]
) -> Float[Array, "R B P D"]:
    """The hidden states that predict response tokens. The gather stays within a row, so rows may
    lie on different devices.
    """
    return jnp.take_along_axis(hidden, index[..., None], axis=2)


def cross_entropy_sum(
    hidden: Float[Array, "R B P D"],
    vocabulary: Float[Array, "V D"],
    targets: Int[Array, "R B P"],
    weights: Float[Array, "R B P"],
    *,
    softcap: float | None = None,
    train_vocabulary: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> Float[Array, "R B"]:
    """Sum over P of weight * -log p(target), for each row, in float32.

    No gradient reaches the vocabulary unless `train_vocabulary`. While it is frozen, a chunk's
    logits live only inside one loop body, where both the loss and d loss / d hidden = (softmax -
    onehot) @ vocabulary are taken from them, so that the backward pass has no product left to do;
    weights then carry no gradient.
    """
    if train_vocabulary:
        log_probs = token_log_probs(
            hidden,
            vocabulary,
            targets,
            softcap=softcap,
            train_vocabulary=True,
            chunk_rows=chunk_rows,
        )
        return -jnp.sum(log_probs * weights, axis=-1)
    return _cross_entropy_sum(
        hidden, jax.lax.stop_gradient(vocabulary), targets, weights, softcap, chunk_rows
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy_sum(hidden, vocabulary, targets, weights, softcap, chunk_rows):
    return _forward(hidden, vocabulary, targets, weights, softcap, chunk_rows, with_gradient=False)[
        0
    ]


def _forward(hidden, vocabulary, targets, weights, softcap, chunk_rows, with_gradient: bool):
    split, join = _chunks(hidden.shape, chunk_rows)

    def chunk_loss(h, target, weight):
        logits = _capped_logits(h, vocabulary, softcap)
        log_normaliser = _log_normaliser(logits)
        target_logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        loss = jnp.sum((log_normaliser - target_logit) * weight, axis=-1)
        if not with_gradient:
            return loss, None
        is_target = _is_target(target, logits)
        pull = jnp.exp(logits - log_normaliser[..., None]) - is_target
        pull = _through_cap(pull * weight[..., None], logits, softcap)
        gradient = product("rbpv,vd->rbpd", pull, vocabulary, vocabulary.dtype)
        return loss, constrain(gradient.astype(h.dtype), BY_ROW)

    def body(total, scanned):
        # each device has all rows and its part of the vocabulary
        h, target, weight = (constrain(a, EVERYWHERE) for a in scanned)
        nothing = jnp.zeros_like(total), jnp.zeros_like(h) if with_gradient else None
        loss, gradient = jax.lax.cond(
            jnp.any(weight > 0), chunk_loss, lambda *_: nothing, h, target, weight
        )
        return total + loss, gradient

    total, gradient = jax.lax.scan(
        body,
        jnp.zeros(hidden.shape[:2], jnp.float32),
        (split(hidden), split(targets), split(weights)),
    )
    return total, join(gradient) if with_gradient else None


def _cross_entropy_fwd(hidden, vocabulary, targets, weights, softcap, chunk_rows):
    return _forward(hidden, vocabulary, targets, weights, softcap, chunk_rows, with_gradient=True)


def _cross_entropy_bwd(softcap, chunk_rows, gradient, cotangent):
    return gradient * cotangent[..., None, None].astype(gradient.dtype), None, None, None


_cross_entropy_sum.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def token_log_probs(
    hidden: Float[Array, "R B P D"],
    vocabulary: Float[Array, "V D"],
    targets: Int[Array, "R B P"],
    temperature: Float[Array, "R B"] | None = None,
    *,
    softcap: float | None = None,
    train_vocabulary: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> Float[Array, "R B P"]:
    """log p(target) of each position in float32, at each row's temperature (positive; None: 1).

    Its gradient reaches `hidden`, and the vocabulary where `train_vocabulary`; temperatures get
    none.
    """
    return _token_stats(
        hidden,
        _frozen_unless(train_vocabulary, vocabulary),
        targets,
        temperature,
        softcap,
        (False, train_vocabulary),
        chunk_rows,
    )[0]


def token_log_probs_and_entropy(
    hidden: Float[Array, "R B P D"],
    vocabulary: Float[Array, "V D"],
    targets: Int[Array, "R B P"],
    temperature: Float[Array, "R B"] | None = None,
    *,
    softcap: float | None = None,
    train_vocabulary: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Float[Array, "R B P"], Float[Array, "R B P"]]:
    """`token_log_probs` and, in nats, the entropy of the distribution that each target is drawn
    from; both have gradients.
    """
    return _token_stats(
        hidden,
        _frozen_unless(train_vocabulary, vocabulary),
        targets,
        temperature,
        softcap,
        (True, train_vocabulary),
        chunk_rows,
    )


def _frozen_unless(trained: bool, vocabulary):
    return vocabulary if trained else jax.lax.stop_gradient(vocabulary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_stats(
    hidden, vocabulary, targets, temperature, softcap, wanted: tuple[bool, bool], chunk_rows
):
    """(log-probabilities, entropies or None); `wanted` says whether entropies and the vocabulary's
    gradient are.
    """
    return _token_stats_fwd(hidden, vocabulary, targets, temperature, softcap, wanted, chunk_rows)[
        0
    ]


def _token_stats_fwd(hidden, vocabulary, targets, temperature, softcap, wanted, chunk_rows):
    split, join = _chunks(hidden.shape, chunk_rows)

    def body(_, scanned):
        h, target = (constrain(a, EVERYWHERE) for a in scanned)
        logits = _divided(_capped_logits(h, vocabulary, softcap), temperature)
        log_normaliser = _log_normaliser(logits)
        # a gather would fetch a vocabulary that is cut
        target_logit = row_sum(jnp.where(_is_target(target, logits), logits, 0))[..., 0]
        entropy = None
        if wanted[0]:
            log_p = logits - log_normaliser[..., None]
            # log Z - sum p z would multiply the rounding of p by large logits
            entropy = -row_sum(jnp.exp(log_p) * log_p)[..., 0]
        return None, jax.tree.map(
            lambda a: constrain(a, BY_ROW), (target_logit - log_normaliser, entropy, log_normaliser)
        )

    stats = jax.lax.scan(body, None, (split(hidden), split(targets)))[1]
    log_probs, entropy, log_normaliser = jax.tree.map(join, stats)
    return (log_probs, entropy), (hidden, vocabulary, targets, temperature, log_normaliser, entropy)


def _token_stats_bwd(softcap, wanted, chunk_rows, residuals, cotangents):
    hidden, vocabulary, targets, temperature, log_normaliser, entropy = residuals
    split, join = _chunks(hidden.shape, chunk_rows)

    def body(d_vocabulary, scanned):
        h, target, log_normaliser, entropy, (d_log_prob, d_entropy) = jax.tree.map(
            lambda a: constrain(a, EVERYWHERE), scanned
        )
        capped = _capped_logits(h, vocabulary, softcap)
        log_p = _divided(capped, temperature) - log_normaliser[..., None]
        p = jnp.exp(log_p)
        pull = (_is_target(target, log_p) - p) * d_log_prob[..., None]
        if wanted[0]:
            # d H / d z = -p (log p + H)
            pull -= p * (log_p + entropy[..., None]) * d_entropy[..., None]
        pull = _through_cap(_divided(pull, temperature), capped, softcap)
        d_h = product("rbpv,vd->rbpd", pull, vocabulary, vocabulary.dtype).astype(h.dtype)
        if wanted[1]:
            d_vocabulary += product("rbpv,rbpd->vd", pull, h, vocabulary.dtype)
        return d_vocabulary, constrain(d_h, BY_ROW)

    start = jnp.zeros(vocabulary.shape, jnp.float32) if wanted[1] else None
    d_vocabulary, d_hidden = jax.lax.scan(
        body, start, jax.tree.map(split, (hidden, targets, log_normaliser, entropy, cotangents))
    )
    return (
        join(d_hidden),
        d_vocabulary if d_vocabulary is None else d_vocabulary.astype(vocabulary.dtype),
        None,
        None,
    )


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd)


def _chunks(shape: tuple[int, ...], chunk_rows: int):
    """(split, join): [R, B, P, ...] to chunks [P / C, R, B, C, ...] (the last one padded with
    zeros) of about `chunk_rows` rows, and back.
    """
    runs, rows, length, _ = shape
    chunk = min(length, max(1, chunk_rows // (runs * rows)))
    pad = -length % chunk

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 3))
        return jnp.moveaxis(a.reshape(runs, rows, -1, chunk, *a.shape[3:]), 2, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 2).reshape(runs, rows, length + pad, *a.shape[4:])[:, :, :length]

    return split, join


def _capped_logits(h, vocabulary, softcap: float | None):
    logits = product("rbpd,vd->rbpv", h, vocabulary, vocabulary.dtype)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _through_cap(pull, capped, softcap: float | None):
    """The gradient of logits before the cap from that behind it: d c tanh(x / c) / dx = 1 - tanh(x
    / c)^2.
    """
    return pull if softcap is None else pull * (1 - jnp.square(capped / softcap))


def _divided(logits, temperature):
    return logits if temperature is None else logits / temperature[..., None, None]


def _log_normaliser(logits):
    largest = logits.max(axis=-1)
    return jnp.log(row_sum(jnp.exp(logits - largest[..., None]))[..., 0]) + largest


def _is_target(target, logits):
    return target[..., None] == jnp.arange(logits.shape[-1])
