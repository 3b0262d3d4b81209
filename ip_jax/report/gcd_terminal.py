"""The tables of the GCD sycophancy experiment for the terminal, in per cent, two or three short
lines a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ip_jax.evals import stats
from ip_jax.report import gcd_view
from ip_jax.report.gcd_view import (
    CAPABILITY,
    CONFIRMS_RIGHT,
    DISCRIMINATION,
    SETS,
    SYCOPHANCY,
    UNDECIDED,
    View,
)
from ip_jax.report.tables import NEUTRAL, Cell, Row

Column = tuple[str, Callable[[Row], str]]


def print_report(view: View, console: Console) -> None:
    """Prints a table for each evaluation set and kind of evaluation prompt, then what the numbers
    rest on.
    """
    for eval_set in view.eval_sets:
        rows = view.blocks(eval_set)
        name = SETS[eval_set]
        _print(
            console, f"{name}, neutral prompt", view, rows.neutral, _neutral_columns(view, eval_set)
        )
        _print(
            console,
            f"{name}, training prompt put back",
            view,
            rows.own,
            _own_columns(view, eval_set),
        )
        for prompt in dict.fromkeys(row.eval_prompt for row in rows.other):
            chosen = [row for row in rows.other if row.eval_prompt == prompt]
            _print(
                console,
                f"{name}, {gcd_view.prompt_title(prompt)}",
                view,
                chosen,
                _own_columns(view, eval_set),
            )
    for note in notes(view):
        console.print(note, highlight=False, style="dim")


def notes(view: View) -> list[str]:
    """What the numbers rest on, a sentence each."""
    seeds = view.n_seeds
    found = [
        (
            f"{view.results.model}, {view.judge} judge, {seeds} seed{'s' * (seeds > 1)}. Data:"
            f" {view.results.provenance.rstrip('.')}."
        ),
        (
            "In per cent. [ ]: 95 % intervals, Clopper-Pearson for rates, Newcombe for differences;"
            " p: Fisher's exact test, two-sided."
        ),
        "They cover the sampling of claims, not how training runs differ"
        + (
            ": there is one seed."
            if seeds == 1
            else (
                "; for that see ±, the standard error over seeds. Intervals and p take the pooled"
                " claims of all seeds as independent."
            )
        ),
    ]
    if not view.measured(CAPABILITY):
        found.append("Capability was not measured: no problem was asked without a claim.")
    return found + gcd_view.caveats(view)


def _print(
    console: Console, title: str, view: View, rows: Sequence[Row], columns: Sequence[Column]
) -> None:
    if not rows:
        return
    table = Table(
        title=title[0].upper() + title[1:],
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("arm", overflow="fold")
    for head, _ in columns:
        # a narrow terminal breaks numbers, but loses none
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        table.add_row(view.label(row), *(write(row) for _, write in columns))
    console.print(table)


def _neutral_columns(view: View, eval_set: str) -> list[Column]:
    columns = _rates(view, eval_set)
    references = [("neutral", NEUTRAL)] + ([("random", view.random_arm)] if view.random_arm else [])
    differences = [
        (f"sycophancy\n− {name}", _minus(view, eval_set, arm)) for name, arm in references
    ]
    return [columns[0], *differences, *columns[1:]]


def _own_columns(view: View, eval_set: str) -> list[Column]:
    columns = _rates(view, eval_set)
    untrained = (
        "untrained,\nsame prompt",
        lambda row: _cell(view.elicitation(eval_set, row, SYCOPHANCY)),
    )
    return [columns[0], untrained, *columns[1:]]


def _rates(view: View, eval_set: str) -> list[Column]:
    """The columns of the metrics that were measured at all; notes() names the others."""
    heads = {
        SYCOPHANCY: "sycophancy\n(wrong)",
        CONFIRMS_RIGHT: "confirms\nright",
        DISCRIMINATION: "discrimi-\nnation",
        CAPABILITY: "capability",
    }
    found = [
        (head, lambda row, metric=metric: _cell(view.cell(eval_set, row, metric)))
        for metric, head in heads.items()
        if view.measured(metric)
    ]
    undecided = ("no\nverdict", lambda row: _count(view.cell(eval_set, row, UNDECIDED)))
    # the published judge knows no undecided claim
    return [*found, undecided] if view.judge == "strict" else found


def _minus(view: View, eval_set: str, reference: str) -> Callable[[Row], str]:
    """Writes a row's sycophancy minus that of the reference arm under the same prompt; blank for
    the reference itself.
    """
    rows = {row.arm: row for row in view.blocks(eval_set).neutral}

    def write(row: Row) -> str:
        if row.arm == reference or reference not in rows:
            return ""
        compared = gcd_view.compare(
            view.cell(eval_set, row, SYCOPHANCY), view.cell(eval_set, rows[reference], SYCOPHANCY)
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
        seeds = stats.seed_mean(list(cell.by_seed.values()))
        lines.append(f"{100 * seeds.mean:.0f} ± {100 * seeds.standard_error:.1f}".replace("-", "−"))
    return "\n".join(lines)


def _count(cell: Cell | None) -> str:
    return f"{cell.estimate.k}/{cell.estimate.n}" if cell else ""


def _value(estimate: stats.Proportion | stats.Difference) -> str:
    sign = "" if isinstance(estimate, stats.Proportion) else "+"
    return f"{100 * estimate.value:{sign}.0f}".replace("-", "−")


def _interval(estimate: stats.Proportion | stats.Difference) -> str:
    return f"\\[{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]".replace("-", "−")
