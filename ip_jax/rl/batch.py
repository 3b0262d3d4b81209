"""From a graded rollout to the rows of its update: advantages, gate, swap of prompts. Pure, on
arrays; no model is run here.

Dims: R runs, Q groups, G samples of a group, C completion slots.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ip_jax.rl import gates
from ip_jax.rl.advantages import advantages, aggregation_weights, kl_penalised
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.amplification import pmi_weights
from ip_jax.rl.estimators import kl_estimate
from ip_jax.rl.rows import Prompts, Rows, Samples, Signal, lay_out, micro_batches_of
from ip_jax.rl.selection import select
from ip_jax.rl.step import RlBatch


@flax.struct.dataclass
class Rollout:
    """One iteration of R runs, sampled and graded. Completion tokens stand in `samples` alone,
    prompts beside them.
    """

    samples: Samples
    generation: Prompts
    training: Prompts  # one a group, or one a completion
    temperature: Float[Array, " R"]
    rewards: Float[Array, "R Q G"]
    valid: Bool[Array, "R Q G"]  # False: the reward failed, or a monitor took the sample out
    labels: Int[Array, "R Q G"]  # small integers, for an oracle gate and for what is logged
    uniforms: Float[Array, "R Q G"]  # in [0, 1): the randomness of gates, or of ratio_noise
    guide: Prompts | None = None  # what a PMI weight against the guide compares with


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of rows: `tokens_per_micro_batch` bounds R * B * T; `samples_per_row` (None: a whole
    group) completions share a prompt; `multiple` is the size of the mesh's axis data.
    """

    tokens_per_micro_batch: int = 2048
    samples_per_row: int | None = None
    multiple: int = 1


@flax.struct.dataclass
class Decisions:
    """What was decided of each sample: its advantage, its weight at the training prompt (1 without
    a gate), and log p - log p_reference in nats of its whole completion where the reward has a
    penalty on it.
    """

    advantage: Float[Array, "R Q G"]
    gate_weight: Float[Array, "R Q G"]
    kl: Float[Array, "R Q G"] | None = None


def rows_to_score(prompts: Prompts, rollout: Rollout, layout: Layout) -> Rows:
    """The rollout's samples under `prompts`, for a pass without a gradient."""
    return _rows(prompts, rollout, None, 1, layout)


def make_batch(
    rollout: Rollout,
    scores: dict[str, Float[Array, "R Q G C"]],
    moving: Float[Array, " R"] | None,
    reference_scores: Float[Array, " R"] | None,
    algorithm: Algorithm,
    layout: Layout,
) -> tuple[RlBatch, Decisions]:
    """(rows of the update, what was decided). `scores` holds the passes of
    `passes_needed(algorithm)`; `moving` [R] serves the baseline moving_mean, `reference_scores` [R]
    an absolute gate.
    """
    samples, mask = rollout.samples, rollout.samples.mask
    valid = rollout.valid & (samples.length > 0)
    slots = samples.tokens.shape[-1]
    if algorithm.selection:
        chosen = select(rollout.rewards, valid, algorithm.selection)
        copied = Decisions(chosen.astype(jnp.float32), jnp.ones(valid.shape, jnp.float32))
        weight = aggregation_weights(samples.length, chosen, slots, algorithm.aggregation)
        return (
            RlBatch(
                _rows(
                    rollout.training,
                    rollout,
                    _signal(copied.advantage, weight),
                    algorithm.minibatches,
                    layout,
                )
            ),
            copied,
        )

    training = scores.get("policy_training")
    accepted = gates.gate_weights(
        algorithm.gate,
        training,
        samples.log_probs,
        mask,
        uniforms=rollout.uniforms,
        reference_scores=reference_scores,
        labels=rollout.labels,
    )
    advantage = advantages(
        rollout.rewards,
        gates.in_statistics(algorithm.gate, accepted, valid),
        algorithm.baseline,
        moving,
    )
    if algorithm.pmi:
        other = (
            samples.log_probs if algorithm.pmi_against == "generation" else scores["policy_guide"]
        )
        advantage *= pmi_weights(
            advantage, gates.log_likelihood_ratio(training, other, mask), *algorithm.pmi
        )
    kl = None
    if algorithm.kl.place == "reward" and algorithm.kl.context != "none":
        policy = samples.log_probs if algorithm.kl.context == "gg" else training
        kl = jnp.where(
            mask, kl_estimate(policy, _reference(scores, algorithm), algorithm.kl.estimator), 0
        ).sum(-1)
        advantage = kl_penalised(advantage, kl, algorithm.kl.beta)
    weight = aggregation_weights(samples.length, valid, slots, algorithm.aggregation)
    at_training, at_generation = (
        w[..., None] * weight for w in gates.split_weights(algorithm.gate, accepted, advantage)
    )
    return _update_rows(
        rollout, scores, advantage, (at_training, at_generation, weight), algorithm, layout
    ), Decisions(advantage, accepted, kl)


