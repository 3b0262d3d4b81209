"""Estimators of the policy gradient when a completion is sampled under one prompt and the update is
taken under another, and penalties on leaving the reference policy.

x_g is the generation prompt, x_t the training prompt, l(y | x) the log-probability of a token or a
sequence. Sources: the original paper on recontextualization (arXiv 2512.19027: equation 7,
appendices A and E), PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), truncated importance
weights (Ionides 2008), k1, k2 and k3 (Schulman, "Approximating KL divergence", 2020).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ip_jax.rl.selection import Selection

OLD = ("itself", "generation", "training", "noise")
LEVELS = ("token", "sequence")
KL_CONTEXTS = ("none", "tt", "gg", "tg")
KL_PLACES = ("loss", "reward")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """A supervised loss at x_t, `factor` times, on the samples that `selection` chooses: by default
    each group's best one, where it earned a reward.
    """

    factor: float = 1.0
    selection: Selection = Selection("best_of_n", minimum=0.0)

    def __post_init__(self):
        if not 0 < self.factor < math.inf:
            raise ValueError(f"auxiliary.factor is {self.factor}: it must be a number above 0")
        if self.selection.restart_from_base:
            raise ValueError(
                "auxiliary.selection has restart_from_base: an auxiliary loss is a part of an"
                " update, which does not restart; leave it out"
            )


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What the present log-probabilities at x_t are compared with (`old`), and what is done with
    the ratio.

    `old`: "itself" (the same pass: the ratio is 1 and only its gradient counts), "generation" (the
    sampling policy at x_g), "training" (the sampling policy at x_t), "noise" (the ratio is a number
    drawn from [1 - noise, 1 + noise] for each sequence). `level`: the ratio of a token, or of the
    whole sequence for each of its tokens. `clip`: PPO's epsilon. `dual_clip`: the bound of the loss
    at negative advantages. `truncate`: the bound of the weight exp(l(y | x_g) - l_sampler(y |
    x_g)), which corrects the sampler's numerics under one and the same prompt. `auxiliary`: a
    supervised loss at x_t on selected samples, with which the policy loss itself stays at x_g.
    Raises ValueError for fields without meaning.
    """

    name: str
    old: str = "itself"
    level: str = "token"
    clip: float | None = None
    dual_clip: float | None = None
    noise: float | None = None
    truncate: float | None = None
    auxiliary: Auxiliary | None = None

    def __post_init__(self):
        for field, known in (("old", OLD), ("level", LEVELS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"estimator.{field} is {getattr(self, field)!r}: choose from {', '.join(known)}"
                )
        if (self.old == "noise") != (self.noise is not None):
            raise ValueError("an estimator has noise exactly when its old is 'noise'")
        for field in ("clip", "truncate"):
            if getattr(self, field) is not None and not 0 < getattr(self, field) < math.inf:
                raise ValueError(
                    f"estimator.{field} is {getattr(self, field)}: it must be a number above 0"
                )
        if self.noise is not None and not 0 <= self.noise <= 1:
            raise ValueError(
                f"estimator.noise is {self.noise}: it must lie between 0 and 1, or ratios become"
                " negative"
            )
        if self.dual_clip is not None and (self.clip is None or not 1 < self.dual_clip < math.inf):
            raise ValueError(
                f"estimator.dual_clip is {self.dual_clip}: it needs a clip, and must be above 1"
            )
        if self.truncate is not None and self.old == "generation":
            raise ValueError(
                "an estimator with truncate and old 'generation' corrects the sampler twice, whose"
                " own log-probabilities are in the ratio: drop truncate"
            )
        if not isinstance(self.auxiliary, Auxiliary | None):
            raise ValueError(
                f"estimator.auxiliary is {self.auxiliary!r}: give an Auxiliary, whose factor the"
                " loss is multiplied by"
            )
        if self.auxiliary is not None and self.old == "training":
            raise ValueError(
                "an estimator with auxiliary has its policy loss at the generation prompt, old"
                " 'training' is at the other: use old 'generation'"
            )


ESTIMATORS = {
    estimator.name: estimator
    for estimator in (
        Estimator("plain"),  # E1, equation 7: what "recontextualization" means there
        Estimator("importance_token", old="generation"),  # E2
        # E2: the policy gradient at x_t, for a baseline that does not depend on the sample
        Estimator("importance_sequence", old="generation", level="sequence"),
        Estimator("late_sequence", old="generation", level="sequence", clip=0.2),  # E3
        # E4: what naive swapping in a PPO trainer gives; collapses
        Estimator("late_token", old="generation", clip=0.2, dual_clip=3.0),
        # E5: the generalisation of E1 to several updates
        Estimator("train_old", old="training", clip=0.2),
        Estimator("truncated", truncate=2.0),  # E6
        Estimator("ratio_noise", old="noise", noise=0.3, clip=0.2),  # E7
        Estimator("auxiliary", auxiliary=Auxiliary()),  # E8
    )
}
WARNINGS = {
    "late_token": (
        "late_token (swapping prompts inside a token-level PPO ratio) collapsed in every published"
        " run: it is here as a control"
    )
}


@dataclasses.dataclass(frozen=True)
class Kl:
    """A penalty on leaving the reference policy. `context` names the prompt of the policy, then
    that of the reference: tt, gg, tg, or none.

    `place`: in the loss, or (k1) in the reward, where it is added to the finished advantage and not
    centred. gg is the unbiased penalty on the sampled states; tg pulls the policy at x_t to the
    reference at x_g, which is context distillation by itself.
    """

    context: str = "none"
    place: str = "loss"
    estimator: str = "k3"
    beta: float = 0.0

    def __post_init__(self):
        for field, known in (
            ("context", KL_CONTEXTS),
            ("place", KL_PLACES),
            ("estimator", KL_ESTIMATORS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"kl.{field} is {getattr(self, field)!r}: choose from {', '.join(known)}"
                )
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"kl.beta is {self.beta}: it must be a number of at least 0")
        if (self.context == "none") != (self.beta == 0):
            raise ValueError(
                f"kl.context is {self.context!r} and kl.beta is {self.beta}: a context needs a beta"
                " other than 0, and a beta a context"
            )


def policy_loss(
    log_probs: Float[Array, "*B C"],
    old_log_probs: Float[Array, "*B C"],
    advantage: Float[Array, "*B C"],
    mask: Bool[Array, "*B C"],
    estimator: Estimator,
) -> tuple[Float[Array, "*B C"], Float[Array, "*B C"], Bool[Array, "*B C"]]:
    """(loss, ratio, whether clipping took the gradient away) of each token of completions that lie
    along the last axis.

    A sequence's ratio r is given to its tokens as sg[r] * exp(l - sg[l]): the gradient is r A
    sum(grad l), as of the sequence itself.
    """
    fixed = jax.lax.stop_gradient(log_probs)
    own = log_probs - fixed  # 0, with the gradient of l
    if estimator.old == "itself":
        log_ratio = own
    elif estimator.old == "noise":
        log_ratio = own + old_log_probs
    elif estimator.level == "token":
        log_ratio = own + (fixed - old_log_probs)
    else:
        log_ratio = own + jnp.sum(jnp.where(mask, fixed - old_log_probs, 0), axis=-1, keepdims=True)
    ratio = jnp.exp(log_ratio)
    objective = ratio * advantage
    clipped = jnp.zeros(mask.shape, bool)
    if estimator.clip is not None:
        bounded = jnp.clip(ratio, 1 - estimator.clip, 1 + estimator.clip) * advantage
        clipped = bounded < objective
        objective = jnp.minimum(objective, bounded)
    if estimator.dual_clip is not None:
        floor = estimator.dual_clip * advantage
        clipped |= (advantage < 0) & (objective < floor)
        objective = jnp.where(advantage < 0, jnp.maximum(objective, floor), objective)
    return -objective, ratio, clipped & mask


def kl_estimate(
    log_probs: Float[Array, "*B"], reference_log_probs: Float[Array, "*B"], estimator: str
) -> Float[Array, "*B"]:
    """KL(policy || reference) from samples of the policy: with d = l_reference - l, k1 = -d, k2 =
    d^2 / 2, k3 = e^d - 1 - d.
    """
    d = reference_log_probs - log_probs
    if estimator == "k1":
        return -d
    return jnp.square(d) / 2 if estimator == "k2" else jnp.expm1(d) - d
