"""Attention of completions that share one prompt: the prompt stands once in a row, and each
completion sees it and itself.

Causal attention makes a prompt's states the same for all its completions, so one copy serves them
all, and their gradients add up in it. Dims: R runs, B rows, X prompt positions (right-padded), S
completions of a row, C positions of each, T = X + S * C, K kv heads, G query heads of one kv head,
H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ip_jax.models.attention import MASKED, causal_attention, soft_capped
from ip_jax.models.decoder import Attend
from ip_jax.models.families import AttentionKind
from ip_jax.models.kernels import KernelAttention, SharedPrompt


def grouped_positions(
    prompt_length: Int[Array, "R B"], slots: int, samples: int, length: int
) -> Int[Array, "R B T"]:
    """Positions of a row of `slots` (X) prompt tokens and `samples` (S) completions of `length` (C)
    tokens, each right behind the prompt.
    """
    prompt = jnp.broadcast_to(jnp.arange(slots), (*prompt_length.shape, slots))
    completion = prompt_length[..., None] + jnp.arange(length)
    return jnp.concatenate([prompt, jnp.tile(completion, samples)], axis=-1)


def grouped_attend(
    prompt_length: Int[Array, "R B"], slots: int, samples: int, kernel: str = "xla"
) -> Attend:
    """Attention for rows of `slots` (X) prompt positions, of which the first `prompt_length` count,
    and `samples` (S) completions, by one of `models.kernels` or XLA. Emits nothing.

    Padding lies behind a prompt and behind a completion, where causality hides it; completions
    never see the prompt's.
    """

    def attend(q, k, v, _, kind: AttentionKind):
        if kernel != "xla":
            # of the longest sequence: a window that holds it hides nothing
            positions = slots + (q.shape[2] - slots) // samples
            window = None if kind.window is None or kind.window >= positions else kind.window
            return (
                KernelAttention(kernel, kind.scale, window, kind.softcap)(
                    q, k, v, SharedPrompt(prompt_length, slots, samples)
                ),
                None,
            )
        parts = [(x[:, :, :slots], _by_completion(x[:, :, slots:], samples)) for x in (q, k, v)]
        (prompt_q, q), (prompt_k, k), (prompt_v, v) = parts
        context = causal_attention(
            prompt_q, prompt_k, prompt_v, scale=kind.scale, window=kind.window, softcap=kind.softcap
        )
        of_completions = _over_prompt_and_itself(
            (q, k, v),
            (prompt_k, prompt_v),
            _visible(prompt_length, slots, q.shape[3], kind.window),
            kind,
        )
        return (
            jnp.concatenate(
                [
                    context,
                    of_completions.reshape(*context.shape[:2], -1, *context.shape[3:]).astype(
                        context.dtype
                    ),
                ],
                axis=2,
            ),
            None,
        )

    return attend


def _by_completion(x: Float[Array, "R B S*C ..."], samples: int) -> Float[Array, "R B S C ..."]:
    return x.reshape(*x.shape[:2], samples, -1, *x.shape[3:])


def _visible(
    prompt_length, slots: int, length: int, window: int | None
) -> tuple[Bool[Array, "R B C X"], Bool[Array, "C C"]]:
    """What the c-th token of a completion sees of the prompt and of its own completion."""
    own = jnp.arange(length)
    before = own[:, None] - own  # positions back
    to_prompt = (prompt_length[..., None] + own)[..., None] - jnp.arange(slots)
    of_prompt = jnp.broadcast_to(
        (jnp.arange(slots) < prompt_length[..., None])[..., None, :], to_prompt.shape
    )
    if window is None:
        return of_prompt, before >= 0
    return of_prompt & (to_prompt < window), (before >= 0) & (before < window)


def _over_prompt_and_itself(
    qkv, prompt, visible, kind: AttentionKind
) -> Float[Array, "R B S C K G H"]:
    """One softmax over the prompt's keys and the completion's own, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in qkv)
    prompt_k, prompt_v = (x.astype(jnp.float32) for x in prompt)
    q = q * kind.scale
    to_prompt = soft_capped(jnp.einsum("rbsckgh,rbxkh->rbkgscx", q, prompt_k), kind.softcap)
    to_own = soft_capped(jnp.einsum("rbsckgh,rbsdkh->rbkgscd", q, k), kind.softcap)
    of_prompt, of_own = visible
    to_prompt = jnp.where(of_prompt[:, :, None, None, None], to_prompt, MASKED)
    to_own = jnp.where(of_own, to_own, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], axis=-1), axis=-1)
    slots = prompt_k.shape[2]
    context = jnp.einsum("rbkgscx,rbxkh->rbsckgh", weights[..., :slots], prompt_v)
    return context + jnp.einsum("rbkgscd,rbsdkh->rbsckgh", weights[..., slots:], v)
