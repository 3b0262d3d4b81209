"""Gates against their definitions in float64, exactly in expectation on a policy that can be
enumerated; their controls; the PMI weight.
"""

import functools

import enumerable
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import expit

from ip_jax.rl import gates
from ip_jax.rl.advantages import advantages
from ip_jax.rl.algorithm import Algorithm, check_guidance
from ip_jax.rl.amplification import check_pmi, pmi_weights
from ip_jax.rl.estimators import ESTIMATORS, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.selection import Selection

RUNS, GROUPS, OF_GROUP, SLOTS = 2, 3, 50, 6
SHAPE = (RUNS, GROUPS, OF_GROUP)
weigh = jax.jit(gates.gate_weights, static_argnames="gate")


def samples(seed: int = 0):
    """(log-probs at x_t, at x_g, mask) [R, Q, G, C], with rubbish behind the ends."""
    rng = np.random.default_rng(seed)
    train, gen = -rng.exponential(1.0, (2, *SHAPE, SLOTS)).astype(np.float32)
    mask = np.arange(SLOTS) < rng.integers(1, SLOTS + 1, SHAPE)[..., None]
    train[~mask] = np.nan
    return train, gen, mask


def evenly(shape=SHAPE, seed: int = 9) -> np.ndarray:
    """Uniforms that hit each of their n equal intervals once, in random order, in each run."""
    count = int(np.prod(shape[1:]))
    rows = [
        (np.random.default_rng(seed + r).permutation(count) + 0.5) / count for r in range(shape[0])
    ]
    return np.reshape(rows, shape).astype(np.float32)


def of_samples(function, *arrays):
    """function(the tokens of one sample in float64, of each array) -> [R, Q, G]."""
    mask = arrays[-1]
    found = [
        function(*(np.float64(a[place][mask[place]]) for a in arrays[:-1]))
        for place in np.ndindex(SHAPE)
    ]
    return np.reshape(found, SHAPE)


def mean_difference(train, gen):
    return (train - gen).mean()


def enumerated(seed: int = 6):
    """(log-probs at x_t, at x_g, mask) [1, 1, N, C] of all completions, and their probabilities [N]
    under both prompts.
    """
    sampled, trained = enumerable.table(seed), enumerable.table(seed + 1)
    log_probs = (enumerable.token_log_probs(t)[None, None] for t in (trained, sampled))
    return (
        (*log_probs, enumerable.MASK[None, None]),
        enumerable.probabilities(trained),
        enumerable.probabilities(sampled),
    )


def test_a_gate_that_is_off_accepts_everything():
    train, gen, mask = samples()
    found = weigh(Gate(), None, None, mask, uniforms=evenly())
    np.testing.assert_array_equal(found, np.ones(SHAPE))
    np.testing.assert_array_equal(
        gates.split_weights(Gate(), found, train[..., 0])[1], np.zeros(SHAPE)
    )
    assert not Gate().needs_log_probs


def test_absolute_gate_asks_for_a_quantile_of_the_training_prompts_own_samples():
    train, gen, mask = samples()
    reference, _, reference_mask = samples(1)
    scores = np.asarray(gates.mean_log_prob(reference, reference_mask)).reshape(RUNS, -1)
    np.testing.assert_allclose(
        scores, of_samples(np.mean, reference, reference_mask).reshape(RUNS, -1), rtol=1e-5
    )
    asked = gates.reference_quantile(scores, 0.3)
    np.testing.assert_allclose(asked, np.quantile(scores, 0.3, axis=1), rtol=1e-6)
    gate = Gate("absolute", quantile=0.3)
    found = weigh(gate, train, None, mask, uniforms=evenly(), reference_scores=asked)
    np.testing.assert_array_equal(
        found, of_samples(np.mean, train, mask) >= np.asarray(asked)[:, None, None]
    )
    itself = weigh(gate, reference, None, reference_mask, uniforms=evenly(), reference_scores=asked)
    np.testing.assert_allclose(np.mean(itself, axis=(1, 2)), 0.7, atol=1 / (GROUPS * OF_GROUP))


