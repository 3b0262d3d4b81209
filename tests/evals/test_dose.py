"""Arms at an equal dose, on runs whose doses are written down here."""

import numpy as np
import pytest

from ip_jax.evals import dose, rl_tables
from ip_jax.evals.measures import Undefined
from ip_jax.evals.rules import Contrast, Onset, Reading, Rule, interval_below


def _runs(**arms):
    """{arm: [tokens that each iteration of a run reinforces]}, probed every second step; a run's
    hacks at a probe are a tenth of its tokens.
    """
    rows = []
    for arm, runs in arms.items():
        for seed, tokens in enumerate(runs):
            rows += [
                {
                    "arm": arm,
                    "seed": seed,
                    "step": i,
                    "eval_prompt": "rollout",
                    "n": 8,
                    "n_hack": 0,
                    "n_correct": 0,
                    "reinforced_hack_tokens": value,
                }
                for i, value in enumerate(tokens)
            ]
            for step in range(0, len(tokens) + 1, 2):
                so_far = sum(value or 0 for value in tokens[:step])
                rows.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "step": step,
                        "eval_prompt": "neutral",
                        "n": 100,
                        "n_hack": so_far // 10,
                        "n_correct": step,
                    }
                )
    table = rl_tables.curves_table(rows)
    return dose.dosed(rl_tables.curves_of(table, "rollout"), rl_tables.curves_of(table, "neutral"))


def test_a_probe_stands_behind_the_iterations_before_it():
    run = _runs(a=[[1, 2, 0, 30, 5, 5]])["a", 0]
    assert run.probe.steps.tolist() == [0, 2, 4, 6] and run.tokens.tolist() == [0, 3, 33, 43]
    assert [run.reaches(at) for at in (0, 1, 3, 4, 33, 43, 44)] == [0, 1, 1, 2, 2, 3, None]


def test_what_was_not_recorded_is_no_dose():
    runs = _runs(a=[[10, None, 10, 10]])
    assert np.isnan(runs["a", 0].tokens[1:]).all() and runs["a", 0].reaches(10) is None
    assert isinstance(dose.common_dose(runs, ["a"]), Undefined)
    assert (
        dose.common_dose(_runs(a=[[None, 1], [10, 0], [20, 0], [30, 0], [40, 0]]), ["a"]) == 10
    ), "four of five"


def test_the_common_dose_is_what_four_fifths_of_every_arm_reach():
    runs = _runs(
        a=[[10, 0], [20, 0], [30, 0], [40, 0], [50, 0]],
        b=[[25, 0], [500, 0]],
        never=[[0, 0], [0, 0], [0, 9]],
    )
    assert dose.common_dose(runs, ["a"]) == 20, "four of five"
    assert dose.common_dose(runs, ["a", "b"]) == 20 and dose.common_dose(runs, ["b"]) == 25, (
        "of two runs both"
    )
    assert (
        "of the runs of never reinforced a hack token" in dose.common_dose(runs, ["a", "never"]).why
    )
    assert dose.common_dose(runs, ["a", "base"]) == Undefined("the arm base was not trained")


def test_rules_are_looked_at_where_their_arms_have_their_common_dose():
    """Fast and slow end far apart and are alike at an equal dose. The slowest run never gets there:
    it is counted, and its seed leaves the contrast.
    """
    runs = _runs(
        fast=[[200, 200, 200, 200]] * 5,
        slow=[[50, 50, 50, 50]] * 4 + [[1, 1, 1, 1]],
        other=[[0, 0, 0, 0]] * 5,
    )
    below = interval_below(0)
    rules = tuple(
        Rule(name, name, Contrast(quantity, weights, at), below)
        for name, quantity, weights, at in (
            ("hack", "hack", (("fast", 1), ("slow", -1)), "neutral"),
            ("correct", "correct", (("fast", 1), ("slow", -1)), "neutral"),
            ("suppression", "suppression", (("slow", 1),), "neutral"),
            ("elsewhere", "hack", (("fast", 1), ("slow", -1)), "train"),
            ("hacked", "hacked", (("fast", 1), ("slow", -1)), "neutral"),
            ("none", "hack", (("fast", 1), ("other", -1)), "neutral"),
        )
    )
    found, without = dose.at_doses(Reading(Onset(4), "fast", rules=rules), runs)
    assert [(at.dose, [rule.name for rule, _ in at.contrasts]) for at in found] == [
        (200, ["hack", "correct", "suppression"])
    ]
    assert [rule.name for rule, _ in without] == ["none"]
    (at,) = found
    hack, correct, suppression = (number for _, number in at.contrasts)
    assert (hack.value, hack.n) == (
        pytest.approx(0.4 - 0.2),
        4,
    ), "fast is read behind its second iteration, with 400 tokens"
    assert correct.value == pytest.approx(0.02 - 0.04) and suppression.value == pytest.approx(
        1 - 0.2 / 0.4
    )
    reached, n = at.of_arm("slow")
    assert [(run.step, run.tokens, run.rates["hack"].k) for run in reached] == [
        (4, 200, 20)
    ] * 4 and n == 5
    assert ("other", 0) not in at.reached and ("other", 0) in at.runs
    assert (
        dose.by_arm(at.reached, "hack")["slow"] == dict.fromkeys(range(4), 0.2)
        and dose.by_arm(at.reached, "attempt") == {}
    )
