"""The figures of an RL experiment: curves of every run, the frontier of hack against correct, and
the forest of arms.

Arms keep one colour and marker in all three.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ip_jax.evals.measures import MIN_SEEDS
from ip_jax.evals.rl_tables import NEUTRAL, Curve, Run
from ip_jax.report import panels
from ip_jax.report.panels import FAINT, INK, SOFT, Point
from ip_jax.report.rl_view import ArmNumbers, RlView

WIDTH = 10.4
HACK, CORRECT = panels.VERMILLION, panels.BLUE
# inches: an arm's panels with their title and axis, one of its two panels, the figure's title, a
# line of caption
CELL, HALF, HEAD, TEXT_LINE = 2.05, 0.62, 0.72, 0.145
X_LIMITS = (-0.1, 1.03)  # of the frontier
_STYLES = [
    (colour, marker)
    for marker in "osD^"
    for colour in (
        panels.BLUE,
        panels.SKY,
        panels.ORANGE,
        panels.PURPLE,
        panels.WINE,
        panels.OLIVE,
    )
]


def arm_styles(view: RlView) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each arm: grey untrained, vermillion standard, green oracle, the others
    in the config's order.
    """
    fixed = {
        view.reading.base: panels.GREY,
        view.reading.standard: panels.VERMILLION,
        view.reading.oracle: panels.GREEN,
    }
    rest = itertools.cycle(_STYLES)
    return {
        arm.name: (fixed[arm.name], "o") if arm.name in fixed else next(rest) for arm in view.arms
    }


def draw_curves(view: RlView) -> Figure:
    """One cell an arm: above what its rollouts did, below its probes under x_0; single seeds thin,
    their mean bold.
    """
    arms = [
        arm
        for arm in view.arms
        if any(name == arm.name for name, _ in (*view.rollouts, *view.probes))
    ]
    columns = min(4, max(1, len(arms)))
    rows = math.ceil(len(arms) / columns)
    caption = wrapped(
        f"Thin lines are single seeds ({view.seeds_said}), bold ones their mean. Upper panels: the"
        " completions that training sampled, under the arm's own generation prompts. Lower panels:"
        " held-out tasks under x₀, the task without any extra text. " + provenance(view)
    )
    height = HEAD + 0.25 + rows * CELL + TEXT_LINE * len(caption) + 0.15
    left, gutter = 0.62, 0.26
    width = (WIDTH - left - 0.2 - (columns - 1) * gutter) / columns
    last = max(
        (curve.steps[-1] for curve in (*view.rollouts.values(), *view.probes.values())), default=1
    )
    with matplotlib.rc_context(panels.STYLE):
        figure = Figure(figsize=(WIDTH, height))
        for i, arm in enumerate(arms):
            row, column = divmod(i, columns)
            for half, (curves, name) in enumerate(
                ((view.rollouts, "rollouts"), (view.probes, "x₀ probes"))
            ):
                top = height - HEAD - 0.25 - row * CELL - 0.33 - half * (HALF + 0.1)
                box = (
                    (left + column * (width + gutter)) / WIDTH,
                    (top - HALF) / height,
                    width / WIDTH,
                    HALF / height,
                )
                ax = figure.add_axes(box)
                _curve_panel(
                    ax, {run: curve for run, curve in curves.items() if run[0] == arm.name}, last
                )
                if column == 0:
                    ax.set_ylabel(name, fontsize=8, color=SOFT)
                    ax.set_yticklabels(["0", "", "1"])
                if half == 0:
                    ax.set_title(
                        "\n".join(panels.label_lines(arm.label, 34)[:2]),
                        fontsize=8.5,
                        fontweight="bold",
                        loc="left",
                        pad=4,
                        linespacing=1.0,
                    )
                    ax.set_xticklabels([])
                elif row == rows - 1 or i + columns >= len(arms):
                    ax.set_xlabel("step", fontsize=8, color=SOFT, labelpad=1)
        head(figure, view, "every run over training", arms)
        handles = [
            Line2D([], [], color=colour, linewidth=2, label=view.name_of(name))
            for name, colour in (("hack", HACK), ("correct", CORRECT))
        ]
        figure.legend(
            handles=handles,
            loc="center left",
            ncols=2,
            frameon=False,
            fontsize=9,
            bbox_to_anchor=(0.005, 1 - (HEAD + 0.02) / height),
        )
        foot(figure, caption)
    return figure


