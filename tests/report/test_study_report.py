"""The whole report on synthetic results: what is written, what is said, and what is never said."""

import io
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ElementTree

import matplotlib.image
import numpy as np
import pytest
import synthetic
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from rich.console import Console
from scipy import stats as scipy_stats

from configs.gcd_sycophancy import STUDY
from ip_jax.models import hub
from ip_jax.report import study_report, terminal, view
from ip_jax.report.figure import draw
from ip_jax.report.tables import Row

SYCOPHANCY = next(m for m in STUDY.judges["strict"] if m.name == "confirms_incorrect")


def load_view(folder, judge):
    return view.load_view(folder, STUDY, judge)


def write_report(folder, console=None, judge=None):
    study_report.write_report(STUDY, folder, console, judge)


def _printed(folder, judge="strict", width=120):
    console = Console(file=io.StringIO(), width=width)
    write_report(folder, console, judge)
    return console.file.getvalue()


def _said(folder):
    """All words of the figure."""
    return [
        text.get_text()
        for text in draw(load_view(folder, "strict")).findobj(Text)
        if text.get_text()
    ]


def test_the_files_are_written_and_the_same_each_time(demo):
    _printed(demo)
    first = {name: (demo / name).read_bytes() for name in ("table.csv", "figure.png", "figure.svg")}
    image = matplotlib.image.imread(demo / "figure.png")
    assert (
        image.shape[1] == 2160
        and image.shape[0] > 1000
        and (image[..., :3].min(axis=-1) < 0.9).mean() > 0.02
    )
    assert ElementTree.fromstring(first["figure.svg"]).tag.endswith("svg")
    _printed(demo)
    assert {name: (demo / name).read_bytes() for name in first} == first
    assert sorted(path.name for path in demo.iterdir()) == [
        "config.json",
        "figure.png",
        "figure.svg",
        "table.csv",
        "transcripts.parquet",
    ]


def test_the_figure_names_model_counts_judge_and_data(demo):
    said = _said(demo)
    assert (
        "smollm2-135m-instruct  ·  160 training examples an arm  ·  1 seed  ·  n: Sycophancy 96,"
        " Right claims 48  ·  strict judge" in said
    )
    assert {
        "52/96",
        "25/48",
        "76/96",
        "57/96",
        "−0.02",
        "IP behave",
        "random string",
        "not measured",
    } <= set(said)
    caption = " ".join(said).replace("  ", " ")
    assert (
        "Data: No published files: 160 training rows" in caption
        and "there is one seed" in caption
        and "1 to 8 % of a bar's claims" in caption
    )
    assert not any("No random-string control" in text for text in said)


def test_bars_and_markers_stand_where_the_counts_say(demo):
    axes = draw(load_view(demo, "strict")).axes
    widths = [patch.get_width() for patch in axes[0].patches]
    # the random string stands beside the inoculation
    assert widths == pytest.approx([10 / 96, 76 / 96, 52 / 96, 57 / 96, 80 / 96, 74 / 96])
    diamonds = [
        float(found.get_offsets()[0, 0])
        for found in axes[0].collections
        if isinstance(found, PathCollection)
    ]
    # the untrained model under each training prompt
    assert diamonds == pytest.approx([56 / 96, 10 / 96])
    assert [ax.get_xlim() for ax in axes[:4]] == [(0, 1), (0, 1), (-1, 1), (0, 1)] and not axes[
        3
    ].patches
    points = [
        tuple(found.get_offsets()[0])
        for found in axes[4].collections
        if isinstance(found, PathCollection)
    ]
    # each arm's wrong and right claims confirmed; behind it, where it has one, that under its
    # own training prompt
    counts = [(10, 7), (76, 40), (80, 41), (52, 25), (74, 39), (57, 29)]
    expected = [(wrong / 96, right / 48) for wrong, right in counts]
    np.testing.assert_allclose(points, expected)
    curves = {
        tuple(line.get_xdata()): line.get_ydata()
        for line in axes[5].lines
        if len(line.get_xdata()) == 3
    }
    assert list(curves) == [(0, 80, 160)]
    ends = sorted(line.get_ydata()[2] for line in axes[5].lines if len(line.get_xdata()) == 3)
    assert ends == pytest.approx([52 / 96, 57 / 96, 76 / 96]) and axes[5].get_ylim() == (0, 1)


