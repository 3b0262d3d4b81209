"""Panels: bars as long as their values, fixed axes, words where nothing was measured."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ip_jax.report import panels
from ip_jax.report.panels import Bar, Block, Line, Point


def _texts(ax):
    return [text.get_text() for text in ax.texts]


def _bars(ax):
    return [patch.get_width() for patch in ax.patches if isinstance(patch, Rectangle)]


def test_bars_have_their_values_and_a_missing_one_is_no_bar():
    ax = Figure().add_subplot()
    bars = (
        Bar("a", panels.BLUE, Point(0.3, 0.2, 0.45), "3/10"),
        Bar("b", panels.ORANGE, None),
        Bar("c", panels.GREEN, Point(0.0, 0.0, 0.1), "0/20"),
    )
    panels.bar_panel(
        ax,
        [Block("neutral prompt", bars[:2]), Block("own prompt", bars[2:], light=True)],
        "Rate\nof something",
    )
    assert _bars(ax) == [0.3, 0.0] and ax.get_xlim() == (0.0, 1.0)
    assert {
        "3/10",
        "–",
        "0/20",
        "a",
        "b",
        "c",
        "neutral prompt",
        "own prompt",
        "Rate",
        "of something",
    } == set(_texts(ax))
    ends = sorted(
        x for lines in ax.collections for path in lines.get_paths() for x in path.vertices[:, 0]
    )
    assert {0.2, 0.45, 0.0, 0.1} == {round(x, 6) for x in ends}


def test_a_panel_without_any_measurement_says_so():
    bars, dose = Figure().subplots(1, 2)
    panels.bar_panel(
        bars, [Block("neutral prompt", (Bar("a", panels.BLUE, None),))], "Capability", labels=False
    )
    panels.dose_panel(dose, [], "Dose", "examples seen")
    assert not _bars(bars) and "not measured" in _texts(bars) and "not measured" in _texts(dose)


def test_single_seeds_are_dots_only_where_there_are_several():
    one, three = Figure().subplots(1, 2)
    for ax, seeds in ((one, (0.5,)), (three, (0.4, 0.5, 0.6))):
        panels.bar_panel(
            ax, [Block("", (Bar("a", panels.BLUE, Point(0.5, 0.4, 0.6), "", seeds),))], "Rate"
        )
    offsets = [
        [len(found.get_offsets()) for found in ax.collections if isinstance(found, PathCollection)]
        for ax in (one, three)
    ]
    assert offsets == [[], [3]]


def test_a_line_with_its_band_and_its_seeds():
    ax = Figure().add_subplot()
    points = (Point(0.1, 0.05, 0.2), Point(0.6, 0.5, 0.7))
    panels.dose_panel(
        ax,
        [
            Line(
                "a",
                panels.BLUE,
                (0, 160),
                points,
                (((0, 0.1), (160, 0.5)), ((0, 0.1), (160, 0.7))),
            )
        ],
        "Dose",
        "examples seen",
    )
    curves = [line.get_ydata() for line in ax.lines if list(line.get_xdata()) == [0, 160]]
    assert [list(curve) for curve in curves] == [
        [0.1, 0.5],
        [0.1, 0.7],
        [0.1, 0.6],
    ] and ax.get_ylim() == (0.0, 1.0)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.05 and band[:, 1].max() == 0.7


@pytest.mark.parametrize("seed", range(20))
def test_labels_never_overlap_nor_leave_the_axis(seed):
    draw = np.random.default_rng(seed)
    wanted, heights = np.sort(draw.uniform(0, 1, 6)), draw.uniform(0.02, 0.16, 6)
    centres = np.asarray(panels.spread(wanted, heights))
    assert (np.diff(centres) >= (heights[1:] + heights[:-1]) / 2 - 1e-9).all()
    assert centres[0] - heights[0] / 2 >= -1e-9 and centres[-1] + heights[-1] / 2 <= 1 + 1e-9
    loose = heights / 1000  # labels with room stay where they want to be
    assert panels.spread(wanted, loose) == pytest.approx(wanted, abs=1e-3)
