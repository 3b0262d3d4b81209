"""The step's gradients against the formulae of recontextualization, in exact expectation: all 16
completions of a tiny policy, each weighed by its probability; and what must give zero, or the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_models as rl
from flax import nnx
from rl_steps import (
    GENERATION,
    ONE_ROW,
    SUMS,
    TRAINING,
    assert_same,
    batch_of,
    graded,
    gradients_of,
    log_probs_of,
    options_of,
    passes,
    scores_weighted,
    step_gradients,
    weighted,
)
from scipy.special import log_softmax

from ip_jax.rl.advantages import Aggregation
from ip_jax.rl.algorithm import Algorithm, passes_needed
from ip_jax.rl.batch import make_batch
from ip_jax.rl.estimators import ESTIMATORS, Auxiliary, Estimator, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.policy import completion_log_probs
from ip_jax.rl.selection import Selection
from ip_jax.rl.step import compile_rl_step

REWARDS = np.random.default_rng(0).normal(0.5, 1.0, 16).astype(np.float32)
PLAIN = Algorithm(ESTIMATORS["plain"], **SUMS)
FULL = Algorithm(ESTIMATORS["importance_sequence"], **SUMS)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trained():
    return rl.policy()[1]


def sampled(trained, prompts=GENERATION):
    """All completions of one group with the token log-probabilities under `prompts`, as the sampler
    would give them.
    """
    everything = rl.everything()
    # whose pass is the policy's at the generation prompt
    algorithm = Algorithm(ESTIMATORS["truncated"], **SUMS)
    found = passes(trained, graded(everything, prompts, prompts, 0.0), algorithm)[
        "policy_generation"
    ]
    return everything.replace(log_probs=found)


def probabilities(trained, prompts) -> np.ndarray:
    """pi(y | prompts) [16] of all completions."""
    found = np.exp(np.float64(log_probs_of(trained, prompts, rl.everything()).ravel()))
    assert found.sum() == pytest.approx(1, abs=1e-5)
    return found


def expected_gradient(
    trained, algorithm: Algorithm, training=TRAINING, moving=None, rewards=REWARDS
) -> np.ndarray:
    """The loss's gradient in expectation over completions of the generation prompt."""
    batch = batch_of(
        trained, graded(sampled(trained), GENERATION, training, rewards), algorithm, moving=moving
    )
    return step_gradients(trained, weighted(batch, probabilities(trained, GENERATION)), algorithm)[
        0
    ]


@jax.jit
@jax.grad
def _gradient_of_expected_reward(trained, prompts):
    return jnp.sum(jnp.exp(rl.sequence_log_probs(trained, prompts, rl.everything())) * REWARDS)


def gradient_of_expected_reward(trained, prompts) -> np.ndarray:
    return rl.flat(_gradient_of_expected_reward(trained, prompts))


def guided(trained, guide, weight: float) -> np.ndarray:
    """Token log-probabilities [4, 4, 2] of all completions by softmax((1 + weight) z(GENERATION) -
    weight z(guide)), in float64.
    """
    own, other = (
        np.float64(sampled(trained, prompts).log_probs).reshape(4, 4, 2)
        for prompts in (GENERATION, guide)
    )
    combined = (1 + weight) * own - weight * other
    first, second = log_softmax(combined[:, 0, 0]), log_softmax(combined[:, :, 1], axis=-1)
    return np.stack([np.broadcast_to(first[:, None], (4, 4)), second], axis=-1)


@pytest.mark.slow
def test_importance_weights_of_guided_samples_give_the_policy_gradient_at_the_training_prompt(
    trained,
):
    """Where the behaviour's log-probabilities are the guided ones, as the sampler says them; where
    they were the policy's at x_g it would be another.
    """
    behaviour = guided(trained, TRAINING, 0.7)
    assert (
        np.abs(np.exp(behaviour.sum(-1)).ravel() - probabilities(trained, GENERATION)).max() > 0.01
    )
    samples = rl.everything()
    samples = samples.replace(
        log_probs=jnp.asarray(behaviour, jnp.float32).reshape(samples.log_probs.shape)
    )
    batch = batch_of(trained, graded(samples, GENERATION, TRAINING, REWARDS), FULL)
    found = step_gradients(trained, weighted(batch, np.exp(behaviour.sum(-1)).ravel()), FULL)[0]
    assert_same(found, -gradient_of_expected_reward(trained, TRAINING))


