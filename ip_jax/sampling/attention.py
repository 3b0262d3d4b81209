"""Attention of the sampler in XLA: a prompt behind a shared prefix, and one new token over shared
and own caches.

Dims as in slots.py: R runs, P groups, G rows of one group, S prompt positions, C ring columns, Q
prompts and T positions of one prefill, X positions of the prefix, K kv heads, J query heads of one
kv head, H head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ip_jax.models.attention import MASKED, causal_attention, soft_capped
from ip_jax.models.products import product, row_sum


def prompt_attend(dtype):
    """Causal attention of prompts [R, Q, T] over the prefix in the cache and themselves. Padding
    lies behind a prompt, where it is not seen.

    The cache of a layer is (keys [R, 1, K, H, X], values [R, 1, K, X, H]); emits the prompts' (keys
    [R, Q, K, H, T], values [R, Q, K, T, H]).
    """

    def attend(q, k, v, cache, kind):
        def behind(prefix, x):
            return jnp.concatenate(
                [jnp.broadcast_to(prefix.astype(x.dtype), (*x.shape[:2], *prefix.shape[2:])), x],
                axis=2,
            )

        prefix_k, prefix_v = jnp.moveaxis(cache[0], 4, 2), jnp.moveaxis(cache[1], 3, 2)
        context = causal_attention(
            q,
            behind(prefix_k, k),
            behind(prefix_v, v),
            scale=kind.scale,
            window=kind.window,
            softcap=kind.softcap,
        )
        return context, (jnp.moveaxis(k, 2, 4).astype(dtype), jnp.moveaxis(v, 2, 3).astype(dtype))

    return attend


def token_attend(
    in_prompt: Bool[Array, "R P S"],
    in_ring: Bool[Array, "R P C"],
    back: tuple[Int[Array, "R P S"], Int[Array, " C"]],
    rows: int,
):
    """Attention of one new token for each row over the filled positions of its group's prompt and
    of its own ring, and itself.

    `back` is how many positions before the new token those of the prompt and the ring are: a window
    hides what is too far back. The cache of a layer is (prompt keys [R, P, K, H, S], values [R, P,
    K, S, H], ring keys [R, P, G, K, H, C], values [R, P, G, K, C, H]); emits the token's (keys,
    values) [R, P, G, K, H].
    """

    def over_heads(x):
        return x[:, :, None, None, None]

    def attend(q, k, v, cache, kind):
        prompt_k, prompt_v, own_k, own_v = cache
        runs, groups = prompt_k.shape[:2]

        def heads(x):
            return x.reshape(runs, groups, rows, *x.shape[3:])

        q, k, v = heads(q).astype(jnp.float32) * kind.scale, heads(k), heads(v)
        shared = _over_prompt(q, prompt_k)
        own = product("rpgkjh,rpgkhc->rpgkjc", q, own_k, own_k.dtype)
        itself = row_sum(q * k[..., None, :])
        shared, own, itself = (
            soft_capped(scores, kind.softcap) for scores in (shared, own, itself)
        )
        seen = (
            (in_prompt, in_ring)
            if kind.window is None
            else (in_prompt & (back[0] < kind.window), in_ring & (back[1] < kind.window))
        )
        shared, own = (
            jnp.where(over_heads(seen[0]), shared, MASKED),
            jnp.where(over_heads(seen[1]), own, MASKED),
        )
        largest = jnp.maximum(
            jnp.maximum(shared.max(-1, keepdims=True), own.max(-1, keepdims=True)), itself
        )
        shared, own, itself = (jnp.exp(scores - largest) for scores in (shared, own, itself))
        context = _over_prompt(shared, prompt_v)
        context += product("rpgkjc,rpgkch->rpgkjh", own, own_v, own_v.dtype)
        context += itself * v[..., None, :]
        context /= shared.sum(-1, keepdims=True) + own.sum(-1, keepdims=True) + itself
        return context.astype(q.dtype).reshape(runs, groups * rows, 1, *q.shape[3:]), (k, v)

    return attend


def _over_prompt(
    x: Float[Array, "R P G K J I"], cache: Float[Array, "R P K I O"]
) -> Float[Array, "R P G K J O"]:
    """One product for each prompt and kv head over all rows that share it, in the order in which
    the cache lies in memory.
    """
    runs, groups, rows, kv, heads, _ = x.shape
    x = jnp.moveaxis(x, 2, 3).reshape(runs, groups, kv, rows * heads, -1)
    out = product("rpkmi,rpkio->rpkmo", x, cache, cache.dtype)
    return jnp.moveaxis(out.reshape(runs, groups, kv, rows, heads, -1), 3, 2)
