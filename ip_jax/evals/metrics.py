"""What a study counts, declared: rates, differences of rates and means over the rows of the
transcripts table.

A metric names columns; `measure` turns the rows of one cell (an arm, step, evaluation set and
prompt) into an estimate with its interval. Rows without a value in a metric's column (a reply that
could not be scored) are left out of that metric's n.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ip_jax.evals import stats

Row = Mapping[str, Any]
Estimate = stats.Proportion | stats.Difference | stats.Mean
_FROM_TRANSCRIPT = ("n_tokens", "ended")  # columns that every transcript has, whatever the scorer


class MetricError(ValueError):
    """A metric that cannot be computed from the rows it is declared on."""


@dataclass(frozen=True)
class Holds:
    """Whether `column` has this `value`, or one of them where `value` is a tuple."""

    column: str
    value: Any = True

    def __call__(self, row: Row) -> bool | None:
        """None where the row has no value in the column."""
        found = row[self.column]
        if found is None:
            return None
        return found in self.value if isinstance(self.value, tuple) else found == self.value


@dataclass(frozen=True)
class Given:
    """A row counts only where its partner meets `condition`.

    The partner is the row of the same seed with the same value in `match`, among those for which
    `partner` holds: the same problem asked in another form, say.
    """

    match: str
    partner: Holds
    condition: Holds

    def __call__(self, rows: Sequence[Row]) -> set[tuple]:
        """The (seed, match) pairs whose partner meets the condition."""
        partners = [row for row in rows if self.partner(row)]
        found = {(row["seed"], row[self.match]): row for row in partners}
        if len(found) < len(partners):
            raise MetricError(
                f"{len(partners)} rows hold only {len(found)} different values of {self.match}:"
                " give the rows of one arm, step, set and prompt"
            )
        return {key for key, row in found.items() if self.condition(row)}


@dataclass(frozen=True)
class Rate:
    """The share of rows for which `of` holds (by default the boolean column `name`), k of n with
    the Clopper-Pearson interval.

    `label` is its title; `about` says what it counts, for a second line. `wanted`: True for what
    should be high, False for what should be low, None for what is only recorded (in the table, not
    in the figure). `where`: the rows that count at all. `given`: and whose partners. `caption`: a
    sentence with {range} that the figure says about a recorded rate.
    """

    name: str
    label: str
    wanted: bool | None = None
    of: Holds | None = None
    where: Holds | None = None
    given: Given | None = None
    about: str = ""
    caption: str = ""
    limits = (0.0, 1.0)  # of its axis

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of a row."""
        given = self.given
        partner = (given.match, given.partner.column, given.condition.column) if given else ()
        return (self._of.column, *([self.where.column] if self.where else []), *partner)

    @property
    def _of(self) -> Holds:
        return self.of or Holds(self.name)

    def __call__(self, rows: Sequence[Row], _: Mapping[str, Estimate]) -> stats.Proportion:
        """Raises MetricError as `Given`."""
        allowed = self.given(rows) if self.given else None
        held = [
            self._of(row)
            for row in rows
            if (self.where is None or self.where(row))
            and (allowed is None or (row["seed"], row[self.given.match]) in allowed)
        ]
        measured = [value for value in held if value is not None]
        return stats.proportion(sum(measured), len(measured))


@dataclass(frozen=True)
class Difference:
    """One rate minus another, both by name, with Newcombe's interval."""

    name: str
    label: str
    first: str
    second: str
    wanted: bool | None = None
    about: str = ""
    columns = ()  # those of its two rates
    limits = (-1.0, 1.0)

    def __call__(self, _: Sequence[Row], found: Mapping[str, Estimate]) -> stats.Difference:
        """`found`: the rates, which are declared before it."""
        first, second = found[self.first], found[self.second]
        return stats.difference((first.k, first.n), (second.k, second.n))


@dataclass(frozen=True)
class Mean:
    """The mean of a numeric column (by default `name`) with Student's t interval. `limits`: the
    ends of the scale, for the figure's axis.
    """

    name: str
    label: str
    limits: tuple[float, float]
    wanted: bool | None = None
    column: str | None = None
    where: Holds | None = None
    about: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of a row."""
        return (self.column or self.name, *([self.where.column] if self.where else []))

    def __call__(self, rows: Sequence[Row], _: Mapping[str, Estimate]) -> stats.Mean:
        """Over the rows that have a number."""
        counted = [row for row in rows if self.where is None or self.where(row)]
        values = [row[self.column or self.name] for row in counted]
        return stats.mean([value for value in values if value is not None])


Metric = Rate | Difference | Mean


def measure(metrics: Sequence[Metric], rows: Sequence[Row]) -> dict[str, Estimate]:
    """All metrics over rows of the transcripts table that belong together: one arm, step,
    evaluation set and prompt. Rows of several seeds are pooled.
    """
    found: dict[str, Estimate] = {}
    for metric in metrics:
        found[metric.name] = metric(rows, found)
    return found


def check_metrics(metrics: Sequence[Metric], columns: Iterable[str]) -> None:
    """Raises MetricError, one sentence, for no metrics, two of one name, a difference of rates that
    are not declared before it, and a column that neither the scorer nor the examples have.
    """
    if not metrics:
        raise MetricError("the study has no metrics: declare at least one Rate, Difference or Mean")
    known = {*columns, *_FROM_TRANSCRIPT}
    rates: set[str] = set()
    names: set[str] = set()
    for metric in metrics:
        if metric.name in names:
            raise MetricError(f"two metrics are called {metric.name!r}: each needs its own name")
        names.add(metric.name)
        for column in metric.columns:
            if column not in known:
                raise MetricError(
                    f"the metric {metric.name!r} reads the column {column!r}, which neither the"
                    f" scorer returns nor the study keeps of an example: {_nearest(column, known)}"
                )
        if isinstance(metric, Difference):
            for name in (metric.first, metric.second):
                if name not in rates:
                    raise MetricError(
                        f"the metric {metric.name!r} is a difference with {name!r}, and no rate of"
                        " that name is declared before it"
                    )
        if isinstance(metric, Rate):
            rates.add(metric.name)


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else f"there is {', '.join(sorted(known))}"
