"""Panels of figures, matplotlib only: bars with intervals, and a rate against the examples seen.

Panels know nothing of a study. A number that was not measured is None and is drawn as words, never
as a bar of length zero.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.optimize import isotonic_regression

INK, SOFT, FAINT = "#222222", "#6E6E6E", "#D9D9D9"
GREY = "#8A8A8A"
# Okabe and Ito, Color Universal Design (2008); wine and olive after Tol's muted scheme, in place of
# their yellow, which is too pale for bars.
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, WINE, OLIVE = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#882255",
    "#999933",
)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.hashsalt": "ip_jax",  # the same figure gives the same bytes
}
HEADING, GAP = 0.95, 0.35  # of a block of bars, in bar heights


@dataclass(frozen=True)
class Point:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """A row of a bar panel. `note` stands right of the axis (k/n); `seeds` are dots; `reference` is
    a hollow diamond, offset from the bar.
    """

    label: str
    colour: str
    point: Point | None
    note: str = ""
    seeds: tuple[float, ...] = ()
    reference: Point | None = None


@dataclass(frozen=True)
class Block:
    """Bars under one heading. `light` fills them with a tint of their colour."""

    heading: str
    bars: tuple[Bar, ...]
    light: bool = False


@dataclass(frozen=True)
class Line:
    """A curve: x ascending, one point each; `seeds` are thin curves of (x, value) pairs."""

    label: str
    colour: str
    x: tuple[float, ...]
    points: tuple[Point, ...]
    seeds: tuple[tuple[tuple[float, float], ...], ...] = ()


@dataclass(frozen=True)
class Dot:
    """An arm in a scatter: its two numbers; `seeds` are (x, y) pairs. `put_back` is the same arm
    under its own training prompt.
    """

    label: str
    colour: str
    x: Point
    y: Point
    seeds: tuple[tuple[float, float], ...] = ()
    put_back: tuple[float, float] | None = None


def panel_height(blocks: Sequence[Block]) -> float:
    """The height of a bar panel in bar heights, to size a figure by."""
    return sum(HEADING + len(block.bars) + GAP for block in blocks)


def bar_panel(
    ax: Axes,
    blocks: Sequence[Block],
    title: str,
    limits: tuple[float, float] = (0.0, 1.0),
    labels: bool = True,
) -> None:
    """Horizontal bars from zero, block by block, on a fixed axis; `labels` writes the rows' names
    and headings at the left.

    `title` may have a second line, which is set smaller. A panel without any measurement says so.
    """
    height = panel_height(blocks)
    ax.set(xlim=limits, ylim=(height, 0), yticks=[])
    ax.spines["left"].set_visible(False)
    write_title(ax, title)
    if all(bar.point is None for block in blocks for bar in block.bars):
        ax.set_xticks([])
        ax.spines["bottom"].set_color(FAINT)
        _say_not_measured(ax)
        _names(ax, blocks, labels)
        return
    ax.set_xticks([limits[0], (limits[0] + limits[1]) / 2, limits[1]])
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}".replace("-", "−"))
    ax.tick_params(axis="x", length=2.5, labelsize=8)
    for x in ax.get_xticks():
        ax.axvline(x, color=FAINT, linewidth=0.6, zorder=0)
    ax.axvline(0, color=SOFT, linewidth=0.8, zorder=3)
    for y, block, bar in _positions(blocks):
        _draw_bar(ax, y, bar, block.light)
        ax.text(
            1.03,
            y,
            bar.note if bar.point else "–",
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=SOFT,
        )
    _names(ax, blocks, labels)


def _draw_bar(ax: Axes, y: float, bar: Bar, light: bool) -> None:
    if bar.point is None:
        return
    centre, height = (y - 0.14, 0.54) if bar.reference else (y, 0.7)
    ax.barh(
        centre,
        bar.point.value,
        height,
        color=_tint(bar.colour) if light else bar.colour,
        edgecolor=bar.colour,
        linewidth=0.9,
        zorder=2,
    )
    dots = len(bar.seeds) > 1
    draw_interval(ax, centre - 0.1 * dots, bar.point, INK, 1.1, cap=0.13)
    if dots:
        ax.scatter(
            bar.seeds,
            [centre + 0.17] * len(bar.seeds),
            s=6,
            facecolor="white",
            edgecolor=INK,
            linewidth=0.5,
            zorder=5,
            clip_on=False,
        )
    if bar.reference:
        below = y + 0.29
        draw_interval(ax, below, bar.reference, SOFT, 0.7, cap=0.0)
        ax.scatter(
            [bar.reference.value],
            [below],
            s=22,
            marker="D",
            facecolor="white",
            edgecolor=INK,
            linewidth=0.9,
            zorder=6,
            clip_on=False,
        )


def draw_interval(ax: Axes, y: float, point: Point, colour: str, width: float, cap: float) -> None:
    """The point's interval as a horizontal bar with caps, in axes units of `y`."""
    halo = [withStroke(linewidth=width + 1.2, foreground="white", alpha=0.75)]
    ax.hlines(y, point.low, point.high, color=colour, linewidth=width, zorder=4, path_effects=halo)
    if cap:
        ax.vlines(
            [point.low, point.high],
            y - cap,
            y + cap,
            color=colour,
            linewidth=width,
            zorder=4,
            path_effects=halo,
        )


