"""The report of the GCD sycophancy experiment: table.csv, the figure and the terminal's tables,
from its results folder alone.

No verdict is passed on an arm: counts, intervals and differences are what there is to say.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D
from rich.console import Console

from ip_jax.evals import stats
from ip_jax.report import figures, gcd_terminal, gcd_view, tables
from ip_jax.report.figures import Bar, Block, Line, Point
from ip_jax.report.gcd_view import (
    CAPABILITY,
    CONFIRMS_RIGHT,
    DISCRIMINATION,
    MAIN_SET,
    SETS,
    SYCOPHANCY,
    View,
)
from ip_jax.report.tables import NEUTRAL, UNTRAINED, Cell, Row
from ip_jax.studies.gcd_sycophancy import metrics
from ip_jax.training.results import write_whole

PANELS = (  # metric, title, limits
    (SYCOPHANCY, "Sycophancy\nwrong claims confirmed", (0.0, 1.0)),
    (CONFIRMS_RIGHT, "Right claims\nconfirmed, as they should be", (0.0, 1.0)),
    (DISCRIMINATION, "Discrimination\nconfirmed: right minus wrong", (-1.0, 1.0)),
    (CAPABILITY, "Capability\nsolved without any claim", (0.0, 1.0)),
)
# inches: figure, row names, bar panel, its k/n, dose panel
WIDTH, NAMES, PANEL, GUTTER, DOSE = 10.0, 1.62, 1.72, 0.68, 1.95
TITLE, AXIS, HEAD, LEGEND, TEXT_LINE = 0.45, 0.45, 0.72, 0.3, 0.145


def write_report(
    folder: str | os.PathLike, console: Console | None = None, judge: str = "strict"
) -> None:
    """Writes table.csv, figure.png and figure.svg of a results folder and prints the tables. Needs
    no model.

    Raises FileNotFoundError or ValueError for a folder without results, ValueError for an unknown
    judge, OSError where nothing can be written.
    """
    view = gcd_view.load_view(folder, judge)
    of_labels = tables.summarise_labels(view.results.transcripts, metrics.metrics, gcd_view.JUDGES)
    tables.write_csv(view.results.folder / "table.csv", view.cells, of_labels)
    png, svg = figures.render(draw(view))
    write_whole(view.results.folder / "figure.png", png)
    write_whole(view.results.folder / "figure.svg", svg)
    gcd_terminal.print_report(view, console or Console())


def draw(view: View) -> Figure:
    """Bars of the four metrics, of sycophancy on the published sets where they were run, and beside
    them the dose.
    """
    colours = arm_colours(view)
    main = {metric: _blocks(view, MAIN_SET, metric, colours) for metric, _, _ in PANELS}
    others = [name for name in view.eval_sets if name != MAIN_SET]
    extra = [_blocks(view, name, SYCOPHANCY, colours) for name in others]
    bars = figures.panel_height(main[SYCOPHANCY])
    inch = min(0.27, max(0.19, 3.4 / bars))  # of one bar: many arms make thin ones
    body = [bars * inch] * 2 + ([max(map(figures.panel_height, extra)) * inch] if extra else [])
    caption = textwrap.wrap(_caption(view), 180)
    foot = LEGEND + TEXT_LINE * len(caption) + 0.1
    height = HEAD + sum(TITLE + AXIS + part for part in body) + foot
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(WIDTH, height))

        def axes(row: int, column: int):
            top = height - HEAD - sum(TITLE + AXIS + part for part in body[:row]) - TITLE
            left = NAMES + column * (PANEL + GUTTER) + (0.28 if column == 2 else 0)
            return figure.add_axes(
                (
                    left / WIDTH,
                    (top - body[row]) / height,
                    (DOSE if column == 2 else PANEL) / WIDTH,
                    body[row] / height,
                )
            )

        for i, (metric, title, limits) in enumerate(PANELS):
            figures.bar_panel(axes(i // 2, i % 2), main[metric], title, limits, labels=i % 2 == 0)
        for i, (name, blocks) in enumerate(zip(others, extra, strict=True)):
            figures.bar_panel(axes(2, i), blocks, f"Sycophancy\n{SETS[name]}", labels=i == 0)
        for row, (metric, title, limits) in enumerate((PANELS[0], PANELS[2])):
            head = f"{title.partition(chr(10))[0]} by training dose\nneutral prompt"
            figures.dose_panel(
                axes(row, 2), _lines(view, metric, colours), head, "training examples seen", limits
            )
        _write_texts(figure, view, caption, foot)
    return figure


def arm_colours(view: View) -> dict[str, str]:
    """A colour for each arm: grey untrained, vermillion neutral, blues for inoculations, orange for
    random strings, green for clean data.
    """
    pools = {
        "inoculation": itertools.cycle((figures.BLUE, figures.SKY)),
        "random": itertools.cycle((figures.ORANGE,)),
        "neutral": itertools.cycle((figures.GREEN,)),
    }
    rest = itertools.cycle((figures.PURPLE, figures.WINE, figures.OLIVE))
    fixed = {UNTRAINED: figures.GREY, NEUTRAL: figures.VERMILLION}
    return {arm.name: fixed.get(arm.name) or next(pools.get(arm.kind, rest)) for arm in view.arms}


def _blocks(view: View, eval_set: str, metric: str, colours: dict[str, str]) -> list[Block]:
    rows = view.blocks(eval_set)

    def block(heading: str, chosen: Sequence[Row], light: bool = True) -> Block:
        return Block(
            heading,
            tuple(_bar(view, eval_set, row, metric, colours[row.arm]) for row in chosen),
            light,
        )

    found = [
        block("neutral prompt", rows.neutral, light=False),
        block("training prompt put back", rows.own),
    ]
    for prompt in dict.fromkeys(row.eval_prompt for row in rows.other):
        found.append(
            block(
                gcd_view.prompt_title(prompt),
                [row for row in rows.other if row.eval_prompt == prompt],
            )
        )
    return [block for block in found if block.bars]


def _bar(view: View, eval_set: str, row: Row, metric: str, colour: str) -> Bar:
    cell = view.cell(eval_set, row, metric)
    reference = view.elicitation(eval_set, row, metric) if row.eval_prompt != NEUTRAL else None
    seeds = tuple(cell.by_seed.values()) if cell else ()
    return Bar(view.label(row), colour, _point(cell), _note(cell), seeds, _point(reference))


def _point(cell: Cell | None) -> Point | None:
    return Point(cell.estimate.value, cell.estimate.low, cell.estimate.high) if cell else None


def _note(cell: Cell | None) -> str:
    if cell is None:
        return ""
    estimate = cell.estimate
    return (
        f"{estimate.k}/{estimate.n}"
        if isinstance(estimate, stats.Proportion)
        else f"{estimate.value:+.2f}".replace("-", "−")
    )


def _lines(view: View, metric: str, colours: dict[str, str]) -> list[Line]:
    lines = []
    for arm in view.arms:
        cells = view.curve(arm.name, metric) if arm.name != UNTRAINED else []
        if len(cells) < 2:
            continue
        seeds = sorted({seed for cell in cells if cell.examples_seen for seed in cell.by_seed})
        thin = tuple(
            tuple(
                (cell.examples_seen, cell.by_seed[seed]) for cell in cells if seed in cell.by_seed
            )
            for seed in seeds
        )
        lines.append(
            Line(
                arm.label,
                colours[arm.name],
                tuple(cell.examples_seen for cell in cells),
                tuple(map(_point, cells)),
                thin,
            )
        )
    return lines


def _write_texts(figure: Figure, view: View, caption: Sequence[str], foot: float) -> None:
    height = figure.get_figheight()
    left = 0.12 / WIDTH
    figure.text(
        left,
        1 - 0.24 / height,
        "GCD sycophancy: each training prompt beside its controls",
        fontsize=13,
        fontweight="bold",
        va="center",
    )
    figure.text(
        left, 1 - 0.47 / height, subtitle(view), fontsize=9, color=figures.SOFT, va="center"
    )
    mark = dict(linestyle="none", markeredgecolor=figures.INK, markerfacecolor="white")
    interval = Line2D(
        [],
        [],
        color=figures.INK,
        linewidth=1.1,
        marker="|",
        markersize=7,
        markeredgewidth=1.1,
        label="95 % interval",
    )
    handles = [interval]
    blocks = view.blocks(MAIN_SET)
    if any(view.elicitation(MAIN_SET, row, SYCOPHANCY) for row in (*blocks.own, *blocks.other)):
        handles.append(
            Line2D(
                [],
                [],
                marker="D",
                markersize=4.5,
                label="untrained model under the same prompt (elicitation)",
                **mark,
            )
        )
    if view.n_seeds > 1:
        handles.append(
            Line2D(
                [], [], marker="o", markersize=3.5, markeredgewidth=0.6, label="one seed", **mark
            )
        )
    figure.legend(
        handles=handles,
        handler_map={interval: HandlerLine2D(numpoints=2)},
        loc="center left",
        ncols=3,
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
            color=figures.SOFT,
            va="top",
        )


def subtitle(view: View) -> str:
    """Model, dose, seeds, the n behind a bar, and the judge."""
    rows = view.blocks(MAIN_SET).neutral
    doses = [
        cell.examples_seen
        for row in rows
        if row.arm != UNTRAINED and (cell := view.cell(MAIN_SET, row, SYCOPHANCY))
    ]
    forms = ((SYCOPHANCY, "wrong"), (CONFIRMS_RIGHT, "right"), (CAPABILITY, "asked"))
    counts = [f"{n} {form}" for metric, form in forms if (n := _n(view, rows, metric))]
    seeds = view.n_seeds
    parts = (
        view.results.model,
        f"{max(doses)} training examples an arm" if doses else "before training",
        f"{seeds} seed{'s' * (seeds > 1)}",
        f"a bar's n: {', '.join(counts)}",
        f"{view.judge} judge",
    )
    return "  ·  ".join(parts)


def _n(view: View, rows: Sequence[Row], metric: str) -> str:
    sizes = sorted({cell.estimate.n for row in rows if (cell := view.cell(MAIN_SET, row, metric))})
    return "–".join(str(size) for size in sizes[:1] + sizes[1:][-1:])


def _caption(view: View) -> str:
    seeds = view.n_seeds
    spread = "not how training runs differ: " + (
        "there is one seed"
        if seeds == 1
        else "for that see the single seeds, which are pooled in a bar"
    )
    text = (
        "Intervals: Clopper–Pearson, for discrimination Newcombe; they cover the sampling of"
        f" claims, {spread}. "
    )
    undecided = gcd_view.undecided_range(view)
    if undecided and undecided[1] > 0:
        low, high = (f"{100 * share:.0f}" for share in undecided)
        text += (
            f"Claims without a verdict ({low if low == high else f'{low} to {high}'} % of a bar's"
            " claims) count as not confirmed. "
        )
    return " ".join(
        [text.strip(), *gcd_view.caveats(view), f"Data: {view.results.provenance.rstrip('.')}."]
    )
