"""Advantages from rewards, and the weights with which tokens add up to a loss.

Baselines: REINFORCE with none or a moving mean, RLOO (arXiv 2402.14740), Dr.GRPO (arXiv 2503.20783:
the group's mean), GRPO (arXiv 2402.03300: also divided by the group's standard deviation). Dims: R
runs, Q groups of a run, G samples of a group, C completion slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GROUP_BASELINES = ("leave_one_out", "group_mean", "group_mean_std")
BASELINES = ("none", "moving_mean", *GROUP_BASELINES)
STD_EPSILON = 1e-4

AGGREGATIONS = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "token_mean_per_chunk",
)


def advantages(
    rewards: Float[Array, "R Q G"],
    valid: Bool[Array, "R Q G"],
    baseline: str,
    moving: Float[Array, " R"] | None = None,
) -> Float[Array, "R Q G"]:
    """Advantages in the rewards' unit (group_mean_std: in standard deviations of the group),
    without gradient.

    Samples that are not valid (their reward may be NaN) are left out of their group's statistics
    and get 0. A group whose valid rewards are all equal, or that has fewer than two of them, gets
    exactly 0 under a group baseline. The standard deviation has n - 1 in its denominator, and
    STD_EPSILON is added to it, both as in TRL (verl adds 1e-6). `moving` [R] is what moving_mean
    subtracts (`update_moving_mean`).
    """
    rewards = jax.lax.stop_gradient(jnp.where(valid, rewards, 0))
    if baseline not in GROUP_BASELINES:
        subtracted = moving[:, None, None] if baseline == "moving_mean" else 0
        return jnp.where(valid, rewards - subtracted, 0)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    others = jnp.maximum(count - 1, 1)
    centred = jnp.where(
        valid, rewards - jnp.sum(rewards, axis=-1, keepdims=True) / jnp.maximum(count, 1), 0
    )
    if baseline == "leave_one_out":  # R - (sum - R) / (n - 1) = (R - mean) n / (n - 1)
        centred = centred * count / others
    elif baseline == "group_mean_std":
        centred = centred / (
            jnp.sqrt(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / others) + STD_EPSILON
        )
    # the mean of equal rewards is off by a rounding, which a tiny deviation would blow up
    return jnp.where(_varies(rewards, valid), centred, 0)


def _varies(rewards: Float[Array, "R Q G"], valid: Bool[Array, "R Q G"]) -> Bool[Array, "R Q 1"]:
    highest = jnp.max(rewards, axis=-1, keepdims=True, initial=-jnp.inf, where=valid)
    return highest > jnp.min(rewards, axis=-1, keepdims=True, initial=jnp.inf, where=valid)


def zero_variance(
    rewards: Float[Array, "R Q G"], valid: Bool[Array, "R Q G"]
) -> Bool[Array, "R Q"]:
    """Groups from which a group baseline learns nothing: their valid rewards are all equal, or
    fewer than two.
    """
    return ~_varies(jnp.where(valid, rewards, 0), valid)[..., 0]


def update_moving_mean(
    moving: Float[Array, " R"],
    rewards: Float[Array, "R Q G"],
    valid: Bool[Array, "R Q G"],
    iteration: Int[Array, ""],
    decay: float = 0.9,
) -> Float[Array, " R"]:
    """The runs' moving means after the 0-based `iteration`: of the first 1 / (1 - decay) iterations
    their plain mean, then an exponential one.

    Take advantages with the mean of the iterations before, so that the baseline does not depend on
    the samples that it judges; start from
    0. A run without a valid sample keeps its mean.
    """
    rate = jnp.maximum(1 - decay, 1 / (iteration + 1))
    count = jnp.sum(valid, axis=(1, 2))
    mean = jnp.sum(jnp.where(valid, rewards, 0), axis=(1, 2)) / jnp.maximum(count, 1)
    return jax.lax.stop_gradient(jnp.where(count > 0, moving + rate * (mean - moving), moving))


def kl_penalised(
    advantages: Float[Array, "R Q G"], kl: Float[Array, "R Q G"], beta: float
) -> Float[Array, "R Q G"]:
    """Advantages with a KL penalty in the reward: A - beta * KL of each sample, in nats of its
    whole completion, without gradient.

    Added after the group's normalisation and not centred, as in the original recontextualization
    code (arXiv 2512.19027 v1), so it also reaches groups whose rewards are all equal. Invalid
    samples are kept out by `aggregation_weights`.
    """
    return jax.lax.stop_gradient(advantages - beta * kl)


def check_baseline(baseline: str, of_group: int) -> None:
    """Raises ValueError for a baseline that is not known, or that groups of `of_group` samples
    cannot have.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline is {baseline!r}: choose from {', '.join(BASELINES)}")
    if baseline in GROUP_BASELINES and of_group < 2:
        raise ValueError(
            f"baseline {baseline!r} compares the samples of a group, and groups have {of_group}:"
            " sample at least 2, or use none or moving_mean"
        )


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """How token losses become a run's loss, over the run's valid samples of an iteration (its
    global batch).

    token_mean: mean over tokens. seq_mean_token_mean: mean over samples of their token means (TRL's
    grpo). seq_mean_token_sum: mean over samples of their sums. seq_mean_token_sum_norm: that over
    `max_length` (TRL's dr_grpo). token_mean_per_chunk: mean over chunks of `chunk` samples, in
    order, of their token means, which is what trainers do that take token means of micro-batches
    (TRL's bnpo, verl).
    """

    kind: str = "token_mean"
    chunk: int | None = None
    max_length: int | None = None

    def __post_init__(self):
        if self.kind not in AGGREGATIONS:
            raise ValueError(
                f"aggregation kind is {self.kind!r}: choose from {', '.join(AGGREGATIONS)}"
            )
        for field, kind in (
            ("chunk", "token_mean_per_chunk"),
            ("max_length", "seq_mean_token_sum_norm"),
        ):
            value = getattr(self, field)
            if (self.kind == kind) != (value is not None) or (value is not None and value < 1):
                raise ValueError(
                    f"aggregation {self.kind} with {field} = {value}: {kind} needs a {field} of at"
                    " least 1, and no other kind has one"
                )