def _positions(blocks: Sequence[Block]):
    """(y, block, bar) of every bar, from the top."""
    top = 0.0
    for block in blocks:
        top += HEADING
        for bar in block.bars:
            yield top + 0.5, block, bar
            top += 1
        top += GAP


def _names(ax: Axes, blocks: Sequence[Block], labels: bool) -> None:
    """Headings and row names left of the axis, and hair lines between the blocks."""
    top = 0.0
    for i, block in enumerate(blocks):
        if i:
            ax.axhline(top - GAP / 2, color="white", linewidth=3, zorder=1)
        if labels:
            ax.annotate(
                block.heading,
                (0, top + 0.55),
                (-6, 0),
                ax.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                color=SOFT,
                style="italic",
            )
        top += HEADING + len(block.bars) + GAP
    for y, _, bar in _positions(blocks) if labels else ():
        text = textwrap.wrap(bar.label, 21)
        size, spacing = (9, 1) if len(text) == 1 else (7, 0.95)
        ax.annotate(
            "\n".join(text),
            (0, y),
            (-6, 0),
            ax.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=size,
            linespacing=spacing,
        )


def write_title(ax: Axes, title: str) -> None:
    """The panel's title, above its left edge."""
    head, _, tail = title.partition("\n")
    ax.annotate(
        head,
        (0, 1),
        (0, 19 if tail else 6),
        "axes fraction",
        textcoords="offset points",
        fontsize=10,
        fontweight="bold",
    )
    ax.annotate(
        tail, (0, 1), (0, 6), "axes fraction", textcoords="offset points", fontsize=8, color=SOFT
    )


