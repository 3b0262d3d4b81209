"""Updates that copy selected samples (supervised): best-of-N, filtered training, and expert
iteration, which repeats either.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

KINDS = ("best_of_n", "filtered")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which samples of a group are copied: its best one (best_of_n), or all (filtered), and only
    those with a reward above `minimum`.

    Such weights are not centred: beside the selection they always carry mean(weight) * E[grad log
    p(y | x_t)] under y ~ p(. | x_g), which copies the generation prompt's distribution whatever was
    good. Groups of one isolate that term. Expert iteration samples from the updated policy and
    selects again; with `restart_from_base` each iteration's update starts from the untrained
    adapter.
    """

    kind: str = "best_of_n"
    minimum: float = -math.inf
    restart_from_base: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"selection kind is {self.kind!r}: choose from {', '.join(KINDS)}")
        if math.isnan(self.minimum):
            raise ValueError(
                "selection minimum is NaN, which no reward is above: give a number, or -inf to keep"
                " every valid sample"
            )


def select(
    rewards: Float[Array, "R Q G"], valid: Bool[Array, "R Q G"], selection: Selection
) -> Bool[Array, "R Q G"]:
    """True for the samples that are copied. Of several best ones of a group the first wins; samples
    that are not valid are never copied.
    """
    kept = valid & (rewards > selection.minimum)
    if selection.kind == "filtered":
        return kept
    best = jnp.argmax(jnp.where(kept, rewards, -jnp.inf), axis=-1, keepdims=True)
    return kept & (jnp.arange(rewards.shape[-1]) == best)
