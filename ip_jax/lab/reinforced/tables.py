"""What is counted of a text experiment in reinforcement learning: the metrics of an iteration, and
its two tables (`evals.rl_tables`).
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from ip_jax.evals import leak_grid, measures, rl_tables
from ip_jax.evals.rl_tables import NEUTRAL, ROLLOUT, Counts
from ip_jax.lab.reinforced import plan
from ip_jax.lab.reinforced.grading import check_failures, grade_all
from ip_jax.lab.reinforced.plan import UNTRAINED, Reinforced
from ip_jax.lab.reinforced.records import Recorded
from ip_jax.lab.supervised.plan import Run, Sweep
from ip_jax.rl.diagnostics import CORRECT, HACK, OTHER
from ip_jax.rl.environment import Grades
from ip_jax.training.results import write_binary

_COUNTED = ("hackable", "hack", "attempt", "correct", "trait")


def labels_of(grades: Grades) -> np.ndarray:
    """[R, Q, G] int32: HACK, CORRECT or OTHER by the verdicts."""
    labels = [
        HACK if verdicts.get("hack") else CORRECT if verdicts.get("correct") else OTHER
        for verdicts in grades.verdicts
    ]
    return np.array(labels, np.int32).reshape(grades.reward.shape)


def iteration_metrics(recorded: Recorded, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name: [R]} of one iteration that has been decided on: `found`
    (`rl.diagnostics.sample_metrics`) and the counts of verdicts (n_...).
    """
    grades, ended = recorded.grades, recorded.rollout.ended
    counted = [name for name in _COUNTED if any(name in verdicts for verdicts in grades.verdicts)]
    counts = {
        f"n_{name}": (
            np.array([bool(verdicts.get(name)) for verdicts in grades.verdicts])
            .reshape(len(ended), -1)
            .sum(1)
        )
        for name in counted
    }
    every = {
        **counts,
        "n": np.full(len(ended), ended[0].size),
        "length_cap": (~ended).mean((1, 2)),
        **found,
    }
    return {
        name: np.asarray(value, np.int64 if name in rl_tables.COUNTS else np.float64)
        for name, value in every.items()
    }


def verdicts_of(
    experiment: Reinforced, run: str, completions: Sequence[str]
) -> list[Mapping[str, bool | str]]:
    """For each evaluation task the verdicts of its completion: the experiment's own, or the
    environment's, whose failed grades have none.

    Raises TooManyFailures, in which `run` is named, where more grades fail than `rl.max_failed`
    allows.
    """
    if experiment.scorer:
        return [
            leak_grid.scored(experiment.scorer, plan.example_of(experiment, task), text)
            for task, text in zip(experiment.eval_tasks, completions, strict=True)
        ]
    grades = grade_all(
        experiment.environment,
        experiment.eval_tasks,
        completions,
        (1, 1, len(completions)),
        workers=experiment.rl.grading_workers,
    )
    check_failures(grades, [run], experiment.rl.max_failed)
    return grades.verdicts


def write_tables(experiment: Reinforced, folder: epath.Path, runs: Sequence[Run]) -> None:
    """curves.parquet, final.parquet and transcripts.parquet from what has been recorded of the
    runs: metrics.jsonl and the transcripts.
    """
    transcripts = leak_grid.merge_parts(folder / "transcripts")
    counted = _counts(transcripts)
    curves, final = [], []
    categories = {(run.arm.name, run.seed): plan.grid_of(experiment, run.arm) for run in runs}
    categories |= {(UNTRAINED, seed): plan.grid_of(experiment, None) for seed in experiment.seeds}
    answers_for = plan.untrained_seeds(experiment)
    for run in runs:
        if 0 in experiment.evaluation.steps:  # it begins as the untrained model
            counts = counted[UNTRAINED, answers_for[run.seed], 0, NEUTRAL]
            curves.append(
                {"arm": run.arm.name, "seed": run.seed, "step": 0, "eval_prompt": NEUTRAL, **counts}
            )
        rows = [
            json.loads(line)
            for line in (folder / "runs" / run.name / "metrics.jsonl").read_text().splitlines()
        ]
        curves += [_rollout_row(run, row) for row in rows]
    for (arm, seed, step, prompt), counts in counted.items():
        if (arm, seed) not in categories:
            continue  # of an arm that this call was not asked for
        if arm != UNTRAINED and prompt == NEUTRAL and step:
            curves.append(
                {"arm": arm, "seed": seed, "step": step, "eval_prompt": NEUTRAL, **counts}
            )
        if step == (0 if arm == UNTRAINED else experiment.rl.iterations):
            final.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "eval_prompt": prompt,
                    "category": categories[arm, seed][prompt],
                    **counts,
                }
            )
    for name, table in (
        ("curves", rl_tables.curves_table(curves)),
        ("final", rl_tables.final_table(final)),
        ("transcripts", transcripts),
    ):
        write_binary(
            folder / f"{name}.parquet", lambda file, table=table: pq.write_table(table, file)
        )


def evaluation_rates(folder: epath.Path, sweeps: Sequence[Sweep]) -> list[dict[str, float]]:
    """Of each run of one evaluation, all of whose parts are there: {"eval/VERDICT/PROMPT": rate},
    without those that nothing was counted for.
    """
    found: list[dict[str, float]] = [{} for _ in sweeps[0]]
    for sweep in sweeps:
        for of_run, cell in zip(found, sweep, strict=True):
            if cell:
                (counts,) = _counts(
                    leak_grid.read_part(folder / "transcripts" / cell.part)
                ).values()
                rates = measures.rates(Counts(**dict.fromkeys(Counts._fields) | counts))
                of_run |= {
                    f"eval/{verdict}/{cell.eval_prompt}": rate.value
                    for verdict, rate in rates.items()
                    if rate.n
                }
    return found


def _rollout_row(run: Run, row: Mapping) -> dict:
    names = [
        name for name in (*rl_tables.COUNTS, *rl_tables.QUANTITIES) if row.get(name) is not None
    ]
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "step": row["step"],
        "eval_prompt": ROLLOUT,
        **{name: row[name] for name in names},
    }


def _counts(transcripts: pa.Table) -> dict[tuple[str, int, int, str], dict[str, int]]:
    """{(arm, seed, step, prompt): counts of its completions}."""
    found: dict[tuple, dict[str, int]] = {}
    names = [name for name in _COUNTED if name in transcripts.column_names]
    for row in transcripts.select(["arm", "seed", "step", "eval_prompt", *names]).to_pylist():
        cell = found.setdefault(
            (row["arm"], row["seed"], row["step"], row["eval_prompt"]),
            {"n": 0} | {f"n_{name}": 0 for name in names},
        )
        cell["n"] += 1
        for name in names:
            cell[f"n_{name}"] += bool(row[name])
    return found
