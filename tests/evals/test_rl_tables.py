"""The tables of RL experiments: what may stand in them, and how curves are read back."""

import numpy as np
import pyarrow as pa
import pytest

from ip_jax.evals import rl_tables


def _row(arm="standard", seed=0, step=0, eval_prompt="neutral", **changes):
    return {
        "arm": arm,
        "seed": seed,
        "step": step,
        "eval_prompt": eval_prompt,
        "n": 10,
        "n_hack": 2,
        "n_correct": 3,
    } | changes


def test_curves_come_back_by_run_in_the_order_of_steps():
    rows = [
        _row(seed=seed, step=step, arm=arm, n_hack=step // 10)
        for step in (40, 0, 20)
        for arm in ("b", "a")
        for seed in (1, 0)
    ]
    table = rl_tables.curves_table([*rows, _row(arm="a", eval_prompt="rollout", kl=0.5)])
    assert table.schema == rl_tables.CURVES
    curves = rl_tables.curves_of(table, "neutral")
    assert sorted(curves) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    for curve in curves.values():
        np.testing.assert_array_equal(curve.steps, [0, 20, 40])
        np.testing.assert_array_equal(curve.rate("hack"), [0, 0.2, 0.4])
        assert np.isnan(curve.columns["kl"]).all() and np.isnan(curve.rate("trait")).all()
    (rollouts,) = rl_tables.curves_of(table, "rollout").values()
    assert rollouts.columns["kl"] == [0.5]
    assert rl_tables.curves_of(table, "another") == {}


def test_hacks_are_a_share_of_what_could_be_hacked():
    rows = [_row(step=0, n_hackable=4), _row(step=1, n_hackable=0, n_hack=0), _row(step=2)]
    (curve,) = rl_tables.curves_of(rl_tables.curves_table(rows), "neutral").values()
    np.testing.assert_array_equal(curve.rate("hack"), [0.5, np.nan, 0.2])
    np.testing.assert_array_equal(curve.rate("correct"), [0.3, 0.3, 0.3])


def test_the_leak_grid_keeps_its_order():
    rows = [
        {
            "arm": "a",
            "seed": 1,
            "eval_prompt": prompt,
            "category": category,
            "n": 10,
            "n_hack": k,
            "n_correct": 1,
        }
        for prompt, category, k in (
            ("ip/x", "train", 5),
            ("neutral", "neutral", 1),
            ("ip/not_x", "negated", 4),
        )
    ]
    grid = rl_tables.grids_of(rl_tables.final_table(rows))["a", 1]
    assert [(cell.eval_prompt, cell.category, cell.counts.n_hack) for cell in grid] == [
        ("ip/x", "train", 5),
        ("neutral", "neutral", 1),
        ("ip/not_x", "negated", 4),
    ]
    assert grid[0].counts.n_trait is None and grid[0].counts.hackable == 10


@pytest.mark.parametrize(
    "row,words",
    [
        (_row(n_hack=11), "n_hack 11: it needs 0 to 10"),
        (_row(n_hackable=1), "n_hack 2: it needs 0 to 1"),
        (_row(n_correct=None), "n_correct None: it needs 0 to 10"),
        (_row(n_trait=-1), "n_trait -1: it needs 0 to 10"),
        (_row(n_hack=8), "8 hacks and 3 correct of 10: a completion is one or the other"),
        (_row(klio=1.0), "no column 'klio'"),
    ],
)
def test_impossible_rows_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        rl_tables.curves_table([row])


def test_a_row_twice_an_unknown_category_and_missing_columns_are_refused():
    with pytest.raises(
        ValueError, match="arm standard, seed 0, step 0, eval_prompt neutral stands twice"
    ):
        rl_tables.curves_table([_row(), _row(n_hack=1)])
    final = {
        "arm": "a",
        "seed": 0,
        "eval_prompt": "x",
        "category": "odd",
        "n": 1,
        "n_hack": 0,
        "n_correct": 0,
    }
    with pytest.raises(ValueError, match="category 'odd': allowed are neutral, "):
        rl_tables.final_table([final])
    with pytest.raises(
        ValueError, match="final.parquet lacks the columns eval_prompt, category, n"
    ):
        rl_tables.check_columns(
            pa.table({"arm": ["a"], "seed": [0]}), rl_tables.FINAL, "final.parquet"
        )
