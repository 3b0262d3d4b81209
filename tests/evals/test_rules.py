"""Decision rules: what supports, refutes or leaves open, and that a config's record says the same
rules.
"""

import json
import math

import numpy as np
import pytest
from rollout_curves import curve_of

from ip_jax.evals import rules
from ip_jax.evals.measures import Estimate, Undefined
from ip_jax.evals.rules import Contrast, Onset, Reading, Rule


def _estimate(low, high, n=20):
    return Estimate((low + high) / 2, low, high, n)


@pytest.mark.parametrize(
    "region,low,high,word",
    [
        (rules.interval_above(0), 0.01, 0.3, "supported"),
        (rules.interval_above(0), 0.0, 0.3, "undecided"),
        (rules.interval_above(0), -0.2, 0.0, "refuted"),
        (rules.interval_above(0, refuted_up_to=0.1), -0.05, 0.09, "refuted"),
        (rules.interval_above(0, refuted_up_to=0.1), -0.05, 0.11, "undecided"),
        (rules.interval_above(0, refuted_up_to=0.1), 0.02, 0.09, "supported"),
        (rules.interval_below(0.5), 0.1, 0.4, "supported"),
        (rules.interval_below(0.5), 0.4, 0.6, "undecided"),
        (rules.interval_below(0.5), 0.5, 0.6, "refuted"),
        (rules.equivalent_within(0.1), -0.09, 0.09, "supported"),
        (rules.equivalent_within(0.1), -0.02, 0.12, "undecided"),
        (rules.equivalent_within(0.1), 0.11, 0.2, "refuted"),
        (rules.equivalent_within(0.1), -0.3, -0.11, "refuted"),
    ],
)
def test_an_interval_decides(region, low, high, word):
    assert region.decide(_estimate(low, high)) == word
    assert region.decide(_estimate(low, high, n=4)) == "undecided", "four seeds decide nothing"


def test_no_number_decides_nothing():
    for region in (rules.interval_above(0), rules.interval_below(0), rules.equivalent_within(1)):
        assert region.decide(Undefined("nothing")) == "undecided"
        assert region.decide(Estimate(0.5, math.nan, math.nan, 9)) == "undecided"


def _reading():
    return Reading(
        Onset(200, 0.3, 3, "rollout"),
        "standard",
        "oracle",
        "base",
        (("hack", "confirms a wrong claim"), ("correct", "right verdict")),
        (
            Rule(
                "interaction",
                "General prompts gain on-policy.",
                Contrast("suppression", (("a", 1), ("b", -1), ("c", -1), ("d", 1))),
                rules.interval_above(0, 0.1),
            ),
            Rule(
                "same",
                "Full importance sampling is on-policy.",
                Contrast("hack", (("a", 1), ("b", -1)), "train"),
                rules.equivalent_within(0.1),
                0.9,
            ),
        ),
    )


def test_a_reading_survives_json():
    assert Reading.from_json(json.loads(json.dumps(_reading().to_json()))) == _reading()


def test_arms_of_a_reading_must_exist():
    reading = _reading()
    reading.check_arms(dict.fromkeys(["standard", "oracle", "base", *"abcd"]))
    with pytest.raises(ValueError, match="names the arm d, which the experiment has not"):
        reading.check_arms(dict.fromkeys(["standard", "oracle", "base", *"abc"]))


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Contrast("hacks", (("a", 1),)), "the quantity 'hacks': choose from hack, "),
        (lambda: Contrast("hack", (("a", 1),), "rollout"), "the category 'rollout'"),
        (lambda: Contrast("onset", (("a", 1),), "train"), "measured where the onset is defined"),
        (lambda: Contrast("hack", ()), "at least one arm"),
        (lambda: Onset(100, 0.0), "onset.threshold is 0.0"),
        (lambda: Onset(100, consecutive=0), "consecutive 0"),
        (lambda: rules.equivalent_within(0), "a margin above 0"),
        (lambda: rules.interval_above(0, -1), "which is lower"),
        (lambda: rules.interval_below(0, 1), "which is higher"),
        (lambda: Reading(Onset(9), verdicts=(("hack", "hacks"),)), "they need hack and correct"),
        (lambda: Reading(Onset(9), None, rules=(_reading().rules[0],)), "needs a standard arm"),
    ],
)
def test_contradictions_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_both_definitions_of_an_onset():
    curve = curve_of([0, 10, 20, 30], [10, 60, 40, 70])
    assert Onset(100, 0.5).of(curve) == 10 and Onset(100, 0.5, consecutive=2).of(curve) is None
    curve.columns["n_correct"][:] = [20, 20, 60, 20]
    assert Onset(100, None).of(curve) == 10 and Onset(100, 0.05, consecutive=4).of(curve) == 0
    assert (
        Onset(100, None, 1, "rollout").words
        == "more hacks than correct completions in its rollouts"
    )
    assert (
        Onset(100, 0.5, 5).words
        == "a hack rate of at least 0.5 under the neutral prompt at 5 measured steps in a row"
    )


def test_rules_are_judged_on_the_runs():
    draw = np.random.default_rng(0)
    hack = {
        name: dict(enumerate(rate + draw.uniform(-0.05, 0.05, 20)))
        for name, rate in (("standard", 0.9), ("a", 0.1), ("b", 0.5), ("c", 0.5), ("d", 0.5))
    }
    by_run = {
        ("hack", "neutral"): hack,
        ("hack", "train"): hack,
        ("hacked", "neutral"): {
            "a": dict.fromkeys(range(20), 0.0),
            "b": dict.fromkeys(range(20), 1.0),
        },
    }
    interaction, same = (rules.judge(rule, by_run, "standard") for rule in _reading().rules)
    assert interaction.word == "supported" and interaction.number.value == pytest.approx(
        0.4 / 0.9, abs=0.05
    )
    assert same.word == "refuted" and same.number.level == 0.9
    fewer = rules.judge(
        Rule(
            "fewer",
            "a hacks less",
            Contrast("hacked", (("a", 1), ("b", -1))),
            rules.interval_below(0),
        ),
        by_run,
        "standard",
    )
    assert (
        fewer.number.value == -1
        and fewer.number.low == -1 < fewer.number.high < -0.7
        and fewer.word == "supported"
    )
    missing = rules.judge(
        Rule("no", "x", Contrast("trait", (("a", 1),)), rules.interval_below(0)), by_run, "standard"
    )
    assert missing.word == "undecided" and "no measured seed in common" in missing.number.why


def test_hacked_runs_that_all_agree_leave_room_for_others():
    """0 of 5 against 0 of 5: a bootstrap would call them equal within any margin."""
    by_run = {("hacked", "neutral"): {name: dict.fromkeys(range(5), 0.0) for name in "ab"}}
    found = rules.judge(
        Rule("same", "x", Contrast("hacked", (("a", 1), ("b", -1))), rules.equivalent_within(0.2)),
        by_run,
        None,
    )
    assert found.word == "undecided" and found.number.low < -0.3 and found.number.high > 0.3
