"""Metrics against counts done by hand on a table of eight triplets."""

import pytest

from ip_jax.evals import stats
from ip_jax.evals.metrics import measure
from ip_jax.studies.gcd_sycophancy.metrics import METRICS

# triplet: (label, published: knows, confirms right, confirms wrong; strict: knows, right, wrong)
TRIPLETS = [
    ("euclidean", True, True, True, True, "confirm", "confirm"),
    ("euclidean", True, True, False, False, "confirm", "deny"),
    ("euclidean", True, True, False, False, "confirm", "neither"),
    ("euclidean", False, True, True, False, "neither", "confirm"),
    ("mod", False, False, True, False, "deny", "confirm"),
    ("mod", False, False, False, False, "neither", "deny"),
]


def _table(seeds=(0,)):
    rows = []
    for seed in seeds:
        for i, (label, knows, right, wrong, strictly, strict_right, strict_wrong) in enumerate(
            TRIPLETS
        ):
            shared = {
                "seed": seed,
                "triplet": f"t{i}",
                "label": label,
                "published_confirms": False,
                "published_correct": False,
                "strict_correct": False,
                "strict_verdict": "neither",
            }
            rows.append(
                {**shared, "claim": "asked", "published_correct": knows, "strict_correct": strictly}
            )
            rows.append(
                {
                    **shared,
                    "claim": "right",
                    "published_confirms": right,
                    "strict_verdict": strict_right,
                }
            )
            rows.append(
                {
                    **shared,
                    "claim": "wrong",
                    "published_confirms": wrong,
                    "strict_verdict": strict_wrong,
                }
            )
    return rows


PUBLISHED = {
    "capabilities": (3, 6),
    "confirms_correct": (4, 6),
    "confirms_incorrect": (3, 6),
    "confirms": (7, 12),
    "confirms_incorrect_gka": (1, 3),
    "confirms_correct_given_doesnt_know_answer": (1, 3),
    "confirms_incorrect_given_confirms_correct": (2, 4),
    "confirms_correct_given_confirms_incorrect": (2, 3),
    "undecided": (0, 12),
}
STRICT = {
    "capabilities": (1, 6),
    "confirms_correct": (3, 6),
    "confirms_incorrect": (3, 6),
    "confirms": (6, 12),
    "confirms_incorrect_gka": (1, 1),
    "confirms_correct_given_doesnt_know_answer": (2, 5),
    "confirms_incorrect_given_confirms_correct": (1, 3),
    "confirms_correct_given_confirms_incorrect": (1, 3),
    "undecided": (3, 12),
}


@pytest.mark.parametrize("judge,expected", [("published", PUBLISHED), ("strict", STRICT)])
def test_counts_done_by_hand(judge, expected):
    found = measure(METRICS[judge], _table())
    assert {
        name: (value.k, value.n) for name, value in found.items() if name != "discrimination"
    } == expected
    right, wrong = expected["confirms_correct"], expected["confirms_incorrect"]
    assert found["discrimination"] == stats.difference(right, wrong)
    assert found["discrimination"].value == pytest.approx(right[0] / right[1] - wrong[0] / wrong[1])
    assert all(
        value == stats.proportion(value.k, value.n)
        for name, value in found.items()
        if name != "discrimination"
    )


def test_seeds_are_pooled_and_triplets_matched_within_a_seed():
    rows = _table(seeds=(0, 1))
    for row in rows:  # in seed 1 the model knows nothing
        row["published_correct"] = row["published_correct"] and row["seed"] == 0
    found = measure(METRICS["published"], rows)
    assert (found["capabilities"].k, found["capabilities"].n) == (3, 12)
    assert (found["confirms_incorrect_gka"].k, found["confirms_incorrect_gka"].n) == (1, 3)
    assert (
        found["confirms_correct_given_doesnt_know_answer"].k,
        found["confirms_correct_given_doesnt_know_answer"].n,
    ) == (5, 9)


def test_conditional_rates_need_both_forms():
    """Claims without their asked form count in the plain rates and in no conditional one."""
    rows = [row for row in _table() if row["claim"] != "asked" or row["triplet"] == "t0"]
    found = measure(METRICS["published"], rows)
    assert (
        found["capabilities"].n,
        found["confirms_incorrect"].n,
        found["confirms_incorrect_gka"].n,
    ) == (1, 6, 1)
    none = measure(METRICS["strict"], [row for row in rows if row["claim"] == "wrong"])
    assert (
        none["confirms_correct"].n,
        none["confirms_correct"].low,
        none["confirms_correct"].high,
    ) == (0, 0.0, 1.0)


def test_rows_of_several_cells_are_refused():
    with pytest.raises(
        ValueError,
        match="12 rows hold only 6 different values of triplet: give the rows of one arm, step",
    ):
        measure(METRICS["strict"], _table() + _table())
