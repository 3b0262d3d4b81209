"""From a graded rollout to the rows of its update: advantages, gate, swap of prompts. Pure, on arrays; no model is run here.

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
from ip_jax.rl.selection import Selection, select
from ip_jax.rl.step import RlBatch


@flax.struct.dataclass
class Rollout:
    """One iteration of R runs, sampled and graded. Completion tokens stand in `samples` alone, prompts beside them."""

    samples: Samples
    generation: Prompts
    training: Prompts  # one a group, or one a completion
    temperature: Float[Array, " R"]
    rewards: Float[Array, "R Q G"]
    valid: Bool[Array, "R Q G"]  # False: the reward failed, or a monitor took the sample out
    labels: Int[Array, "R Q G"]  # small integers, for an oracle gate and for what is logged
    uniforms: Float[Array, "R Q G"]  # in [0, 1): the randomness of gates and of ratio_noise


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of rows: `tokens_per_micro_batch` bounds R * B * T; `samples_per_row` (None: a whole group) completions share a prompt;
    `multiple` is the size of the mesh's axis data.
    """

    tokens_per_micro_batch: int = 2048
    samples_per_row: int | None = None
    multiple: int = 1


@flax.struct.dataclass
class Decisions:
    """What was decided of each sample: its advantage, and its weight at the training prompt (1 without a gate)."""

    advantage: Float[Array, "R Q G"]
    gate_weight: Float[Array, "R Q G"]


def rows_to_score(prompts: Prompts, rollout: Rollout, algorithm: Algorithm, layout: Layout) -> Rows:
    """The rollout's samples under `prompts`, for a pass without a gradient."""
    return _rows(prompts, rollout, None, algorithm, layout)


def make_batch(
    rollout: Rollout, scores: dict[str, Float[Array, "R Q G C"]], moving: Float[Array, " R"] | None, reference_scores: Float[Array, " R"] | None,
    algorithm: Algorithm, layout: Layout,
) -> tuple[RlBatch, Decisions]:
    """(rows of the update, what was decided). `scores` holds the passes of `passes_needed(algorithm)`; `moving` [R] serves the baseline
    moving_mean, `reference_scores` [R] an absolute gate.
    """
    samples, mask = rollout.samples, rollout.samples.mask
    valid = rollout.valid & (samples.length > 0)
    slots = samples.tokens.shape[-1]
    if algorithm.selection:
        chosen = select(rollout.rewards, valid, algorithm.selection)
        copied = Decisions(chosen.astype(jnp.float32), jnp.ones(valid.shape, jnp.float32))
        weight = aggregation_weights(samples.length, chosen, slots, algorithm.aggregation)
        return RlBatch(_rows(rollout.training, rollout, _signal(copied.advantage, weight), algorithm, layout)), copied

    training = scores.get("policy_training")
    accepted = gates.gate_weights(
        algorithm.gate, training, samples.log_probs, mask, uniforms=rollout.uniforms, reference_scores=reference_scores, labels=rollout.labels
    )
    advantage = advantages(rollout.rewards, gates.in_statistics(algorithm.gate, accepted, valid), algorithm.baseline, moving)
    if algorithm.pmi:
        advantage *= pmi_weights(advantage, gates.log_likelihood_ratio(training, samples.log_probs, mask), *algorithm.pmi)
    if algorithm.kl.place == "reward" and algorithm.kl.context != "none":
        policy = samples.log_probs if algorithm.kl.context == "gg" else training
        of_tokens = jnp.where(mask, kl_estimate(policy, _reference(scores, algorithm), algorithm.kl.estimator), 0)
        advantage = kl_penalised(advantage, of_tokens.sum(-1), algorithm.kl.beta)
    weight = aggregation_weights(samples.length, valid, slots, algorithm.aggregation)
    at_training, at_generation = (w[..., None] * weight for w in gates.split_weights(algorithm.gate, accepted, advantage))
    return _update_rows(rollout, scores, advantage, (at_training, at_generation, weight), algorithm, layout), Decisions(advantage, accepted)


