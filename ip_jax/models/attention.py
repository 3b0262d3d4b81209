"""Causal attention in XLA, with its own backward pass, and the way from packed rows to their
segments and back.

A packed row is attended to segment by segment: the cost grows with the segments' length, not with
the row's, and no mask keeps segments apart because they never meet. Heads are grouped: G query
heads share one key/value head. Dims: R runs, B rows, T positions of a row, N segments of a row, L
positions of a segment, E = B * N segments, S = L or more keys (a prefix before the queries), K kv
heads, G query heads of one kv head, H head dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import on_one_cpu
from ip_jax.models.products import as_bits, from_bits, keep, product, row_sum
from ip_jax.models.remat import ATTENTION

MASKED = -1e30  # finite: a softmax over masked scores alone is uniform, not NaN
# queries that share one key range, so that most of the upper triangle is never computed
QUERY_CHUNK = 128


class _Scores(NamedTuple):
    """What a softmax is taken of: G query rows at each position, a window of keys or all, capped
    scores or plain ones.
    """

    groups: int
    window: int | None
    softcap: float | None


def causal_attention(
    q: Float[Array, "R E L K G H"],
    k: Float[Array, "R E S K H"],
    v: Float[Array, "R E S K H"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "R E L K G H"]:
    """Each of the last L of S positions attends to itself and those before it, with a `window` w to
    itself and the w - 1 before it. Products in q's dtype, softmax in float32, of scores scaled by
    `scale` and then, with a `softcap` c, made c * tanh(score / c).

    Nothing of size L x S is kept for the backward pass, which makes the probabilities again from
    the log normaliser.
    """
    length, _, groups, head_dim = q.shape[2:]
    rows = _heads_first(q * jnp.asarray(scale, q.dtype)), _heads_first(k), _heads_first(v)
    seen_whole = window is None or window >= k.shape[2]
    out = _attention(*rows, _Scores(groups, None if seen_whole else window, softcap))
    return jnp.moveaxis(out.reshape(*out.shape[:3], length, groups, head_dim), 2, 3)


def _heads_first(x):
    """[R, E, L, K, (G,) H] -> [R, E, K, L * G, H]: one matrix product per segment and kv head."""
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(
    q: Float[Array, "R E K L*G H"],
    k: Float[Array, "R E K S H"],
    v: Float[Array, "R E K S H"],
    form: _Scores,
):
    return _by_segment(functools.partial(_forward, form=form), q, k, v)[0]


def _by_segment(function, *arrays: Float[Array, "R E ..."]):
    """function(*arrays), on a CPU one segment after the other: the scores of one stay in the cache,
    which halves the time.
    """

    def one_by_one(*arrays):
        leading = arrays[0].shape[:2]
        segments = as_bits([a.reshape(-1, 1, 1, *a.shape[2:]) for a in arrays])
        results = from_bits(
            jax.lax.map(lambda segment: as_bits(function(*from_bits(segment))), segments)
        )
        return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[3:]), results)

    return on_one_cpu(one_by_one, function, *arrays)


def _chunks(q, k, form: _Scores) -> list[tuple[slice, slice, Array]]:
    """(query rows, keys that they may see, which of them [rows, keys]) of every query chunk."""
    length = q.shape[-2] // form.groups
    before = k.shape[-2] - length
    size = -(-length // -(-length // QUERY_CHUNK))
    chunks = []
    for first in range(0, length, size):
        end = min(first + size, length)
        oldest = 0 if form.window is None else max(0, before + first - form.window + 1)
        queries, keys = (
            jnp.arange(before + first, before + end)[:, None],
            jnp.arange(oldest, before + end),
        )
        visible = (
            queries >= keys
            if form.window is None
            else (queries >= keys) & (queries - keys < form.window)
        )
        chunks.append(
            (
                slice(first * form.groups, end * form.groups),
                slice(oldest, before + end),
                jnp.repeat(visible, form.groups, axis=0),
            )
        )
    return chunks


def soft_capped(scores: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118); `scores` themselves where there
    is none.
    """
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _forward(q, k, v, form: _Scores):
    """(context, log normaliser) of query rows [R, E, K, L * G, H] over keys and values [R, E, K, S,
    H].
    """
    out, normaliser = [], []
    for rows, keys, visible in _chunks(q, k, form):
        scores = soft_capped(
            product("rekth,reksh->rekts", q[..., rows, :], k[..., keys, :], q.dtype), form.softcap
        )
        scores = jnp.where(visible, scores, MASKED)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = row_sum(weights)
        out.append(product("rekts,reksh->rekth", weights, v[..., keys, :], q.dtype) / total)
        normaliser.append((jnp.log(total) + largest)[..., 0])
    return jnp.concatenate(out, axis=-2).astype(q.dtype), jnp.concatenate(normaliser, axis=-1)


