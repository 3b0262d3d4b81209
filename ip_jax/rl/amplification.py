"""Strengthening the link from a prompt to what was found under it: positive advantages weighed by
how much the prompt explains a sample, or (guidance) samples that the prompt explains better, from
the logits (1 + w) z(x_g) - w z(x_guide) of the sampler.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PMI_AGAINST = ("generation", "guide")


def check_pmi(gamma: float, bound: float) -> None:
    """Raises ValueError for a weight that could turn the sign of an advantage."""
    if not (bound > 0 and abs(gamma) * bound <= 1):
        raise ValueError(
            f"pmi is gamma {gamma}, bound {bound}: bound must be above 0, and |gamma| * bound at"
            " most 1, or weights become negative"
        )


def pmi_weights(
    advantages: Float[Array, "R Q G"], llr: Float[Array, "R Q G"], gamma: float, bound: float
) -> Float[Array, "R Q G"]:
    """Factors of the advantages, without gradient: 1 + gamma * clip(LLR, -bound, bound) where they
    are positive, else 1.

    `llr` is the pointwise mutual information of prompt and completion, in nats a token
    (`gates.log_likelihood_ratio` of the training prompt and what it is compared with). A negative
    `gamma` is the control: it weakens the link.
    """
    weight = jnp.where(advantages > 0, 1 + gamma * jnp.clip(llr, -bound, bound), 1.0)
    return jax.lax.stop_gradient(weight)
