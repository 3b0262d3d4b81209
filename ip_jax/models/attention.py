"""Causal attention in XLA, with its own backward pass, and the way from packed rows to their segments and back.

A packed row is attended to segment by segment: the cost grows with the segments' length, not with the row's, and no mask
keeps segments apart because they never meet. Heads are grouped: G query heads share one key/value head.
Dims: R runs, B rows, T positions of a row, S segments of a row, L positions of a segment, E = B * S segments,
K kv heads, G query heads of one kv head, H head dim.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import on_one_cpu
from ip_jax.models.products import as_bits, from_bits, keep, product

MASKED = -1e30  # finite: a softmax over masked scores alone is uniform, not NaN
QUERY_CHUNK = 128  # queries that share one key range, so that most of the upper triangle is never computed


@jax.custom_vjp
def causal_attention(
    q: Float[Array, "R E L K G H"], k: Float[Array, "R E L K H"], v: Float[Array, "R E L K H"]
) -> Float[Array, "R E L K G H"]:
    """Each position attends to itself and those before it. Products in q's dtype, softmax in float32, scores scaled by 1 / sqrt(H).

    Nothing of size L x L is kept for the backward pass, which makes the probabilities again from the log normaliser.
    """
    return by_segment(_forward, q, k, v)[0]


def _heads_first(x):
    """[R, E, L, K, (G,) H] -> [R, E, K, L * G, H]: one matrix product per segment and kv head."""
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _chunks(length: int) -> list[tuple[int, int]]:
    """(first, end) of the query chunks: chunk i sees the keys before its end."""
    count = -(-length // QUERY_CHUNK)
    size = -(-length // count)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _visible(first: int, end: int, groups: int):
    """[(end - first) * G, end]: which keys each query row of a chunk may see."""
    return jnp.repeat(jnp.arange(first, end)[:, None] >= jnp.arange(end), groups, axis=0)


def by_segment(function, *arrays: Float[Array, "R E ..."]):
    """function(*arrays), on a CPU one segment after the other: the scores of one stay in the cache, which halves the time."""

    def one_by_one(*arrays):
        leading = arrays[0].shape[:2]
        segments = as_bits([a.reshape(-1, 1, 1, *a.shape[2:]) for a in arrays])
        results = from_bits(jax.lax.map(lambda segment: as_bits(function(*from_bits(segment))), segments))
        return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[3:]), results)

    return on_one_cpu(one_by_one, function, *arrays)


def _forward(q, k, v):
    length, _, groups, head_dim = q.shape[2:]
    q_rows, k_rows, v_rows = _heads_first(q * jnp.asarray(head_dim**-0.5, q.dtype)), _heads_first(k), _heads_first(v)
    out, normaliser = [], []
    for first, end in _chunks(length):
        rows = slice(first * groups, end * groups)
        scores = product("rekth,reksh->rekts", q_rows[..., rows, :], k_rows[..., :end, :], q.dtype)
        scores = jnp.where(_visible(first, end, groups), scores, MASKED)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.dot(weights, jnp.ones((end, 1)))
        out.append(product("rekts,reksh->rekth", weights, v_rows[..., :end, :], q.dtype) / total)
        normaliser.append((jnp.log(total) + largest)[..., 0])
    out = jnp.concatenate(out, axis=-2).astype(q.dtype)
    return jnp.moveaxis(out.reshape(*out.shape[:3], length, groups, head_dim), 2, 3), jnp.concatenate(normaliser, axis=-1)


def _forward_kept(q, k, v):
    q, k, v, out, normaliser = (keep(x, x.dtype) for x in (q, k, v, *by_segment(_forward, q, k, v)))
    return out, (q, k, v, out, normaliser)


def _backward(residuals, cotangent):
    return by_segment(_backward_of_segments, *residuals, cotangent)


def _backward_of_segments(q, k, v, out, normaliser, cotangent):
    length, _, groups, head_dim = q.shape[2:]
    q_rows, k_rows, v_rows, d_rows = (_heads_first(x) for x in (q * jnp.asarray(head_dim**-0.5, q.dtype), k, v, cotangent))
    delta = jnp.einsum("retkgh,retkgh->retkg", cotangent, out, preferred_element_type=jnp.float32)
    delta = jnp.moveaxis(delta, 3, 2).reshape(normaliser.shape)
    k_columns = jax.lax.optimization_barrier(jnp.swapaxes(k_rows, -1, -2))
    dq, dk, dv = [], jnp.zeros(k_rows.shape, jnp.float32), jnp.zeros(v_rows.shape, jnp.float32)
    for first, end in _chunks(length):
        rows = slice(first * groups, end * groups)
        q_chunk, d_chunk = q_rows[..., rows, :], d_rows[..., rows, :]
        # Key-major scores [end, rows]: the two products with them on the left then need no transposed copy.
        scores = product("reksh,rekth->rekst", k_rows[..., :end, :], q_chunk, q.dtype)
        weights = jnp.where(_visible(first, end, groups).T, jnp.exp(scores - normaliser[..., None, rows]), 0)
        d_weights = product("reksh,rekth->rekst", v_rows[..., :end, :], d_chunk, q.dtype)
        d_scores = weights * (d_weights - delta[..., None, rows])
        dv = dv.at[..., :end, :].add(product("rekst,rekth->reksh", weights, d_chunk, q.dtype))
        dk = dk.at[..., :end, :].add(product("rekst,rekth->reksh", d_scores, q_chunk, q.dtype))
        dq.append(product("rekhs,rekst->rekht", k_columns[..., :end], d_scores, q.dtype))
    dq = jnp.swapaxes(jax.lax.optimization_barrier(jnp.concatenate(dq, axis=-1)), -1, -2) * head_dim**-0.5
    dq = jnp.moveaxis(dq.reshape(*dq.shape[:3], length, groups, head_dim), 2, 3)
    return dq.astype(q.dtype), jnp.moveaxis(dk, 2, 3).astype(k.dtype), jnp.moveaxis(dv, 2, 3).astype(v.dtype)


causal_attention.defvjp(_forward_kept, _backward)


@jax.custom_vjp
def to_segments(x: Float[Array, "R B T ..."], place: Int[Array, "R B S L"], source: Int[Array, "R B T"]) -> Float[Array, "R E L ..."]:
    """The segments of packed rows, zero where a segment has ended. `place` names the row position of each segment position
    (T: none), `source` is its inverse, s * L + l (S * L: padding). Being a rearrangement, its gradient is `to_rows`, not a scatter.
    """
    return _gather(x, place.reshape(*place.shape[:2], -1)).reshape(x.shape[0], -1, place.shape[-1], *x.shape[3:])


@jax.custom_vjp
def to_rows(x: Float[Array, "R E L ..."], place: Int[Array, "R B S L"], source: Int[Array, "R B T"]) -> Float[Array, "R B T ..."]:
    """The inverse of `to_segments`; zero on padding."""
    return _gather(x.reshape(*place.shape[:2], -1, *x.shape[3:]), source)


def _gather(x, index):
    return jax.vmap(jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0)))(x, index)


to_segments.defvjp(lambda x, place, source: (to_segments(x, place, source), (place, source)), lambda kept, d: (to_rows(d, *kept), None, None))
to_rows.defvjp(lambda x, place, source: (to_rows(x, place, source), (place, source)), lambda kept, d: (to_segments(d, *kept), None, None))
