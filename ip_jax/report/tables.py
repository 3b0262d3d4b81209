"""The numbers of an experiment, from its transcripts table alone: one cell for each arm, set,
prompt, step, judge and metric.

A cell without a measurement stays without a number: it is blank in the CSV and in the terminal,
never zero.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from etils import epath

from ip_jax.evals import stats
from ip_jax.evals.metrics import Estimate, Metric, measure
from ip_jax.lab.experiment import NEUTRAL, UNTRAINED
from ip_jax.training.results import write_whole

Judges = Mapping[str, Sequence[Metric]]  # a judge's name -> the metrics of its verdicts


class Key(NamedTuple):
    """What a number is about."""

    eval_set: str
    arm: str
    eval_prompt: str
    step: int
    judge: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """A number: `estimate` pools the seeds, `by_seed` has each seed's own value, where it was
    measured.
    """

    examples_seen: int
    own_prompt: bool
    estimate: Estimate
    by_seed: Mapping[int, float]

    @property
    def measured(self) -> bool:
        """Whether there is anything behind the number."""
        return not math.isnan(self.estimate.value)


Cells = Mapping[Key, Cell]


class Row(NamedTuple):
    """A line of a table or a bar of a figure: an arm under an evaluation prompt, at one step."""

    arm: str
    eval_prompt: str
    step: int


class Blocks(NamedTuple):
    """The rows that are shown of one evaluation set: under the neutral prompt, under the arm's own
    training prompt, and the others.
    """

    neutral: list[Row]
    own: list[Row]
    other: list[Row]


def summarise(transcripts: pa.Table, judges: Judges) -> Cells:
    """All cells of a transcripts table, in its order of arms and prompts, steps ascending.

    Seeds are pooled in `estimate`. Raises MetricError for rows that do not belong together.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in transcripts.to_pylist():
        groups.setdefault(
            (row["eval_set"], row["arm"], row["eval_prompt"], row["step"]), []
        ).append(row)
    cells = {}
    for group in sorted(groups, key=lambda key: key[-1]):  # stable: only the steps are sorted
        rows = groups[group]
        seeds = sorted({row["seed"] for row in rows})
        for judge, metrics in judges.items():
            single = {
                seed: measure(metrics, [row for row in rows if row["seed"] == seed])
                for seed in seeds
            }
            for metric, estimate in measure(metrics, rows).items():
                by_seed = {
                    seed: found[metric].value
                    for seed, found in single.items()
                    if not math.isnan(found[metric].value)
                }
                cells[Key(*group, judge, metric)] = Cell(
                    rows[0]["examples_seen"], rows[0]["own_prompt"], estimate, by_seed
                )
    return cells


def summarise_labels(transcripts: pa.Table, column: str, judges: Judges) -> dict[str, Cells]:
    """The cells of the rows with each value of `column` alone, for the evaluation sets in which it
    has several. Raises as `summarise`.
    """
    labels = list(
        zip(transcripts["eval_set"].to_pylist(), transcripts[column].to_pylist(), strict=True)
    )
    sets = Counter(eval_set for eval_set, _ in set(labels))
    wanted = dict.fromkeys(label for eval_set, label in labels if sets[eval_set] > 1)
    return {
        wanted_label: summarise(
            transcripts.filter([sets[s] > 1 and label == wanted_label for s, label in labels]),
            judges,
        )
        for wanted_label in wanted
    }


def final_rows(cells: Cells, arms: Sequence[str], eval_set: str) -> Blocks:
    """The rows of `eval_set` at the last step that any arm reached, in the order of `arms`.

    An arm that has not come so far is left out rather than compared at another step. The untrained
    model has a row under the neutral prompt; under another prompt only while no trained arm has
    one.
    """
    steps = {key.step for key in cells if key.eval_set == eval_set and key.arm != UNTRAINED}
    found: dict[Row, bool] = {}
    for arm in arms:
        step = 0 if arm == UNTRAINED else max(steps, default=0)
        for key, cell in cells.items():
            if (key.eval_set, key.arm, key.step) == (eval_set, arm, step):
                found[Row(arm, key.eval_prompt, step)] = cell.own_prompt
    trained_prompts = {row.eval_prompt for row in found if row.arm != UNTRAINED}
    shown = [
        row
        for row in found
        if row.arm != UNTRAINED
        or row.eval_prompt == NEUTRAL
        or row.eval_prompt not in trained_prompts
    ]
    neutral = [row for row in shown if row.eval_prompt == NEUTRAL]
    own = [row for row in shown if found[row] and row.eval_prompt != NEUTRAL]
    return Blocks(neutral, own, [row for row in shown if row not in neutral and row not in own])


def write_csv(path: epath.Path, cells: Cells, of_labels: Mapping[str, Cells]) -> None:
    """One line a cell, those over all labels first, whole or absent. `seed_mean` and `seed_se`
    (standard error over seeds) need two seeds; `k` belongs to a proportion, `n` to a mean as well.

    Raises OSError where it cannot be written.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {"label": label, **_line(key, cell)}
        for label, found in {"all": cells, **of_labels}.items()
        for key, cell in found.items()
    )
    write_whole(path, out.getvalue().encode())


_COLUMNS = (
    "eval_set",
    "label",
    "arm",
    "eval_prompt",
    "own_prompt",
    "step",
    "examples_seen",
    "judge",
    "metric",
    "k",
    "n",
    "value",
    "low",
    "high",
    "interval",
    "n_seeds",
    "seed_mean",
    "seed_se",
)


def _line(key: Key, cell: Cell) -> dict[str, Any]:
    line = key._asdict() | {
        "own_prompt": cell.own_prompt,
        "examples_seen": cell.examples_seen,
        "n_seeds": len(cell.by_seed),
    }
    estimate = cell.estimate
    if isinstance(estimate, stats.Proportion | stats.Mean):
        line |= {"n": estimate.n}
    if cell.measured:
        proportion = isinstance(estimate, stats.Proportion)
        line |= {
            "value": _number(estimate.value),
            "low": _number(estimate.low),
            "high": _number(estimate.high),
        }
        line |= (
            {"k": estimate.k, "interval": "clopper-pearson"}
            if proportion
            else {"interval": estimate.method}
        )
    if len(cell.by_seed) > 1:
        seeds = stats.seed_mean(list(cell.by_seed.values()))
        line |= {"seed_mean": _number(seeds.mean), "seed_se": _number(seeds.standard_error)}
    return line


def _number(value: float) -> str:
    return f"{value:.6g}"