def test_relative_gate_compares_both_prompts_by_token():
    train, gen, mask = samples()
    found = weigh(Gate("relative", threshold=0.2), train, gen, mask, uniforms=evenly())
    np.testing.assert_array_equal(found, of_samples(mean_difference, train, gen, mask) >= 0.2)
    ratio = gates.log_likelihood_ratio(train, gen, mask)
    np.testing.assert_array_equal(gates.log_likelihood_ratio(gen, train, mask), -ratio)


@pytest.mark.parametrize("window", [1, 2, 4, SLOTS, 100])
def test_worst_token_gate_takes_the_lowest_window(window):
    def worst(train, gen):
        k = min(window, len(train))
        return min((train - gen)[i : i + k].mean() for i in range(len(train) - k + 1))

    train, gen, mask = samples()
    expected = of_samples(worst, train, gen, mask)
    np.testing.assert_allclose(
        gates.worst_window(train - gen, mask, window), expected, rtol=1e-4, atol=1e-5
    )
    found = weigh(
        Gate("worst_token", threshold=-0.4, window=window), train, gen, mask, uniforms=evenly()
    )
    np.testing.assert_array_equal(found, expected >= -0.4)
    if window >= SLOTS:
        np.testing.assert_array_equal(
            found, weigh(Gate("relative", threshold=-0.4), train, gen, mask, uniforms=evenly())
        )


def test_stochastic_gate_at_the_supremum_accepts_the_training_prompts_distribution():
    arrays, at_train, at_gen = enumerated()
    supremum = (at_train / at_gen).max()
    with jax.enable_x64(True):
        found = np.asarray(gates.acceptance(Gate("stochastic", bound=supremum), *arrays))[0, 0]
    assert at_gen @ found == pytest.approx(1 / supremum)
    np.testing.assert_allclose(at_gen * found / (at_gen @ found), at_train, rtol=1e-12)
    assert np.abs(at_gen - at_train).max() > 0.05


def test_stochastic_gate_is_a_dial_down_to_recontextualization():
    arrays, at_train, at_gen = enumerated()
    with jax.enable_x64(True):
        distance, accepted = [], None
        for bound in (100.0, 2.0, 0.5, 1e-6):
            accepted = (
                at_gen
                * np.asarray(gates.acceptance(Gate("stochastic", bound=bound), *arrays))[0, 0]
            )
            distance.append(np.abs(accepted / accepted.sum() - at_gen).sum())
    assert distance == sorted(distance, reverse=True) and distance[0] > 0.1
    np.testing.assert_array_equal(accepted, at_gen)  # below inf exp(dl) nothing is rejected


def test_stochastic_gate_accepts_with_its_probability():
    train, gen, mask = samples()
    difference = of_samples(lambda train, gen: (train - gen).sum(), train, gen, mask)
    probability = np.minimum(1, np.exp(difference) / 3)
    gate = Gate("stochastic", bound=3.0)
    for sign in (1, -1):  # just above and just below
        uniforms = np.clip(probability * (1 + 1e-4 * sign), 0, 1 - 1e-6).astype(np.float32)
        found = weigh(gate, train, gen, mask, uniforms=uniforms)
        np.testing.assert_array_equal(found, (probability == 1) | (sign < 0))
    huge = np.where(mask, 1000.0, 0.0).astype(np.float32)
    np.testing.assert_array_equal(weigh(gate, huge, -huge, mask, uniforms=evenly()), np.ones(SHAPE))


