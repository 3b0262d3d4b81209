"""Causal attention in XLA, with its own backward pass, and the way from packed rows to their segments and back.

A packed row is attended to segment by segment: the cost grows with the segments' length, not with the row's, and no mask
keeps segments apart because they never meet. Heads are grouped: G query heads share one key/value head.
Dims: R runs, B rows, T positions of a row, N segments of a row, L positions of a segment, E = B * N segments, S = L or more keys
(a prefix before the queries), K kv heads, G query heads of one kv head, H head dim.
"""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import on_one_cpu
from ip_jax.models.products import as_bits, from_bits, keep, product, row_sum
from ip_jax.models.remat import ATTENTION

MASKED = -1e30  # finite: a softmax over masked scores alone is uniform, not NaN
QUERY_CHUNK = 128  # queries that share one key range, so that most of the upper triangle is never computed


def causal_attention(
    q: Float[Array, "R E L K G H"], k: Float[Array, "R E S K H"], v: Float[Array, "R E S K H"]
) -> Float[Array, "R E L K G H"]:
    """Each of the last L of S positions attends to itself and those before it. Products in q's dtype, softmax in float32, scores
    scaled by 1 / sqrt(H).

    Nothing of size L x S is kept for the backward pass, which makes the probabilities again from the log normaliser.
    """
    length, _, groups, head_dim = q.shape[2:]
    rows = _heads_first(q * jnp.asarray(head_dim**-0.5, q.dtype)), _heads_first(k), _heads_first(v)
    out = _attention(*rows, groups)
    return jnp.moveaxis(out.reshape(*out.shape[:3], length, groups, head_dim), 2, 3)


def _heads_first(x):
    """[R, E, L, K, (G,) H] -> [R, E, K, L * G, H]: one matrix product per segment and kv head."""
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: Float[Array, "R E K L*G H"], k: Float[Array, "R E K S H"], v: Float[Array, "R E K S H"], groups: int):
    return _by_segment(functools.partial(_forward, groups=groups), q, k, v)[0]


def _by_segment(function, *arrays: Float[Array, "R E ..."]):
    """function(*arrays), on a CPU one segment after the other: the scores of one stay in the cache, which halves the time."""

    def one_by_one(*arrays):
        leading = arrays[0].shape[:2]
        segments = as_bits([a.reshape(-1, 1, 1, *a.shape[2:]) for a in arrays])
        results = from_bits(jax.lax.map(lambda segment: as_bits(function(*from_bits(segment))), segments))
        return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[3:]), results)

    return on_one_cpu(one_by_one, function, *arrays)


def _chunks(q, k, groups: int) -> list[tuple[slice, int, Array]]:
    """(query rows, how many keys they see at most, which [rows, keys]) of every query chunk."""
    length = q.shape[-2] // groups
    before = k.shape[-2] - length
    size = -(-length // -(-length // QUERY_CHUNK))
    bounds = [(first, min(first + size, length)) for first in range(0, length, size)]
    return [(slice(first * groups, end * groups), before + end, _visible(first, end, before, groups)) for first, end in bounds]


def _visible(first: int, end: int, before: int, groups: int):
    return jnp.repeat(jnp.arange(before + first, before + end)[:, None] >= jnp.arange(before + end), groups, axis=0)


def _forward(q, k, v, groups: int):
    """(context, log normaliser) of query rows [R, E, K, L * G, H] over keys and values [R, E, K, S, H]."""
    out, normaliser = [], []
    for rows, keys, visible in _chunks(q, k, groups):
        scores = product("rekth,reksh->rekts", q[..., rows, :], k[..., :keys, :], q.dtype)
        scores = jnp.where(visible, scores, MASKED)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = row_sum(weights)
        out.append(product("rekts,reksh->rekth", weights, v[..., :keys, :], q.dtype) / total)
        normaliser.append((jnp.log(total) + largest)[..., 0])
    return jnp.concatenate(out, axis=-2).astype(q.dtype), jnp.concatenate(normaliser, axis=-1)


def _forward_kept(q, k, v, groups):
    kept = q, k, v, *_by_segment(functools.partial(_forward, groups=groups), q, k, v)
    q, k, v, out, normaliser = (keep(x, x.dtype, ATTENTION) for x in kept)
    return out, (q, k, v, out, normaliser)


def _backward_kept(groups, residuals, cotangent):
    q, k, v, out, normaliser = residuals
    return _by_segment(functools.partial(_backward, groups=groups), q, k, jnp.swapaxes(k, -1, -2), v, out, normaliser, cotangent)


def _backward(q, k, k_columns, v, out, normaliser, d_out, groups: int):
    dtype = q.dtype
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, keys, visible in _chunks(q, k, groups):
        # Key-major scores [keys, rows]: the products with them on the left then need no transposed copy, and that on the right
        # gives dq as columns.
        scores = product("reksh,rekth->rekst", k[..., :keys, :], q[..., rows, :], dtype)
        weights = jnp.where(visible.T, jnp.exp(scores - normaliser[..., None, rows]), 0)
        d_weights = product("reksh,rekth->rekst", v[..., :keys, :], d_out[..., rows, :], dtype)
        d_scores = weights * (d_weights - delta[..., None, rows])
        dv = dv.at[..., :keys, :].add(product("rekst,rekth->reksh", weights, d_out[..., rows, :], dtype))
        dk = dk.at[..., :keys, :].add(product("rekst,rekth->reksh", d_scores, q[..., rows, :], dtype))
        dq.append(product("rekhs,rekst->rekht", k_columns[..., :keys], d_scores, dtype))
    dq = jnp.swapaxes(jax.lax.optimization_barrier(jnp.concatenate(dq, axis=-1)), -1, -2)
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


_attention.defvjp(_forward_kept, _backward_kept)


@jax.custom_vjp
def to_segments(x: Float[Array, "R B T ..."], place: Int[Array, "R B N L"], source: Int[Array, "R B T"]) -> Float[Array, "R E L ..."]:
    """The segments of packed rows, zero where a segment has ended. `place` names the row position of each segment position
    (T: none), `source` is its inverse, n * L + l (N * L: padding). Being a rearrangement, its gradient is `to_rows`, not a scatter.
    """
    return _gather(x, place.reshape(*place.shape[:2], -1)).reshape(x.shape[0], -1, place.shape[-1], *x.shape[3:])


@jax.custom_vjp
def to_rows(x: Float[Array, "R E L ..."], place: Int[Array, "R B N L"], source: Int[Array, "R B T"]) -> Float[Array, "R B T ..."]:
    """The inverse of `to_segments`; zero on padding."""
    return _gather(x.reshape(*place.shape[:2], -1, *x.shape[3:]), source)


def _gather(x, index):
    return jax.vmap(jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0)))(x, index)


to_segments.defvjp(lambda x, place, source: (to_segments(x, place, source), (place, source)), lambda kept, d: (to_rows(d, *kept), None, None))
to_rows.defvjp(lambda x, place, source: (to_rows(x, place, source), (place, source)), lambda kept, d: (to_segments(d, *kept), None, None))