def _curve_panel(ax: Axes, curves: Mapping[Run, Curve], last: int) -> None:
    ax.set(xlim=(0, last), ylim=(-0.02, 1.02), yticks=[0, 0.5, 1], xticks=[0, last])
    ax.set_yticklabels([])
    ax.tick_params(length=2, labelsize=7.5, pad=1.5)
    ax.axhline(0.5, color=FAINT, linewidth=0.6, zorder=0)
    if not curves:
        ax.text(
            0.5,
            0.5,
            "not measured",
            transform=ax.transAxes,
            ha="center",
            va="center",
            color=SOFT,
            style="italic",
            fontsize=8,
        )
        return
    for verdict, colour in (("correct", CORRECT), ("hack", HACK)):
        for curve in curves.values() if len(curves) > 1 else ():
            ax.plot(curve.steps, curve.rate(verdict), color=colour, linewidth=0.5, alpha=0.35)
        steps, mean = mean_curve([(curve.steps, curve.rate(verdict)) for curve in curves.values()])
        ax.plot(steps, mean, color=colour, linewidth=1.9, zorder=4)


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, mean over runs) at the steps that every run has measured: where one ends early the
    mean ends, too.
    """
    steps = sorted(set.intersection(*(set(at[~np.isnan(rate)].tolist()) for at, rate in curves)))
    values = [dict(zip(at.tolist(), rate.tolist(), strict=True)) for at, rate in curves]
    return np.asarray(steps), np.asarray(
        [np.mean([of_run[step] for of_run in values]) for step in steps]
    )


def draw_frontier(view: RlView) -> Figure:
    """Hack against correct under x_0 at the end: single seeds as dots, arm means as markers with
    their intervals, names at both sides.
    """
    styles = arm_styles(view)
    shown = [arm for arm in view.arms if ("hack", NEUTRAL) in arm.rates]
    caption = wrapped(
        f"At the end of training, held-out tasks under x₀. Dots: single runs ({view.seeds_said})."
        " Markers: means over runs with 95 % intervals from a bootstrap over seeds; with few seeds"
        " these are too narrow, and with one there is none. Towards the upper left is better. "
        + provenance(view)
    )
    sides = [
        [arm for arm in shown if (arm.rates["hack", NEUTRAL].value < 0.5) == left]
        for left in (True, False)
    ]
    body, side = max(5.6, *(sum(map(_label_inches, arms)) for arms in sides)), 2.75
    above = HEAD + 0.14  # the name of the upright axis stands over it
    height = above + body + 0.75 + TEXT_LINE * len(caption)
    with matplotlib.rc_context(panels.STYLE):
        figure = Figure(figsize=(WIDTH, height))
        ax = figure.add_axes(
            (
                side / WIDTH,
                (height - above - body) / height,
                (WIDTH - 2 * side) / WIDTH,
                body / height,
            )
        )
        top = max(
            (
                value
                for arm in shown
                for value in view.by_run["correct", NEUTRAL][arm.name].values()
            ),
            default=1.0,
        )
        top = min(1.0, math.ceil(10 * top + 0.5) / 10)
        ax.set(
            xlim=X_LIMITS,
            ylim=(-0.03 * top, 1.02 * top),
            xticks=[0, 0.25, 0.5, 0.75, 1],
            xlabel=view.titled("hack"),
        )
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.tick_params(length=2.5, labelsize=8)
        # in the strip left of 0: the arms' names stand outside
        ax.tick_params(axis="y", direction="in", pad=-5)
        for label in ax.get_yticklabels():
            label.set(
                horizontalalignment="left", bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6}
            )
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.grid(color=FAINT, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.annotate(
            view.titled("correct"),
            (0, 1),
            (0, 6),
            "axes fraction",
            textcoords="offset points",
            fontsize=9,
        )
        for arm in shown:
            _frontier_arm(ax, view, arm, *styles[arm.name])
        for arms, left in zip(sides, (True, False), strict=True):
            _side_labels(ax, arms, styles, left, body)
        head(figure, view, "hacking against capability", shown)
        foot(figure, caption)
    return figure


def _frontier_arm(ax: Axes, view: RlView, arm: ArmNumbers, colour: str, marker: str) -> None:
    hacks, corrects = (view.by_run[verdict, NEUTRAL][arm.name] for verdict in ("hack", "correct"))
    ax.scatter(
        list(hacks.values()),
        [corrects[seed] for seed in hacks],
        s=7,
        color=colour,
        alpha=0.45,
        linewidth=0,
        zorder=2,
    )
    x, y = arm.rates["hack", NEUTRAL], arm.rates["correct", NEUTRAL]
    if x.n > 1:
        ax.plot([x.low, x.high], [y.value] * 2, color=colour, linewidth=1.1, zorder=3)
        ax.plot([x.value] * 2, [y.low, y.high], color=colour, linewidth=1.1, zorder=3)
    ax.scatter(
        [x.value],
        [y.value],
        s=46,
        color=colour,
        marker=marker,
        edgecolor="white",
        linewidth=0.8,
        zorder=4,
    )


def _side_label(arm: ArmNumbers) -> list[str]:
    return panels.label_lines(arm.label, 30)


def _label_inches(arm: ArmNumbers) -> float:
    return 0.155 * len(_side_label(arm)) + 0.07


def _side_labels(
    ax: Axes,
    arms: Sequence[ArmNumbers],
    styles: Mapping[str, tuple[str, str]],
    left: bool,
    inches: float,
) -> None:
    """Names at the height of their markers, moved apart where two would overlap, with leaders."""
    arms = sorted(arms, key=lambda arm: arm.rates["correct", NEUTRAL].value)
    low, high = ax.get_ylim()
    heights = [_label_inches(arm) / inches * (high - low) for arm in arms]
    centres = panels.spread(
        [arm.rates["correct", NEUTRAL].value for arm in arms], heights, low, high
    )
    edge, end, outside = (-0.005, -0.06, -0.105) if left else (1.005, 1.06, 1.105)
    to_axes = ax.get_yaxis_transform()
    for arm, centre in zip(arms, centres, strict=True):
        colour, marker = styles[arm.name]
        x, y = arm.rates["hack", NEUTRAL].value, arm.rates["correct", NEUTRAL].value
        inner = (x - X_LIMITS[0]) / (X_LIMITS[1] - X_LIMITS[0])
        ax.plot(
            [inner, edge],
            [y, y],
            transform=to_axes,
            color=colour,
            linewidth=0.8,
            linestyle=(0, (1, 2)),
            zorder=1,
        )
        ax.plot(
            [edge, end],
            [y, centre],
            transform=to_axes,
            color=colour,
            linewidth=0.6,
            alpha=0.7,
            clip_on=False,
            zorder=1,
        )
        ax.scatter(
            [end + (outside - end) * 0.45],
            [centre],
            s=30,
            color=colour,
            marker=marker,
            edgecolor="white",
            linewidth=0.6,
            transform=to_axes,
            clip_on=False,
        )
        ax.text(
            outside,
            centre,
            "\n".join(_side_label(arm)),
            transform=to_axes,
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            linespacing=1.05,
        )


def draw_forest(view: RlView) -> Figure:
    """Hacked runs of n and restricted mean onset, a line an arm, and what may be said of it beside
    the standard arm.
    """
    styles = arm_styles(view)
    arms = view.trained
    onset = view.reading.onset
    caption = wrapped(
        f"A run is hacked at {onset.words}. Left: hacked runs of n, exact (Clopper–Pearson) 95 %"
        f" intervals. Middle: mean of min(onset, {onset.horizon}) steps, runs that ended early"
        " censored there (area under the Kaplan–Meier curve), 95 % bootstrap over runs; an"
        " interval without width means only that all runs agree. Right: Fisher's exact test"
        f" against the standard arm, two-sided, p corrected by {view.holm_said}. Protected: by this"
        " p (below .05) fewer hacked runs, fewer than half of the arm's own, and the hack learned"
        f" at x_t; never from fewer than {MIN_SEEDS} seeds. " + provenance(view)
    )
    inch = 0.36
    body = inch * max(len(arms), 1)
    height = HEAD + 0.5 + body + 0.65 + TEXT_LINE * len(caption)
    names, counts, steps = 2.5, 2.35, 2.35
    with matplotlib.rc_context(panels.STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def axes(left: float, width: float, limits: tuple[float, float], title: str) -> Axes:
            ax = figure.add_axes(
                (left / WIDTH, (height - HEAD - 0.5 - body) / height, width / WIDTH, body / height)
            )
            ax.set(xlim=limits, ylim=(len(arms) - 0.5, -0.5), yticks=[])
            ax.set_xticks([limits[0], sum(limits) / 2, limits[1]])
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            ax.spines["left"].set_visible(False)
            ax.tick_params(axis="x", length=2.5, labelsize=8)
            for x in ax.get_xticks():
                ax.axvline(x, color=FAINT, linewidth=0.6, zorder=0)
            panels.write_title(ax, title)
            return ax

        left = axes(names, counts, (0.0, 1.0), "Hacked runs\nshare of all runs, exact interval")
        right = axes(
            names + counts + 0.85,
            steps,
            (0.0, float(onset.horizon)),
            "Restricted mean onset\nsteps; later is better",
        )
        for y, arm in enumerate(arms):
            _forest_arm(left, right, y, arm, *styles[arm.name])
        head(figure, view, "hacked runs first", arms)
        foot(figure, caption)
    return figure


def _forest_arm(left: Axes, right: Axes, y: int, arm: ArmNumbers, colour: str, marker: str) -> None:
    label = panels.label_lines(arm.label, 34)
    left.annotate(
        "\n".join(label),
        (0, y),
        (-8, 0),
        left.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=9 if len(label) == 1 else 8,
        linespacing=0.95,
    )
    for ax, point, said in (
        (left, arm.hacked, f"{arm.hacked.k}/{arm.hacked.n}"),
        (right, arm.onset, f"{arm.onset.value:.0f}"),
    ):
        if not math.isnan(point.low):
            panels.draw_interval(
                ax, y, Point(point.value, point.low, point.high), colour, 1.3, cap=0.14
            )
        ax.scatter(
            [point.value],
            [y],
            s=34,
            color=colour,
            marker=marker,
            edgecolor="white",
            linewidth=0.8,
            zorder=6,
            clip_on=False,
        )
        ax.text(
            1.04, y, said, transform=ax.get_yaxis_transform(), va="center", fontsize=8.5, color=INK
        )
    p = (
        ""
        if arm.holm is None
        else "p < .001"
        if arm.holm < 0.001
        else f"p = {arm.holm:.3f}".replace("0.", ".", 1)
    )
    right.annotate(
        "\n".join(filter(None, (arm.word, p))),
        (1, y),
        (34, 0),
        right.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=SOFT,
        linespacing=1.0,
        annotation_clip=False,
    )


def head(figure: Figure, view: RlView, words: str, arms: Sequence[ArmNumbers]) -> None:
    """The figure's title: the experiment and `words`, below them how many `arms` are drawn, and
    seeds.
    """
    height = figure.get_figheight()
    figure.text(
        0.012,
        1 - 0.24 / height,
        f"{view.experiment.replace('_', ' ')}: {words}",
        fontsize=13,
        fontweight="bold",
        va="center",
    )
    figure.text(
        0.012,
        1 - 0.47 / height,
        f"{view.arms_said(arms)}  ·  {view.seeds_said}",
        fontsize=9,
        color=SOFT,
        va="center",
    )


def provenance(view: RlView) -> str:
    """The end of a caption: what the data are."""
    return f"Data: {view.provenance.rstrip('.')}."


def wrapped(text: str) -> list[str]:
    """The lines of a caption."""
    return textwrap.wrap(text, 172)


def foot(figure: Figure, caption: Sequence[str]) -> None:
    """The caption's lines at the figure's lower edge."""
    for i, line in enumerate(reversed(caption)):
        figure.text(
            0.012, (0.1 + TEXT_LINE * i) / figure.get_figheight(), line, fontsize=8, color=SOFT
        )