@pytest.mark.parametrize(
    "name",
    [pytest.param("importance_token", marks=pytest.mark.slow), "importance_sequence", "train_old"],
)
def test_without_a_swap_the_estimators_agree(trained, name):
    """Old log-probabilities of another pass put the ratio at 1 up to rounding; where the pass is
    the same one it is 1 exactly.
    """
    rollout = graded(sampled(trained), GENERATION, GENERATION, REWARDS)
    expected, plain = step_gradients(trained, batch_of(trained, rollout, PLAIN), PLAIN)
    assert plain["ratio"] == plain["tokens"] == 32
    algorithm = Algorithm(ESTIMATORS[name], **SUMS)
    found, sums = step_gradients(trained, batch_of(trained, rollout, algorithm), algorithm)
    assert_same(found, expected)
    np.testing.assert_allclose(sums["ratio"], 32, atol=0 if name == "train_old" else 32 * 1e-4)
    assert not sums["clipped"].any()


def test_old_log_probs_of_a_pass_at_the_training_prompt_give_ratio_1(trained):
    """What the first of several updates sees."""
    algorithm = Algorithm(ESTIMATORS["train_old"], epochs=2, **SUMS)
    rollout = graded(sampled(trained), GENERATION, TRAINING, REWARDS)
    batch = batch_of(trained, rollout, algorithm)
    # not the sampler's
    assert (
        np.abs(batch.policy.signal.old_log_probs[0, :, 0] - rollout.samples.log_probs[:, 0]).max()
        > 0.1
    )
    found, sums = step_gradients(trained, batch, algorithm)
    np.testing.assert_allclose(sums["ratio"], 32, atol=32 * 1e-4)
    assert_same(found, gradients_of(trained, rollout, PLAIN))


def test_the_policy_loss_beside_an_auxiliary_one_compares_with_the_generation_prompt(trained):
    """The first of several updates has ratio 1, from the sampler's own log-probabilities and no
    other pass.
    """
    algorithm = Algorithm(
        Estimator("auxiliary_clipped", old="generation", clip=0.2, auxiliary=Auxiliary()),
        epochs=2,
        **SUMS,
    )
    assert not passes_needed(algorithm)
    rollout = graded(sampled(trained), GENERATION, TRAINING, REWARDS)
    batch = batch_of(trained, rollout, algorithm)
    np.testing.assert_array_equal(batch.policy.prompt[0, 0], GENERATION.tokens[0])
    found, sums = step_gradients(trained, batch.replace(auxiliary=None), algorithm)
    np.testing.assert_allclose(sums["ratio"], 32, atol=32 * 1e-4)
    assert_same(found, -scores_weighted(trained, GENERATION, rl.everything(), REWARDS / 16))


def test_metrics_are_means_over_the_tokens_of_their_term(trained):
    """Behind a gate the penalty gg still has every valid sample, the policy's terms have what was
    accepted, and where that is nothing they are no number.
    """
    algorithm = Algorithm(
        kl=Kl("gg", "loss", "k3", 0.3), gate=Gate("oracle", accepted_labels=(1,)), **SUMS
    )
    graphdef, _, base = rl.policy()
    step = compile_rl_step(graphdef, options_of(algorithm))
    rollout = graded(sampled(trained), GENERATION, TRAINING, REWARDS)
    reference = np.float64(passes(trained, rollout, algorithm)["reference_generation"])
    d = reference - np.float64(rollout.samples.log_probs)
    for accepted in (1, 0):
        labels = (jnp.arange(16) < accepted).astype(jnp.int32)[None, None]
        _, metrics = step(
            rl.state_of(trained), base, batch_of(trained, rollout.replace(labels=labels), algorithm)
        )
        np.testing.assert_allclose(metrics["kl"], (np.exp(d) - 1 - d).mean(), rtol=1e-3)
        assert metrics["tokens"] == 2 * accepted and metrics["kl_tokens"] == 32 and metrics["alive"]
        for name in ("entropy", "ratio", "clipped"):
            assert np.isfinite(metrics[name]).all() == bool(accepted), name


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_full_importance_sampling_is_the_policy_gradient_at_the_training_prompt(trained, baseline):
    algorithm = (
        FULL
        if baseline == 0
        else Algorithm(FULL.estimator, baseline="moving_mean", aggregation=FULL.aggregation)
    )
    found = expected_gradient(trained, algorithm, moving=jnp.full(1, baseline))
    wanted = -gradient_of_expected_reward(trained, TRAINING)
    assert_same(found, wanted)
    with pytest.raises(AssertionError):  # and not that at the generation prompt
        assert_same(found, -gradient_of_expected_reward(trained, GENERATION), 0.1)