def test_soft_ratio_goes_from_recontextualization_to_importance_weights():
    arrays, at_train, at_gen = enumerated()
    ratio = at_train / at_gen
    weights = {}
    with jax.enable_x64(True):
        for alpha, limit in ((0.0, 1.0), (0.5, 1e9), (1.0, 1.5), (1.0, 1e9)):
            gate = Gate("soft_ratio", alpha=alpha, max_weight=limit)
            weights[alpha, limit] = np.asarray(
                gates.gate_weights(gate, *arrays, uniforms=jnp.zeros((1, 1, len(ratio))))
            )[0, 0]
    np.testing.assert_array_equal(weights[0.0, 1.0], np.ones_like(ratio))
    np.testing.assert_allclose(weights[0.5, 1e9], np.sqrt(ratio), rtol=1e-12)
    np.testing.assert_allclose(weights[1.0, 1.5], np.minimum(ratio, 1.5), rtol=1e-12)
    rewards, score = (
        np.random.default_rng(8).random(len(ratio)),
        enumerable.scores(enumerable.table(7)),
    )
    policy_gradient = (at_train * rewards) @ score
    np.testing.assert_allclose(
        (at_gen * weights[1.0, 1e9] * rewards) @ score, policy_gradient, atol=1e-12
    )


def test_soft_sigmoid():
    train, gen, mask = samples()
    gate = Gate("soft_sigmoid", threshold=0.1, width=0.3)
    found = weigh(gate, train, gen, mask, uniforms=evenly())
    expected = expit((of_samples(mean_difference, train, gen, mask) - 0.1) / 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    against = Gate("soft_sigmoid", threshold=0.1, width=0.3, reversed=True)
    np.testing.assert_allclose(
        weigh(against, train, gen, mask, uniforms=evenly()), 1 - expected, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    "gate",
    [Gate("soft_sigmoid", threshold=0.1, width=0.3), Gate("soft_ratio", alpha=1.0, max_weight=9.0)],
    ids=lambda g: g.kind,
)
def test_weights_carry_no_gradient(gate):
    train, gen, mask = samples()
    train = jnp.where(mask, train, 0)
    pull = jax.grad(lambda x: jnp.sum(gates.gate_weights(gate, x, gen, mask, uniforms=evenly())))(
        train
    )
    np.testing.assert_array_equal(pull, np.zeros(train.shape))


def test_random_gate_has_the_requested_rate():
    mask = samples()[2]
    found = weigh(Gate("random", rate=0.3), None, None, mask, uniforms=evenly())
    np.testing.assert_allclose(np.mean(found, axis=(1, 2)), 0.3, atol=1 / (GROUPS * OF_GROUP))


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("kind", ["relative", "stochastic", "oracle"])
def test_random_gate_accepts_as_often_as_another_in_each_run(kind, against):
    train, gen, mask = samples()
    gen[1] -= 0.5  # the runs have different rates
    labels = (
        np.random.default_rng(3).integers(0, 2, SHAPE) * np.array([1, 0])[:, None, None]
        + np.array([0, 1])[:, None, None]
    )
    other = {
        "relative": Gate("relative", threshold=0.0, reversed=against),
        "stochastic": Gate("stochastic", bound=4.0, reversed=against),
        "oracle": Gate("oracle", accepted_labels=(1,), reversed=against),
    }[kind]
    probability = np.asarray(gates.acceptance(other, train, gen, mask, labels=labels))
    rates = probability.mean(axis=(1, 2))
    assert abs(rates[0] - rates[1]) > 0.05
    random = Gate("random", like=other)
    found = np.asarray(weigh(random, train, gen, mask, uniforms=evenly(), labels=labels))
    np.testing.assert_allclose(found.mean(axis=(1, 2)), rates, atol=1 / (GROUPS * OF_GROUP))
    # by the fraction alone: the samples do not matter
    np.testing.assert_array_equal(found, gates.accept(rates[:, None, None], evenly()))
    assert (random.needs_log_probs, random.needs_labels) == (
        other.needs_log_probs,
        other.needs_labels,
    )


def test_scores_do_not_depend_on_padding():
    train, gen, mask = samples()
    wider = [np.pad(a, [(0, 0)] * 3 + [(0, 4)]) for a in (train - gen, mask)]
    for score in (
        gates.mean_log_prob,
        functools.partial(gates.worst_window, window=3),
        functools.partial(gates.worst_window, window=8),
    ):
        np.testing.assert_allclose(score(*wider), score(train - gen, mask), rtol=1e-5, atol=1e-6)


def test_oracle_accepts_labels():
    labels = np.random.default_rng(4).integers(0, 4, SHAPE)
    mask = samples()[2]
    found = weigh(
        Gate("oracle", accepted_labels=(1, 3)), None, None, mask, uniforms=evenly(), labels=labels
    )
    np.testing.assert_array_equal(found, labels % 2)


@pytest.mark.parametrize(
    "fields",
    [
        dict(kind="absolute", quantile=0.4),
        dict(kind="relative", threshold=0.1),
        dict(kind="worst_token", threshold=-0.4, window=2),
        dict(kind="oracle", accepted_labels=(0,)),
    ],
    ids=lambda f: f["kind"],
)
def test_reversed_gate_accepts_what_would_be_rejected(fields):
    train, gen, mask = samples()
    given = dict(
        uniforms=evenly(),
        reference_scores=np.full(RUNS, -1, np.float32),
        labels=np.random.default_rng(4).integers(0, 2, SHAPE),
    )
    stated, turned = (
        np.asarray(weigh(Gate(**fields, reversed=r), train, gen, mask, **given))
        for r in (False, True)
    )
    np.testing.assert_array_equal(stated + turned, np.ones(SHAPE))
    assert 0 < stated.mean() < 1


@pytest.mark.parametrize(
    "gate",
    [
        Gate(),
        Gate("absolute", quantile=0.4),
        Gate("relative", threshold=0.1),
        Gate("stochastic", bound=2.0),
        Gate("soft_sigmoid", threshold=0.0, width=0.5),
        Gate("soft_ratio", alpha=0.5, max_weight=2.0),
        Gate("worst_token", threshold=-0.4, window=2),
        Gate("random", rate=0.5),
        Gate("oracle", accepted_labels=(0,)),
        Gate("random", like=Gate("relative", threshold=0.1)),
    ],
    ids=lambda g: g.kind,
)
def test_a_gate_that_draws_is_one_whose_weights_depend_on_the_uniforms(gate):
    train, gen, mask = samples()
    given = dict(
        reference_scores=np.full(RUNS, -1, np.float32),
        labels=np.random.default_rng(4).integers(0, 2, SHAPE),
    )
    one, other = (
        np.asarray(weigh(gate, train, gen, mask, uniforms=evenly(seed=seed), **given))
        for seed in (1, 50)
    )
    assert (one != other).any() == gate.draws


@pytest.mark.parametrize(
    "rejected, expected",
    [
        ("drop", [0, 0, 0, 0]),
        ("train_at_gen", [0, 1, 0.75, 0]),
        ("train_at_gen_negative_only", [0, 0, 0.75, 0]),
    ],
)
def test_what_becomes_of_rejected_samples(rejected, expected):
    weights, of_samples = np.array([[[1, 0, 0.25, 2]]]), np.array([[[1.0, 1.0, -1.0, -1.0]]])
    gate = Gate("relative", threshold=0.0, rejected=rejected)
    at_train, at_gen = gates.split_weights(gate, weights, of_samples)
    np.testing.assert_array_equal(at_train, weights)
    np.testing.assert_array_equal(at_gen, [[expected]])


@pytest.mark.parametrize("statistics", gates.STATISTICS)
def test_baselines_before_or_after_the_gate(statistics):
    rewards = np.random.default_rng(0).standard_normal((1, 1, 6)).astype(np.float32)
    valid, weights = np.arange(6)[None, None] != 5, np.array([[[1, 0, 1, 1, 0, 1.0]]])
    counted = gates.in_statistics(
        Gate("relative", threshold=0.0, statistics=statistics), weights, valid
    )
    found = advantages(rewards, counted, "group_mean_std")[0, 0]
    members = [0, 2, 3] if statistics == "after_gate" else [0, 1, 2, 3, 4]
    of_members = torch.tensor(rewards[0, 0, members])
    np.testing.assert_allclose(
        found[np.array(members)],
        (of_members - of_members.mean()) / (of_members.std() + 1e-4),
        rtol=1e-5,
    )
    assert np.count_nonzero(found) == len(members)


def test_mean_by_label_and_effective_sample_size():
    weights = np.array([[[1, 0, 1], [0.5, 2, 9]], [[0, 0, 0], [0, 0, 3]]], np.float32)
    labels = np.array([[[0, 0, 1], [1, 0, 0]], [[0, 0, 0], [0, 0, 2]]])
    valid = np.ones(weights.shape, bool)
    valid[:, 1, 2] = False
    np.testing.assert_array_equal(
        gates.mean_by_label(weights, valid, labels, 3), [[1, 0.75, np.nan], [0, np.nan, np.nan]]
    )
    np.testing.assert_allclose(
        gates.effective_sample_size(weights, valid), [4.5**2 / 6.25, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        gates.effective_sample_size(np.full_like(weights, 0.3), valid), [5, 5], rtol=1e-6
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="likelihood"), "gate kind is 'likelihood': choose from off, absolute"),
        (dict(rejected="keep"), "gate rejected is 'keep': choose from drop, "),
        (dict(statistics="both"), "gate statistics is 'both': choose from before_gate, after_gate"),
        (dict(kind="relative"), "gate relative with threshold = None: .* it needs threshold"),
        (
            dict(kind="off", threshold=0.0),
            "gate off with threshold = 0.0: .* it needs none of them",
        ),
        (dict(kind="absolute", quantile=1.0), "quantile is 1.0: it must lie between 0 and 1"),
        (dict(kind="absolute", quantile=float("nan")), "quantile is nan"),
        (dict(kind="relative", threshold=float("nan")), "threshold is nan: it must be a number"),
        (dict(kind="stochastic", bound=0.0), "bound is 0.0: it must be a number above 0"),
        (dict(kind="soft_sigmoid", threshold=0.0, width=0.0), "width is 0.0"),
        (dict(kind="soft_ratio", alpha=-1.0, max_weight=2.0), "alpha is -1.0"),
        (
            dict(kind="soft_ratio", alpha=1.0, max_weight=0.5),
            "max_weight is 0.5: it must be a number of at least 1",
        ),
        (
            dict(kind="worst_token", threshold=0.0, window=0),
            "window is 0: it must be at least 1 token",
        ),
        (dict(kind="oracle", accepted_labels=()), "accepted_labels is empty"),
        (dict(kind="random", rate=0.0), r"rate is 0.0: it must lie in \(0, 1\]"),
        (dict(kind="random"), "random needs a rate or a gate to be like"),
        (dict(kind="random", rate=0.5, like=Gate("relative", threshold=0.0)), "one of the two"),
        (dict(kind="relative", threshold=0.0, rate=0.5), "no other kind has either"),
        (
            dict(kind="random", like=Gate("soft_ratio", alpha=1.0, max_weight=2.0)),
            "cannot be like the gate soft_ratio",
        ),
        (dict(kind="off", reversed=True), "gate off cannot be reversed"),
        (
            dict(kind="soft_sigmoid", threshold=0.0, width=1.0, statistics="after_gate"),
            "must be before_gate",
        ),
        (
            dict(kind="relative", threshold=0.0, statistics="after_gate", rejected="train_at_gen"),
            "have no advantage then",
        ),
        (dict(kind="off", rejected="train_at_gen"), "leaves no samples"),
    ],
)
def test_a_gate_without_meaning_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Gate(**fields)


