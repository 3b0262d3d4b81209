"""What a report shows of a supervised experiment: all numbers, the arms in order, each row's name
and its comparisons.

Every inoculation stands beside the random-string control: an effect that random words have too is
no effect of the words.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from ip_jax.evals import stats
from ip_jax.evals.metrics import Metric, Rate
from ip_jax.lab.experiment import NEUTRAL, UNTRAINED
from ip_jax.lab.study import Study
from ip_jax.report.results import Arm, Results, read_results
from ip_jax.report.tables import Blocks, Cell, Cells, Key, Row, final_rows, summarise


@dataclass(frozen=True)
class View:
    """All numbers of a results folder, what its study declares, and the judge whose verdicts are
    shown.
    """

    study: Study
    results: Results
    cells: Cells
    judge: str

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """What the figure shows, in the order of the study."""
        return self.study.shown(self.judge)

    @cached_property
    def unwanted(self) -> Metric | None:
        """The first metric that should be low: the one that arms are compared in."""
        return next((metric for metric in self.metrics if not metric.wanted), None)

    @cached_property
    def wanted(self) -> Metric | None:
        """The first metric that should be high."""
        return next((metric for metric in self.metrics if metric.wanted), None)

    @cached_property
    def main(self) -> Metric:
        """What the figure shows of further evaluation sets."""
        return self.unwanted or self.metrics[0]

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The untrained model, the neutral arm, inoculations, random strings, then the rest, each
        in the config's order.
        """
        named, kinds = {UNTRAINED: 0, NEUTRAL: 1}, {"inoculation": 2, "random": 3}
        return tuple(
            sorted(self.results.arms, key=lambda arm: named.get(arm.name, kinds.get(arm.kind, 4)))
        )

    @cached_property
    def eval_sets(self) -> tuple[str, ...]:
        """The evaluation sets that have completions, the main one first: in the order of the
        study's titles, then by name.
        """
        present = sorted({key.eval_set for key in self.cells})
        titled = [name for name in self.study.set_titles if name in present]
        return (*titled, *(name for name in present if name not in titled))

    @property
    def main_set(self) -> str:
        """The evaluation set of the panels."""
        return self.eval_sets[0]

    def set_title(self, eval_set: str) -> str:
        """What an evaluation set is called in words."""
        return self.study.set_titles.get(eval_set, eval_set.replace("_", " "))

    @cached_property
    def random_arm(self) -> str | None:
        """The first arm that was trained under a random string and is shown."""
        present = {row.arm for row in self.blocks(self.main_set).neutral}
        return next(
            (arm.name for arm in self.arms if arm.kind == "random" and arm.name in present), None
        )

    def blocks(self, eval_set: str) -> Blocks:
        """The rows that are shown of an evaluation set."""
        return final_rows(self.cells, [arm.name for arm in self.arms], eval_set)

    def cell(self, eval_set: str, row: Row, metric: Metric) -> Cell | None:
        """The number of a row, None where it was not measured."""
        cell = self.cells.get(Key(eval_set, *row, self.judge, metric.name))
        return cell if cell and cell.measured else None

    def label(self, row: Row) -> str:
        """The label of a row's arm."""
        return next(arm.label for arm in self.arms if arm.name == row.arm)

    def elicitation(self, eval_set: str, row: Row, metric: Metric) -> Cell | None:
        """The untrained model's number under the prompt of a trained arm's `row`."""
        if row.arm == UNTRAINED:
            return None
        return self.cell(eval_set, Row(UNTRAINED, row.eval_prompt, 0), metric)

    def curve(self, arm: str, metric: Metric) -> list[Cell]:
        """An arm's numbers under the neutral prompt by examples seen. Before its first step an arm
        is the untrained model.
        """
        keys = [
            key
            for key in self.cells
            if key[:3] == (self.main_set, arm, NEUTRAL)
            and (key.judge, key.metric) == (self.judge, metric.name)
        ]
        found = [self.cells[key] for key in keys if self.cells[key].measured]
        if found and found[0].examples_seen > 0:
            start = self.cell(self.main_set, Row(UNTRAINED, NEUTRAL, 0), metric)
            found = [start, *found] if start else found
        return found

    def measured(self, metric: Metric) -> bool:
        """Whether any row of any set has this metric."""
        return any(
            cell.measured
            for key, cell in self.cells.items()
            if (key.judge, key.metric) == (self.judge, metric.name)
        )

    @cached_property
    def n_seeds(self) -> int:
        """The largest number of seeds behind a number."""
        return max(len(cell.by_seed) for cell in self.cells.values())

    def unfinished(self) -> list[str]:
        """Labels of the arms that have no row at the step that is shown."""
        present = {row.arm for row in self.blocks(self.main_set).neutral}
        return [arm.label for arm in self.arms if arm.name not in present]

    def captioned(self) -> list[Rate]:
        """The recorded rates that a caption speaks of."""
        metrics = self.study.judges[self.judge]
        return [metric for metric in metrics if isinstance(metric, Rate) and metric.caption]


def load_view(folder: str | os.PathLike, study: Study, judge: str | None = None) -> View:
    """Reads a results folder; without a `judge` the study's first one is shown. Raises ValueError
    for an unknown judge, and what `read_results` raises.
    """
    judge = study.choose_judge(judge)
    results = read_results(folder, study)
    return View(study, results, summarise(results.transcripts, study.judges), judge)


def prompt_title(study: Study, eval_prompt: str) -> str:
    """What a prompt that is neither neutral nor an arm's own is called: tuning without and testing
    with a safety prompt is PTST.
    """
    kinds = {prompt.name: prompt.kind for prompt in study.prompts}
    safety = kinds.get(eval_prompt) == "safety"
    return "safety prompt (PTST)" if safety else f"prompt {eval_prompt}"


def caveats(view: View) -> list[str]:
    """Sentences about what is missing or could not be counted."""
    found = []
    if view.random_arm is None:
        found.append("No random-string control was run: what any other words would do is unknown.")
    if view.unfinished():
        found.append(f"Not run, or not yet to this step: {', '.join(view.unfinished())}.")
    if view.results.diverged:
        found.append(f"Diverged and stopped before the end: {', '.join(view.results.diverged)}.")
    if view.results.unscored:
        found.append(
            f"Replies that could not be scored, and count nowhere: {view.results.unscored}."
        )
    return found


def compare(first: Cell | None, second: Cell | None) -> tuple[stats.Difference, float] | None:
    """First minus second rate with Newcombe's interval, and the p-value of Fisher's exact test,
    both on pooled counts; None where one is missing or no rate.
    """
    estimates = [cell.estimate for cell in (first, second) if cell]
    if len(estimates) < 2 or not all(isinstance(e, stats.Proportion) for e in estimates):
        return None
    counts = [(estimate.k, estimate.n) for estimate in estimates]
    return stats.difference(*counts), stats.fisher_exact(*counts)


def caption_of(view: View, rate: Rate) -> str:
    """The rate's sentence with the range of its values over the rows of the main set; "" where it
    is 0 in all of them or was not measured.
    """
    blocks = view.blocks(view.main_set)
    rows = (*blocks.neutral, *blocks.own, *blocks.other)
    cells = [cell for row in rows if (cell := view.cell(view.main_set, row, rate))]
    shares = [100 * cell.estimate.value for cell in cells]
    if not shares or max(shares) == 0:
        return ""
    low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
    return rate.caption.format(range=f"{low if low == high else f'{low} to {high}'} %")
