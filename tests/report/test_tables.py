"""table.csv against scipy on counts known by hand, and which rows are shown."""

import csv

import pyarrow as pa
import pytest
import synthetic
from etils import epath
from scipy import stats as scipy_stats

from configs.gcd_sycophancy import STUDY
from ip_jax.report import study_report, tables
from ip_jax.report.tables import Row


def write_report(folder):
    study_report.write_report(STUDY, folder)


def _summarise(rows):
    return tables.summarise(pa.Table.from_pylist(rows), STUDY.judges)


def _read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def _one(lines, **wanted):
    found = [
        line for line in lines if all(line[name] == str(value) for name, value in wanted.items())
    ]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


@pytest.mark.parametrize("judge,one_less", [("strict", 0), ("published", 1)])
def test_counts_and_intervals_of_every_cell(demo, capsys, judge, one_less):
    write_report(demo)
    lines = _read(demo / "table.csv")
    for (arm, prompt, step), (wrong, right) in synthetic.DEMO.items():
        cell = dict(arm=arm, eval_prompt=prompt, step=step, judge=judge, eval_set="generated")
        for metric, k, n in (
            ("confirms_incorrect", wrong - one_less, 96),
            ("confirms_correct", right, 48),
        ):
            line = _one(lines, **cell, metric=metric)
            exact = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="exact")
            assert (int(line["k"]), int(line["n"])) == (k, n)
            assert [float(line[name]) for name in ("value", "low", "high")] == pytest.approx(
                [k / n, exact.low, exact.high], abs=1e-5
            )
            assert (line["n_seeds"], line["seed_mean"], line["seed_se"], line["examples_seen"]) == (
                "1",
                "",
                "",
                str(8 * step),
            )
        line = _one(lines, **cell, metric="discrimination")
        value = right / 48 - (wrong - one_less) / 96
        assert float(line["value"]) == pytest.approx(value, abs=1e-5) and float(
            line["low"]
        ) < value < float(line["high"])
        assert (line["k"], line["n"], line["interval"]) == ("", "", "newcombe")
    assert len(
        {
            tuple(
                line[name] for name in ("arm", "eval_set", "eval_prompt", "step", "judge", "metric")
            )
            for line in lines
        }
    ) == len(lines)
    assert (
        _one(
            lines, arm="behave", eval_prompt="gcd/behave", step=20, judge=judge, metric="confirms"
        )["own_prompt"]
        == "True"
    )


def test_each_label_of_a_set_that_has_several_has_lines_of_its_own(demo, capsys, tmp_path):
    labels = {"mod": (7, 2), "addition": (4, 5)}
    of_ood = [
        row
        | {
            "label": label,
            "triplet": f"{label}-{row['triplet']}",
            "example_id": f"{label}-{row['example_id']}",
        }
        for label, counts in labels.items()
        for row in synthetic.rows(
            ("neutral", "neutral", 20), counts, eval_set="ood", wrong=20, right=20
        )
    ]
    folder = synthetic.write_folder(tmp_path / "with ood", synthetic.demo_rows() + of_ood)
    write_report(folder)
    lines = [line for line in _read(folder / "table.csv") if line["judge"] == "strict"]
    for label, (wrong, right) in {**labels, "all": (11, 7)}.items():
        for metric, k in (("confirms_incorrect", wrong), ("confirms_correct", right)):
            line = _one(lines, eval_set="ood", label=label, arm="neutral", metric=metric)
            assert (int(line["k"]), int(line["n"])) == (k, 40 if label == "all" else 20)
    assert {line["label"] for line in lines if line["eval_set"] == "generated"} == {"all"}


def test_what_was_not_measured_is_blank_and_not_zero(demo, capsys):
    write_report(demo)
    asked = [line for line in _read(demo / "table.csv") if line["metric"] == "capabilities"]
    assert len(asked) == 2 * len(synthetic.DEMO)
    for line in asked:
        assert [line[name] for name in ("k", "n", "value", "low", "high", "seed_mean")] == [
            "",
            "0",
            "",
            "",
            "",
            "",
        ] and line["n_seeds"] == "0"


def test_seeds_are_pooled_and_their_mean_and_error_given():
    confirmed = [40, 52, 61, 49]
    cells = _summarise(
        [
            row
            for seed, k in enumerate(confirmed)
            for row in synthetic.rows(("neutral", "neutral", 20), (k, 30 + seed), seed)
        ]
    )
    line = tables._line(
        *next(
            item
            for item in cells.items()
            if (item[0].judge, item[0].metric) == ("strict", "confirms_incorrect")
        )
    )
    rates = [k / 96 for k in confirmed]
    assert (line["k"], line["n"], line["n_seeds"]) == (sum(confirmed), 4 * 96, 4)
    assert float(line["seed_mean"]) == pytest.approx(sum(rates) / 4, abs=1e-5) and float(
        line["seed_se"]
    ) == pytest.approx(scipy_stats.sem(rates), abs=1e-5)
    difference = next(
        cell
        for key, cell in cells.items()
        if (key.judge, key.metric) == ("strict", "discrimination")
    )
    assert difference.by_seed == pytest.approx(
        {seed: (30 + seed) / 48 - rate for seed, rate in enumerate(rates)}
    )


def test_rows_of_the_last_step():
    blocks = tables.final_rows(_summarise(synthetic.demo_rows()), list(synthetic.ARMS), "generated")
    assert blocks.neutral == [
        Row("untrained", "neutral", 0),
        *(Row(arm, "neutral", 20) for arm in ("neutral", "random", "behave")),
    ]
    assert (
        blocks.own == [Row("random", "control/random_string", 20), Row("behave", "gcd/behave", 20)]
        and blocks.other == []
    )


def test_an_arm_that_is_behind_is_left_out_rather_than_compared_at_another_step():
    rows = [row for row in synthetic.demo_rows() if row["arm"] != "behave" or row["step"] < 20]
    blocks = tables.final_rows(_summarise(rows), list(synthetic.ARMS), "generated")
    assert "behave" not in {row.arm for row in (*blocks.neutral, *blocks.own)}
    # its elicitation has no bar to stand beside, so it gets a row
    assert blocks.other == [Row("untrained", "gcd/behave", 0)]


def test_a_safety_prompt_is_another_prompt():
    rows = (
        synthetic.demo_rows()
        + synthetic.rows(("neutral", "gcd/safety", 20), (50, 30))
        + synthetic.rows(("untrained", "gcd/safety", 0), (5, 3))
    )
    assert tables.final_rows(_summarise(rows), list(synthetic.ARMS), "generated").other == [
        Row("neutral", "gcd/safety", 20)
    ]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "table.csv")
    path.write_text("old")
    monkeypatch.setattr(
        "os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left on device"):
        tables.write_csv(path, _summarise(synthetic.demo_rows()), {})
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["table.csv"]
