"""The figure of arms at an equal dose: hacks under x_0 against the hack tokens reinforced so far, a
panel for each common dose of the rules.
"""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ip_jax.evals import dose, measures
from ip_jax.evals.dose import AtDose
from ip_jax.report import panels
from ip_jax.report.panels import FAINT, SOFT, Line, Point
from ip_jax.report.rl_figures import (
    HEAD,
    TEXT_LINE,
    WIDTH,
    arm_styles,
    foot,
    head,
    provenance,
    wrapped,
)
from ip_jax.report.rl_view import RlView

# panels abreast; inches: a panel, its title, its axis, the names at its right
COLUMNS, PANEL, ABOVE, BELOW, NAMES = 2, 2.0, 0.5, 0.5, 1.55
LEFT, GRID = 0.55, 60  # inches; doses at which a mean line is drawn


def draw_dose(view: RlView) -> Figure:
    """One panel for each common dose, with the arms that the rules compare there. Where no rule has
    one it says so.
    """
    rows = max(1, math.ceil(len(view.at_doses) / COLUMNS))
    columns = min(COLUMNS, max(1, len(view.at_doses)))
    caption = wrapped(
        f"Thin lines are single seeds ({view.seeds_said}), probes joined; bold ones the mean of"
        f" these lines, drawn as far as at least {dose.SHARE:.0%} of an arm's runs get. The grey"
        " line is the largest dose that so many runs of each compared arm reach; markers: the"
        " tabled means at each run's first probe by which it had that dose, often more than that,"
        " with 95 % intervals from a bootstrap over seeds. Exploratory: no rule was stated for"
        f" equal doses. {provenance(view)}"
    )
    height = HEAD + rows * (ABOVE + PANEL + BELOW) + TEXT_LINE * len(caption) + 0.15
    width = (WIDTH - columns * (LEFT + NAMES)) / columns
    with matplotlib.rc_context(panels.STYLE):
        figure = Figure(figsize=(WIDTH, height))
        for i, at in enumerate(view.at_doses):
            row, column = divmod(i, columns)
            left, top = (
                LEFT + column * (LEFT + width + NAMES),
                height - HEAD - row * (ABOVE + PANEL + BELOW) - ABOVE,
            )
            _panel(
                figure.add_axes(
                    (left / WIDTH, (top - PANEL) / height, width / WIDTH, PANEL / height)
                ),
                view,
                at,
            )
        if not view.at_doses:
            figure.text(
                0.5, 0.5, "no rule has a common dose", ha="center", color=SOFT, style="italic"
            )
        drawn = {
            name
            for at in view.at_doses
            for rule, _ in at.contrasts
            for name, _ in rule.contrast.weights
        }
        head(
            figure,
            view,
            "hacking at an equal dose",
            [arm for arm in view.arms if arm.name in drawn],
        )
        foot(figure, caption)
    return figure


def _panel(ax: Axes, view: RlView, at: AtDose) -> None:
    styles = arm_styles(view)
    compared = {name for rule, _ in at.contrasts for name, _ in rule.contrast.weights}
    hack, lines = dose.by_arm(at.reached, "hack"), []
    end = max(np.mean([run.tokens for run in at.of_arm(arm)[0]]) for arm in compared) * 1.02
    ax.set(xlim=(0, end), ylim=(-0.02, 1.02), yticks=[0, 0.5, 1], xticks=[0, at.dose])
    ax.axvline(at.dose, color=FAINT, linewidth=0.8, zorder=0)
    for arm in (arm for arm in view.arms if arm.name in compared):
        colour, marker = styles[arm.name]
        seeds = [
            (of_run.tokens, of_run.probe.rate("hack"))
            for (name, _), of_run in view.doses.items()
            if name == arm.name
        ]
        for tokens, rates in seeds if len(seeds) > 1 else ():
            ax.plot(tokens, rates, color=colour, linewidth=0.5, alpha=0.3)
        ax.plot(
            *_mean(seeds, min(end, dose.common_dose(view.doses, [arm.name]))),
            color=colour,
            linewidth=2,
            zorder=4,
        )
        estimate = measures.mean(hack, arm.name)
        x = float(np.mean([run.tokens for run in at.of_arm(arm.name)[0]]))
        if estimate.n > 1:
            ax.plot([x, x], [estimate.low, estimate.high], color=colour, linewidth=1.1, zorder=5)
        ax.scatter(
            [x],
            [estimate.value],
            s=34,
            color=colour,
            marker=marker,
            edgecolor="white",
            linewidth=0.8,
            zorder=6,
            clip_on=False,
        )
        lines.append(
            Line(
                arm.label, colour, (at.dose,), (Point(estimate.value, estimate.low, estimate.high),)
            )
        )
    panels.write_title(
        ax, f"Common dose: {at.dose:g} tokens\n{'; '.join(rule.name for rule, _ in at.contrasts)}"
    )
    ax.set_ylabel("hack rate under x₀", fontsize=8, color=SOFT)
    ax.set_xlabel("hack tokens reinforced so far", fontsize=8, color=SOFT, labelpad=1)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.tick_params(length=2.5, labelsize=8)
    panels.end_labels(ax, lines)


def _mean(seeds: list[tuple[np.ndarray, np.ndarray]], end: float) -> tuple[np.ndarray, np.ndarray]:
    """(doses, mean over the seeds that get so far of the rate between their probes)."""
    doses = np.linspace(0, end, GRID)
    rates = [
        np.where(doses <= tokens[-1], np.interp(doses, tokens, rate), np.nan)
        for tokens, rate in seeds
    ]
    return doses, np.nanmean(rates, axis=0)