def test_centred_plain_is_the_covariance_of_reward_and_score(trained):
    p = probabilities(trained, GENERATION)
    mean = np.sum(p * REWARDS)
    algorithm = Algorithm(PLAIN.estimator, baseline="moving_mean", aggregation=PLAIN.aggregation)
    found = expected_gradient(trained, algorithm, moving=jnp.full(1, mean))
    covariance = scores_weighted(
        trained, TRAINING, rl.everything(), p * REWARDS
    ) - mean * scores_weighted(trained, TRAINING, rl.everything(), p)
    assert_same(found, -covariance)


def test_uncentred_plain_adds_context_distillation(trained):
    """Beside the covariance: -mean reward * grad KL(sg pi(. | x_g) || pi(. | x_t)), whichever
    samples were good.
    """
    p = probabilities(trained, GENERATION)
    mean = np.sum(p * REWARDS)
    covariance = scores_weighted(trained, TRAINING, rl.everything(), p * (REWARDS - mean))

    def divergence(trained):
        return jnp.sum(p * (np.log(p) - rl.sequence_log_probs(trained, TRAINING, rl.everything())))

    distillation = rl.flat(jax.jit(jax.grad(divergence))(trained))
    assert np.abs(mean * distillation).max() > 0.1 * np.abs(covariance).max()
    assert_same(expected_gradient(trained, PLAIN), -(covariance - mean * distillation))


def test_without_a_swap_the_mean_of_scores_is_zero(trained):
    """So a constant baseline changes nothing then, unlike under a swap."""
    found = expected_gradient(trained, PLAIN, training=GENERATION)
    assert_same(found, -gradient_of_expected_reward(trained, GENERATION))


@pytest.mark.parametrize(
    "gate",
    [Gate("soft_ratio", alpha=0.0, max_weight=1.0), Gate("random", rate=1.0)],
    ids=["alpha 0", "rate 1"],
)
def test_a_gate_that_is_off_is_plain_to_the_bit(trained, gate):
    rollout = graded(sampled(trained), GENERATION, TRAINING, REWARDS)
    off = batch_of(trained, rollout, PLAIN)
    gated = Algorithm(PLAIN.estimator, gate=gate, **SUMS)
    on = batch_of(trained, rollout, gated)
    jax.tree.map(np.testing.assert_array_equal, on, off)
    (found, sums), (expected, sums_off) = (
        step_gradients(trained, on, gated),
        step_gradients(trained, off, PLAIN),
    )
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, sums, sums_off)


def test_a_stochastic_gate_at_the_supremum_gives_the_policy_gradient_at_the_training_prompt(
    trained,
):
    """It accepts y with probability pi(y | x_t) / (c pi(y | x_g)): 1 / c of all samples,
    distributed as those of x_t.
    """
    p, p_train = probabilities(trained, GENERATION), probabilities(trained, TRAINING)
    bound = float(np.max(p_train / p)) * 1.0001
    probability = p_train / p / bound
    algorithm = Algorithm(PLAIN.estimator, gate=Gate("stochastic", bound=bound), **SUMS)
    rollout = graded(sampled(trained), GENERATION, TRAINING, REWARDS)

    def decide(uniforms):
        return make_batch(
            rollout.replace(uniforms=jnp.float32(uniforms).reshape(1, 1, 16)),
            passes(trained, rollout, algorithm),
            None,
            None,
            algorithm,
            ONE_ROW,
        )

    np.testing.assert_array_equal(decide(probability * 0.999)[1].gate_weight, np.ones((1, 1, 16)))
    np.testing.assert_array_equal(decide(probability * 1.001)[1].gate_weight, np.zeros((1, 1, 16)))
    accepted, _ = decide(np.zeros(16))
    found, _ = step_gradients(trained, weighted(accepted, p * probability), algorithm)
    assert_same(found, -gradient_of_expected_reward(trained, TRAINING) / bound)