def test_differences_are_those_of_scipy(demo):
    shown = load_view(demo, "strict")
    inoculated, control, neutral = (
        shown.cell("generated", Row(arm, "neutral", 20), SYCOPHANCY)
        for arm in ("behave", "random", "neutral")
    )
    for first, second, table in (
        (inoculated, neutral, [[52, 44], [76, 20]]),
        (inoculated, control, [[52, 44], [57, 39]]),
    ):
        difference, p = view.compare(first, second)
        assert p == pytest.approx(scipy_stats.fisher_exact(table).pvalue)
        assert (
            difference.value == pytest.approx((table[0][0] - table[1][0]) / 96)
            and difference.low < difference.value < difference.high
        )
    assert view.compare(inoculated, None) is None
    text = _printed(demo)
    assert (
        "− random" in text and "−25 p<.001" in text and "−5 p=.560" in text and "58 (56/96)" in text
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_verdict_is_passed_on_an_arm(tmp_path, seeds):
    """Even where every claim is denied after the inoculation and none in the neutral arm."""
    rows = [
        row
        for seed in range(seeds)
        for key, counts in (
            synthetic.DEMO
            | {
                ("behave", "neutral", 20): (0, 0),
                ("neutral", "neutral", 20): (96, 48),
            }
        ).items()
        for row in synthetic.rows(key, counts, seed)
    ]
    folder = synthetic.write_folder(tmp_path / "one", rows)
    words = (
        _printed(folder) + " ".join(_said(folder)) + (folder / "table.csv").read_text()
    ).lower()
    assert not re.search(r"protect|significan|prove|succe|works\b", words)
    assert ("there is one seed" in words) == (seeds == 1) and ("±" in words) == (seeds == 2)


def test_without_a_random_string_the_report_says_what_is_unknown(tmp_path):
    arms = {name: arm for name, arm in synthetic.ARMS.items() if name != "random"}
    folder = synthetic.write_folder(
        tmp_path / "bare", [row for row in synthetic.demo_rows() if row["arm"] != "random"], arms
    )
    assert "No random-string control was run" in _printed(
        folder
    ) and "No random-string control was run" in " ".join(_said(folder))


@pytest.mark.parametrize("last_step", [0, 10])
def test_an_unfinished_experiment_is_drawn_as_far_as_it_is(tmp_path, last_step):
    folder = synthetic.write_folder(
        tmp_path / "early", [row for row in synthetic.demo_rows() if row["step"] <= last_step]
    )
    text, said = _printed(folder), " ".join(_said(folder))
    assert (
        "Not run, or not yet to this step: neutral, IP behave, random string"
        in text.replace("\n", " ")
    ) == (last_step == 0)
    assert ("before training" in said) == (last_step == 0) and "prompt gcd/behave" in said
    curves = 2 * (last_step > 0)
    assert len(draw(load_view(folder, "strict")).axes) == 4 + 1 + curves


def test_published_sets_capability_and_ptst_are_shown_where_they_were_run(tmp_path):
    rows = [
        row
        for key, counts in synthetic.DEMO.items()
        for row in synthetic.rows(key, counts, asked=(7, 24))
    ]
    rows += synthetic.rows(("neutral", "gcd/safety", 20), (50, 30), asked=(3, 24))
    rows += [
        row
        for key in synthetic.DEMO
        for row in synthetic.rows(key, (9, 11), eval_set="ood", wrong=20, right=20)
    ]
    folder = synthetic.write_folder(tmp_path / "more", rows)
    axes = draw(load_view(folder, "strict")).axes
    assert len(axes) == 8 and {"7/24", "3/24"} <= {text.get_text() for text in axes[3].texts}
    assert (
        "published out-of-distribution set" in {text.get_text() for text in axes[4].texts}
        and [p.get_width() for p in axes[4].patches] == [9 / 20] * 6
    )
    assert "safety prompt (PTST)" in _said(folder) and "not measured" not in _said(folder)
    text = _printed(folder)
    assert (
        "Published out-of-distribution set, neutral prompt" in text
        and "29 (7/24)" in text
        and "Capability was not measured" not in text
    )


def test_the_published_judge_knows_no_undecided_claim(demo):
    strict, published = _printed(demo), _printed(demo, "published")
    assert "12/144" in strict and "54 (52/96)" in strict
    assert "/144" not in published and "53 (51/96)" in published and "published judge" in published


def test_runs_that_diverged_are_named(demo):
    for arm, finite in (("neutral", True), ("behave", False)):
        (demo / "runs" / f"{arm}-s0").mkdir(parents=True)
        (demo / "runs" / f"{arm}-s0" / "run.json").write_text(
            json.dumps({"arm": arm, "seed": 0, "finished_finite": finite})
        )
    note = "Diverged and stopped before the end: behave (seed 0)."
    assert note in _printed(demo) and note in " ".join(_said(demo))


def test_arms_of_an_earlier_list_keep_their_place(tmp_path):
    """config.json holds the last list of arms; the random string's transcripts are still there."""
    arms = {name: arm for name, arm in synthetic.ARMS.items() if name != "random"}
    shown = load_view(
        synthetic.write_folder(tmp_path / "fewer", synthetic.demo_rows(), arms), "strict"
    )
    assert shown.random_arm == "random" and [arm.label for arm in shown.arms] == [
        "untrained",
        "neutral",
        "IP behave",
        "random",
    ]


def test_a_local_model_is_named_without_its_folder(demo):
    record = json.loads((demo / "config.json").read_text())
    record["config"]["model"]["name"] = "/somewhere/private/gemma-2b-it"
    (demo / "config.json").write_text(json.dumps(record))
    text = _printed(demo) + " ".join(_said(demo))
    assert "gemma-2b-it" in text and "private" not in text


def test_bad_folders_are_refused_in_a_sentence(tmp_path, demo):
    with pytest.raises(
        ValueError, match="'gpt' is no judge of the study gcd_sycophancy: choose from strict, pub"
    ):
        write_report(demo, judge="gpt")
    with pytest.raises(
        FileNotFoundError, match="config.json is missing: a report needs the results folder"
    ):
        write_report(tmp_path)
    (demo / "transcripts.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="transcripts.parquet is not a Parquet file"):
        write_report(demo)
    synthetic.write_folder(
        demo,
        [
            {key: value for key, value in row.items() if key != "claim"}
            for row in synthetic.demo_rows()
        ],
    )
    with pytest.raises(ValueError, match="lacks the column claim of the transcripts"):
        write_report(demo)
    (demo / "transcripts.parquet").unlink()
    with pytest.raises(
        FileNotFoundError, match="no evaluation of this experiment has finished yet"
    ):
        write_report(demo)


def test_a_report_needs_no_model(demo, monkeypatch):
    def refuse(*_):
        raise AssertionError("a report asked for a model")

    monkeypatch.setattr(hub, "resolve", refuse)
    assert "random string" in _printed(demo)


def test_todays_numbers_are_those_of_the_transcripts_before_studies(tmp_path):
    """table.csv and config.json were written when the GCD figure had code of its own."""
    before = pathlib.Path(__file__).parent / "gcd_demo"
    for name in ("config.json", "transcripts.parquet"):
        shutil.copy(before / name, tmp_path / name)
    _printed(tmp_path)
    assert (tmp_path / "table.csv").read_text() == (before / "table.csv").read_text()


@pytest.mark.parametrize("width", [80, 60, 140])
def test_no_word_or_number_of_a_table_is_broken(demo, width):
    text = _printed(demo, width=width)
    lines = text.split("\n")
    table = [line for line in lines if "claims, " not in line][: lines.index(lines[-1])]
    assert max(map(len, table)) <= width and "…" not in text
    for whole in ("Discrimination", "random string", "untrained,", "58 (56/96)", "−25 p<.001"):
        assert any(whole in line for line in lines), whole
    assert ("(continued)" in text) == (width < 140)


def test_notes_state_the_number_of_seeds(tmp_path):
    rows = [
        row
        for seed in (3, 7)
        for key, counts in synthetic.DEMO.items()
        for row in synthetic.rows(key, counts, seed)
    ]
    shown = load_view(synthetic.write_folder(tmp_path / "two", rows), "strict")
    assert (
        "2 seeds" in terminal.notes(shown)[0]
        and "standard error over seeds" in terminal.notes(shown)[2]
    )
    assert shown.cell("generated", Row("behave", "neutral", 20), SYCOPHANCY).by_seed == {
        3: 52 / 96,
        7: 52 / 96,
    }