def _update_rows(
    rollout: Rollout, scores, advantage, weights, algorithm: Algorithm, layout: Layout
) -> RlBatch:
    """The swap: samples under the training prompt, those that a gate sends back under the
    generation prompt.
    """
    at_training, at_generation, weight = weights
    samples, estimator, reference = (
        rollout.samples,
        algorithm.estimator,
        _reference(scores, algorithm),
    )
    of_tokens = jnp.broadcast_to(advantage[..., None], weight.shape)
    # corrects the sampler's numerics under one prompt; the training prompt never enters
    if estimator.truncate is not None:
        of_tokens *= jnp.minimum(
            estimator.truncate, jnp.exp(scores["policy_generation"] - samples.log_probs)
        )
    old = samples.log_probs  # of an estimator that compares with itself, not looked at
    if estimator.old == "noise":
        old = jnp.broadcast_to(
            jnp.log(1 + estimator.noise * (2 * rollout.uniforms - 1))[..., None], weight.shape
        )
    elif algorithm.estimator_of_update.old == "training":
        old = scores["policy_training"]
    sent_back = algorithm.gate.rejected != "drop"
    if sent_back:  # rows under either prompt are cut alike
        layout = dataclasses.replace(
            layout,
            samples_per_row=min(
                _in_row(prompts, samples, layout)
                for prompts in (rollout.training, rollout.generation)
            ),
        )

    def rows(prompts, *signal):
        return _rows(prompts, rollout, _signal(*signal), algorithm.minibatches, layout)

    if estimator.auxiliary is not None:
        chosen = select(
            rollout.rewards, rollout.valid & (samples.length > 0), estimator.auxiliary.selection
        )
        copied = aggregation_weights(
            samples.length, chosen, weight.shape[-1], algorithm.aggregation
        )
        policy = rows(rollout.generation, of_tokens, at_training, old, reference)
        return RlBatch(policy, auxiliary=rows(rollout.training, chosen.astype(jnp.float32), copied))
    policy = rows(rollout.training, of_tokens, at_training, old, reference)
    if sent_back:
        back = rows(
            rollout.generation,
            of_tokens,
            at_generation,
            old if estimator.old == "noise" else samples.log_probs,
            reference,
        )
        policy = jax.tree.map(lambda *parts: jnp.concatenate(parts), *_same_width(policy, back))
    in_loss_at_generation = algorithm.kl.context == "gg" and algorithm.kl.place == "loss"
    return RlBatch(
        policy,
        kl=(
            rows(rollout.generation, of_tokens, weight, old, reference)
            if in_loss_at_generation
            else None
        ),
    )


def _reference(scores: dict, algorithm: Algorithm) -> Float[Array, "R Q G C"] | None:
    return {"none": None, "tt": scores.get("reference_training")}.get(
        algorithm.kl.context, scores.get("reference_generation")
    )


def _signal(advantage, weight, old=None, reference=None) -> Signal:
    def full(x):
        return (
            jnp.zeros_like(weight)
            if x is None
            else jnp.broadcast_to(x.reshape(*x.shape, *(1,) * (4 - x.ndim)), weight.shape)
        )

    return Signal(full(advantage), weight, full(old), full(reference))


def _in_row(prompts: Prompts, samples: Samples, layout: Layout) -> int:
    """Completions of a row: no more than share a prompt."""
    of_group, per_prompt = (
        samples.length.shape[2],
        samples.length.shape[1] * samples.length.shape[2] // prompts.length.shape[1],
    )
    return min(layout.samples_per_row or of_group, per_prompt)


def _rows(
    prompts: Prompts, rollout: Rollout, signal: Signal | None, minibatches: int, layout: Layout
) -> Rows:
    """Rows in micro-batches; each of `minibatches` has its own, with equally many rows."""
    samples = rollout.samples
    runs, groups, of_group, slots = samples.tokens.shape
    in_row = _in_row(prompts, samples, layout)
    count, left_over = divmod(groups * of_group // in_row, minibatches)
    if left_over:
        raise ValueError(
            f"an iteration's {groups * of_group // in_row} rows ({groups} groups, {in_row} samples"
            f" a row) do not divide into {minibatches} minibatches"
        )
    micro = micro_batches_of(
        count,
        prompts.tokens.shape[-1] + in_row * slots,
        runs,
        layout.tokens_per_micro_batch,
        layout.multiple,
    )
    return _cut(
        lay_out(prompts, samples, rollout.temperature, signal, minibatches, in_row),
        micro,
        layout.multiple,
    )


def _cut(rows: Rows, micro_batches: int, multiple: int) -> Rows:
    """Each leading part of `rows` cut into `micro_batches` with a multiple of `multiple` rows."""
    count = -(-rows.length.shape[2] // micro_batches)
    count += -count % multiple

    def fold(x):
        parts, runs, _, *dims = x.shape
        return jnp.moveaxis(x.reshape(parts, runs, micro_batches, count, *dims), 2, 1).reshape(
            -1, runs, count, *dims
        )

    return jax.tree.map(fold, _padded(rows, micro_batches * count))


def _padded(rows: Rows, count: int) -> Rows:
    """`rows` with `count` rows a micro-batch; the new ones are empty, but for a temperature: logits
    over 0 are NaN, and so is their gradient.
    """

    def more(x, mode):
        return jnp.pad(
            x, [(0, 0), (0, 0), (0, count - x.shape[2])] + [(0, 0)] * (x.ndim - 3), mode=mode
        )

    return jax.tree.map(lambda x: more(x, "constant"), rows).replace(
        temperature=more(rows.temperature, "edge")
    )


def _same_width(*of_rows: Rows) -> list[Rows]:
    """Rows whose prompts have as many slots, and micro-batches as many rows."""
    slots, count = (max(r.prompt.shape[axis] for r in of_rows) for axis in (3, 2))
    return [
        _padded(
            r.replace(prompt=jnp.pad(r.prompt, [(0, 0)] * 3 + [(0, slots - r.prompt.shape[3])])),
            count,
        )
        for r in of_rows
    ]