def test_selection_of_best_samples_isolates_the_distillation_in_groups_of_one(trained):
    """Best of 1 keeps everything, so its update is the supervised one on samples of x_g: grad KL(sg
    pi(. | x_g) || pi(. | x_t)).
    """
    algorithm = Algorithm(selection=Selection("filtered"), aggregation=SUMS["aggregation"])
    p = probabilities(trained, GENERATION)
    assert_same(
        expected_gradient(trained, algorithm),
        -scores_weighted(trained, TRAINING, rl.everything(), p),
    )


@pytest.mark.parametrize("place", ["loss", pytest.param("reward", marks=pytest.mark.slow)])
def test_gg_kl_is_zero_at_the_reference(place):
    """With B = 0 the policy is the reference. The rows are those of the generation prompt, and the
    policy's own have no reward.
    """
    trained = jax.tree.map_with_path(
        lambda path, x: jnp.zeros_like(x) if "lora_b" in jax.tree_util.keystr(path) else x,
        rl.policy()[1],
    )
    algorithm = Algorithm(kl=Kl("gg", place, "k3" if place == "loss" else "k1", beta=0.3), **SUMS)
    rollout = graded(sampled(trained), GENERATION, TRAINING, 0.0)
    batch = batch_of(trained, rollout, algorithm)
    assert (batch.kl is not None) == (place == "loss")
    if place == "loss":
        np.testing.assert_array_equal(batch.kl.prompt[0, 0], GENERATION.tokens[0])
    found, sums = step_gradients(trained, batch, algorithm)
    np.testing.assert_allclose(found, 0, atol=1e-6)
    np.testing.assert_allclose(sums["loss"], 0, atol=1e-6)
    swapped = Algorithm(kl=Kl("tg", place, algorithm.kl.estimator, beta=0.3), **SUMS)
    # under a swap tg is context distillation from the first step on
    assert np.abs(gradients_of(trained, rollout, swapped)).max() > 1e-3


@pytest.mark.parametrize(
    ("context", "estimator"),
    [
        ("tt", "k3"),
        ("gg", "k3"),
        ("tg", "k3"),
        *(
            pytest.param(context, k, marks=pytest.mark.slow)
            for context in ("tt", "gg", "tg")
            for k in ("k1", "k2")
        ),
    ],
)
def test_kl_in_the_loss_equals_its_formula(trained, context, estimator):
    """The loss and its gradient, from log-probabilities of the policy and the reference under the
    prompts that the context names.
    """
    algorithm = Algorithm(kl=Kl(context, "loss", estimator, beta=0.3), **SUMS)
    rollout = graded(sampled(trained), GENERATION, TRAINING, 0.0)
    found, sums = step_gradients(trained, batch_of(trained, rollout, algorithm), algorithm)
    prompts = {"t": TRAINING, "g": GENERATION}
    name = "reference_training" if context == "tt" else "reference_generation"
    policy = np.float64(
        passes(
            trained,
            graded(sampled(trained), prompts[context[0]], TRAINING, 0.0),
            Algorithm(ESTIMATORS["truncated"]),
        )["policy_generation"]
    )
    reference = np.float64(passes(trained, rollout, algorithm)[name])
    x = reference - policy
    value = {"k1": -x, "k2": x**2 / 2, "k3": np.exp(x) - x - 1}[estimator]
    # d value / d log-probability
    slope = {"k1": np.ones_like(x), "k2": -x, "k3": 1 - np.exp(x)}[estimator]
    np.testing.assert_allclose(sums["loss"], 0.3 * value.sum() / 16, rtol=1e-3)
    assert_same(found, 0.3 / 16 * token_scores_weighted(trained, prompts[context[0]], slope), 1e-3)


@jax.jit
@jax.grad
def _token_score_sum(trained, prompts, weights):
    graphdef, _, base = rl.policy()
    rows = jax.tree.map(lambda x: x[0], rl.rows_of(prompts, rl.everything()))
    return jnp.sum(
        weights * completion_log_probs(nnx.merge(graphdef, trained, base), rows, "float32", "none")
    )


