"""Declared metrics against counts done by hand and scipy's intervals, and what is refused."""

import math

import pytest
from scipy import stats as scipy_stats

from ip_jax.evals.metrics import (
    Difference,
    Given,
    Holds,
    Mean,
    MetricError,
    Rate,
    check_metrics,
    measure,
)

ROWS = [
    {"seed": 0, "item": "a", "form": "asked", "good": True, "score": 1.0, "word": "yes"},
    {"seed": 0, "item": "a", "form": "told", "good": True, "score": 2.0, "word": "no"},
    {"seed": 0, "item": "b", "form": "asked", "good": False, "score": 4.0, "word": "yes"},
    {"seed": 0, "item": "b", "form": "told", "good": True, "score": 5.0, "word": "maybe"},
    {"seed": 1, "item": "a", "form": "asked", "good": False, "score": None, "word": None},
    {"seed": 1, "item": "a", "form": "told", "good": None, "score": 3.0, "word": "yes"},
]
ASKED = Holds("form", "asked")


def counts(metric):
    found = measure([metric], ROWS)[metric.name]
    return found.k, found.n


def test_a_rate_counts_the_rows_that_have_a_value():
    assert counts(Rate("good", "good")) == (3, 5)
    assert counts(Rate("x", "x", of=Holds("good", False))) == (2, 5)
    assert counts(Rate("x", "x", of=Holds("word", ("yes", "maybe")))) == (4, 5)
    assert counts(Rate("x", "x", of=Holds("word", ()))) == (0, 5)
    assert counts(Rate("good", "good", where=ASKED)) == (1, 3)


def test_a_condition_looks_at_the_partner_of_the_same_seed():
    told = Holds("form", "told")
    partner_was_good = Given("item", ASKED, Holds("good"))
    assert counts(Rate("good", "good", where=told, given=partner_was_good)) == (1, 1)
    partner_was_not = Given("item", ASKED, Holds("good", False))
    assert counts(Rate("good", "good", where=told, given=partner_was_not)) == (1, 1), (
        "of two such rows one has no value"
    )
    with pytest.raises(MetricError, match="4 rows hold only 3 different values of item"):
        measure([Rate("good", "good", given=partner_was_good)], [*ROWS, ROWS[0]])


def test_a_mean_has_students_interval():
    found = measure([Mean("score", "score", (0, 10))], ROWS)["score"]
    values = [1.0, 2.0, 4.0, 5.0, 3.0]
    low, high = scipy_stats.t.interval(
        0.95, len(values) - 1, loc=3.0, scale=scipy_stats.sem(values)
    )
    assert (found.value, found.n, found.method) == (3.0, 5, "student-t")
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    one = measure([Mean("score", "score", (0, 10))], ROWS[:1])["score"]
    assert (one.value, one.low, one.high) == (1.0, -math.inf, math.inf)
    none = measure([Mean("score", "score", (0, 10))], ROWS[4:5])["score"]
    assert math.isnan(none.value) and none.n == 0


def test_a_difference_is_of_rates_declared_before_it():
    metrics = (
        Rate("asked", "asked", of=Holds("good"), where=ASKED),
        Rate("told", "told", of=Holds("good"), where=Holds("form", "told")),
        Difference("gap", "gap", "told", "asked"),
    )
    found = measure(metrics, ROWS)["gap"]
    assert found.value == pytest.approx(2 / 2 - 1 / 3) and found.method == "newcombe"
    check_metrics(metrics, ("good", "form"))
    with pytest.raises(MetricError, match="'gap' is a difference with 'told', and no rate of"):
        check_metrics((metrics[0], metrics[2], metrics[1]), ("good", "form"))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((), "the study has no metrics"),
        ((Rate("good", "a"), Rate("good", "b")), "two metrics are called 'good'"),
        ((Rate("god", "a"),), "reads the column 'god', which neither .* did you mean good"),
        ((Rate("good", "a", where=Holds("from", 1)),), "reads the column 'from'"),
        ((Rate("good", "a", given=Given("itm", ASKED, ASKED)),), "reads the column 'itm'"),
        ((Mean("scor", "a", (0, 1)),), "did you mean score"),
    ],
)
def test_metrics_that_cannot_be_counted_are_refused_in_a_sentence(metrics, message):
    with pytest.raises(MetricError, match=message) as caught:
        check_metrics(metrics, ("good", "form", "item", "score"))
    assert "\n" not in str(caught.value)
