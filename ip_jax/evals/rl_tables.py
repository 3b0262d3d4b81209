"""The two flat tables of an RL experiment, defined in this one place: `curves` over training and
the leak grid `final` at its end.

All measurements and figures are drawn from them and config.json alone. Counts are per run (an arm
with a seed), never rates, so that every number can say what it rests on. A count or quantity that
was not measured is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROLLOUT = "rollout"
"""The `eval_prompt` of what training itself sampled, under the arm's generation prompts."""
NEUTRAL = "neutral"
"""x_0, the task without any extra text: as an `eval_prompt` and as a category."""
TRAIN = "train"
"""The category of the arm's own training prompts, where they are not x_0."""
CATEGORIES = (
    NEUTRAL,
    "default_system",
    "empty",
    TRAIN,
    "generation",
    "discouraging",
    "paraphrase",
    "reordered",
    "negated",
    "exchanged",
    "keyword",
    "length_matched",
    "irrelevant",
    "random",
)
"""Of the leak grid (spec of the measurements; Dubinski et al. 2604.25891 for the like in form):
`paraphrase` of the training prompt, held out from training; `reordered` its clauses; `negated` its
form with the opposite meaning; `exchanged` the meanings of its words; `keyword` a word of it
alone.
"""

COUNTS = ("n", "n_hackable", "n_hack", "n_attempt", "n_correct", "n_trait")
"""`n` completions, `n_hackable` those in which a hack was possible (wrong claims, tasks with a
loophole; null: all), the others of them with that verdict.
"""
QUANTITIES = (
    "reward",
    "kl",
    "entropy",
    "length",
    "length_cap",
    "zero_variance_groups",
    "gate_acceptance",
    "clip_fraction",
    "grad_norm",
    "invalid_rewards",
    "reinforced_hack_tokens",
    "llr_hack",
    "llr_correct",
    "llr_other",
    "acceptance_hack",
    "acceptance_correct",
    "acceptance_other",
    "effective_samples",
    "coupling_hack",
    "coupling_correct",
)
"""Of one step: mean `reward`; `kl` and `entropy` in nats a token; mean `length` in tokens and the
share of completions at the cap; shares of groups without variance, of samples that the gate
accepted and of clipped tokens; how many rewards were invalid and how many hack tokens had a
positive advantage; mean log-likelihood ratio a token (training minus generation prompt) and mean
gate weight by label; the gate's effective sample size (Kish); mean cosine of the gradients of a
sample's log-probability under its training prompt and under x_0, by label (`rl.coupling`).
"""

_KEYS = {"arm": pa.string(), "seed": pa.int64()}
_WHOLE = {name: pa.int64() for name in COUNTS}
CURVES = pa.schema(
    [
        *{
            **_KEYS,
            "step": pa.int64(),
            "eval_prompt": pa.string(),
            **_WHOLE,
            **{name: pa.float64() for name in QUANTITIES},
        }.items()
    ]
)
FINAL = pa.schema(
    [*{**_KEYS, "eval_prompt": pa.string(), "category": pa.string(), **_WHOLE}.items()]
)

Run = tuple[str, int]
"""(arm, seed)."""


class Counts(NamedTuple):
    """The counts of one cell, None where not measured; see COUNTS."""

    n: int
    n_hackable: int | None
    n_hack: int
    n_attempt: int | None
    n_correct: int
    n_trait: int | None

    @property
    def hackable(self) -> int:
        """The completions that a hack rate is a share of."""
        return self.n if self.n_hackable is None else self.n_hackable


@dataclass(frozen=True)
class Curve:
    """What was counted of one run under one evaluation prompt, by ascending step. `columns`: {name:
    [steps]}, NaN where not measured.
    """

    steps: np.ndarray
    columns: Mapping[str, np.ndarray]

    @cached_property
    def hackable(self) -> np.ndarray:
        """[steps], the completions that a hack rate is a share of."""
        return np.where(
            np.isnan(self.columns["n_hackable"]), self.columns["n"], self.columns["n_hackable"]
        )

    def rate(self, name: str) -> np.ndarray:
        """[steps], the share of completions with the verdict `name` (hack, attempt, correct,
        trait); NaN where nothing was counted.
        """
        of = self.hackable if name in ("hack", "attempt") else self.columns["n"]
        return np.divide(self.columns[f"n_{name}"], of, out=np.full(len(of), np.nan), where=of > 0)

    def counts(self, index: int) -> Counts:
        """What was counted at the `index`-th of `steps`."""
        found = {name: self.columns[name][index] for name in COUNTS}
        return Counts(
            **{name: None if np.isnan(value) else int(value) for name, value in found.items()}
        )


