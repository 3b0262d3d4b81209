"""Attention in XLA: over packed rows (with its own backward pass) and over explicit key/value arrays for decoding.

Heads are grouped: G query heads share one key/value head.
Dims: R runs, B rows, T query positions, S key positions, K kv heads, G query heads of one kv head, H head dim.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ip_jax.models.products import product

MASKED = -1e30  # finite, so that a fully masked row gives a uniform softmax and no NaN


def packed_mask(segment_ids: Int[Array, "R B T"]) -> Bool[Array, "R B T T"]:
    """True where query t may see key s: the same segment, and s <= t. Padding (segment 0) sees only padding."""
    length = segment_ids.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segment_ids[..., :, None] == segment_ids[..., None, :])


@jax.custom_vjp
def packed_attention(
    q: Float[Array, "R B T K G H"], k: Float[Array, "R B T K H"], v: Float[Array, "R B T K H"], mask: Bool[Array, "R B T T"]
) -> Float[Array, "R B T K G H"]:
    """Softmax attention within rows, scaled by 1 / sqrt(H): products in q's dtype, scores and softmax in float32.

    Nothing of size T x T is kept for the backward pass, which makes the probabilities again from the log normaliser.
    """
    return _packed_forward(q, k, v, mask)[0]


def _heads_first(x):
    """[R, B, T, K, (G,) H] -> [R, B, K, T * G, H]: one matrix product per row and kv head."""
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _packed_forward(q, k, v, mask):
    groups, head_dim, dtype = *q.shape[4:], q.dtype
    q_rows, k_rows, v_rows = _heads_first(q), _heads_first(k), _heads_first(v)
    scores = product("rbkth,rbksh->rbkts", q_rows, k_rows, dtype) * head_dim**-0.5
    scores = jnp.where(jnp.repeat(mask, groups, axis=2)[:, :, None], scores, MASKED)
    normaliser = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - normaliser[..., None])
    out = product("rbkts,rbksh->rbkth", weights, v_rows, dtype).astype(dtype)
    return jnp.moveaxis(out.reshape(*out.shape[:3], -1, groups, head_dim), 2, 3), normaliser


def _packed_fwd(q, k, v, mask):
    out, normaliser = _packed_forward(q, k, v, mask)
    return out, (q, k, v, mask, out, normaliser)


def _packed_bwd(residuals, cotangent):
    q, k, v, mask, out, normaliser = residuals
    groups, head_dim, dtype = *q.shape[4:], q.dtype
    q_rows, k_rows, v_rows, d_rows = (_heads_first(x) for x in (q, k, v, cotangent))
    delta = jnp.einsum("rbtkgh,rbtkgh->rbtkg", cotangent, out, preferred_element_type=jnp.float32)
    delta = jnp.moveaxis(delta, 3, 2).reshape(normaliser.shape)
    # Key-major scores [S, T*G]: the two products with them on the left then need no transposed copy.
    scores = product("rbksh,rbkth->rbkst", k_rows, q_rows, dtype) * head_dim**-0.5
    visible = jnp.repeat(jnp.swapaxes(mask, 2, 3), groups, axis=3)[:, :, None]
    weights = jnp.where(visible, jnp.exp(scores - normaliser[..., None, :]), 0)
    d_weights = product("rbksh,rbkth->rbkst", v_rows, d_rows, dtype)
    d_scores = weights * (d_weights - delta[..., None, :]) * head_dim**-0.5
    dv = product("rbkst,rbkth->rbksh", weights, d_rows, dtype).astype(dtype)
    dk = product("rbkst,rbkth->rbksh", d_scores, q_rows, dtype).astype(dtype)
    dq = product("rbkst,rbksh->rbkth", d_scores, k_rows, dtype)
    dq = jnp.moveaxis(dq.reshape(*dq.shape[:3], -1, groups, head_dim), 2, 3)
    return dq.astype(dtype), jnp.moveaxis(dk, 2, 3), jnp.moveaxis(dv, 2, 3), None


packed_attention.defvjp(_packed_fwd, _packed_bwd)