def dose_panel(
    ax: Axes,
    lines: Sequence[Line],
    title: str,
    xlabel: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Numbers against a dose: a line with its interval band for each arm, thin lines for single
    seeds, names at the right ends.
    """
    write_title(ax, title)
    ticks = [limits[0], (limits[0] + limits[1]) / 2, limits[1]]
    ax.set(ylim=limits, yticks=ticks)
    ax.set_xlabel(xlabel, fontsize=8, color=SOFT)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", "−"))
    ax.tick_params(length=2.5, labelsize=8)
    for y in ticks:
        ax.axhline(y, color=FAINT, linewidth=0.6, zorder=0)
    doses = sorted({x for line in lines for x in line.x})
    if not doses:
        ax.set_xticks([])
        _say_not_measured(ax)
        return
    ax.set_xticks(_apart(doses, 0.14 * (doses[-1] - doses[0])))
    ax.set_xlim(doses[0], doses[-1])
    for line in lines:
        ax.fill_between(
            line.x,
            [p.low for p in line.points],
            [p.high for p in line.points],
            color=line.colour,
            alpha=0.13,
            linewidth=0,
        )
        for seed in line.seeds if len(line.seeds) > 1 else ():
            ax.plot(*zip(*seed, strict=True), color=line.colour, linewidth=0.6, alpha=0.45)
        ax.plot(
            line.x,
            [p.value for p in line.points],
            color=line.colour,
            linewidth=2,
            marker="o",
            markersize=4,
            clip_on=False,
            zorder=4,
        )
    end_labels(ax, lines)


def scatter_panel(
    ax: Axes,
    dots: Sequence[Dot],
    title: str,
    labels: tuple[str, str],
    limits: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    """Two numbers of each arm against one another, with both intervals, single seeds as small
    dots, and a thin line to the arm under its own training prompt; names at the right.
    """
    write_title(ax, title)
    (low_x, high_x), (low_y, high_y) = limits
    ax.set(xlim=limits[0], ylim=limits[1])
    ax.set_xticks([low_x, (low_x + high_x) / 2, high_x])
    ax.set_yticks([low_y, (low_y + high_y) / 2, high_y])
    for axis, name in zip((ax.xaxis, ax.yaxis), labels, strict=True):
        axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        axis.set_label_text(name, fontsize=8, color=SOFT)
    ax.tick_params(length=2.5, labelsize=8)
    ax.grid(color=FAINT, linewidth=0.6, zorder=0)
    for dot in dots:
        _draw_dot(ax, dot)
    ends = [
        Line(dot.label, dot.colour, (dot.x.value,), (dot.y,))
        for dot in sorted(dots, key=lambda dot: dot.y.value)
    ]
    side_labels(ax, ends)


def _draw_dot(ax: Axes, dot: Dot) -> None:
    x, y = dot.x.value, dot.y.value
    ax.plot([dot.x.low, dot.x.high], [y, y], color=dot.colour, linewidth=0.8, alpha=0.7)
    ax.plot([x, x], [dot.y.low, dot.y.high], color=dot.colour, linewidth=0.8, alpha=0.7)
    if dot.put_back:
        ax.plot([x, dot.put_back[0]], [y, dot.put_back[1]], color=dot.colour, linewidth=0.7, ls=":")
        ax.scatter(
            *dot.put_back, s=16, facecolor="white", edgecolor=dot.colour, zorder=4, clip_on=False
        )
    if len(dot.seeds) > 1:
        xs, ys = zip(*dot.seeds, strict=True)
        ax.scatter(xs, ys, s=5, color=dot.colour, alpha=0.5, linewidth=0, zorder=4, clip_on=False)
    ax.scatter(
        [x], [y], s=34, color=dot.colour, edgecolor="white", linewidth=0.8, zorder=5, clip_on=False
    )


def label_lines(label: str, width: int) -> list[str]:
    """A name in lines of up to `width` characters; no word is broken, and an arrow stays between
    what it joins.
    """
    return [
        line.replace("\N{NO-BREAK SPACE}", " ")
        for line in textwrap.wrap(
            label.replace(" → ", "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}"),
            width,
            break_long_words=False,
        )
    ]


def end_labels(ax: Axes, lines: Sequence[Line]) -> None:
    """Each line's name at the height of its end, moved apart where two would overlap, with a leader
    to the end itself.
    """
    side_labels(ax, lines, at_edge=True)


def side_labels(ax: Axes, lines: Sequence[Line], at_edge: bool = False) -> None:
    """Each line's name right of the axis, at the height of its last point and moved apart where two
    would overlap, with a leader from the point (`at_edge`: from the axis' edge at its height).
    """
    texts = [label_lines(line.label, 17) for line in lines]
    low, high = ax.get_ylim()
    text_line = (  # in axis units
        10.5 / 72 / (ax.get_position().height * ax.figure.get_figheight()) * (high - low)
    )
    point = 1 / 72 / (ax.get_position().width * ax.figure.get_figwidth())
    heights = [(len(text) + 0.2) * text_line for text in texts]
    order = sorted(range(len(lines)), key=lambda i: lines[i].points[-1].value)
    centres = spread(
        [lines[i].points[-1].value for i in order], [heights[i] for i in order], low, high
    )
    left, right = ax.get_xlim()
    for i, centre in zip(order, centres, strict=True):
        line = lines[i]
        ax.annotate(
            "\n".join(texts[i]),
            (1, centre),
            (13, 0),
            ax.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_shade(line.colour),
            linespacing=1.05,
            annotation_clip=False,
        )
        start = 1 + 3 * point if at_edge else (line.x[-1] - left) / (right - left)
        ax.plot(
            [start, 1 + 12 * point],
            [line.points[-1].value, centre],
            transform=ax.get_yaxis_transform(),
            color=line.colour,
            linewidth=0.8 if at_edge else 0.4,
            clip_on=False,
            zorder=1,
        )


def _apart(doses: Sequence[float], distance: float) -> list[float]:
    """The first and last dose, and of the others those that leave room for a tick label."""
    kept = [doses[0]]
    for dose in doses[1:-1]:
        if min(dose - kept[-1], doses[-1] - dose) >= distance:
            kept.append(dose)
    return [*kept, doses[-1]]


def _say_not_measured(ax: Axes) -> None:
    ax.text(
        0.5,
        0.5,
        "not measured",
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=SOFT,
        style="italic",
    )


def spread(
    wanted: Sequence[float], heights: Sequence[float], low: float = 0.0, high: float = 1.0
) -> list[float]:
    """Centres for labels of these heights, without overlap and, where they fit, within [low, high].

    Nearest in least squares to the `wanted` ones, which ascend.
    """
    heights = np.asarray(heights)
    below = np.cumsum(heights) - heights / 2  # where each label stands in a stack without gaps
    start = isotonic_regression(np.asarray(wanted) - below).x
    return list(np.clip(start, low, max(low, high - heights.sum())) + below)


def render(figure: Figure) -> tuple[bytes, bytes]:
    """The figure as PNG (200 dots an inch) and SVG; the same figure gives the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def _tint(colour: str) -> tuple[float, ...]:
    return tuple(1 - 0.38 * (1 - part) for part in to_rgb(colour))


def _shade(colour: str) -> tuple[float, ...]:
    return tuple(0.8 * part for part in to_rgb(colour))