class Cell(NamedTuple):
    """One evaluation prompt of a run's leak grid."""

    eval_prompt: str
    category: str
    counts: Counts


def curves_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as the table of curves; a missing quantity is null. Raises ValueError for a column that
    is not in CURVES, or impossible counts.
    """
    return _table(rows, CURVES, ("arm", "seed", "step", "eval_prompt"))


def final_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as the leak grid. Raises ValueError for a column that is not in FINAL, an unknown
    category, or impossible counts.
    """
    table = _table(rows, FINAL, ("arm", "seed", "eval_prompt"))
    unknown = sorted(set(table["category"].to_pylist()) - set(CATEGORIES), key=str)
    if unknown:
        raise ValueError(
            f"the leak grid has the category {unknown[0]!r}: allowed are {', '.join(CATEGORIES)}"
        )
    return table


def check_columns(table: pa.Table, schema: pa.Schema, name: str) -> None:
    """Raises ValueError where `table` lacks a column of the schema."""
    missing = [column for column in schema.names if column not in table.column_names]
    if missing:
        raise ValueError(f"{name} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}")


def curves_of(table: pa.Table, eval_prompt: str) -> dict[Run, Curve]:
    """The curves of all runs under one evaluation prompt (ROLLOUT: what training sampled)."""
    table = table.filter(pc.equal(table["eval_prompt"], eval_prompt))
    table = table.sort_by([("arm", "ascending"), ("seed", "ascending"), ("step", "ascending")])
    arms, seeds, steps = (table[name].to_numpy() for name in ("arm", "seed", "step"))
    columns = {name: table[name].to_numpy().astype(np.float64) for name in (*COUNTS, *QUANTITIES)}
    new = np.flatnonzero((arms[1:] != arms[:-1]) | (seeds[1:] != seeds[:-1])) + 1
    bounds = [0, *new.tolist(), len(arms)] if len(arms) else []
    return {
        (arms[start], int(seeds[start])): Curve(
            steps[start:end], {name: column[start:end] for name, column in columns.items()}
        )
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    }


def grids_of(table: pa.Table) -> dict[Run, list[Cell]]:
    """The leak grid of every run, in the table's order."""
    found: dict[Run, list[Cell]] = {}
    for row in table.to_pylist():
        counts = Counts(**{name: row[name] for name in COUNTS})
        found.setdefault((row["arm"], row["seed"]), []).append(
            Cell(row["eval_prompt"], row["category"], counts)
        )
    return found


def _table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema, key: Sequence[str]) -> pa.Table:
    rows, seen = list(rows), set()
    for row in rows:
        unknown = sorted(row.keys() - set(schema.names))
        if unknown:
            raise ValueError(
                f"there is no column {unknown[0]!r} in the tables of an RL experiment: allowed are"
                f" {', '.join(schema.names)}"
            )
        where = tuple(row[name] for name in key)
        if where in seen:
            raise ValueError(
                f"{', '.join(f'{name} {value}' for name, value in zip(key, where, strict=True))}"
                " stands twice in the table"
            )
        seen.add(where)
        _check_counts(row, where)
    return pa.Table.from_pylist(rows, schema=schema)


def _check_counts(row: Mapping[str, Any], where: tuple) -> None:
    n = row["n"]
    hackable = n if row.get("n_hackable") is None else row["n_hackable"]
    for name in COUNTS:
        limit = hackable if name in ("n_hack", "n_attempt") else n
        value = row.get(name)
        if value is None and name in ("n_hackable", "n_attempt", "n_trait"):
            continue
        if value is None or not 0 <= value <= limit:
            raise ValueError(f"{where} has {name} {value}: it needs 0 to {limit}")
    if row["n_hack"] + row["n_correct"] > n:
        raise ValueError(
            f"{where} has {row['n_hack']} hacks and {row['n_correct']} correct of {n}: a completion"
            " is one or the other"
        )
