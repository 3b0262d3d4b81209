"""The figure of a supervised experiment, from what its study declares: bars of every metric, what
was not wanted against what was wanted, and both by training dose.

No verdict is passed on an arm: counts, intervals and differences are what there is to say.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D

from ip_jax.evals import stats
from ip_jax.evals.metrics import Difference, Mean, Metric
from ip_jax.lab.experiment import NEUTRAL, UNTRAINED
from ip_jax.report import panels, view
from ip_jax.report.panels import Bar, Block, Dot, Line, Point
from ip_jax.report.tables import Cell, Row
from ip_jax.report.view import View

# inches
WIDTH, MARGIN, NAMES, GUTTER = 10.8, 0.12, 1.62, 0.62
TITLE, AXIS, HEAD, LEGEND, TEXT_LINE = 0.45, 0.45, 0.72, 0.3, 0.145
SQUARE, SIDE = 1.95, 1.5  # a panel of the last row, and the room for names right of it
WANTED = {True: "wanted", False: "not wanted", None: ""}


@dataclass(frozen=True)
class Drawn:
    """One bar panel."""

    blocks: list[Block]
    title: str
    limits: tuple[float, float]


def draw(shown: View) -> Figure:
    """Rows of bar panels: every metric of the main evaluation set, then the main metric of the
    others; below them the scatter of arms and the dose curves.
    """
    colours = arm_colours(shown)
    bars = [_bar_panel(shown, shown.main_set, metric, colours) for metric in shown.metrics]
    others = [
        _bar_panel(shown, name, shown.main, colours)
        for name in shown.eval_sets
        if name != shown.main_set
    ]
    rows = [*_in_rows(bars), *_in_rows(others)]
    tallest = max(panels.panel_height(panel.blocks) for panel in bars)
    inch = min(0.27, max(0.19, 3.4 / tallest))  # of one bar: many arms make thin ones
    heights = [max(panels.panel_height(p.blocks) for p in row) * inch for row in rows]
    below = _squares(shown, colours)
    caption = textwrap.wrap(_caption(shown), 195)
    foot = LEGEND + TEXT_LINE * len(caption) + 0.1
    bands = [*heights, *([SQUARE] if below else [])]
    height = HEAD + sum(TITLE + AXIS + band for band in bands) + foot
    with matplotlib.rc_context(panels.STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def axes(band: int, left: float, width: float) -> Axes:
            above = HEAD + sum(TITLE + AXIS + of for of in bands[:band]) + TITLE
            bottom = height - above - bands[band]
            return figure.add_axes(
                (left / WIDTH, bottom / height, width / WIDTH, bands[band] / height)
            )

        for band, row in enumerate(rows):
            columns = max(2, len(row))
            width = (WIDTH - NAMES) / columns - GUTTER
            for column, panel in enumerate(row):
                ax = axes(band, NAMES + column * (width + GUTTER), width)
                panels.bar_panel(ax, panel.blocks, panel.title, panel.limits, labels=column == 0)
        for column, paint in enumerate(below):
            paint(axes(len(rows), 0.75 + column * (SQUARE + SIDE), SQUARE))
        _write_texts(figure, shown, caption, foot)
    return figure


def arm_colours(shown: View) -> dict[str, str]:
    """A colour for each arm: grey untrained, vermillion neutral, blues for inoculations, orange for
    random strings, green for other data under the neutral prompt.
    """
    pools = {
        "inoculation": itertools.cycle((panels.BLUE, panels.SKY)),
        "random": itertools.cycle((panels.ORANGE,)),
        "neutral": itertools.cycle((panels.GREEN,)),
    }
    rest = itertools.cycle((panels.PURPLE, panels.WINE, panels.OLIVE))
    fixed = {UNTRAINED: panels.GREY, NEUTRAL: panels.VERMILLION}
    return {arm.name: fixed.get(arm.name) or next(pools.get(arm.kind, rest)) for arm in shown.arms}


def _in_rows(drawn: Sequence[Drawn]) -> list[Sequence[Drawn]]:
    """Up to four panels side by side; more in rows of three."""
    across = max(2, len(drawn)) if len(drawn) <= 4 else 3
    return [drawn[i : i + across] for i in range(0, len(drawn), across)]


def _bar_panel(shown: View, eval_set: str, metric: Metric, colours: dict[str, str]) -> Drawn:
    about = metric.about or WANTED[metric.wanted]
    if eval_set != shown.main_set:
        about = shown.set_title(eval_set)
    elif metric.about and metric.wanted is not None:
        about = f"{metric.about} ({WANTED[metric.wanted]})"
    title = f"{metric.label}\n{about}"
    return Drawn(_blocks(shown, eval_set, metric, colours), title, metric.limits)


def _blocks(shown: View, eval_set: str, metric: Metric, colours: dict[str, str]) -> list[Block]:
    rows = shown.blocks(eval_set)

    def block(heading: str, chosen: Sequence[Row], light: bool = True) -> Block:
        bars = tuple(_bar(shown, eval_set, row, metric, colours[row.arm]) for row in chosen)
        return Block(heading, bars, light)

    found = [
        block("neutral prompt", rows.neutral, light=False),
        block("training prompt put back", rows.own),
    ]
    for prompt in dict.fromkeys(row.eval_prompt for row in rows.other):
        chosen = [row for row in rows.other if row.eval_prompt == prompt]
        found.append(block(view.prompt_title(shown.study, prompt), chosen))
    return [block for block in found if block.bars]


def _bar(shown: View, eval_set: str, row: Row, metric: Metric, colour: str) -> Bar:
    cell = shown.cell(eval_set, row, metric)
    reference = None
    if row.eval_prompt != NEUTRAL:
        reference = shown.elicitation(eval_set, row, metric)
    seeds = tuple(cell.by_seed.values()) if cell else ()
    return Bar(
        shown.label(row),
        colour,
        _point(cell, metric),
        _note(cell),
        seeds,
        _point(reference, metric),
    )


def _point(cell: Cell | None, metric: Metric) -> Point | None:
    """The number with its interval, which ends where the axis does."""
    if cell is None:
        return None
    low, high = metric.limits
    return Point(cell.estimate.value, max(cell.estimate.low, low), min(cell.estimate.high, high))


def _note(cell: Cell | None) -> str:
    if cell is None:
        return ""
    estimate = cell.estimate
    if isinstance(estimate, stats.Proportion):
        return f"{estimate.k}/{estimate.n}"
    if isinstance(estimate, stats.Mean):
        return f"{estimate.value:.3g}".replace("-", "−")
    return f"{estimate.value:+.2f}".replace("-", "−")


def _squares(shown: View, colours: dict[str, str]) -> list:
    """What stands below the bars, as functions that paint on axes: the scatter where there is
    something wanted and something unwanted, and the dose curves that have two points.
    """
    found = []
    dots = _dots(shown, colours)
    if dots:
        x, y = shown.unwanted, shown.wanted

        def scatter(ax: Axes) -> None:
            title = "Unwanted against wanted\nneutral prompt; best is up and left"
            labels = (_axis_label(x), _axis_label(y))
            panels.scatter_panel(ax, dots, title, labels, (x.limits, y.limits))

        found.append(scatter)
    return [*found, *_dose_panels(shown, colours)]


def _dose_panels(shown: View, colours: dict[str, str]) -> list:
    found = []
    for metric in (shown.unwanted, shown.wanted):
        lines = _lines(shown, metric, colours) if metric else []
        if lines:

            def dose(ax: Axes, metric: Metric = metric, lines: list[Line] = lines) -> None:
                title = f"{metric.label} by dose\nneutral prompt"
                panels.dose_panel(ax, lines, title, "training examples seen", metric.limits)

            found.append(dose)
    return found


def _axis_label(metric: Metric) -> str:
    return "\n".join(textwrap.wrap(metric.about or metric.label, 30))


def _dots(shown: View, colours: dict[str, str]) -> list[Dot]:
    """The arms under the neutral prompt that have both numbers."""
    if shown.unwanted is None or shown.wanted is None:
        return []
    rows = shown.blocks(shown.main_set)
    own = {row.arm: row for row in rows.own}
    found = []
    for row in rows.neutral:
        x, y = (shown.cell(shown.main_set, row, m) for m in (shown.unwanted, shown.wanted))
        if x is None or y is None:
            continue
        seeds = tuple((x.by_seed[s], y.by_seed[s]) for s in x.by_seed if s in y.by_seed)
        found.append(
            Dot(
                shown.label(row),
                colours[row.arm],
                _point(x, shown.unwanted),
                _point(y, shown.wanted),
                seeds,
                _put_back(shown, own.get(row.arm)),
            )
        )
    return found


def _put_back(shown: View, row: Row | None) -> tuple[float, float] | None:
    if row is None:
        return None
    x, y = (shown.cell(shown.main_set, row, m) for m in (shown.unwanted, shown.wanted))
    return (x.estimate.value, y.estimate.value) if x and y else None


def _lines(shown: View, metric: Metric, colours: dict[str, str]) -> list[Line]:
    lines = []
    for arm in shown.arms:
        cells = shown.curve(arm.name, metric) if arm.name != UNTRAINED else []
        if len(cells) < 2:
            continue
        seeds = sorted({seed for cell in cells if cell.examples_seen for seed in cell.by_seed})
        thin = tuple(
            tuple((c.examples_seen, c.by_seed[seed]) for c in cells if seed in c.by_seed)
            for seed in seeds
        )
        doses = tuple(cell.examples_seen for cell in cells)
        points = tuple(_point(cell, metric) for cell in cells)
        lines.append(Line(arm.label, colours[arm.name], doses, points, thin))
    return lines


def _write_texts(figure: Figure, shown: View, caption: Sequence[str], foot: float) -> None:
    height = figure.get_figheight()
    left = MARGIN / WIDTH
    figure.text(
        left,
        1 - 0.24 / height,
        shown.study.title,
        fontsize=13,
        fontweight="bold",
        va="center",
    )
    figure.text(
        left, 1 - 0.47 / height, subtitle(shown), fontsize=9, color=panels.SOFT, va="center"
    )
    handles = _legend(shown)
    figure.legend(
        handles=handles,
        handler_map={handles[0]: HandlerLine2D(numpoints=2)},
        loc="center left",
        ncols=4,
        frameon=False,
        fontsize=8,
        bbox_to_anchor=(left - 0.006, (foot - 0.12) / height),
        handletextpad=0.6,
    )
    for i, line in enumerate(caption):
        figure.text(
            left,
            (foot - LEGEND - TEXT_LINE * i) / height,
            line,
            fontsize=7.5,
            color=panels.SOFT,
            va="top",
        )


def _legend(shown: View) -> list[Line2D]:
    """What the marks mean, as far as they are there; the interval first."""
    mark = dict(linestyle="none", markeredgecolor=panels.INK, markerfacecolor="white")
    interval = dict(color=panels.INK, linewidth=1.1, marker="|", markersize=7, markeredgewidth=1.1)
    handles = [Line2D([], [], label="95 % interval", **interval)]
    blocks = shown.blocks(shown.main_set)
    others = (*blocks.own, *blocks.other)
    if any(shown.elicitation(shown.main_set, row, shown.main) for row in others):
        name = "untrained model under the same prompt (elicitation)"
        handles.append(Line2D([], [], marker="D", markersize=4.5, label=name, **mark))
    if shown.n_seeds > 1:
        handles.append(
            Line2D([], [], marker="o", markersize=3, markeredgewidth=0.6, label="one seed", **mark)
        )
    if any(dot.put_back for dot in _dots(shown, arm_colours(shown))):
        name = "scatter: training prompt put back"
        handles.append(Line2D([], [], marker="o", markersize=4.5, label=name, **mark))
    return handles


def subtitle(shown: View) -> str:
    """Model, dose, seeds, the n behind a bar, and the judge where there are several."""
    rows = shown.blocks(shown.main_set).neutral
    cells = [shown.cell(shown.main_set, row, shown.main) for row in rows if row.arm != UNTRAINED]
    doses = [cell.examples_seen for cell in cells if cell]
    seeds = shown.n_seeds
    judge = [f"{shown.judge} judge"] if len(shown.study.judges) > 1 else []
    parts = (
        shown.results.model,
        f"{max(doses)} training examples an arm" if doses else "before training",
        f"{seeds} seed{'s' * (seeds > 1)}",
        _counts(shown, rows),
        *judge,
    )
    return "  ·  ".join(parts)


def _counts(shown: View, rows: Sequence[Row]) -> str:
    """The n of each metric that has one, said once where all are equal."""
    counts = {}
    for metric in shown.metrics:
        cells = [shown.cell(shown.main_set, row, metric) for row in rows]
        sizes = sorted({cell.estimate.n for cell in cells if cell and hasattr(cell.estimate, "n")})
        if sizes:
            counts[metric.label] = "–".join(map(str, sizes[:1] + sizes[1:][-1:]))
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values()))} a bar"
    return "n: " + ", ".join(f"{what} {n}" for what, n in counts.items())


def _caption(shown: View) -> str:
    spread = (
        "there is one seed"
        if shown.n_seeds == 1
        else "for that see the single seeds, which are pooled in a bar"
    )
    text = (
        f"Intervals: {_methods(shown.metrics)}; they cover the sampling of evaluation rows, not how"
        f" training runs differ: {spread}."
    )
    said = [view.caption_of(shown, rate) for rate in shown.captioned()]
    data = f"Data: {shown.results.provenance.rstrip('.')}."
    return " ".join([text, *filter(None, said), *view.caveats(shown), data])


def _methods(metrics: Sequence[Metric]) -> str:
    """The intervals' methods, for the kinds of metrics that there are."""
    kinds = {
        "rates": any(not isinstance(m, Difference | Mean) for m in metrics),
        "differences": any(isinstance(m, Difference) for m in metrics),
        "means": any(isinstance(m, Mean) for m in metrics),
    }
    names = {"rates": "Clopper–Pearson", "differences": "Newcombe", "means": "Student's t"}
    present = [kind for kind, there in kinds.items() if there]
    if len(present) == 1:
        return names[present[0]]
    return ", ".join(f"{names[kind]} for {kind}" for kind in present)
