"""Gates: which of the samples drawn under one prompt are plausible enough under another to be
trained on there, and with what weight.

x_g is the generation prompt, x_t the training prompt, l(y | x) the log-probability of a completion
of T tokens, dl = l(y | x_t) - l(y | x_g) in nats, LLR = dl / T. Dims: R runs, Q groups, G samples,
C completion slots. Between full recontextualization (gate off) and importance sampling.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEEDS = {  # kind: the fields that it needs; no other kind has them
    "off": (),
    "absolute": ("quantile",),
    "relative": ("threshold",),
    "stochastic": ("bound",),
    "soft_sigmoid": ("threshold", "width"),
    "soft_ratio": ("alpha", "max_weight"),
    "worst_token": ("threshold", "window"),
    "random": (),
    "oracle": ("accepted_labels",),
}
KINDS = tuple(NEEDS)
FIELDS = (
    "quantile",
    "threshold",
    "bound",
    "width",
    "alpha",
    "max_weight",
    "window",
    "accepted_labels",
)
SOFT = ("soft_sigmoid", "soft_ratio")  # accept every sample in part
REJECTED = ("drop", "train_at_gen", "train_at_gen_negative_only")
STATISTICS = ("before_gate", "after_gate")


@dataclasses.dataclass(frozen=True)
class Gate:
    """A sample's weight at the training prompt is 1 where the gate accepts it.

    absolute: l(y | x_t) / T is at least the `quantile` of what samples of x_t itself have.
    relative: LLR >= `threshold`. stochastic: with probability min(1, exp(dl) / `bound`): if `bound`
    >= sup exp(dl), accepted samples are distributed as p(. | x_t). soft_sigmoid: weight
    sigmoid((LLR - `threshold`) / `width`). soft_ratio: weight min(`max_weight`, exp(`alpha` * dl)),
    from recontextualization (alpha 0) to truncated importance weights (1). worst_token: the lowest
    mean of the token LLRs in `window` consecutive tokens is at least `threshold` (a shorter
    completion is one window). Controls: random accepts with probability `rate`, or as often as the
    gate `like` would accept the same samples; oracle accepts samples with one of `accepted_labels`;
    `reversed` accepts exactly what would be rejected. `rejected`: what becomes of the others, see
    `split_weights`. `statistics`: whether a group's baseline is taken over all its valid samples,
    or (after_gate) over the accepted ones only. All weights are without gradient. Raises ValueError
    for fields without meaning.
    """

    kind: str = "off"
    quantile: float | None = None
    threshold: float | None = None
    bound: float | None = None
    width: float | None = None
    alpha: float | None = None
    max_weight: float | None = None
    window: int | None = None
    accepted_labels: tuple[int, ...] | None = None
    rate: float | None = None
    like: "Gate | None" = None
    reversed: bool = False
    rejected: str = "drop"
    statistics: str = "before_gate"

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("rejected", REJECTED), ("statistics", STATISTICS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"gate {name} is {getattr(self, name)!r}: choose from {', '.join(known)}"
                )
        for name in FIELDS:
            if (name in NEEDS[self.kind]) != (getattr(self, name) is not None):
                needed = ", ".join(NEEDS[self.kind]) or "none of them"
                raise ValueError(
                    f"gate {self.kind} with {name} = {getattr(self, name)}: of {', '.join(FIELDS)}"
                    f" it needs {needed}"
                )
        for reason, is_so in self._contradictions().items():
            if is_so:
                raise ValueError(reason)

    def _contradictions(self) -> dict[str, bool]:
        rate, like = self.rate, self.like

        # NaN is outside
        def outside(value, inside):
            return value is not None and not inside(value)

        return {
            f"gate quantile is {self.quantile}: it must lie between 0 and 1": outside(
                self.quantile, lambda q: 0 < q < 1
            ),
            f"gate threshold is {self.threshold}: it must be a number": outside(
                self.threshold, math.isfinite
            ),
            f"gate bound is {self.bound}: it must be a number above 0": outside(
                self.bound, lambda c: 0 < c < math.inf
            ),
            f"gate width is {self.width}: it must be a number above 0": outside(
                self.width, lambda h: 0 < h < math.inf
            ),
            f"gate alpha is {self.alpha}: it must be a number of at least 0": outside(
                self.alpha, lambda a: 0 <= a < math.inf
            ),
            f"gate max_weight is {self.max_weight}: it must be a number of at least 1": outside(
                self.max_weight, lambda w: 1 <= w < math.inf
            ),
            f"gate window is {self.window}: it must be at least 1 token": outside(
                self.window, lambda k: k >= 1
            ),
            "gate accepted_labels is empty: name at least one label": self.accepted_labels == (),
            f"gate rate is {rate}: it must lie in (0, 1]": outside(rate, lambda r: 0 < r <= 1),
            (
                f"gate {self.kind} with rate = {rate}: random needs a rate or a gate to be "
                "like, one of the two, and no other kind has either"
            ): (((rate is not None) + (like is not None)) != (self.kind == "random")),
            (
                f"a random gate cannot be like the gate {like and like.kind}: name one that "
                "accepts some samples and rejects others"
            ): (like is not None and like.kind in ("off", "random", *SOFT)),
            f"gate {self.kind} cannot be reversed: it has no samples that it rejects": (
                self.reversed and self.kind in ("off", "soft_ratio")
            ),
            f"gate {self.kind} has no rejected samples, so its statistics must be before_gate": (
                self.statistics == "after_gate" and self.kind in ("off", *SOFT)
            ),
            (
                f"gate rejected is {self.rejected} with statistics after_gate: rejected "
                "samples have no advantage then: use before_gate or drop"
            ): (self.statistics == "after_gate" and self.rejected != "drop"),
            f"gate {self.kind} leaves no samples for rejected = {self.rejected}: use drop": (
                self.kind == "off" and self.rejected != "drop"
            ),
        }

    @property
    def draws(self) -> bool:
        """Whether it decides by a random number of each sample."""
        return self.kind in ("stochastic", "random")

    @property
    def needs_log_probs(self) -> bool:
        """Whether it compares log-probabilities, for which a pass at the training prompt is
        needed.
        """
        return (
            self.like.needs_log_probs
            if self.like is not None
            else self.kind not in ("off", "random", "oracle")
        )

    @property
    def compares_prompts(self) -> bool:
        """Whether it compares log-probabilities at the training prompt with those at the generation
        prompt.
        """
        return self.needs_log_probs and not self.needs_reference

    @property
    def needs_reference(self) -> bool:
        """Whether it needs `reference_scores` from samples of the training prompt itself."""
        return self.like.needs_reference if self.like is not None else self.kind == "absolute"

    @property
    def needs_labels(self) -> bool:
        """Whether it needs the samples' labels."""
        return self.like.needs_labels if self.like is not None else self.kind == "oracle"


