"""What is logged of samples, against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_models as rl

from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.batch import Decisions, Layout, Rollout, make_batch
from ip_jax.rl.diagnostics import CORRECT, HACK, LABELS, OTHER, sample_metrics
from ip_jax.rl.estimators import Kl

RUNS, GROUPS, OF_GROUP = 2, 3, 4


@pytest.fixture(scope="module")
def made():
    """(rollout, decisions, scores, metrics) with invalid samples, a label that run 1 never has, and
    a rejected hack.
    """
    rng, samples = np.random.default_rng(3), rl.random_samples(RUNS, GROUPS, OF_GROUP, 5, seed=2)
    shape = samples.length.shape
    labels, valid = rng.integers(0, 3, shape), rng.uniform(size=shape) < 0.8
    labels[1][labels[1] == CORRECT] = OTHER
    labels[0, 0, :2], valid[0, 0, :2] = HACK, True
    rewards = np.where(valid, rng.integers(0, 2, shape), np.nan)
    weight, advantage = rng.uniform(0, 1, shape), rng.normal(size=shape)
    weight[0, 0, 0], advantage[0, 0, :2] = 0, 1.0
    arrays = [jnp.asarray(x, jnp.float32) for x in (rewards, weight, advantage)]
    prompts = rl.prompts([1], [2], [3], runs=RUNS)
    rollout = Rollout(
        samples,
        prompts,
        prompts,
        jnp.ones(RUNS),
        arrays[0],
        jnp.asarray(valid),
        jnp.asarray(labels),
        jnp.zeros(shape),
    )
    decisions, scores = (
        Decisions(arrays[2], arrays[1]),
        {
            "policy_training": (
                samples.log_probs - 0.5 * samples.mask * (jnp.asarray(labels)[..., None] + 1)
            )
        },
    )
    return (
        rollout,
        decisions,
        scores,
        jax.device_get(jax.jit(sample_metrics)(rollout, decisions, scores)),
    )


def test_means_are_over_valid_samples_and_a_dose_counts_what_is_reinforced(made):
    rollout, decisions, _, metrics = made
    for run in range(RUNS):
        valid, length = np.asarray(rollout.valid[run]), np.asarray(rollout.samples.length[run])
        weight, labels = np.asarray(decisions.gate_weight[run]), np.asarray(rollout.labels[run])

        def of_valid(x, valid=valid):
            return np.asarray(x)[valid].mean()

        dose = sum(
            length[i]
            for i in np.ndindex(length.shape)
            if labels[i] == HACK and decisions.advantage[run][i] > 0 and weight[i] > 0
        )
        kept = weight[valid]
        wanted = {
            "reward": of_valid(rollout.rewards[run]),
            "gate_acceptance": of_valid(weight),
            "length": length.mean(),
            "invalid_rewards": (~valid).sum(),
            "reinforced_hack_tokens": dose,
            "effective_samples": kept.sum() ** 2 / (kept**2).sum(),
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name][run], value, rtol=1e-5, err_msg=name)
    assert metrics["reinforced_hack_tokens"][0] > 0


def test_labels_have_their_own_acceptance_and_likelihood_ratio(made):
    rollout, decisions, _, metrics = made
    for run in range(RUNS):
        for label, name in enumerate(LABELS):
            here = np.asarray(rollout.valid[run] & (rollout.labels[run] == label))
            wanted = np.asarray(decisions.gate_weight[run])[here].mean() if here.any() else np.nan
            np.testing.assert_allclose(metrics[f"acceptance_{name}"][run], wanted, rtol=1e-5)
            np.testing.assert_allclose(
                metrics[f"llr_{name}"][run], -0.5 * (label + 1) if here.any() else np.nan, rtol=1e-5
            )
    assert np.isnan(metrics["acceptance_correct"][1]) and np.isfinite(
        metrics["acceptance_correct"][0]
    )


def test_without_a_pass_at_the_training_prompt_there_is_no_likelihood_ratio(made):
    assert not [name for name in sample_metrics(*made[:2], {}) if name.startswith("llr")]


@pytest.mark.parametrize("context", ["gg", "tt", "tg"])
def test_a_penalty_in_the_reward_is_logged_as_its_mean_over_tokens_of_valid_samples(made, context):
    """log p - log p_ref of whichever policy and reference the context names; NaN for a run without
    a valid sample. One in the loss is the step's.
    """
    rollout, rng = made[0], np.random.default_rng(8)
    rollout = rollout.replace(valid=rollout.valid.at[1].set(False))
    names = ("policy_training", "reference_training", "reference_generation")
    scores = {
        name: jnp.asarray(rng.uniform(-3, 0, rollout.samples.tokens.shape), jnp.float32)
        for name in names
    }
    algorithm = Algorithm(kl=Kl(context, "reward", "k1", 0.3))
    _, decisions = make_batch(rollout, scores, None, None, algorithm, Layout())
    policy = np.float64(rollout.samples.log_probs if context == "gg" else scores["policy_training"])
    reference = np.float64(
        scores["reference_training" if context == "tt" else "reference_generation"]
    )
    counted = np.asarray(rollout.samples.mask & rollout.valid[..., None])
    found = sample_metrics(rollout, decisions, scores)["kl"]
    np.testing.assert_allclose(found[0], (policy - reference)[0][counted[0]].mean(), rtol=1e-5)
    assert np.isnan(found[1])
    assert "kl" not in made[3] and not algorithm.penalty_shares_rows