@pytest.mark.parametrize(
    ("dials", "words"),
    [
        (
            dict(estimator=ESTIMATORS["late_sequence"]),
            (
                "late_sequence clips the ratio to the policy at the generation prompt: use"
                " importance_sequence"
            ),
        ),
        (dict(estimator=ESTIMATORS["late_token"]), "late_token clips"),
        (dict(estimator=ESTIMATORS["truncated"]), "truncated corrects the sampler's numerics"),
        (dict(gate=Gate("relative", threshold=0.0)), "the gate relative compares"),
        (dict(gate=Gate("stochastic", bound=2.0)), "the gate stochastic compares"),
        (
            dict(gate=Gate("random", like=Gate("worst_token", threshold=0.0, window=2))),
            "the gate random compares",
        ),
        (dict(pmi=(0.5, 1.0)), "a PMI weight compares"),
        (dict(kl=Kl("gg", "reward", "k1", 0.1)), "a penalty gg in the reward"),
        (
            dict(
                estimator=ESTIMATORS["train_old"],
                epochs=2,
                gate=Gate("random", rate=0.5, rejected="train_at_gen"),
            ),
            "train_old compares samples that a gate sends back",
        ),
    ],
)
def test_what_compares_with_the_policy_at_the_generation_prompt_cannot_have_guided_samples(
    dials, words
):
    algorithm = Algorithm(**dials)  # has a meaning by itself
    with pytest.raises(
        ValueError,
        match=f"guided samples are not those of the policy at the generation prompt: {words}",
    ):
        algorithm.check_guided()


