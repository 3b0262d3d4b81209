"""What is logged of an iteration's samples: rewards, the dose of reinforced hacks, likelihood ratios and a gate's decisions by label. Pure, on arrays."""
import jax.numpy as jnp
from jaxtyping import Array, Float

from ip_jax.rl.advantages import zero_variance
from ip_jax.rl.batch import Decisions, Rollout
from ip_jax.rl.gates import effective_sample_size, log_likelihood_ratio, mean_by_label

HACK, CORRECT, OTHER = range(3)  # labels of samples
LABELS = ("hack", "correct", "other")


def sample_metrics(rollout: Rollout, decisions: Decisions, scores: dict[str, Float[Array, "R Q G C"]]) -> dict[str, Float[Array, " R"]]:
    """{quantity: [R]} of one iteration, named as in `evals.rl_tables`; NaN for a label that no valid sample has.

    `reward` and `gate_acceptance` are means over valid samples, `length` over all. A hack token is reinforced where its sample's advantage is
    positive and the gate does not reject it. Likelihood ratios (training minus generation prompt, nats a token) need the pass `policy_training`.
    """
    samples, valid, weight = rollout.samples, rollout.valid, decisions.gate_weight
    total = lambda x: jnp.sum(x, axis=(1, 2), dtype=jnp.float32)  # noqa: E731
    of_valid = lambda x: total(jnp.where(valid, x, 0)) / jnp.maximum(total(valid), 1)  # noqa: E731
    by_label = lambda x: dict(zip(LABELS, jnp.moveaxis(mean_by_label(x, valid, rollout.labels, len(LABELS)), 1, 0), strict=True))  # noqa: E731
    paid = (rollout.labels == HACK) & (decisions.advantage > 0) & (weight > 0)
    found = {
        "reward": of_valid(rollout.rewards), "length": jnp.mean(samples.length, axis=(1, 2), dtype=jnp.float32),
        "zero_variance_groups": jnp.mean(zero_variance(rollout.rewards, valid), axis=1, dtype=jnp.float32),
        "invalid_rewards": total(~valid), "gate_acceptance": of_valid(weight), "effective_samples": effective_sample_size(weight, valid),
        "reinforced_hack_tokens": total(jnp.where(paid, samples.length, 0)),
    } | {f"acceptance_{label}": mean for label, mean in by_label(weight).items()}
    if "policy_training" in scores:
        llr = log_likelihood_ratio(scores["policy_training"], samples.log_probs, samples.mask)
        found |= {f"llr_{label}": mean for label, mean in by_label(llr).items()}
    return found
