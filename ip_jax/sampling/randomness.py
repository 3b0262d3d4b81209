"""Choosing tokens: one threefry uniform for each row and token, the inverse CDF in two levels,
top-p by a checked top_k.

A row's random bits are a function of (seed, example id, sample id, token index) alone, never of its
slot or its neighbours. Dims: V vocabulary, C classes (lanes) of the two-level sums, V = W * C after
padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# classes of tokens with equal id modulo LANES: sums over them run along the vector registers; a
# small vocabulary has one for each token
LANES = 256
TINY_TEMPERATURE = 1e-6  # only guards the division; rows at temperature 0 take the largest logit


def row_keys(
    seed: Int[Array, "*rows"], example_id: Int[Array, "*rows"], sample_id: Int[Array, "*rows"]
) -> Int[Array, "*rows 2"]:
    """Raw threefry keys of rows (uint32)."""

    def key(seed, example_id, sample_id):
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.key_data(
            jax.random.fold_in(jax.random.fold_in(key, example_id), sample_id)
        )

    flat = jax.vmap(key)(seed.ravel(), example_id.ravel(), sample_id.ravel())
    return flat.reshape(*seed.shape, 2)


def token_uniforms(
    keys: Int[Array, "*rows 2"], token_index: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """One uniform in [0, 1) for each row's token (24 bits, float32)."""

    def uniform(key, index):
        return jax.random.uniform(
            jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), index)
        )

    return jax.vmap(uniform)(keys.reshape(-1, 2), token_index.ravel()).reshape(token_index.shape)


def choose_tokens(
    logits: Float[Array, "*rows V"],
    temperature: Float[Array, "*rows"],
    top_p: Float[Array, "*rows"],
    uniform: Float[Array, "*rows"],
    candidates: int = 256,
) -> tuple[Int[Array, "*rows"], Float[Array, "*rows"]]:
    """(token, its log-probability) for each row; temperature 0 takes the largest logit.

    The log-probability is scaled by the temperature (by 1 where that is 0) and not truncated by
    top-p. `candidates` is how many of the largest logits top-p looks at before it falls back to a
    full sort; it changes the time, never the result.
    """
    greedy = temperature <= 0
    inverse = 1 / jnp.where(greedy, 1.0, jnp.maximum(temperature, TINY_TEMPERATURE))[..., None]
    classes = _classes(logits)
    # Without the barriers XLA adds a reduction over the whole vocabulary for what is reduced twice:
    # half of the time that choosing takes on a CPU.
    class_max = jax.lax.optimization_barrier(classes.max(axis=-2))
    largest = class_max.max(axis=-1, keepdims=True)

    # log of the unnormalised probability; made anew where it is used
    def relative(logits):
        return (logits - largest) * inverse

    def by_class():
        return (classes - largest[..., None]) * inverse[..., None]

    mass = jax.lax.optimization_barrier(jnp.exp(by_class()).sum(axis=-2))
    total = mass.sum(axis=-1)

    def sampled_class():
        everything = jnp.full_like(total, -jnp.inf)
        truncates = jnp.any(top_p < 1)
        cutoff = jax.lax.cond(
            truncates,
            lambda: top_p_cutoff(relative(logits), total, top_p, candidates),
            lambda: everything,
        )
        kept = jax.lax.cond(truncates, lambda: _kept_mass(by_class(), cutoff), lambda: mass)
        chosen, rest = _inverse_cdf(kept, uniform)
        return jnp.where(greedy, jnp.argmax(class_max, axis=-1), chosen), rest, cutoff

    def greedy_class():
        return jnp.argmax(class_max, axis=-1), jnp.zeros_like(total), jnp.full_like(total, -jnp.inf)

    lane, rest, cutoff = jax.lax.cond(jnp.all(greedy), greedy_class, sampled_class)
    members = relative(jnp.take_along_axis(classes, lane[..., None, None], axis=-1)[..., 0])
    weights = jnp.where(members >= cutoff[..., None], jnp.exp(members), 0)
    index = jnp.where(
        greedy, jnp.argmax(members, axis=-1), _inverse_cdf(weights, rest, fraction=False)[0]
    )
    log_prob = jnp.take_along_axis(members, index[..., None], axis=-1)[..., 0] - jnp.log(total)
    return (index * classes.shape[-1] + lane).astype(jnp.int32), log_prob


def top_p_cutoff(
    relative: Float[Array, "*rows V"],
    total: Float[Array, "*rows"],
    top_p: Float[Array, "*rows"],
    candidates: int,
) -> Float[Array, "*rows"]:
    """The smallest kept one of `relative`, the logarithms of probabilities x `total`: a token stays
    while the mass before it is below top_p (Holtzman et al. 2020), with every tie at the edge.

    Rows with top_p >= 1 keep all (-inf).
    """

    def cutoff(count):
        values = jax.lax.top_k(relative, count)[0]
        probability = jnp.exp(values) / total[..., None]
        before = jnp.cumsum(probability, axis=-1) - probability
        edge = jnp.where(before < top_p[..., None], values, jnp.inf).min(axis=-1)
        captured = before[..., -1] + probability[..., -1] >= top_p
        return jnp.where(top_p < 1, edge, -jnp.inf), jnp.all(captured | (top_p >= 1))

    size = relative.shape[-1]
    edge, captured = cutoff(min(candidates, size))
    return (
        edge
        if candidates >= size
        else jax.lax.cond(captured, lambda: edge, lambda: cutoff(size)[0])
    )


def _classes(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows W C"]:
    lanes = min(LANES, logits.shape[-1])
    pad = -logits.shape[-1] % lanes
    if pad:
        logits = jnp.pad(
            logits, [(0, 0)] * (logits.ndim - 1) + [(0, pad)], constant_values=-jnp.inf
        )
    return logits.reshape(*logits.shape[:-1], -1, lanes)


def _kept_mass(by_class, cutoff):
    return jnp.where(by_class >= cutoff[..., None, None], jnp.exp(by_class), 0).sum(axis=-2)


def _inverse_cdf(
    weights: Float[Array, "*rows N"], target: Float[Array, "*rows"], fraction: bool = True
):
    """(index, what is left of the target inside it): the first entry of positive weight whose
    running sum passes the target.

    `target` is a fraction of the whole, or a weight. Rounding never chooses an entry of weight 0:
    the target stays below the largest running sum that such an entry has.
    """
    running = jnp.cumsum(weights, axis=-1)
    possible: Bool[Array, "*rows N"] = weights > 0
    end = jnp.where(possible, running, 0).max(axis=-1)
    target = jnp.minimum(target * end if fraction else target, jnp.nextafter(end, 0.0))
    index = jnp.argmax(possible & (running > target[..., None]), axis=-1)

    def at(a):
        return jnp.take_along_axis(a, index[..., None], axis=-1)[..., 0]

    return index, jnp.maximum(target - (at(running) - at(weights)), 0)
