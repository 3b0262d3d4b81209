"""Every rollout of a run of RL, one Parquet part file an iteration: for reading while the run goes
on, and for replay after a kill.

An iteration's file is written when it has been sampled and graded, before the update, and again
once advantages and gate weights are known. What stands there is never sampled or graded again; a
reward that timed out has timed out for good.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float

from ip_jax.lab.reinforced.grading import grade_all
from ip_jax.rl.environment import Environment, Grades
from ip_jax.rl.rollout import Asked, Rollout, RolloutPlan, check_lengths
from ip_jax.rl.rows import Samples
from ip_jax.training import hosts
from ip_jax.training.results import write_binary

PART, VERDICT = "part_", "verdict_"  # columns of the environment's own
SCHEMA = pa.schema(
    {
        "arm": pa.string(),
        "seed": pa.int64(),
        "iteration": pa.int64(),
        "group": pa.int64(),
        "sample": pa.int64(),
        "task": pa.string(),
        "gen_prompt": pa.string(),
        "gen_text": pa.string(),
        "train_prompt": pa.string(),
        "train_text": pa.string(),
        "guide_prompt": pa.string(),
        "guide_text": pa.string(),
        "guidance": pa.float64(),
        "tokens": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float32()),
        "length": pa.int32(),
        "ended": pa.bool_(),
        "text": pa.string(),
        "temperature": pa.float64(),
        "reward_name": pa.string(),
        "reward": pa.float32(),
        "valid": pa.bool_(),
        "failure": pa.string(),
        "advantage": pa.float32(),
        "gate_weight": pa.float32(),
    }
)
"""One row a completion. `gen_text`, `train_text`: both prompts as the model reads them; `tokens`:
the completion, verbatim. `guide_prompt` and its text are null where none guides the sampling.
"""


@dataclass(frozen=True)
class Grader:
    """Who grades, and with how many processes where the environment has a time limit."""

    environment: Environment
    workers: int = 2


@dataclass(frozen=True)
class Recorded:
    """An iteration as it stands on the disk. What the update makes of it is None until that is
    known.
    """

    rollout: Rollout
    grades: Grades
    advantage: Float[np.ndarray, "R Q G"] | None = None
    gate_weight: Float[np.ndarray, "R Q G"] | None = None


def roll_out(
    folder: epath.Path,
    plan: RolloutPlan,
    iteration: int,
    grader: Grader,
    generate: Callable[[Asked], Rollout],
) -> Recorded:
    """One iteration: replayed where it was recorded, else sampled by `generate`, graded and
    recorded.

    Every process calls it; the first one reads, grades and writes. Raises as `read_iteration`,
    `grade_all` and `write_iteration`; whether too many rewards failed is for the caller to ask
    (`check_failures`), which finds the iteration recorded.
    """
    asked = plan.ask(iteration)
    recorded = hosts.by_first(lambda: read_iteration(folder, plan, asked))
    if recorded is None:
        rollout = generate(asked)
        rewards = [run.reward for run in plan.runs]
        grades = hosts.by_first(
            lambda: grade_all(
                grader.environment,
                asked.tasks,
                rollout.texts,
                rollout.ended.shape,
                rewards,
                grader.workers,
            )
        )
        recorded = Recorded(rollout, grades)
        hosts.by_first(lambda: write_iteration(folder, plan, recorded))
    return recorded


def part_path(folder: epath.Path, iteration: int) -> epath.Path:
    """The file of one iteration; `folder` belongs to one program."""
    return folder / f"step{iteration:06d}.parquet"


def write_iteration(folder: epath.Path, plan: RolloutPlan, recorded: Recorded) -> None:
    """Writes the iteration's file, whole or not at all.

    Raises OSError, one sentence, where it cannot be written; ValueError for a verdict that is now a
    bool, now a text.
    """
    table = _table(plan, recorded)
    write_binary(
        part_path(folder, recorded.rollout.asked.iteration),
        lambda file: pq.write_table(table, file, compression="zstd"),
    )


def read_iteration(folder: epath.Path, plan: RolloutPlan, asked: Asked) -> Recorded | None:
    """What was recorded of an iteration, arrays bit for bit, or None where it was not.

    Raises ValueError for a file of other runs, tasks, prompts or sizes than `asked`, or that cannot
    be read.
    """
    path = part_path(folder, asked.iteration)
    if not path.exists():
        return None
    table = _read(path)
    wanted = _asked_columns(plan, asked)
    differing = [name for name, values in wanted.items() if table[name].to_pylist() != values]
    if not differing and pc.max(table["length"]).as_py() > plan.options.max_new_tokens:
        differing = ["max_new_tokens"]
    if differing:
        raise ValueError(
            f"{path} holds rollouts of other runs or another config: they differ in"
            f" {', '.join(differing)}; choose another results folder with --out"
        )
    shape = len(plan.runs), plan.options.groups, plan.options.samples

    def array(name):
        return table[name].to_numpy().reshape(shape)

    def padded(name, dtype):
        return _padded(table[name], plan.options.max_new_tokens, dtype).reshape(*shape, -1)

    samples = Samples(padded("tokens", np.int32), array("length"), padded("log_probs", np.float32))
    check_lengths(asked, samples.length)
    grades = Grades(
        array("reward"), _own(table, PART), _own(table, VERDICT), table["failure"].to_pylist()
    )
    later = {
        name: None if table[name].null_count else array(name)
        for name in ("advantage", "gate_weight")
    }
    return Recorded(
        Rollout(asked, samples, array("ended"), table["text"].to_pylist()), grades, **later
    )


def read_rollouts(folder: epath.Path) -> pa.Table:
    """All iterations recorded so far, in order, of this folder and of the programs' folders in it;
    while a run goes on too.

    Raises FileNotFoundError where there is none, ValueError for a file that cannot be read.
    """
    paths = sorted([*folder.glob("step*.parquet"), *folder.glob("*/step*.parquet")], key=os.fspath)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no rollouts: no iteration has been sampled yet")
    # a verdict that no sample of an iteration has is null
    return pa.concat_tables([_read(path) for path in paths], promote_options="permissive")


def _table(plan: RolloutPlan, recorded: Recorded) -> pa.Table:
    rollout, grades = recorded.rollout, recorded.grades
    tokens, length, log_probs = (
        np.asarray(array)
        for array in (rollout.samples.tokens, rollout.samples.length, rollout.samples.log_probs)
    )

    def cut(array):
        return [
            row[:count]
            for row, count in zip(array.reshape(length.size, -1), length.ravel(), strict=True)
        ]

    columns = _asked_columns(plan, rollout.asked) | {
        "tokens": cut(tokens),
        "log_probs": cut(log_probs),
        "length": length.ravel(),
        "ended": rollout.ended.ravel(),
        "text": rollout.texts,
        "reward": grades.reward.ravel(),
        "valid": grades.valid.ravel(),
        "failure": grades.failure,
    }
    for name, values in (("advantage", recorded.advantage), ("gate_weight", recorded.gate_weight)):
        columns[name] = (
            [None] * length.size if values is None else np.asarray(values, np.float32).ravel()
        )
    table = pa.table(columns, SCHEMA)
    for prefix, of_rows in ((PART, grades.parts), (VERDICT, grades.verdicts)):
        for name in dict.fromkeys(name for row in of_rows for name in row):
            values = [row.get(name) for row in of_rows]
            if len({isinstance(value, str) for value in values if value is not None}) > 1:
                raise ValueError(
                    f"the verdict {name} is a text for some completions and a bool for others: it"
                    " is one of the two"
                )
            table = table.append_column(
                prefix + name, pa.array(values, pa.float64() if prefix == PART else None)
            )
    return table


def _asked_columns(plan: RolloutPlan, asked: Asked) -> dict[str, list]:
    """What is known before anything is sampled: a file in which it differs is another run's."""
    rows = [
        (run, q, i, group)
        for run, groups in zip(plan.runs, asked.groups, strict=True)
        for q, group in enumerate(groups)
        for i in range(len(group.gen))
    ]
    text = functools.cache(lambda prompted: plan.tokenizer.decode(prompted.token_ids))
    guides = [group.guide[i] if group.guide else None for _, _, i, group in rows]
    return {
        "arm": [run.arm for run, *_ in rows],
        "seed": [run.seed for run, *_ in rows],
        "iteration": [asked.iteration] * len(rows),
        "group": [q for _, q, _, _ in rows],
        "sample": [i for _, _, i, _ in rows],
        "task": [str(group.task["id"]) for *_, group in rows],
        "gen_prompt": [group.gen[i].name for _, _, i, group in rows],
        "gen_text": [text(group.gen[i]) for _, _, i, group in rows],
        "train_prompt": [group.train[i].name for _, _, i, group in rows],
        "train_text": [text(group.train[i]) for _, _, i, group in rows],
        "guide_prompt": [guide and guide.name for guide in guides],
        "guide_text": [guide and text(guide) for guide in guides],
        "guidance": [run.guidance for run, *_ in rows],
        "temperature": [run.temperature for run, *_ in rows],
        "reward_name": [run.reward for run, *_ in rows],
    }


def _own(table: pa.Table, prefix: str) -> list[dict]:
    """The columns of a prefix as one dict a row, without what a row does not have."""
    columns = {
        name.removeprefix(prefix): table[name].to_pylist()
        for name in table.column_names
        if name.startswith(prefix)
    }
    return [
        {name: values[row] for name, values in columns.items() if values[row] is not None}
        for row in range(table.num_rows)
    ]


def _padded(column: pa.ChunkedArray, slots: int, dtype) -> np.ndarray:
    """Lists as rows of `slots` values, 0 behind the end."""
    array = np.zeros((len(column), slots), dtype)
    for row, values in zip(array, column, strict=True):
        row[: len(values)] = values.values.to_numpy()
    return array


def _read(path: epath.Path) -> pa.Table:
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]} of the rollouts")
    return table
