"""What a report reads from a results folder: the transcripts, from config.json labels, model and
the data's caption, and which runs diverged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from ip_jax.evals.scorers import SCORE_ERROR
from ip_jax.lab.study import Study

_IDENTIFYING = (
    "arm",
    "seed",
    "step",
    "examples_seen",
    "eval_set",
    "eval_prompt",
    "own_prompt",
)


@dataclass(frozen=True)
class Arm:
    """An arm as the report names it. `kind` is that of its training prompt (`prompts.prompt`),
    None without one or where the study no longer has it.
    """

    name: str
    label: str
    kind: str | None


@dataclass(frozen=True)
class Results:
    """`arms` in the config's order, then the transcripts' others, of an earlier list of arms.
    `model`, `provenance` are for titles and captions.

    `diverged` names runs that were frozen because their loss was no longer finite; `unscored` is
    the number of replies on which the scorer failed.
    """

    folder: epath.Path
    model: str
    provenance: str
    arms: tuple[Arm, ...]
    diverged: tuple[str, ...]
    unscored: int
    transcripts: pa.Table


def read_results(folder: str | os.PathLike, study: Study) -> Results:
    """Reads config.json and the columns of transcripts.parquet that the study's metrics need.

    Raises FileNotFoundError where one of the two is missing, ValueError for an unreadable file,
    missing columns or no rows.
    """
    folder = epath.Path(folder)
    record = _read_config(folder / "config.json")
    table = _read_transcripts(folder / "transcripts.parquet", _columns(study))
    kinds = {prompt.name: prompt.kind for prompt in study.prompts}
    named = {
        name: Arm(name, arm["label"], arm.get("kind") or kinds.get(arm["train_prompt"]))
        for name, arm in record["arms"].items()
    }
    rest = [name for name in table["arm"].unique().to_pylist() if name not in named]
    arms = (
        *named.values(),
        *(Arm(name, name.replace("_", " "), kinds.get(_own_prompt(table, name))) for name in rest),
    )
    # a local model's folder is nobody's business
    model = epath.Path(record["config"]["model"]["name"]).name
    return Results(
        folder, model, record["provenance"], arms, _diverged(folder), _unscored(table), table
    )


def _unscored(table: pa.Table) -> int:
    """Replies on which the scorer failed."""
    return len(table) - table[SCORE_ERROR].null_count if SCORE_ERROR in table.column_names else 0


def _diverged(folder: epath.Path) -> tuple[str, ...]:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/run.json"))]
    return tuple(f"{run['arm']} (seed {run['seed']})" for run in runs if not run["finished_finite"])


def _own_prompt(table: pa.Table, arm: str) -> str | None:
    """The training prompt of an arm that config.json no longer lists."""
    prompts = (
        table.filter((pc.field("arm") == arm) & pc.field("own_prompt"))["eval_prompt"]
        .unique()
        .to_pylist()
    )
    return prompts[0] if prompts else None


def _read_config(path: epath.Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: a report needs the results folder of an experiment"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_transcripts(path: epath.Path, columns: Sequence[str]) -> pa.Table:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: no evaluation of this experiment has finished yet"
        )
    try:
        parquet = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    names = parquet.schema_arrow.names
    failed = [SCORE_ERROR] if SCORE_ERROR in names else []
    missing = [column for column in columns if column not in names]
    if missing and not failed:  # where every reply failed, a scorer has left no columns
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} of the"
            " transcripts"
        )
    table = parquet.read(columns=[*(c for c in columns if c not in missing), *failed])
    for column in missing:
        table = table.append_column(column, pa.nulls(len(table)))
    if table.num_rows == 0:
        raise ValueError(
            f"{path} holds no completions: no evaluation of this experiment has finished yet"
        )
    return table


def _columns(study: Study) -> list[str]:
    """The identifying columns, and those that the study's metrics read."""
    read = [
        column
        for metrics in study.judges.values()
        for metric in metrics
        for column in metric.columns
    ]
    return list(dict.fromkeys([*_IDENTIFYING, *([study.by] if study.by else []), *read]))