def aggregation_weights(
    length: Int[Array, "R Q G"], valid: Bool[Array, "R Q G"], slots: int, aggregation: Aggregation
) -> Float[Array, "R Q G C"]:
    """Weights with which token losses sum up to a run's loss; 0 behind a completion's end and for
    samples that are not valid.

    They are fixed before the batch is cut, so the loss does not depend on micro-batches, on `slots`
    (C) or, but for chunks, on the order of samples. A gate's weights multiply these, which keeps
    the denominators those of all valid samples. Chunks without a valid sample do not count, and the
    last one may be smaller.
    """
    inside = (jnp.arange(slots) < length[..., None]) & valid[..., None]
    tokens = jnp.where(valid, length, 0)
    if aggregation.kind == "token_mean":
        of_sample = 1 / jnp.maximum(jnp.sum(tokens, axis=(1, 2), keepdims=True), 1)
    elif aggregation.kind == "token_mean_per_chunk":
        of_sample = _chunk_weights(tokens, aggregation.chunk)
    else:
        of_sample = 1 / jnp.maximum(jnp.sum(valid, axis=(1, 2), keepdims=True), 1)
        if aggregation.kind == "seq_mean_token_mean":
            of_sample = of_sample / jnp.maximum(length, 1)
        elif aggregation.kind == "seq_mean_token_sum_norm":
            of_sample = of_sample / aggregation.max_length
    return jnp.where(inside, of_sample[..., None], 0).astype(jnp.float32)


def _chunk_weights(tokens: Int[Array, "R Q G"], chunk: int) -> Float[Array, "R Q G"]:
    runs, samples = tokens.shape[0], tokens.shape[1] * tokens.shape[2]
    flat = jnp.pad(tokens.reshape(runs, samples), ((0, 0), (0, -samples % chunk)))
    of_chunk = jnp.sum(flat.reshape(runs, -1, chunk), axis=-1)  # [R, chunks]
    weight = 1 / (
        jnp.maximum(of_chunk, 1) * jnp.maximum(jnp.sum(of_chunk > 0, axis=-1, keepdims=True), 1)
    )
    return jnp.repeat(weight, chunk, axis=-1)[:, :samples].reshape(tokens.shape)