def gate_weights(
    gate: Gate,
    train_log_probs: Float[Array, "R Q G C"] | None,
    gen_log_probs: Float[Array, "R Q G C"] | None,
    mask: Bool[Array, "R Q G C"],
    *,
    uniforms: Float[Array, "R Q G"],
    reference_scores: Float[Array, " R"] | None = None,
    labels: Int[Array, "R Q G"] | None = None,
) -> Float[Array, "R Q G"]:
    """Weights of samples at the training prompt, without gradient: 1 or 0, and for soft gates any
    number from 0 to `max_weight`.

    Log-probabilities are those of the sampling policy at the sampling temperature under x_t and
    x_g. `uniforms` are drawn from [0, 1), one for each sample (stochastic and random use them);
    `reference_scores`: see `reference_quantile` (absolute); `labels` are small integers (oracle).
    What the gate does not need may be None.
    """
    found = acceptance(gate, train_log_probs, gen_log_probs, mask, reference_scores, labels)
    return jax.lax.stop_gradient(found) if gate.kind in SOFT else accept(found, uniforms)


def accept(probability: Float[Array, "*#B"], uniforms: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """1 with the given probability, else 0. With another gate's accepted fraction [R, 1, 1] of each
    run it is the random control of that gate.
    """
    return jax.lax.stop_gradient((uniforms < probability).astype(jnp.float32))


def acceptance(
    gate: Gate, train_log_probs, gen_log_probs, mask, reference_scores=None, labels=None
) -> Float[Array, "R Q G"]:
    """The probability with which the gate accepts each sample, for soft gates the weight; arguments
    as of `gate_weights`.
    """
    found = _as_stated(gate, train_log_probs, gen_log_probs, mask, reference_scores, labels)
    return 1 - found if gate.reversed else found


def _as_stated(gate: Gate, train, gen, mask, reference_scores, labels) -> Float[Array, "R Q G"]:
    """`acceptance` of a gate that is not reversed."""
    if gate.kind == "off":
        return jnp.ones(mask.shape[:-1], jnp.float32)
    if gate.kind == "random":
        if gate.like is None:
            return jnp.full(mask.shape[:-1], gate.rate, jnp.float32)
        of_other = acceptance(gate.like, train, gen, mask, reference_scores, labels)
        return jnp.broadcast_to(jnp.mean(of_other, axis=(1, 2), keepdims=True), of_other.shape)
    if gate.kind == "oracle":
        return jnp.isin(labels, jnp.array(gate.accepted_labels)).astype(jnp.float32)
    if gate.kind == "absolute":
        return (mean_log_prob(train, mask) >= reference_scores[:, None, None]).astype(jnp.float32)
    if gate.kind == "relative":
        return (log_likelihood_ratio(train, gen, mask) >= gate.threshold).astype(jnp.float32)
    if gate.kind == "worst_token":
        return (worst_window(train - gen, mask, gate.window) >= gate.threshold).astype(jnp.float32)
    if gate.kind == "soft_sigmoid":
        return jax.nn.sigmoid(
            (log_likelihood_ratio(train, gen, mask) - gate.threshold) / gate.width
        )
    difference = jnp.sum(jnp.where(mask, train - gen, 0), axis=-1)
    if gate.kind == "soft_ratio":
        return jnp.exp(jnp.minimum(gate.alpha * difference, math.log(gate.max_weight)))
    return jnp.exp(jnp.minimum(difference - math.log(gate.bound), 0))


def mean_log_prob(log_probs: Float[Array, "*B C"], mask: Bool[Array, "*B C"]) -> Float[Array, "*B"]:
    """l(y | x) / T in nats a token; 0 for an empty completion."""
    return jnp.sum(jnp.where(mask, log_probs, 0), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def log_likelihood_ratio(
    train_log_probs: Float[Array, "*B C"],
    gen_log_probs: Float[Array, "*B C"],
    mask: Bool[Array, "*B C"],
) -> Float[Array, "*B"]:
    """LLR in nats a token: how much more likely the training prompt makes a completion than the
    generation prompt.
    """
    return mean_log_prob(train_log_probs - gen_log_probs, mask)


def worst_window(
    values: Float[Array, "*B C"], mask: Bool[Array, "*B C"], window: int
) -> Float[Array, "*B"]:
    """The lowest mean of `values` in `window` consecutive tokens, of completions that lie along the
    last axis; a shorter one is one window.
    """
    window = min(window, values.shape[-1])
    lead = (1,) * (values.ndim - 1)
    sums = jax.lax.reduce_window(
        jnp.where(mask, values, 0), 0.0, jax.lax.add, (*lead, window), (*lead, 1), "valid"
    )
    length = jnp.sum(mask, axis=-1, keepdims=True)
    in_window = jnp.clip(length, 1, window)
    whole = jnp.arange(sums.shape[-1]) <= jnp.maximum(length - in_window, 0)
    return jnp.min(jnp.where(whole, sums / in_window, jnp.inf), axis=-1)


def reference_quantile(scores: Float[Array, "R N"], quantile: float) -> Float[Array, " R"]:
    """What an absolute gate asks for: the quantile of the mean log-probabilities of each run's
    reference batch, which is drawn under x_t.
    """
    return jnp.quantile(scores, quantile, axis=-1)


def split_weights(
    gate: Gate, weights: Float[Array, "R Q G"], advantages: Float[Array, "R Q G"]
) -> tuple[Float[Array, "R Q G"], Float[Array, "R Q G"]]:
    """(weights at the training prompt, weights at the generation prompt).

    What the gate takes from a sample's weight of 1 is dropped, or trained under the prompt that it
    was sampled with (train_at_gen), or that only where its advantage is negative
    (train_at_gen_negative_only).
    """
    if gate.rejected == "drop":
        return weights, jnp.zeros_like(weights)
    left = jnp.maximum(1 - weights, 0)
    return weights, left if gate.rejected == "train_at_gen" else jnp.where(advantages < 0, left, 0)


def in_statistics(
    gate: Gate, weights: Float[Array, "R Q G"], valid: Bool[Array, "R Q G"]
) -> Bool[Array, "R Q G"]:
    """The samples over which a group's baseline is taken: all valid ones, or those of them that the
    gate accepts.
    """
    return valid & (weights > 0) if gate.statistics == "after_gate" else valid


def mean_by_label(
    values: Float[Array, "R Q G"],
    valid: Bool[Array, "R Q G"],
    labels: Int[Array, "R Q G"],
    count: int,
) -> Float[Array, "R labels"]:
    """Mean of the valid samples' values (weights: what is accepted) for each label 0 .. count - 1;
    NaN where a run has none.
    """
    of_label = (labels[..., None] == jnp.arange(count)) & valid[..., None]
    return jnp.sum(jnp.where(of_label, values[..., None], 0), axis=(1, 2)) / jnp.sum(
        of_label, axis=(1, 2)
    )


def effective_sample_size(
    weights: Float[Array, "R Q G"], valid: Bool[Array, "R Q G"]
) -> Float[Array, " R"]:
    """(sum w)^2 / sum w^2 over a run's valid samples (Kish): their number for equal weights, 0
    where nothing is accepted.
    """
    weights = jnp.where(valid, weights, 0)
    squares = jnp.sum(jnp.square(weights), axis=(1, 2))
    return jnp.where(
        squares > 0,
        jnp.square(jnp.sum(weights, axis=(1, 2))) / jnp.where(squares > 0, squares, 1),
        0,
    )