def _update_rows(rollout: Rollout, scores, advantage, weights, algorithm: Algorithm, layout: Layout) -> RlBatch:
    """The swap: samples under the training prompt, those that a gate sends back under the generation prompt."""
    at_training, at_generation, weight = weights
    samples, estimator, reference = rollout.samples, algorithm.estimator, _reference(scores, algorithm)
    of_tokens = jnp.broadcast_to(advantage[..., None], weight.shape)
    if estimator.truncate is not None:  # corrects the sampler's numerics under one prompt; the training prompt never enters
        of_tokens *= jnp.minimum(estimator.truncate, jnp.exp(scores["policy_generation"] - samples.log_probs))
    old = samples.log_probs  # of an estimator that compares with itself, not looked at
    if estimator.old == "noise":
        old = jnp.broadcast_to(jnp.log(1 + estimator.noise * (2 * rollout.uniforms - 1))[..., None], weight.shape)
    elif algorithm.estimator_of_update.old == "training":
        old = scores["policy_training"]
    rows = lambda prompts, *signal: _rows(prompts, rollout, _signal(*signal), algorithm, layout)  # noqa: E731
    if estimator.auxiliary is not None:
        best = select(rollout.rewards, rollout.valid, Selection())
        copied = aggregation_weights(samples.length, best, weight.shape[-1], algorithm.aggregation)
        policy = rows(rollout.generation, of_tokens, at_training, old, reference)
        return RlBatch(policy, auxiliary=rows(rollout.training, best.astype(jnp.float32), copied))
    policy = rows(rollout.training, of_tokens, at_training, old, reference)
    if algorithm.gate.rejected != "drop":
        back = rows(rollout.generation, of_tokens, at_generation, samples.log_probs, reference)
        policy = jax.tree.map(lambda *parts: jnp.concatenate(parts), *_same_width(policy, back))
    in_loss_at_generation = algorithm.kl.context == "gg" and algorithm.kl.place == "loss"
    return RlBatch(policy, kl=rows(rollout.generation, of_tokens, weight, old, reference) if in_loss_at_generation else None)


def _reference(scores: dict, algorithm: Algorithm) -> Float[Array, "R Q G C"] | None:
    return {"none": None, "tt": scores.get("reference_training")}.get(algorithm.kl.context, scores.get("reference_generation"))


def _signal(advantage, weight, old=None, reference=None) -> Signal:
    full = lambda x: jnp.zeros_like(weight) if x is None else jnp.broadcast_to(x.reshape(*x.shape, *(1,) * (4 - x.ndim)), weight.shape)  # noqa: E731
    return Signal(full(advantage), weight, full(old), full(reference))


def _rows(prompts: Prompts, rollout: Rollout, signal: Signal | None, algorithm: Algorithm, layout: Layout) -> Rows:
    samples = rollout.samples
    runs, groups, of_group, slots = samples.tokens.shape
    in_row = min(layout.samples_per_row or of_group, groups * of_group // prompts.length.shape[1])
    tokens = prompts.tokens.shape[-1] + in_row * slots
    per_minibatch = -(-groups * of_group // in_row // algorithm.minibatches)
    micro = algorithm.minibatches * micro_batches_of(per_minibatch, tokens, runs, layout.tokens_per_micro_batch, layout.multiple)
    return lay_out(prompts, samples, rollout.temperature, signal, micro, in_row)


def _same_width(*of_rows: Rows) -> list[Rows]:
    """Rows whose prompts have as many slots, and micro-batches as many rows."""
    slots, rows = (max(r.prompt.shape[axis] for r in of_rows) for axis in (3, 2))

    def widened(r: Rows) -> Rows:
        more_rows = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, rows - x.shape[2])] + [(0, 0)] * (x.ndim - 3))  # noqa: E731
        prompt = jnp.pad(r.prompt, [(0, 0)] * 3 + [(0, slots - r.prompt.shape[3])])
        return jax.tree.map(more_rows, r.replace(prompt=prompt))

    return [widened(r) for r in of_rows]
