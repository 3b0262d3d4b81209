"""Which samples are copied, and that best-of-N copies the generation prompt beside selecting:
exact, on a policy that can be enumerated.
"""

import enumerable
import jax
import numpy as np
import pytest

from ip_jax.rl.selection import Selection, select

choose = jax.jit(select, static_argnames="selection")
REWARDS = np.array([[[2, 5, 5, 1], [3, 3, 3, 3], [0, 1, 0, 1]]], np.float32)
ALL = np.ones(REWARDS.shape, bool)


def test_of_several_best_samples_the_first_wins():
    np.testing.assert_array_equal(
        choose(REWARDS, ALL, Selection()), [[[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]]
    )


def test_a_best_sample_is_kept_only_above_the_minimum():
    np.testing.assert_array_equal(
        choose(REWARDS, ALL, Selection(minimum=3.0)), [[[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]
    )


def test_filtered_keeps_all_above_the_minimum():
    np.testing.assert_array_equal(
        choose(REWARDS, ALL, Selection("filtered", minimum=1.0)),
        [[[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]],
    )


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("best_of_n", [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]),
        ("filtered", [[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]]),
    ],
)
@pytest.mark.parametrize("reward", [np.nan, 9.0])
def test_invalid_samples_are_never_copied(kind, expected, reward):
    rewards, valid = REWARDS.copy(), ALL.copy()
    valid[0, [0, 2], 1] = valid[0, 1] = False
    rewards[~valid] = reward
    np.testing.assert_array_equal(choose(rewards, valid, Selection(kind)), [expected])


@pytest.mark.parametrize("minimum", [-np.inf, 0.0])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_best_of_n_carries_context_distillation(size, minimum):
    """With F the distribution of rewards under x_g, a sample's weight is N u^(N-1), averaged over
    the step u from F(R-) to F(R), and the expected update is Cov(weight, grad log p(y | x_t)) -
    mean(weight) * grad KL(p(. | x_g) || p(. | x_t)). With N = 1 and no minimum the second term is
    all.
    """
    sampled, trained, members = enumerable.table(3), enumerable.table(4), enumerable.groups(size)
    rewards = np.random.default_rng(5).integers(0, 4, len(enumerable.SEQUENCES)).astype(np.float32)
    chosen = choose(
        rewards[members][None], np.ones((1, *members.shape), bool), Selection(minimum=minimum)
    )[0]
    found = enumerable.expected_update(np.asarray(chosen, float), members, sampled, trained)

    p, score = enumerable.probabilities(sampled), enumerable.scores(trained)
    up_to, below = (
        np.array([p[is_so(rewards, r)].sum() for r in rewards])
        for is_so in (np.less_equal, np.less)
    )
    weight = np.where(rewards > minimum, (up_to**size - below**size) / (up_to - below), 0)
    covariance = (p * weight) @ score - (p @ weight) * (p @ score)
    distillation = -(p @ weight) * enumerable.kl_gradient(sampled, trained)
    np.testing.assert_allclose(found, covariance + distillation, atol=1e-8)
    assert p @ weight == pytest.approx(1 - p[rewards <= minimum].sum() ** size)
    if size == 1 and minimum < 0:
        np.testing.assert_allclose(found, distillation, atol=1e-8)
    else:
        assert np.abs(found - distillation).max() > 0.01


def test_a_selection_without_meaning_is_refused():
    with pytest.raises(
        ValueError, match="selection kind is 'best': choose from best_of_n, filtered"
    ):
        Selection("best")
    with pytest.raises(ValueError, match="selection minimum is NaN"):
        Selection(minimum=float("nan"))
