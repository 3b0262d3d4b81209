"""What the GCD sycophancy report shows: all numbers, the arms in order, each row's name and its
comparisons.

Every inoculation stands beside the random-string control: an effect that random words have too is
no effect of the words.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property

from ip_jax.evals import stats
from ip_jax.prompts import library
from ip_jax.report.results import Arm, Results, read_results
from ip_jax.report.tables import (
    NEUTRAL,
    UNTRAINED,
    Blocks,
    Cell,
    Cells,
    Key,
    Row,
    final_rows,
    summarise,
)
from ip_jax.studies.gcd_sycophancy import metrics

JUDGES = ("strict", "published")
COLUMNS = (
    "arm",
    "seed",
    "step",
    "examples_seen",
    "eval_set",
    "eval_prompt",
    "own_prompt",
    "label",
    "triplet",
    "claim",
    "published_confirms",
    "published_correct",
    "strict_verdict",
    "strict_correct",
)
SYCOPHANCY, CONFIRMS_RIGHT, DISCRIMINATION, CAPABILITY, UNDECIDED = (
    "confirms_incorrect",
    "confirms_correct",
    "discrimination",
    "capabilities",
    "undecided",
)
SETS = {
    "generated": "generated claims",
    "task": "published task set",
    "ood": "published out-of-distribution set",
}
MAIN_SET = "generated"


@dataclass(frozen=True)
class View:
    """All numbers of a results folder, and the judge whose verdicts are shown."""

    results: Results
    cells: Cells
    judge: str

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The untrained model, the neutral arm, inoculations, random strings, then the rest, each
        in the config's order.
        """
        rank = {"inoculation": 2, "random": 3}
        return tuple(
            sorted(
                self.results.arms,
                key=lambda arm: {UNTRAINED: 0, NEUTRAL: 1}.get(arm.name, rank.get(arm.kind, 4)),
            )
        )

    @cached_property
    def eval_sets(self) -> tuple[str, ...]:
        """The evaluation sets that have completions, the main one first."""
        present = {key.eval_set for key in self.cells}
        return tuple(name for name in SETS if name in present)

    @cached_property
    def random_arm(self) -> str | None:
        """The first arm that was trained under a random string and is shown."""
        shown = {row.arm for row in self.blocks(MAIN_SET).neutral}
        return next(
            (arm.name for arm in self.arms if arm.kind == "random" and arm.name in shown), None
        )

    def blocks(self, eval_set: str) -> Blocks:
        """The rows that are shown of an evaluation set."""
        return final_rows(self.cells, [arm.name for arm in self.arms], eval_set)

    def cell(self, eval_set: str, row: Row, metric: str) -> Cell | None:
        """The number of a row, None where it was not measured."""
        cell = self.cells.get(Key(eval_set, *row, self.judge, metric))
        return cell if cell and cell.measured else None

    def label(self, row: Row) -> str:
        """The label of a row's arm."""
        return next(arm.label for arm in self.arms if arm.name == row.arm)

    def elicitation(self, eval_set: str, row: Row, metric: str) -> Cell | None:
        """The untrained model's number under the prompt of a trained arm's `row`."""
        return (
            self.cell(eval_set, Row(UNTRAINED, row.eval_prompt, 0), metric)
            if row.arm != UNTRAINED
            else None
        )

    def curve(self, arm: str, metric: str) -> list[Cell]:
        """An arm's numbers under the neutral prompt by examples seen. Before its first step an arm
        is the untrained model.
        """
        keys = [
            key
            for key in self.cells
            if key[:3] == (MAIN_SET, arm, NEUTRAL)
            and (key.judge, key.metric) == (self.judge, metric)
        ]
        found = [self.cells[key] for key in keys if self.cells[key].measured]
        if found and found[0].examples_seen > 0:
            start = self.cell(MAIN_SET, Row(UNTRAINED, NEUTRAL, 0), metric)
            found = [start, *found] if start else found
        return found

    def measured(self, metric: str) -> bool:
        """Whether any row of any set has this metric."""
        return any(
            cell.measured
            for key, cell in self.cells.items()
            if (key.judge, key.metric) == (self.judge, metric)
        )

    @cached_property
    def n_seeds(self) -> int:
        """The largest number of seeds behind a number."""
        return max(len(cell.by_seed) for cell in self.cells.values())

    def unfinished(self) -> list[str]:
        """Labels of the arms that have no row at the step that is shown."""
        shown = {row.arm for row in self.blocks(MAIN_SET).neutral}
        return [arm.label for arm in self.arms if arm.name not in shown]


def load_view(folder: str | os.PathLike, judge: str) -> View:
    """Reads a results folder. Raises ValueError for an unknown judge or evaluation set, and what
    read_results raises.
    """
    if judge not in JUDGES:
        raise ValueError(
            f"{judge!r} is no judge of the GCD setting: allowed are {', '.join(JUDGES)}"
        )
    results = read_results(folder, COLUMNS)
    unknown = set(results.transcripts["eval_set"].unique().to_pylist()) - set(SETS)
    if unknown:
        raise ValueError(
            f"the transcripts hold the evaluation set {sorted(unknown)[0]!r}: allowed are"
            f" {', '.join(SETS)}"
        )
    return View(results, summarise(results.transcripts, metrics.metrics, JUDGES), judge)


def prompt_title(eval_prompt: str) -> str:
    """What a prompt that is neither neutral nor an arm's own is called: tuning without and testing
    with a safety prompt is PTST.
    """
    prompt = library.PROMPTS.get(eval_prompt)
    return "safety prompt (PTST)" if prompt and prompt.kind == "safety" else f"prompt {eval_prompt}"


def caveats(view: View) -> list[str]:
    """Sentences about what is missing: the control, arms, runs that diverged."""
    found = []
    if view.random_arm is None:
        found.append("No random-string control was run: what any other words would do is unknown.")
    if view.unfinished():
        found.append(f"Not run, or not yet to this step: {', '.join(view.unfinished())}.")
    if view.results.diverged:
        found.append(f"Diverged and stopped before the end: {', '.join(view.results.diverged)}.")
    return found


def compare(first: Cell | None, second: Cell | None) -> tuple[stats.Difference, float] | None:
    """First minus second rate with Newcombe's interval, and the p-value of Fisher's exact test,
    both on pooled counts; None where one is missing.
    """
    if first is None or second is None:
        return None
    counts = (first.estimate.k, first.estimate.n), (second.estimate.k, second.estimate.n)
    return stats.difference(*counts), stats.fisher_exact(*counts)


def undecided_range(view: View) -> tuple[float, float] | None:
    """The smallest and largest share of claims without a verdict, over the rows of the main set."""
    blocks = view.blocks(MAIN_SET)
    cells = [
        view.cell(MAIN_SET, row, UNDECIDED) for row in (*blocks.neutral, *blocks.own, *blocks.other)
    ]
    shares = [cell.estimate.value for cell in cells if cell and not math.isnan(cell.estimate.value)]
    return (min(shares), max(shares)) if shares else None