def token_scores_weighted(trained, prompts, weights) -> np.ndarray:
    """sum of weights [1, 1, 16, 2] * grad log pi(token)."""
    return rl.flat(_token_score_sum(trained, prompts, jnp.float32(weights)))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k3", "k1"])
def test_beside_an_auxiliary_loss_the_gg_penalty_shares_the_rows_of_the_policy_loss(
    trained, estimator
):
    """The sum of three losses, of which two are taken from one pass under the generation prompt."""
    auxiliary, kl = ESTIMATORS["auxiliary"], Kl("gg", "loss", estimator, 0.3)
    rollout = graded(sampled(trained), GENERATION, TRAINING, REWARDS)
    batch = batch_of(trained, rollout, Algorithm(auxiliary, kl, **SUMS))
    assert batch.kl is None
    np.testing.assert_array_equal(batch.policy.prompt[0, 0], GENERATION.tokens[0])
    found, sums = step_gradients(trained, batch, Algorithm(auxiliary, kl, **SUMS))
    best = np.eye(16)[REWARDS.argmax()]
    policy = scores_weighted(trained, GENERATION, rl.everything(), REWARDS / 16)
    copied = scores_weighted(trained, TRAINING, rl.everything(), best)
    penalty, kl_sums = step_gradients(
        trained,
        batch_of(trained, rollout.replace(rewards=0 * rollout.rewards), Algorithm(kl=kl, **SUMS)),
        Algorithm(kl=kl, **SUMS),
    )
    assert_same(found, penalty - policy - copied)
    np.testing.assert_allclose(sums["kl"], kl_sums["kl"], rtol=1e-4)


@pytest.mark.slow
def test_kl_in_the_reward_is_taken_from_the_advantage(trained):
    """A - beta * (l(y) - l_reference(y)), behind the baseline, not centred."""
    algorithm = Algorithm(kl=Kl("gg", "reward", "k1", beta=0.3), **SUMS)
    rollout = graded(sampled(trained), GENERATION, TRAINING, REWARDS)
    reference = np.float64(passes(trained, rollout, algorithm)["reference_generation"]).sum(-1)
    penalised = REWARDS - 0.3 * (np.float64(rollout.samples.log_probs).sum(-1) - reference)
    assert_same(
        gradients_of(trained, rollout, algorithm),
        -scores_weighted(trained, TRAINING, rl.everything(), penalised.ravel() / 16),
    )


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "group_mean_std"])
def test_groups_without_variance_give_exactly_no_gradient(trained, baseline):
    algorithm = Algorithm(baseline=baseline, aggregation=Aggregation("token_mean"))
    flat = graded(sampled(trained), GENERATION, TRAINING, 0.1)
    assert not gradients_of(trained, flat, algorithm).any()
    assert gradients_of(
        trained, flat.replace(rewards=flat.rewards.at[0, 0, 3].set(1.0)), algorithm
    ).any()


@pytest.mark.parametrize(
    "algorithm",
    [
        Algorithm(),
        Algorithm(kl=Kl("gg", "loss", "k3", 0.3)),
        pytest.param(
            Algorithm(ESTIMATORS["auxiliary"], Kl("gg", "loss", "k3", 0.3)), marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "gg in the loss", "auxiliary"],
)
def test_an_invalid_sample_changes_nothing(trained, algorithm):
    """Its reward is NaN, and what it says, how long it is and what the sampler said of it do not
    matter.
    """
    samples = sampled(trained)
    out = jnp.zeros((1, 1, 16), bool).at[0, 0, 5].set(True)
    rollout = graded(samples, GENERATION, TRAINING, jnp.where(out, jnp.nan, REWARDS), valid=~out)
    tokens, log_probs = (
        jnp.where(out[..., None], other, x)
        for x, other in ((samples.tokens, 3), (samples.log_probs, -9.0))
    )
    changed = rollout.replace(samples=samples.replace(tokens=tokens, log_probs=log_probs))
    found, expected = (gradients_of(trained, one, algorithm) for one in (rollout, changed))
    assert np.isfinite(found).all() and found.any()
    np.testing.assert_array_equal(found, expected)
