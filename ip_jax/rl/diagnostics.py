"""What is logged of an iteration's samples: rewards, the dose of reinforced hacks, likelihood
ratios and a gate's decisions by label. Pure, on arrays.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ip_jax.rl.advantages import zero_variance
from ip_jax.rl.batch import Decisions, Rollout
from ip_jax.rl.gates import effective_sample_size, log_likelihood_ratio, mean_by_label

HACK, CORRECT, OTHER = range(3)  # labels of samples
LABELS = ("hack", "correct", "other")


def sample_metrics(
    rollout: Rollout,
    decisions: Decisions,
    scores: dict[str, Float[Array, "R Q G C"]],
    guided: bool = False,
) -> dict[str, Float[Array, " R"]]:
    """{quantity: [R]} of one iteration, named as in `evals.rl_tables`; NaN for a label that no
    valid sample has.

    `reward` and `gate_acceptance` are means over valid samples, `length` over all. A hack token is
    reinforced where its sample's advantage is positive and the gate does not reject it. `kl`, in
    nats a token of valid samples, is there where the reward has a penalty on it (of one in the loss
    the step says it). Likelihood ratios need the pass `policy_training`, and of `guided` samples,
    whose own log-probabilities are not the policy's at the generation prompt, `policy_generation`
    too.
    """
    samples, valid, weight = rollout.samples, rollout.valid, decisions.gate_weight

    def total(x):
        return jnp.sum(x, axis=(1, 2), dtype=jnp.float32)

    def of_valid(x):
        return total(jnp.where(valid, x, 0)) / jnp.maximum(total(valid), 1)

    paid = (rollout.labels == HACK) & (decisions.advantage > 0) & (weight > 0)
    found = {
        "reward": of_valid(rollout.rewards),
        "length": jnp.mean(samples.length, axis=(1, 2), dtype=jnp.float32),
        "zero_variance_groups": jnp.mean(
            zero_variance(rollout.rewards, valid), axis=1, dtype=jnp.float32
        ),
        "invalid_rewards": total(~valid),
        "gate_acceptance": of_valid(weight),
        "effective_samples": effective_sample_size(weight, valid),
        "reinforced_hack_tokens": total(jnp.where(paid, samples.length, 0)),
    } | _by_label("acceptance", weight, rollout)
    if decisions.kl is not None:
        found["kl"] = total(jnp.where(valid, decisions.kl, 0)) / total(
            jnp.where(valid, samples.length, 0)
        )
    if "policy_training" not in scores or (guided and "policy_generation" not in scores):
        return found
    return found | llr_metrics(
        rollout, scores["policy_training"], scores.get("policy_generation", samples.log_probs)
    )


def llr_metrics(
    rollout: Rollout,
    train_log_probs: Float[Array, "R Q G C"],
    gen_log_probs: Float[Array, "R Q G C"],
) -> dict[str, Float[Array, " R"]]:
    """{llr_hack, llr_correct, llr_other: [R]}: LLR(y) = (1/T)[l(y | x_t) - l(y | x_g)] in nats a
    token, mean over the valid samples of a label.

    Under one prompt it is what sampler and trainer differ by, 1e-7 or so in float32.
    """
    return _by_label(
        "llr", log_likelihood_ratio(train_log_probs, gen_log_probs, rollout.samples.mask), rollout
    )


def _by_label(
    name: str, values: Float[Array, "R Q G"], rollout: Rollout
) -> dict[str, Float[Array, " R"]]:
    means = mean_by_label(values, rollout.valid, rollout.labels, len(LABELS))
    return {f"{name}_{label}": means[:, i] for i, label in enumerate(LABELS)}
