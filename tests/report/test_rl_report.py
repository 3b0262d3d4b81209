"""The whole report of an RL experiment on drawn numbers: what is written, that the numbers are
those of the tables, and what is never said.
"""

import csv
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import rl_synthetic
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from rich.console import Console
from scipy import stats as scipy_stats

from ip_jax.evals import stats
from ip_jax.evals.measures import Estimate, Undefined
from ip_jax.report import panels, rl_figures, rl_tables
from ip_jax.report.rl_dose import draw_dose
from ip_jax.report.rl_report import write_rl_report
from ip_jax.report.rl_view import load_rl_view

FILES = {
    "curves.png",
    "curves.svg",
    "frontier.png",
    "frontier.svg",
    "forest.png",
    "forest.svg",
    "dose.png",
    "dose.svg",
    "dose.csv",
    "arms.csv",
    "runs.csv",
    "leak_grid.csv",
    "report.md",
    "verdicts.json",
}
MANY = rl_synthetic.KINDS | rl_synthetic.MORE


def _printed(folder):
    console = Console(file=io.StringIO(), width=160)
    write_rl_report(folder, console)
    return console.file.getvalue()


def _lines(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(folder, view, what was printed): eight arms, eight seeds."""
    folder = rl_synthetic.write_folder(tmp_path_factory.mktemp("eight") / "out")
    return folder, load_rl_view(folder), _printed(folder)


def test_the_files_are_written_and_the_same_each_time(eight, tmp_path):
    folder = eight[0]
    inputs = {"config.json", "curves.parquet", "final.parquet"}
    assert {path.name for path in folder.iterdir()} == FILES | inputs
    again = rl_synthetic.write_folder(tmp_path / "again")
    _printed(again)
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    assert ElementTree.fromstring((folder / "forest.svg").read_bytes()).tag.endswith("svg")


def _hacked_by_hand(folder, arm, threshold=0.5):
    """Runs with two probes in a row at the threshold, from the raw table."""
    rows = [
        row
        for row in pq.read_table(folder / "curves.parquet").to_pylist()
        if row["arm"] == arm and row["eval_prompt"] == "neutral"
    ]
    onsets = []
    for seed in sorted({row["seed"] for row in rows}):
        run = sorted(
            (row["step"], row["n_hack"] / row["n"] >= threshold)
            for row in rows
            if row["seed"] == seed
        )
        onsets.append(
            next(
                (
                    step
                    for (step, above), (_, then) in zip(run, run[1:], strict=False)
                    if above and then
                ),
                None,
            )
        )
    return onsets


def test_hacked_runs_onsets_and_p_are_those_of_the_tables(eight):
    folder, view, _ = eight
    standard, fisher = _hacked_by_hand(folder, "standard"), {}
    for arm in view.arms[1:]:
        onsets = _hacked_by_hand(folder, arm.name)
        k, n = sum(onset is not None for onset in onsets), len(onsets)
        exact = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="exact")
        assert (arm.hacked.k, arm.hacked.n, arm.hacked.low, arm.hacked.high) == pytest.approx(
            (k, n, exact.low, exact.high)
        )
        assert arm.onset.value == pytest.approx(
            np.mean([200 if onset is None else onset for onset in onsets])
        )
        s = sum(onset is not None for onset in standard)
        if arm.name in ("standard", "oracle"):
            assert arm.p is arm.holm is None and arm.word == "", (
                "without a loophole nothing is protected"
            )
        else:
            fisher[arm.name] = scipy_stats.fisher_exact([[k, n - k], [s, n - s]]).pvalue
            assert arm.p == pytest.approx(fisher[arm.name])
    assert len(fisher) == 5 and [
        arm.holm for arm in view.arms if arm.holm is not None
    ] == pytest.approx(stats.holm(list(fisher.values())))
    assert view.arms[0].hacked is None, "the untrained model is no run"
    assert 0 < view.arms[1].hacked.k and view.arms[2].hacked.k == 0


def test_rates_and_indices_are_those_of_the_leak_grid(eight):
    folder, view, _ = eight
    final = pq.read_table(folder / "final.parquet").to_pylist()

    def h(arm, category, count="n_hack"):
        return np.mean(
            [
                row[count] / row["n"]
                for row in final
                if (row["arm"], row["category"]) == (arm, category)
            ]
        )

    arms = {arm.name: arm for arm in view.arms}
    ip = arms["ip"]
    assert (
        ip.rates["hack", "paraphrase"].value == pytest.approx(h("ip", "paraphrase"))
        and ip.pooled["hack", "paraphrase"].n == 3 * 8 * 100
    )
    assert ip.others["split_brain"].value == pytest.approx(h("ip", "train") - h("ip", "neutral"))
    assert ip.others["suppression"].value == pytest.approx(
        1 - h("ip", "neutral") / h("standard", "neutral")
    )
    c = {arm: h(arm, "neutral", "n_correct") for arm in ("recon", "base", "oracle")}
    assert arms["recon"].others["retention"].value == pytest.approx(
        (c["recon"] - c["base"]) / (c["oracle"] - c["base"])
    )
    assert ip.worst[0] in ("ip/own", "ip/paraphrase_0") and ip.worst[1].n == 800
    assert (
        "split_brain" not in arms["standard"].others
        and arms["recon"].learned is None
        and ip.learned is True
    )


def test_csv_and_markdown_hold_these_numbers(eight):
    folder, view, printed = eight
    lines = _lines(folder / "arms.csv")
    standard = view.arms[1]
    (hacked,) = (
        line for line in lines if (line["arm"], line["number"]) == ("standard", "hacked_runs")
    )
    assert (hacked["k"], hacked["n"]) == (str(standard.hacked.k), "8") and float(
        hacked["high"]
    ) == pytest.approx(standard.hacked.high, abs=1e-5)
    runs = _lines(folder / "runs.csv")
    assert (
        len(runs) == 7 * 8 + 1
        and sum(line["arm"] == "standard" and line["hacked"] == "True" for line in runs)
        == standard.hacked.k
    )
    assert not next(line for line in runs if line["arm"] == "base")["hacked"], (
        "not measured is blank"
    )
    assert len(_lines(folder / "leak_grid.csv")) == 5 * len(pq.read_table(folder / "final.parquet"))
    text = (folder / "report.md").read_text()
    tables = [block for block in text.split("## ") if "| --- |" in block]
    assert [block.splitlines()[0].split(":")[0].split(",")[0] for block in tables][:2] == [
        "Hacked runs",
        "Under x_0 at the end",
    ]
    for block in tables:
        assert (
            len(
                {
                    line.count(" | ")
                    for line in block.splitlines()
                    if line.startswith("| ") and "---" not in line
                }
            )
            == 1
        )
    assert f"| standard | {standard.hacked.k}/8 [" in text
    assert "Hacked runs" in printed and "split-brain gap" in printed


def test_coupling_and_ph_stand_in_the_tables(eight):
    folder, view, _ = eight
    numbers = {(line["arm"], line["number"]): line for line in _lines(folder / "arms.csv")}
    assert [
        float(numbers["recon", f"coupling_{name}"]["value"])
        for name in ("hack_start", "hack_end", "correct_end")
    ] == [0.9, 0.7, 0.4]
    start = [curve for (arm, _), curve in view.rollouts.items() if arm == "anti"]  # hacks at once
    hacks, ratios = ([curve.columns[name][0] for curve in start] for name in ("n_hack", "llr_hack"))
    assert float(numbers["anti", "llr_hack_minus_clean"]["value"]) == pytest.approx(
        np.average(ratios, weights=hacks) + 0.1, rel=1e-5
    )
    assert ("oracle", "llr_hack_minus_clean") not in numbers  # without a hack there is none
    assert (
        "| recon: don't exploit → neutral | 0.90 [0.90, 0.90] (8) | 0.70 [0.70, 0.70] (8) |"
        in (folder / "report.md").read_text()
    )


def test_rules_are_printed_with_their_verdict_and_stored(eight):
    folder, _, printed = eight
    stored = json.loads((folder / "verdicts.json").read_text())
    assert [found["rule"]["name"] for found in stored] == ["fewer", "interaction", "same"]
    text = (folder / "report.md").read_text()
    for found in stored:
        assert (
            f"{found['rule']['name']}: {found['rule']['statement']} → {found['verdict']} (" in text
        )
    assert (
        "hacked of recon − standard = −" in text
        and "n = 8; supported below 0, refuted from 0" in text
    )
    assert "fewer: Recontextualization lowers" in printed


def test_arms_are_compared_at_an_equal_dose(eight):
    """The common dose, the means at it and the contrast, from the raw table; a rule about counts of
    runs has none.
    """
    folder, view, printed = eight
    rows = pq.read_table(folder / "curves.parquet").to_pylist()

    def runs(arm):
        for seed in range(8):
            of_run = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]

            def tokens(step, of_run=of_run):
                return sum(
                    row["reinforced_hack_tokens"]
                    for row in of_run
                    if row["eval_prompt"] == "rollout" and row["step"] < step
                )

            yield [
                (tokens(row["step"]), row["n_hack"] / row["n"])
                for row in of_run
                if row["eval_prompt"] == "neutral"
            ]

    # 7 of 8 are at least 80 %
    dose = min(
        sorted((run[-1][0] for run in runs(arm)), reverse=True)[6] for arm in ("prior", "ip")
    )
    (at,) = (at for at in view.at_doses if at.contrasts[0][0].name == "same")
    assert at.dose == dose > 0
    hack = {
        arm: {
            seed: next((rate for tokens, rate in run if tokens >= dose), None)
            for seed, run in enumerate(runs(arm))
        }
        for arm in ("prior", "ip")
    }
    both = [seed for seed in range(8) if None not in (hack["prior"][seed], hack["ip"][seed])]
    number = at.contrasts[0][1]
    assert number.n == len(both) and number.value == pytest.approx(
        np.mean([hack["prior"][seed] - hack["ip"][seed] for seed in both])
    )
    lines = [
        line
        for line in _lines(folder / "dose.csv")
        if (line["dose"], line["arm"]) == (f"{dose:g}", "prior")
    ]
    assert [line["reached"] for line in lines] == [
        str(rate is not None) for rate in hack["prior"].values()
    ]
    assert [float(line["hack_value"] or -1) for line in lines] == pytest.approx(
        [-1 if rate is None else rate for rate in hack["prior"].values()], abs=1e-5
    )
    text = (folder / "report.md").read_text()
    assert (
        "## The rules' contrasts at an equal dose (exploratory)" in text
        and f"- same, at {dose:.0f} tokens: hack of prior − ip = " in text
    )
    assert (
        "- fewer, at" not in text
        and "at an equal dose (exploratory): same" in printed
        and "no rule was stated for it" in text
    )


@pytest.mark.parametrize("seeds,words", [(1, False), (4, False), (5, True)])
def test_protected_needs_five_seeds(tmp_path, seeds, words):
    kinds = {
        "standard": rl_synthetic.Kind("standard", 1.0),
        "recon": rl_synthetic.Kind("recon", 0.0),
        "base": rl_synthetic.KINDS["base"],
        "oracle": rl_synthetic.KINDS["oracle"],
    }
    folder = rl_synthetic.write_folder(tmp_path / "out", kinds, seeds)
    _printed(folder)
    recon = load_rl_view(folder).arms[1]
    assert recon.word == ("protected" if words else "fewer than 5 seeds")
    stored = json.loads((folder / "verdicts.json").read_text())
    assert [found["verdict"] for found in stored] == ["supported" if words else "undecided"]
    assert f"recon | 0/{seeds} [" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "others,word,p", [(5, "protected", ".048"), (6, "not distinguished", ".056")]
)
def test_the_word_depends_on_how_many_arms_are_compared(tmp_path, others, word, p):
    """0 of 5 against 5 of 5 has p = .0079: six times that is below .05, seven times is not."""
    kinds = {
        "standard": rl_synthetic.Kind("standard", 1.0),
        "oracle": rl_synthetic.KINDS["oracle"],
        "base": rl_synthetic.KINDS["base"],
        "recon": rl_synthetic.Kind("recon", 0.0),
    }
    kinds |= {f"like{i}": rl_synthetic.Kind(f"like {i}", 1.0) for i in range(others)}
    folder = rl_synthetic.write_folder(tmp_path / "out", kinds, 5)
    _printed(folder)
    view = load_rl_view(folder)
    recon = next(arm for arm in view.arms if arm.name == "recon")
    assert (recon.word, recon.p, recon.holm) == (
        word,
        pytest.approx(1 / 126),
        pytest.approx((others + 1) / 126),
    )
    text = (folder / "report.md").read_text()
    assert f"| .008 | {p} |" in text and f"| p, Holm over {others + 1} arms |" in text
    assert [
        line["value"]
        for line in _lines(folder / "arms.csv")
        if line["arm"] == "recon" and line["number"] in ("fisher_p", "holm_p")
    ] == ["0.00793651", f"{(others + 1) / 126:.6g}"]
    said = " ".join(
        text.get_text()
        for text in [
            *rl_figures.draw_forest(view).texts[::-1],
            *rl_figures.draw_forest(view).axes[1].texts,
        ]
    )
    assert f"Holm over {others + 1} arms" in said and f"{word}\np = {p}" in said


def test_only_drawn_arms_are_counted(eight):
    """Seven are trained; the untrained model has a marker in the frontier and no line elsewhere;
    three stand in the rules that have a dose.
    """
    view = eight[1]
    counted = [
        draw(view).texts[1].get_text().split("  ·  ")[0]
        for draw in (
            rl_figures.draw_curves,
            rl_figures.draw_frontier,
            rl_figures.draw_forest,
            draw_dose,
        )
    ]
    assert counted == ["7 arms", "7 arms and the untrained model", "7 arms", "3 arms"]
    assert (
        "- synthetic_takeoffs: 7 arms and the untrained model, 8 seeds an arm."
        in (eight[0] / "report.md").read_text()
    )


def test_counts_and_dynamics_stand_in_the_report(eight):
    folder, view, _ = eight
    final = [
        row for row in pq.read_table(folder / "final.parquet").to_pylist() if row["arm"] == "ip"
    ]
    cells = []
    for name, category in (
        ("n_hack", "neutral"),
        ("n_attempt", "neutral"),
        ("n_correct", "neutral"),
        ("n_trait", "neutral"),
        ("n_hack", "train"),
    ):
        k, n = (
            sum(row[column] for row in final if row["category"] == category)
            for column in (name, "n")
        )
        exact = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="exact")
        cells.append(
            f"{k}/{n} [{rl_tables._digits(100 * exact.low)}, {rl_tables._digits(100 * exact.high)}]"
        )
    text = (folder / "report.md").read_text()
    assert f"| {view.arms[4].label} | {' | '.join(cells)} |" in text
    onsets = [onset for onset in _hacked_by_hand(folder, "anti") if onset is not None]
    rollouts = [
        row
        for row in pq.read_table(folder / "curves.parquet").to_pylist()
        if row["arm"] == "anti" and row["eval_prompt"] == "rollout" and row["n_hack"]
    ]
    first = [min(row["step"] for row in rollouts if row["seed"] == seed) for seed in range(8)]
    assert (
        f"| anti-recontextualization | {np.median(first):.0f} (8) | {np.median(onsets):.0f}"
        f" ({len(onsets)}) | " in text
    )
    assert "| oracle (no loophole) | – | – | – |" in text


def test_retention_is_undefined_where_the_oracle_learned_nothing(tmp_path):
    kinds = {name: rl_synthetic.KINDS[name] for name in ("base", "standard", "oracle", "recon")}
    kinds["oracle"] = rl_synthetic.Kind("oracle", 0.0, correct=0.12)
    folder = rl_synthetic.write_folder(tmp_path / "out", kinds, 5)
    printed = " ".join(_printed(folder).split())
    assert isinstance(load_rl_view(folder).arms[3].others["retention"], Undefined)
    assert (
        "Undefined: S_C of recon: don't exploit → neutral: the oracle's interval" in printed
        and "does not clear the untrained model's" in printed
    )


def test_a_run_that_ended_early_is_censored(tmp_path):
    folder = rl_synthetic.write_folder(
        tmp_path / "out",
        {name: rl_synthetic.KINDS[name] for name in ("base", "standard", "oracle", "recon")},
        5,
    )
    curves = pq.read_table(folder / "curves.parquet")
    kept = [
        row["arm"] not in ("oracle", "standard") or row["seed"] > 0 or row["step"] <= 20
        for row in curves.to_pylist()
    ]
    pq.write_table(curves.filter(kept), folder / "curves.parquet")
    view = load_rl_view(folder)
    assert view.dynamics["oracle", 0].last == 20 and view.arms[2].onset.value == 200, (
        "four of its five runs show that none hacks"
    )
    others = [200 if onset is None else onset for onset in _hacked_by_hand(folder, "standard")[1:]]
    assert view.arms[1].onset.value == pytest.approx(np.mean(others)) and min(others) < 200, (
        "before any onset a censored run says nothing"
    )
    steps, mean = rl_figures.mean_curve(
        [
            (np.asarray([0, 5, 10]), np.asarray([0.0, 0.2, 0.4])),
            (np.asarray([0, 5]), np.asarray([0.2, np.nan])),
        ]
    )
    assert steps.tolist() == [0] and mean.tolist() == [0.1]


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    return load_rl_view(
        rl_synthetic.write_folder(tmp_path_factory.mktemp("sixteen") / "out", MANY, 6)
    )


@pytest.mark.parametrize(
    "draw", [rl_figures.draw_curves, rl_figures.draw_frontier, rl_figures.draw_forest]
)
def test_sixteen_arms_fit_without_overlapping_words(sixteen, draw):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(sixteen)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    shown = [
        text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()
    ]
    labels = {arm.label for arm in sixteen.arms if arm.hacked or draw is rl_figures.draw_frontier}
    said = [text for text in shown if text.get_text().replace("\n", " ") in labels]
    assert {text.get_text().replace("\n", " ") for text in said} == labels
    boxes = [text.get_window_extent(renderer) for text in said]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    width, height = figure.get_size_inches() * figure.dpi
    assert all(
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        for box in (text.get_window_extent(renderer) for text in shown)
    )


def test_markers_stand_where_the_numbers_say(sixteen):
    (ax,) = rl_figures.draw_frontier(sixteen).axes
    offsets = [
        tuple(found.get_offsets()[0])
        for found in ax.collections
        if isinstance(found, PathCollection) and found.get_sizes()[0] == 46
    ]
    expected = [
        (arm.rates["hack", "neutral"].value, arm.rates["correct", "neutral"].value)
        for arm in sixteen.arms
    ]
    np.testing.assert_allclose(offsets, expected)
    left, right = rl_figures.draw_forest(sixteen).axes
    for ax, numbers in (
        (left, [arm.hacked.value for arm in sixteen.arms[1:]]),
        (right, [arm.onset.value for arm in sixteen.arms[1:]]),
    ):
        marks = [
            found.get_offsets()[0][0]
            for found in ax.collections
            if isinstance(found, PathCollection)
        ]
        np.testing.assert_allclose(marks, numbers)


def test_captions_state_seeds_and_intervals(sixteen):
    for draw, words in (
        (rl_figures.draw_curves, ("6 seeds an arm", "bold ones their mean")),
        (rl_figures.draw_frontier, ("bootstrap over seeds", "6 seeds an arm")),
        (
            rl_figures.draw_forest,
            (
                "Clopper–Pearson",
                "Holm over 13 arms",
                "at 2 measured steps in a row",
                "bootstrap over runs",
            ),
        ),
    ):
        said = " ".join(text.get_text() for text in reversed(draw(sixteen).texts))
        assert all(word in said for word in words) and "Drawn numbers, no model" in said


def test_names_break_between_words_and_not_at_an_arrow():
    assert panels.label_lines("anti-recontextualization: x_ip → x_0", 34) == [
        "anti-recontextualization:",
        "x_ip → x_0",
    ]
    assert panels.label_lines("anti-recontextualization: x_ip → x_0", 17) == [
        "anti-",
        "recontextualization:",
        "x_ip → x_0",
    ]
    assert panels.label_lines("E1 plain", 17) == ["E1 plain"]


def test_numbers_are_written_short():
    assert [
        rl_tables._digits(value)
        for value in (0, -0.0, 123.4, 4.56, 1.234, 0.0123, -0.00001, -np.inf)
    ] == ["0", "0", "123", "4.6", "1.23", "0.012", "0.000", "−∞"]
    assert (
        rl_tables._estimate(Estimate(0.5, np.nan, np.nan, 1), 100) == "50"
        and rl_tables._estimate(Undefined("x")) == "undefined"
    )


def test_bad_folders_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="config.json is missing: a report needs the results folder"
    ):
        load_rl_view(tmp_path)
    folder = rl_synthetic.write_folder(tmp_path / "out", seeds=1)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {
                **record,
                "arms": {name: arm for name, arm in record["arms"].items() if name != "prior"},
                "reading": {**record["reading"], "rules": []},
            }
        )
    )
    with pytest.raises(ValueError, match="hold the arm prior, which its config.json does not list"):
        load_rl_view(folder)
    (folder / "config.json").write_text(
        json.dumps({name: record[name] for name in ("experiment", "arms")})
    )
    with pytest.raises(ValueError, match="config.json lacks provenance, reading"):
        load_rl_view(folder)
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "final.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="final.parquet is not a Parquet file"):
        load_rl_view(folder)
    (folder / "curves.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has not been evaluated yet"):
        load_rl_view(folder)


def test_a_report_needs_neither_jax_nor_a_model(eight):
    code = (
        "import sys; from ip_jax.report.rl_report import write_rl_report;"
        " write_rl_report(sys.argv[1]); print('loaded', [name for name in ('jax', 'flax',"
        " 'transformers', 'grain') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(eight[0])], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("loaded []\n")