def _forward_kept(q, k, v, form):
    kept = q, k, v, *_by_segment(functools.partial(_forward, form=form), q, k, v)
    q, k, v, out, normaliser = (keep(x, x.dtype, ATTENTION) for x in kept)
    return out, (q, k, v, out, normaliser)


def _backward_kept(form, residuals, cotangent):
    q, k, v, out, normaliser = residuals
    return _by_segment(
        functools.partial(_backward, form=form),
        q,
        k,
        jnp.swapaxes(k, -1, -2),
        v,
        out,
        normaliser,
        cotangent,
    )


def _backward(q, k, k_columns, v, out, normaliser, d_out, form: _Scores):
    dtype = q.dtype
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, keys, visible in _chunks(q, k, form):
        # Key-major scores [keys, rows]: the products with them on the left then need no transposed
        # copy, and that on the right gives dq as columns.
        scores = soft_capped(
            product("reksh,rekth->rekst", k[..., keys, :], q[..., rows, :], dtype), form.softcap
        )
        weights = jnp.where(visible.T, jnp.exp(scores - normaliser[..., None, rows]), 0)
        d_weights = product("reksh,rekth->rekst", v[..., keys, :], d_out[..., rows, :], dtype)
        d_scores = weights * (d_weights - delta[..., None, rows])
        if form.softcap is not None:  # the slope of the cap: 1 - tanh^2
            d_scores = d_scores * (1 - jnp.square(scores / form.softcap))
        dv = dv.at[..., keys, :].add(
            product("rekst,rekth->reksh", weights, d_out[..., rows, :], dtype)
        )
        dk = dk.at[..., keys, :].add(
            product("rekst,rekth->reksh", d_scores, q[..., rows, :], dtype)
        )
        dq.append(product("rekhs,rekst->rekht", k_columns[..., keys], d_scores, dtype))
    dq = jnp.swapaxes(jax.lax.optimization_barrier(jnp.concatenate(dq, axis=-1)), -1, -2)
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


_attention.defvjp(_forward_kept, _backward_kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_segments(
    x: Float[Array, "R B T ..."],
    place: Int[Array, "R B N L"],
    source: Int[Array, "R B T"],
    shared: int,
) -> Float[Array, "R E L ..."]:
    """The segments of packed rows, zero where a segment has ended. `place` names the row position
    of each segment position (T: none), `source` is its inverse, n * L + l (N * L: padding). The
    first `shared` positions of all segments of a row are the row's own first ones. A rearrangement
    but for these, its gradient is `to_rows` and their sum, not a scatter.
    """
    return _gather(x, place.reshape(*place.shape[:2], -1)).reshape(
        x.shape[0], -1, place.shape[-1], *x.shape[3:]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_rows(
    x: Float[Array, "R E L ..."],
    place: Int[Array, "R B N L"],
    source: Int[Array, "R B T"],
    shared: int,
) -> Float[Array, "R B T ..."]:
    """The inverse of `to_segments`; zero on padding. Shared positions are taken from the first
    segment.
    """
    return _gather(x.reshape(*place.shape[:2], -1, *x.shape[3:]), source)


def _gather(x, index):
    return jax.vmap(jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0)))(x, index)


def _to_segments_bwd(shared: int, kept, d):
    place, _ = kept
    rows = to_rows(d, *kept, shared)
    if shared:
        others = d.reshape(*place.shape, *d.shape[3:])[:, :, 1:, :shared].astype(jnp.float32)
        there = (place < rows.shape[2])[:, :, 1:, :shared].reshape(
            *others.shape[:4], *(1,) * (others.ndim - 4)
        )
        others = jnp.where(there, others, 0).sum(axis=2)
        rows = rows.at[:, :, :shared].set((rows[:, :, :shared] + others).astype(d.dtype))
    return rows, None, None


def _to_rows_bwd(shared: int, kept, d):
    place, _ = kept
    segments = to_segments(d, *kept, shared)
    if shared:
        is_copy = (jnp.arange(place.shape[2]) > 0)[:, None] & (jnp.arange(place.shape[3]) < shared)
        is_copy = jnp.broadcast_to(is_copy, place.shape).reshape(
            *segments.shape[:3], *(1,) * (segments.ndim - 3)
        )
        segments = jnp.where(is_copy, 0, segments)
    return segments, None, None


to_segments.defvjp(
    lambda x, place, source, shared: (to_segments(x, place, source, shared), (place, source)),
    _to_segments_bwd,
)
to_rows.defvjp(
    lambda x, place, source, shared: (to_rows(x, place, source, shared), (place, source)),
    _to_rows_bwd,
)