def test_the_others_can_have_guided_samples():
    names = (
        "plain",
        "importance_token",
        "importance_sequence",
        "train_old",
        "ratio_noise",
        "auxiliary",
    )
    gates_ = (
        Gate("absolute", quantile=0.1),
        Gate("random", rate=0.5),
        Gate("random", like=Gate("absolute", quantile=0.1)),
        Gate("oracle", accepted_labels=(0,)),
    )
    penalties = Kl("gg", beta=0.1), Kl("tt", "reward", "k1", 0.1), Kl("tg", beta=0.1)
    for algorithm in (
        *(Algorithm(ESTIMATORS[name]) for name in names),
        *(Algorithm(gate=gate) for gate in gates_),
        *(Algorithm(kl=kl) for kl in penalties),
        Algorithm(selection=Selection()),
        Algorithm(pmi=(0.5, 1.0), pmi_against="guide"),
    ):
        algorithm.check_guided()


def test_a_guidance_needs_a_guide_and_a_guide_something_that_uses_it():
    against = Algorithm(pmi=(0.5, 1.0), pmi_against="guide")
    for guidance, has_guide, algorithm in (
        (0.0, False, Algorithm()),
        (1.0, True, Algorithm()),
        (0.0, True, against),
        (1.0, True, against),
    ):
        check_guidance("arm a", guidance, has_guide, algorithm)
    for guidance, has_guide, algorithm, words in (
        (1.0, False, Algorithm(), "arm a has no guide prompt"),
        (0.0, True, Algorithm(), "arm a has a guide prompt"),
        (0.0, False, against, "arm a has no guide prompt"),
        (-1.0, True, Algorithm(), "guidance is -1.0: it must be a number of at least 0"),
        (float("nan"), True, Algorithm(), "guidance is nan"),
        (float("inf"), True, Algorithm(), "guidance is inf"),
        (1.0, True, Algorithm(pmi=(0.5, 1.0)), "use pmi_against guide"),
    ):
        with pytest.raises(ValueError, match=words):
            check_guidance("arm a", guidance, has_guide, algorithm)
    for fields in (dict(pmi=(0.5, 1.0), pmi_against="other"), dict(pmi_against="guide")):
        with pytest.raises(ValueError, match="pmi_against is"):
            Algorithm(**fields)


def test_pmi_weighs_positive_advantages_alone():
    of_samples, llr = (
        np.array([[[1.0, 2.0, 0.5, -1.0, 0.0]]]),
        np.array([[[0.5, 9.0, -9.0, 9.0, 9.0]]]),
    )
    found = pmi_weights(of_samples, llr, 0.4, 2.0)
    np.testing.assert_allclose(found, [[[1.2, 1.8, 0.2, 1, 1]]], rtol=1e-6)
    np.testing.assert_array_equal(
        jax.grad(lambda x: jnp.sum(pmi_weights(of_samples, x, 0.4, 2.0)))(llr), np.zeros(llr.shape)
    )
    check_pmi(0.5, 2.0)
    for gamma, bound in ((0.6, 2.0), (-0.6, 2.0), (0.5, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="pmi is gamma"):
            check_pmi(gamma, bound)
