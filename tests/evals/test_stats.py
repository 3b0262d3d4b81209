"""Intervals against scipy's own and against published tables; seed summaries against invariants."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ip_jax.evals import stats


@pytest.mark.parametrize(
    "k,n", [(0, 20), (1, 20), (7, 20), (19, 20), (20, 20), (697, 1000), (0, 1), (1, 1)]
)
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_clopper_pearson_agrees_with_scipy(k, n, level):
    expected = scipy_stats.binomtest(k, n).proportion_ci(level, method="exact")
    ours = stats.proportion(k, n, level)
    assert (ours.k, ours.n, ours.value) == (k, n, k / n)
    np.testing.assert_allclose([ours.low, ours.high], [expected.low, expected.high], atol=1e-9)


def test_clopper_pearson_covers_at_least_95_percent_at_every_rate():
    """The defining property, by summation over all outcomes."""
    n = 15
    intervals = [stats.proportion(k, n) for k in range(n + 1)]
    for rate in np.linspace(0.01, 0.99, 99):
        covered = sum(
            scipy_stats.binom.pmf(i.k, n, rate) for i in intervals if i.low <= rate <= i.high
        )
        assert covered >= 0.95


def test_no_trials_say_nothing():
    empty = stats.proportion(0, 0)
    assert (empty.low, empty.high) == (0.0, 1.0) and math.isnan(empty.value)
    gap = stats.difference((3, 5), (0, 0))
    assert (gap.low, gap.high) == (-1.0, 1.0) and math.isnan(gap.value)
    assert stats.fisher_exact((3, 5), (0, 0)) == 1.0


# Newcombe 1998, table II, method 10 (95 %).
NEWCOMBE = [
    ((56, 70), (48, 80), 0.0524, 0.3339),
    ((9, 10), (3, 10), 0.1705, 0.8090),
    ((6, 7), (2, 7), 0.0582, 0.8062),
    ((5, 56), (0, 29), -0.0381, 0.1926),
    ((0, 10), (0, 20), -0.1611, 0.2775),
    ((0, 10), (0, 10), -0.2775, 0.2775),
    ((10, 10), (0, 20), 0.6791, 1.0000),
    ((10, 10), (0, 10), 0.6075, 1.0000),
]


@pytest.mark.parametrize("first,second,low,high", NEWCOMBE)
def test_difference_reproduces_newcombes_table(first, second, low, high):
    ours = stats.difference(first, second)
    assert ours.method == "newcombe"
    np.testing.assert_allclose([ours.low, ours.high], [low, high], atol=6e-5)
    swapped = stats.difference(second, first)
    np.testing.assert_allclose(
        [swapped.value, swapped.low, swapped.high], [-ours.value, -ours.high, -ours.low], atol=1e-12
    )


def test_fisher_exact_is_the_hypergeometric_sum():
    """The lady tasting tea: 3 of 4 against 1 of 4."""
    assert stats.fisher_exact((3, 4), (1, 4)) == pytest.approx(34 / 70)
    assert stats.fisher_exact((4, 4), (0, 4)) == pytest.approx(2 / 70)


def test_holm_is_the_closed_test_of_bonferronis():
    """Worked by hand; then by its definition: a test is rejected where every set of tests that
    holds it is, by the set's size times its smallest p.
    """
    # 3 x .01, not below the one before, 2 x .03, 4 x .005
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert (
        stats.holm([]) == ()
        and stats.holm([0.3]) == (0.3,)
        and stats.holm([0.5, 0.6]) == (1.0, 1.0)
    )
    draw = np.random.default_rng(0)
    for _ in range(20):
        p = draw.uniform(size=6) ** 3
        sets = [s for r in range(1, 7) for s in itertools.combinations(range(6), r)]
        closed = [max(min(1, len(s) * p[list(s)].min()) for s in sets if i in s) for i in range(6)]
        np.testing.assert_allclose(stats.holm(p), closed)


def test_holm_reproduces_the_numbers_of_rs_multtest():
    """Ten p-values and what R's multtest makes of them, as statsmodels' own tests quote it."""
    raw = [
        0.838541367553,
        0.642193923795,
        0.680845947633,
        0.967833824309,
        0.71626938238,
        0.177096952723,
        5.23656777208e-5,
        0.0202732688798,
        2.8140506198e-4,
        0.0149877310796,
    ]
    published = [
        1,
        1,
        1,
        1,
        1,
        1,
        5.2365677720800005e-4,
        0.1419128821586,
        2.5326455578199999e-3,
        0.11990184863680,
    ]
    np.testing.assert_allclose(stats.holm(raw), published, rtol=1e-9)


def test_seed_mean_is_mean_and_standard_error():
    values = [0.2, 0.4, 0.9, 0.5]
    ours = stats.seed_mean(values)
    assert ours.mean == pytest.approx(0.5) and ours.n == 4
    assert ours.standard_error == pytest.approx(scipy_stats.sem(values))
    alone = stats.seed_mean([0.3])
    assert alone.mean == pytest.approx(0.3) and math.isnan(alone.standard_error)


def test_bootstrap_resamples_whole_seeds():
    values = [0.1, 0.3, 0.35, 0.8, 0.55]
    low, high = stats.bootstrap_over_seeds(values)
    assert (
        (low, high)
        == stats.bootstrap_over_seeds(values)
        != stats.bootstrap_over_seeds(values, seed=1, resamples=500)
    )
    reference = scipy_stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=50_000, rng=3
    ).confidence_interval
    np.testing.assert_allclose([low, high], reference, atol=0.01)
    assert stats.bootstrap_over_seeds([0.4, 0.4, 0.4]) == (pytest.approx(0.4), pytest.approx(0.4))


def test_impossible_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="5 of 4 is no count"):
        stats.proportion(5, 4)
    with pytest.raises(ValueError, match="between 0 and 1, not at 95"):
        stats.proportion(1, 4, level=95)
    with pytest.raises(ValueError, match="at least 2 seeds, not 1"):
        stats.bootstrap_over_seeds([0.5])
    with pytest.raises(ValueError, match="finite numbers"):
        stats.seed_mean([0.5, math.nan])
