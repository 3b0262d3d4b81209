"""Statistics of counts and seeds: exact intervals for proportions, tests between two arms, means
over seeds.

A rate is always carried as k of n with its interval, never as a bare float, so that a figure can
say what it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Proportion:
    """k successes of n trials; `low` and `high` bound the true rate, both in [0, 1]."""

    k: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """k / n, NaN where nothing was tried."""
        return self.k / self.n if self.n else math.nan


@dataclass(frozen=True)
class Difference:
    """A difference of two proportions, first minus second, in [-1, 1], and the name of its
    interval's method.
    """

    value: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Mean:
    """The mean of `n` numbers and the bounds of its interval."""

    value: float
    low: float
    high: float
    n: int
    method: str


@dataclass(frozen=True)
class SeedMean:
    """Mean over `n` seeds and its standard error sd(ddof=1) / sqrt(n), NaN for one seed."""

    mean: float
    standard_error: float
    n: int


def proportion(k: int, n: int, level: float = 0.95) -> Proportion:
    """k of n with the Clopper-Pearson interval (exact: it covers with at least probability
    `level`).

    Clopper and Pearson, Biometrika 26 (1934) 404-413. With n = 0 the interval is [0, 1].
    Raises ValueError unless 0 <= k <= n and 0 < level < 1.
    """
    _check_counts(k, n)
    tail = _tail(level)
    low = float(stats.beta.ppf(tail, k, n - k + 1)) if k > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Proportion(int(k), int(n), low, high)


def difference(first: tuple[int, int], second: tuple[int, int], level: float = 0.95) -> Difference:
    """k1/n1 - k2/n2 for two independent samples, with Newcombe's hybrid score interval.

    Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10: the two Wilson intervals are
    combined, so it stays within [-1, 1] and behaves at 0 of n. Where the two samples share their
    items and agree, it is too wide, not too narrow. An empty sample gives NaN with the interval
    [-1, 1]. Raises ValueError for impossible counts or level.
    """
    (k1, n1), (k2, n2) = first, second
    _check_counts(k1, n1)
    _check_counts(k2, n2)
    z = stats.norm.ppf(1 - _tail(level))
    if n1 == 0 or n2 == 0:
        return Difference(math.nan, -1.0, 1.0, "newcombe")
    p1, p2 = k1 / n1, k2 / n2
    (low1, high1), (low2, high2) = _wilson(k1, n1, z), _wilson(k2, n2, z)
    value = p1 - p2
    low = value - math.hypot(p1 - low1, high2 - p2)
    high = value + math.hypot(high1 - p1, p2 - low2)
    return Difference(value, low, high, "newcombe")


def mean(values: Sequence[float], level: float = 0.95) -> Mean:
    """The mean of independent numbers with Student's t interval; NaN for none, and an interval
    without bounds for a single one. Raises ValueError for a number that is not finite.
    """
    tail = _tail(level)
    if len(values) == 0:
        return Mean(math.nan, -math.inf, math.inf, 0, "student-t")
    array = _finite(values)
    centre, n = float(array.mean()), len(array)
    if n == 1:
        return Mean(centre, -math.inf, math.inf, n, "student-t")
    half = float(stats.t.ppf(1 - tail, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Mean(centre, centre - half, centre + half, n, "student-t")


def fisher_exact(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Two-sided p-value of Fisher's exact test that two arms, each (k, n), have the same rate; 1
    for an empty arm.
    """
    (k1, n1), (k2, n2) = first, second
    _check_counts(k1, n1)
    _check_counts(k2, n2)
    return float(stats.fisher_exact([[k1, n1 - k1], [k2, n2 - k2]]).pvalue)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The p-values corrected for their number by Holm's step-down method, in the order given: those
    below a level are rejected with the chance of any false rejection at most that level, however
    the tests depend on one another (here they share an arm).

    The i-th smallest of m becomes the largest of min(1, (m - j + 1) p_j) over j <= i. Holm,
    Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    p, m = np.asarray(p_values, dtype=np.float64), len(p_values)
    order = np.argsort(p, kind="stable")
    corrected = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(m, 0, -1)))
    return tuple(corrected[np.argsort(order)].tolist())


def seed_mean(values: Sequence[float]) -> SeedMean:
    """Mean over seeds +- standard error, as the plots of Wichers et al. give it. Raises ValueError
    for no seed.
    """
    array = _finite(values)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return SeedMean(float(array.mean()), error, len(array))


def bootstrap_over_seeds(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean, resampling whole seeds. Deterministic in `seed`.

    With few seeds it is too narrow (five seeds have 126 distinct resamples): show the single seeds
    beside it. Raises ValueError for fewer than two seeds.
    """
    array = _finite(values)
    if len(array) < 2:
        raise ValueError(f"A bootstrap over seeds needs at least 2 seeds, not {len(array)}.")
    tail = _tail(level)
    picks = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _wilson(k: int, n: int, z: float) -> tuple[float, float]:
    """The Wilson score interval: the roots of (p - k/n)^2 = z^2 p (1 - p) / n."""
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"A confidence level lies between 0 and 1, not at {level}.")
    return (1 - level) / 2


def _check_counts(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no count: it needs 0 <= k <= n.")


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"Seeds are summarised from a non-empty list of finite numbers, not from {values!r}."
        )
    return array
