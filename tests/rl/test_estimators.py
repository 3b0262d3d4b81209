"""Losses against TRL's published formulae in torch, estimators against numpy, and the combinations
that are refused.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_models as rl
import torch
from flax import nnx
from rl_steps import ONE_ROW, assert_same, graded, step_gradients

from ip_jax.rl.advantages import Aggregation
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.batch import make_batch
from ip_jax.rl.estimators import (
    ESTIMATORS,
    WARNINGS,
    Auxiliary,
    Estimator,
    Kl,
    kl_estimate,
    policy_loss,
)
from ip_jax.rl.gates import Gate
from ip_jax.rl.policy import completion_log_probs
from ip_jax.rl.selection import Selection

GROUPS, OF_GROUP, SLOTS, BETA, EPSILON = 3, 4, 4, 0.1, 0.2
TWICE = dict(epochs=2)  # old log-probabilities count from the second update on
PUBLISHED = {
    "grpo": Algorithm(
        ESTIMATORS["train_old"],
        Kl("tt", "loss", "k3", BETA),
        "group_mean_std",
        Aggregation("seq_mean_token_mean"),
        **TWICE,
    ),
    "dr_grpo": Algorithm(
        ESTIMATORS["train_old"],
        Kl("tt", "loss", "k3", BETA),
        "group_mean",
        Aggregation("seq_mean_token_sum_norm", max_length=SLOTS),
        **TWICE,
    ),
    "rloo": Algorithm(
        Estimator("rloo", old="training", level="sequence", clip=EPSILON),
        Kl(),
        "leave_one_out",
        Aggregation("seq_mean_token_sum"),
        **TWICE,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def trl_loss(kind: str, log_probs, old, reference, rewards, mask):
    """trl/trainer/grpo_trainer.py and rloo_trainer.py (huggingface/trl, version 1), of tensors [N,
    C] and rewards [Q, G].
    """
    if kind == "rloo":
        advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
        ratio = torch.exp(((log_probs - old) * mask).sum(1))
        advantages = advantages.flatten()
        return -torch.min(
            ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages
        ).mean()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    advantages, ratio = advantages.flatten()[:, None], torch.exp(log_probs - old)
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    loss = loss + BETA * (torch.exp(reference - log_probs) - (reference - log_probs) - 1)
    if kind == "grpo":
        return ((loss * mask).sum(1) / mask.sum(1)).mean()
    return (loss * mask).sum() / (loss.shape[0] * SLOTS)


@functools.cache
def log_probs_and_pull():
    """(token log-probabilities [N, C] of random completions, the function from a cotangent [N, C]
    to the weights' gradient).
    """
    graphdef, trained, base = rl.policy()
    rows = jax.tree.map(
        lambda x: x[0],
        rl.rows_of(
            rl.prompts([1, 2, 3], [2], [3, 0]), rl.random_samples(1, GROUPS, OF_GROUP, SLOTS)
        ),
    )
    of_weights = jax.jit(
        lambda trained: completion_log_probs(
            nnx.merge(graphdef, trained, base), rows, "float32", "none"
        ).reshape(-1, SLOTS)
    )
    found, pull = jax.vjp(of_weights, trained)
    return np.asarray(found), lambda cotangent: rl.flat(pull(jnp.asarray(cotangent))[0])


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_step_has_the_loss_and_the_gradient_of_trl(kind):
    """From random old and reference log-probabilities, of which some ratios are clipped on either
    side.
    """
    algorithm, rng = PUBLISHED[kind], np.random.default_rng(4)
    samples = rl.random_samples(1, GROUPS, OF_GROUP, SLOTS)
    present, pull = log_probs_and_pull()
    old, reference = (
        present + rng.normal(0, 0.3, present.shape).astype(np.float32) for _ in range(2)
    )
    rewards = rng.normal(size=(GROUPS, OF_GROUP)).astype(np.float32)
    rollout = graded(samples, *(rl.prompts([1, 2, 3], [2], [3, 0]),) * 2, rewards)

    def shaped(x):
        return jnp.asarray(x.reshape(1, GROUPS, OF_GROUP, SLOTS))

    batch, _ = make_batch(
        rollout,
        {"policy_training": shaped(old), "reference_training": shaped(reference)},
        None,
        None,
        algorithm,
        ONE_ROW,
    )
    gradients, sums = step_gradients(rl.policy()[1], batch, algorithm)

    mask = torch.tensor(np.array(samples.mask.reshape(-1, SLOTS)))
    log_probs = torch.tensor(present, requires_grad=True)
    loss = trl_loss(
        kind, log_probs, torch.tensor(old), torch.tensor(reference), torch.tensor(rewards), mask
    )
    loss.backward()
    # whose loss is the sequence's ratio once, ours that of each of its tokens, with the same
    # gradient
    if kind != "rloo":
        np.testing.assert_allclose(sums["loss"], loss.item(), rtol=1e-4)
    assert_same(gradients, pull(log_probs.grad.numpy()))
    clipped = float(sums["clipped"][0])
    assert 0 < clipped < float(sums["tokens"][0])


def random_tokens(seed: int = 0, shape=(40, 5)):
    """(log-probabilities, old ones, advantages of sequences, mask) in float64 and float32's
    range.
    """
    rng = np.random.default_rng(seed)
    log_probs, advantage = (
        rng.normal(-1, 0.5, shape),
        np.repeat(rng.normal(0, 1, (shape[0], 1)), shape[1], 1),
    )
    return (
        log_probs,
        log_probs + rng.normal(0, 0.6, shape),
        advantage,
        np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (shape[0], 1)),
    )


def numpy_loss(estimator: Estimator, log_probs, old, advantage, mask):
    """(loss, ratio, d loss / d log-probability) of each token, in float64; a sequence's ratio is a
    constant factor of each token's score.
    """
    difference = {"itself": 0 * log_probs, "noise": old}.get(estimator.old, log_probs - old)
    if estimator.level == "sequence":
        difference = np.broadcast_to(
            np.where(mask, difference, 0).sum(1, keepdims=True), difference.shape
        )
    ratio = np.exp(difference)
    objective, moves = ratio * advantage, np.ones(ratio.shape, bool)
    if estimator.clip is not None:
        moves &= ~(
            ((advantage > 0) & (ratio > 1 + estimator.clip))
            | ((advantage < 0) & (ratio < 1 - estimator.clip))
        )
        objective = np.where(
            moves, objective, np.clip(ratio, 1 - estimator.clip, 1 + estimator.clip) * advantage
        )
    if estimator.dual_clip is not None:
        beyond = (advantage < 0) & (ratio > estimator.dual_clip)
        objective, moves = (
            np.where(beyond, estimator.dual_clip * advantage, objective),
            moves & ~beyond,
        )
    return -objective, ratio, np.where(moves, -ratio * advantage, 0)


@pytest.mark.parametrize(
    "estimator",
    [*ESTIMATORS.values(), Estimator("sequence", "training", "sequence", 0.3, 2.0)],
    ids=lambda e: e.name,
)
def test_losses_and_their_gradients_equal_numpy(estimator):
    log_probs, old, advantage, mask = random_tokens()
    if estimator.old == "noise":
        old = np.log(
            1
            + estimator.noise
            * np.repeat(np.random.default_rng(1).uniform(-1, 1, (len(old), 1)), old.shape[1], 1)
        )

    def of(x):
        return policy_loss(x, jnp.float32(old), jnp.float32(advantage), jnp.array(mask), estimator)

    loss, ratio, clipped = of(jnp.float32(log_probs))
    slope = jax.grad(lambda x: jnp.sum(jnp.where(mask, of(x)[0], 0)))(jnp.float32(log_probs))
    for found, wanted in zip(
        (loss, ratio, slope), numpy_loss(estimator, log_probs, old, advantage, mask), strict=True
    ):
        np.testing.assert_allclose(
            np.where(mask, found, 0), np.where(mask, wanted, 0), rtol=2e-5, atol=1e-6
        )
    np.testing.assert_array_equal(clipped, mask & (np.asarray(slope) == 0))
    assert clipped.any() == (estimator.clip is not None)


def test_noise_takes_a_sixth_of_the_gradients_on_either_side():
    """sigma ~ U[0.7, 1.3]: a positive advantage is clipped above 1.2, a negative one below 0.8."""
    shares = []
    for advantage in (1.0, -1.0):
        uniforms = (np.arange(600) + 0.5) / 600
        old = jnp.float32(np.log(0.7 + 0.6 * uniforms))[:, None]
        _, ratio, clipped = policy_loss(
            jnp.zeros((600, 1)),
            old,
            jnp.full((600, 1), advantage),
            jnp.ones((600, 1), bool),
            ESTIMATORS["ratio_noise"],
        )
        shares.append(float(clipped.mean()))
        assert 0.7 < float(ratio.min()) < 0.701 and 1.299 < float(ratio.max()) < 1.3
    assert shares == pytest.approx([1 / 6, 1 / 6], abs=2 / 600)


def test_truncated_weights_multiply_the_advantage():
    """min(C, exp(l - l_sampler)) under the generation prompt; ratio_noise draws one number for each
    sequence.
    """
    samples = rl.random_samples(1, GROUPS, OF_GROUP, SLOTS)
    prompts = (rl.prompts([1, 2, 3], [2], [3, 0]),) * 2
    rewards = np.random.default_rng(0).normal(size=samples.length.shape)
    rollout = graded(
        samples,
        *prompts,
        rewards,
        uniforms=jnp.float32(np.random.default_rng(1).uniform(size=samples.length.shape)),
    )
    own = samples.log_probs + jnp.float32(
        np.random.default_rng(2).normal(0, 0.8, samples.tokens.shape)
    )
    signal = make_batch(
        rollout,
        {"policy_generation": own},
        None,
        None,
        Algorithm(ESTIMATORS["truncated"], baseline="none"),
        ONE_ROW,
    )[0].policy.signal
    weight = np.minimum(2.0, np.exp(np.float64(own) - np.float64(samples.log_probs)))
    assert (weight == 2).any() and (weight < 2).any()
    wanted = np.where(samples.mask, weight * rewards[..., None], 0)
    np.testing.assert_allclose(np.where(samples.mask, signal.advantage[0], 0), wanted, rtol=1e-5)
    noise = make_batch(rollout, {}, None, None, Algorithm(ESTIMATORS["ratio_noise"]), ONE_ROW)[
        0
    ].policy.signal.old_log_probs[0]
    np.testing.assert_allclose(
        np.exp(noise),
        np.broadcast_to(0.7 + 0.6 * np.float64(rollout.uniforms)[..., None], noise.shape),
        rtol=1e-5,
    )


def test_kl_estimates_equal_their_formulae_and_average_to_the_divergence():
    """Over all tokens of two distributions the means of k1 and k3 under the policy are KL(policy ||
    reference); k2's is near it.
    """
    rng = np.random.default_rng(0)
    log_p, log_q = (np.log(rng.dirichlet(np.full(50, 20.0))) for _ in range(2))
    found = {
        name: np.float64(kl_estimate(jnp.float32(log_p), jnp.float32(log_q), name))
        for name in ("k1", "k2", "k3")
    }
    d = log_q - log_p
    for name, wanted in (("k1", -d), ("k2", d**2 / 2), ("k3", np.exp(d) - 1 - d)):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-6)
    kl = np.sum(np.exp(log_p) * (log_p - log_q))
    for name, tolerance in (("k1", 1e-5), ("k3", 1e-5), ("k2", 0.1 * kl)):
        assert np.sum(np.exp(log_p) * found[name]) == pytest.approx(kl, abs=tolerance)


NAN = float("nan")
BACK = Gate("relative", threshold=0.0, rejected="train_at_gen")
REFUSED = {
    "several updates of plain": (
        dict(epochs=2),
        "plain compares a pass with itself.* use train_old, or",
    ),
    "several updates of an auxiliary loss": (
        dict(estimator=ESTIMATORS["auxiliary"], epochs=2),
        "auxiliary compares .* use old 'generation' and a clip, or",
    ),
    "noise and a random gate": (
        dict(estimator=ESTIMATORS["ratio_noise"], gate=Gate("random", rate=0.3)),
        "the gate random both draw",
    ),
    "noise and a stochastic gate": (
        dict(estimator=ESTIMATORS["ratio_noise"], gate=Gate("stochastic", bound=2.0)),
        "the gate stochastic both draw",
    ),
    "several updates of noise": (
        dict(estimator=ESTIMATORS["ratio_noise"], minibatches=2),
        "ratio_noise compares a pass with itself",
    ),
    "a gate beside an auxiliary loss": (
        dict(estimator=ESTIMATORS["auxiliary"], gate=Gate("random", rate=0.5)),
        "nothing to gate",
    ),
    "tt beside an auxiliary loss": (
        dict(estimator=ESTIMATORS["auxiliary"], kl=Kl("tt", beta=0.1)),
        "its penalty is gg",
    ),
    "tg beside rejected samples": (
        dict(gate=BACK, kl=Kl("tg", beta=0.1)),
        "whose policy is at the training prompt",
    ),
    "minibatches of rejected samples": (
        dict(estimator=ESTIMATORS["train_old"], gate=BACK, minibatches=2),
        "in one minibatch",
    ),
    "a selection with a ratio": (
        dict(estimator=ESTIMATORS["train_old"], selection=Selection()),
        "a selection copies samples",
    ),
    "a selection with a penalty": (
        dict(kl=Kl("gg", beta=0.1), selection=Selection()),
        "a selection copies samples",
    ),
    "k3 in the reward": (dict(kl=Kl("gg", "reward", "k3", 0.1)), "only k1 is added up"),
    "an unknown baseline": (dict(baseline="mean"), "choose from none, moving_mean"),
    "no epochs": (dict(epochs=0), "both must be at least 1"),
    "a PMI weight below 0": (dict(pmi=(2.0, 1.0)), "weights become negative"),
    "an entropy bonus of NaN": (dict(entropy_bonus=NAN), "entropy_bonus is nan"),
    "no gradient": (dict(max_grad_norm=0.0), "max_grad_norm is 0.0: it must be a number above 0"),
    "a gradient's norm of NaN": (dict(max_grad_norm=NAN), "max_grad_norm is nan"),
    "beta_1 of 1": (dict(betas=(1.0, 0.999)), "both must lie in .0, 1."),
    "beta_2 below 0": (dict(betas=(0.9, -0.1)), "both must lie in .0, 1."),
    "beta_2 of NaN": (dict(betas=(0.9, NAN)), "both must lie in .0, 1."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_without_meaning_are_refused_with_the_reason(case):
    changes, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        Algorithm(**changes)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Estimator("x", old="reference"), "choose from itself, generation"),
        (lambda: Estimator("x", level="word"), "choose from token, sequence"),
        (lambda: Estimator("x", old="noise"), "exactly when its old is 'noise'"),
        (lambda: Estimator("x", noise=0.1), "exactly when its old is 'noise'"),
        (lambda: Estimator("x", dual_clip=3.0), "needs a clip"),
        (lambda: Estimator("x", clip=0.2, dual_clip=1.0), "must be above 1"),
        (lambda: Estimator("x", clip=0.2, dual_clip=NAN), "must be above 1"),
        (lambda: Estimator("x", clip=0.0), "clip is 0.0: it must be a number above 0"),
        (lambda: Estimator("x", clip=-0.2), "clip is -0.2"),
        (lambda: Estimator("x", clip=NAN), "clip is nan"),
        (lambda: Estimator("x", clip=math.inf), "clip is inf"),
        (lambda: Estimator("x", truncate=0.0), "truncate is 0.0"),
        (
            lambda: Estimator("x", old="noise", noise=1.1),
            "noise is 1.1: it must lie between 0 and 1",
        ),
        (lambda: Estimator("x", old="noise", noise=-0.1), "noise is -0.1"),
        (lambda: Estimator("x", old="noise", noise=NAN), "noise is nan"),
        (lambda: Estimator("x", old="generation", truncate=2.0), "corrects the sampler twice"),
        (
            lambda: Estimator("x", old="training", clip=0.2, auxiliary=Auxiliary()),
            "use old 'generation'",
        ),
        (lambda: Estimator("x", auxiliary=1.0), "auxiliary is 1.0: give an Auxiliary"),
        (lambda: Auxiliary(0.0), "factor is 0.0: it must be a number above 0"),
        (lambda: Auxiliary(NAN), "factor is nan"),
        (lambda: Auxiliary(selection=Selection(restart_from_base=True)), "does not restart"),
        (lambda: Kl("tt", beta=NAN), "kl.beta is nan"),
        (lambda: Kl("tt", beta=-0.1), "kl.beta is -0.1: it must be a number of at least 0"),
        (lambda: Kl("gt", beta=0.1), "choose from none, tt"),
        (lambda: Kl("tt"), "a context needs a beta"),
        (lambda: Kl(beta=0.1), "a beta a context"),
        (lambda: Kl("tt", "advantage", beta=0.1), "choose from loss, reward"),
        (lambda: Kl("tt", estimator="k4", beta=0.1), "choose from k1"),
    ],
)
def test_bad_dials_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_late_token_warns_and_is_not_the_default():
    assert (
        "collapsed" in WARNINGS["late_token"]
        and Algorithm().estimator.name == "plain"
        and set(WARNINGS) == {"late_token"}
    )


def test_one_update_needs_no_old_pass():
    """With a single update the policy before it is the policy itself, exactly."""
    assert Algorithm(ESTIMATORS["train_old"]).estimator_of_update.old == "itself"
    assert Algorithm(ESTIMATORS["train_old"], minibatches=2).estimator_of_update.old == "training"
