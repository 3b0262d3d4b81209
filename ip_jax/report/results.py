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

from ip_jax.prompts import library


@dataclass(frozen=True)
class Arm:
    """An arm as the report names it. `kind` is that of its training prompt (see prompts.library),
    None without one or for words of the user's own.
    """

    name: str
    label: str
    kind: str | None


@dataclass(frozen=True)
class Results:
    """`arms` in the config's order, then the transcripts' others, of an earlier list of arms.
    `model`, `provenance` are for titles and captions.

    `diverged` names runs that were frozen because their loss was no longer finite.
    """

    folder: epath.Path
    model: str
    provenance: str
    arms: tuple[Arm, ...]
    diverged: tuple[str, ...]
    transcripts: pa.Table


def read_results(folder: str | os.PathLike, columns: Sequence[str]) -> Results:
    """Reads config.json and the given columns of transcripts.parquet.

    `columns` include arm, eval_prompt and own_prompt. Raises FileNotFoundError where one of the two
    is missing, ValueError for an unreadable file, missing columns or no rows.
    """
    folder = epath.Path(folder)
    record = _read_config(folder / "config.json")
    table = _read_transcripts(folder / "transcripts.parquet", columns)
    named = {
        name: Arm(name, arm["label"], _kind(arm["train_prompt"]))
        for name, arm in record["arms"].items()
    }
    rest = [name for name in table["arm"].unique().to_pylist() if name not in named]
    arms = (
        *named.values(),
        *(Arm(name, name.replace("_", " "), _kind(_own_prompt(table, name))) for name in rest),
    )
    # a local model's folder is nobody's business
    model = epath.Path(record["config"]["model"]["name"]).name
    return Results(folder, model, record["provenance"], arms, _diverged(folder), table)


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
    missing = [column for column in columns if column not in parquet.schema_arrow.names]
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} of the"
            " transcripts"
        )
    table = parquet.read(columns=list(columns))
    if table.num_rows == 0:
        raise ValueError(
            f"{path} holds no completions: no evaluation of this experiment has finished yet"
        )
    return table


def _kind(train_prompt: str | None) -> str | None:
    return library.PROMPTS[train_prompt].kind if train_prompt in library.PROMPTS else None
