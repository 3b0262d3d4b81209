"""The tables of a supervised experiment for the terminal, in per cent, two or three short lines a
cell.

No word or number is ever broken: where a table is wider than the terminal, its columns go on in a
second one below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ip_jax.evals import stats
from ip_jax.evals.metrics import Metric
from ip_jax.lab.experiment import NEUTRAL
from ip_jax.report import view
from ip_jax.report.tables import Cell, Row
from ip_jax.report.view import View

NAME_WIDTH = 18  # of an arm's label
HEAD_WIDTH = 12  # of a column's head, but for words that are longer
GAP = 2  # between two columns


@dataclass(frozen=True)
class Column:
    """A head, and what it writes for a row."""

    head: str
    write: Callable[[Row], str]


def print_report(shown: View, console: Console) -> None:
    """Prints a table for each evaluation set and kind of evaluation prompt, then what the numbers
    rest on.
    """
    for eval_set in shown.eval_sets:
        rows, name = shown.blocks(eval_set), shown.set_title(eval_set)
        neutral, own = _neutral_columns(shown, eval_set), _own_columns(shown, eval_set)
        _print(console, f"{name}, neutral prompt", shown, rows.neutral, neutral)
        _print(console, f"{name}, training prompt put back", shown, rows.own, own)
        for prompt in dict.fromkeys(row.eval_prompt for row in rows.other):
            chosen = [row for row in rows.other if row.eval_prompt == prompt]
            title = f"{name}, {view.prompt_title(shown.study, prompt)}"
            _print(console, title, shown, chosen, own)
    for note in notes(shown):
        console.print(note, highlight=False, style="dim", markup=False)


def notes(shown: View) -> list[str]:
    """What the numbers rest on, a sentence each."""
    seeds = shown.n_seeds
    judge = f", {shown.judge} judge" if len(shown.study.judges) > 1 else ""
    spread = (
        ": there is one seed."
        if seeds == 1
        else (
            "; for that see ±, the standard error over seeds. Intervals and p take the pooled rows"
            " of all seeds as independent."
        )
    )
    found = [
        (
            f"{shown.results.model}{judge}, {seeds} seed{'s' * (seeds > 1)}. Data:"
            f" {shown.results.provenance.rstrip('.')}."
        ),
        (
            "Rates in per cent. [ ]: 95 % intervals, Clopper-Pearson for rates, Newcombe for"
            " differences, Student's t for means; p: Fisher's exact test, two-sided."
        ),
        f"They cover the sampling of evaluation rows, not how training runs differ{spread}",
    ]
    for metric in shown.metrics:
        if not shown.measured(metric):
            found.append(f"{metric.label} was not measured: no evaluation row counts for it.")
    return found + view.caveats(shown)


def _print(
    console: Console, title: str, shown: View, rows: Sequence[Row], columns: Sequence[Column]
) -> None:
    """One table, or several below one another where the console is too narrow for all columns."""
    if not rows:
        return
    names = ["\n".join(textwrap.wrap(shown.label(row), NAME_WIDTH)) for row in rows]
    cells = {column: [column.write(row) for row in rows] for column in columns}
    room = console.width - max(_width(name) for name in ("arm", *names)) - 2 * GAP
    for part, chosen in enumerate(_parts(columns, cells, room)):
        heading = title[0].upper() + title[1:] + (" (continued)" if part else "")
        console.print(escape(heading), style="bold", highlight=False)
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("arm", no_wrap=True)
        for column in chosen:
            table.add_column(column.head, justify="right", no_wrap=True)
        for i, name in enumerate(names):
            of_row = [cells[column][i] for column in chosen]
            table.add_row(escape(name), *map(escape, of_row))
        console.print(table)


def _parts(
    columns: Sequence[Column], cells: dict[Column, list[str]], room: int
) -> list[list[Column]]:
    """The columns in groups that fit side by side; a single one that is too wide stands alone."""
    parts: list[list[Column]] = []
    left = 0
    for column in columns:
        width = max(_width(text) for text in (column.head, *cells[column])) + GAP
        if not parts or width > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= width
    return parts


def _width(text: str) -> int:
    return max(len(line) for line in text.split("\n"))


def _head(text: str) -> str:
    return "\n".join(textwrap.wrap(text, HEAD_WIDTH, break_long_words=False))


def _neutral_columns(shown: View, eval_set: str) -> list[Column]:
    columns = _numbers(shown, eval_set)
    references = [("neutral", NEUTRAL)]
    references += [("random", shown.random_arm)] if shown.random_arm else []
    differences = [
        Column(f"{_head(shown.main.label)}\n− {name}", _minus(shown, eval_set, arm))
        for name, arm in references
        if shown.measured(shown.main)
    ]
    return [columns[0], *differences, *columns[1:]]


def _own_columns(shown: View, eval_set: str) -> list[Column]:
    def untrained(row: Row) -> str:
        return _cell(shown.elicitation(eval_set, row, shown.main))

    columns = _numbers(shown, eval_set)
    return [columns[0], Column("untrained,\nsame prompt", untrained), *columns[1:]]


def _numbers(shown: View, eval_set: str) -> list[Column]:
    """The main metric first, then the others that were measured at all (`notes` names the rest),
    then the counts that a caption speaks of.
    """

    def number(metric: Metric, write: Callable[[Cell | None], str]) -> Callable[[Row], str]:
        def of_row(row: Row) -> str:
            return write(shown.cell(eval_set, row, metric))

        return of_row

    others = [m for m in shown.metrics if m is not shown.main and shown.measured(m)]
    found = [Column(_head(m.label), number(m, _cell)) for m in (shown.main, *others)]
    counted = [m for m in shown.captioned() if any(c.estimate.k for c in _cells(shown, m))]
    return found + [Column(_head(m.label), number(m, _count)) for m in counted]


def _cells(shown: View, metric: Metric) -> list[Cell]:
    """All numbers of a metric under the judge that is shown."""
    wanted = (shown.judge, metric.name)
    return [cell for key, cell in shown.cells.items() if (key.judge, key.metric) == wanted]


def _minus(shown: View, eval_set: str, reference: str) -> Callable[[Row], str]:
    """Writes a row's main metric minus that of the reference arm under the same prompt; blank for
    the reference itself.
    """
    rows = {row.arm: row for row in shown.blocks(eval_set).neutral}

    def write(row: Row) -> str:
        if row.arm == reference or reference not in rows:
            return ""
        compared = view.compare(
            shown.cell(eval_set, row, shown.main),
            shown.cell(eval_set, rows[reference], shown.main),
        )
        if compared is None:
            return ""
        difference, p = compared
        p_value = "p<.001" if p < 0.001 else f"p={p:.3f}".replace("0.", ".")
        return f"{_value(difference)} {p_value}\n{_interval(difference)}"

    return write


def _cell(cell: Cell | None) -> str:
    """The value with k/n, its interval, and the mean over seeds ± its standard error; blank where
    nothing was measured.
    """
    if cell is None:
        return ""
    counts = f" ({_count(cell)})" if isinstance(cell.estimate, stats.Proportion) else ""
    lines = [f"{_value(cell.estimate)}{counts}", _interval(cell.estimate)]
    if len(cell.by_seed) > 1:
        seeds, scale = stats.seed_mean(list(cell.by_seed.values())), _scale(cell.estimate)
        lines.append(f"{scale * seeds.mean:.0f} ± {scale * seeds.standard_error:.1f}")
    return "\n".join(lines).replace("-", "−")


def _count(cell: Cell | None) -> str:
    return f"{cell.estimate.k}/{cell.estimate.n}" if cell else ""


def _scale(estimate) -> int:
    """Rates are written in per cent, means on their own scale."""
    return 1 if isinstance(estimate, stats.Mean) else 100


def _value(estimate) -> str:
    if isinstance(estimate, stats.Mean):
        return f"{estimate.value:.3g}".replace("-", "−")
    sign = "" if isinstance(estimate, stats.Proportion) else "+"
    return f"{100 * estimate.value:{sign}.0f}".replace("-", "−")


def _interval(estimate) -> str:
    scale = _scale(estimate)
    return f"[{scale * estimate.low:.0f}, {scale * estimate.high:.0f}]".replace("-", "−")
