"""Log-probabilities and entropies of completion tokens under the prompts of their rows, at the
sampling temperature.

The temperature is the sampler's, and no top-p is applied.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ip_jax.models.grouped import grouped_attend, grouped_positions
from ip_jax.rl.rows import Rows
from ip_jax.training.losses import token_log_probs, token_log_probs_and_entropy


def completion_log_probs(
    decoder, rows: Rows, dtype: str, remat: str, kernel: str = "xla"
) -> Float[Array, "R B S C"]:
    """Of one micro-batch, in float32; 0 behind a completion's end. `kernel`: attention's
    (`models.kernels`).
    """
    hidden, targets = _predicting(decoder, rows, dtype, remat, kernel)
    log_probs = token_log_probs(
        hidden,
        decoder.vocabulary(),
        targets,
        rows.temperature,
        softcap=decoder.config.logit_softcap,
    )
    return _on_completions(log_probs, rows)


def completion_stats(
    decoder, rows: Rows, dtype: str, remat: str, kernel: str = "xla"
) -> tuple[Float[Array, "R B S C"], Float[Array, "R B S C"]]:
    """(log-probabilities, entropies in nats of the distributions that the tokens were drawn from)
    of one micro-batch.
    """
    hidden, targets = _predicting(decoder, rows, dtype, remat, kernel)
    stats = token_log_probs_and_entropy(
        hidden,
        decoder.vocabulary(),
        targets,
        rows.temperature,
        softcap=decoder.config.logit_softcap,
    )
    return tuple(_on_completions(x, rows) for x in stats)


def _predicting(decoder, rows: Rows, dtype: str, remat: str, kernel: str):
    """(hidden states [R, B, S * C, D] that predict the completions' tokens, these tokens): a first
    token is predicted by its prompt's last one.
    """
    runs, count, samples, length = rows.tokens.shape
    slots = rows.prompt.shape[-1]
    tokens = jnp.concatenate([rows.prompt, rows.tokens.reshape(runs, count, -1)], axis=-1)
    positions = grouped_positions(rows.prompt_length, slots, samples, length)
    hidden, _ = decoder(
        tokens,
        positions,
        grouped_attend(rows.prompt_length, slots, samples, kernel),
        dtype=jnp.dtype(dtype),
        remat=remat,
    )
    last = jnp.maximum(rows.prompt_length - 1, 0)[..., None, None]
    # [R, B, 1, 1, D]
    of_prompt = jnp.take_along_axis(hidden[:, :, :slots], last, axis=2)[:, :, None]
    of_completion = hidden[:, :, slots:].reshape(runs, count, samples, length, -1)
    hidden = jnp.concatenate(
        [
            jnp.broadcast_to(of_prompt, (runs, count, samples, 1, hidden.shape[-1])),
            of_completion[:, :, :, :-1],
        ],
        axis=3,
    )
    return hidden.reshape(runs, count, samples * length, -1), rows.tokens.reshape(runs, count, -1)


def _on_completions(values: Float[Array, "R B S*C"], rows: Rows) -> Float[Array, "R B S C"]:
    inside = jnp.arange(rows.tokens.shape[-1]) < rows.length[..., None]
    return jnp.where(inside, values.reshape(rows.tokens.shape), 0)


def score(
    trained, frozen, rows: Rows, *, graphdef, dtype: str, kernel: str = "xla"
) -> Float[Array, "M R B S C"]:
    """Log-probabilities of all micro-batches, without a gradient. The reference policy is a
    `graphdef` without adapters and `trained` = {}.
    """

    def one(_, micro: Rows):
        nothing = jnp.zeros(micro.tokens.shape, jnp.float32)

        def found():
            return completion_log_probs(
                nnx.merge(graphdef, trained, frozen), micro, dtype, "none", kernel
            )

        return None, jax.lax.cond(jnp.any(micro.length > 0), found, lambda: nothing)

    return jax.lax.scan(one, None, rows)[1]
