"""What a report reads from a results folder: the transcripts and, from config.json, labels, model and the data's caption."""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from ip_jax.prompts import library


@dataclass(frozen=True)
class Arm:
    """An arm as the report names it. `kind` is that of its training prompt (see prompts.library), None without one or for words of the user's own."""

    name: str
    label: str
    kind: str | None


@dataclass(frozen=True)
class Results:
    """`arms` in the config's order, then any others of the transcripts. `model`, `preset`, `provenance` are for titles and captions."""

    folder: epath.Path
    preset: str
    model: str
    provenance: str
    arms: tuple[Arm, ...]
    transcripts: pa.Table


def read_results(folder: str | os.PathLike, columns: Sequence[str]) -> Results:
    """Reads config.json and the given columns of transcripts.parquet.

    Raises FileNotFoundError where one of the two is missing, ValueError for an unreadable file, missing columns or no rows.
    """
    folder = epath.Path(folder)
    record = _read_config(folder / "config.json")
    table = _read_transcripts(folder / "transcripts.parquet", columns)
    named = {name: Arm(name, arm["label"], _kind(arm["train_prompt"])) for name, arm in record["arms"].items()}
    rest = [name for name in table["arm"].unique().to_pylist() if name not in named]
    arms = (*named.values(), *(Arm(name, name.replace("_", " ").capitalize(), None) for name in rest))
    model = epath.Path(record["config"]["model"]["name"]).name  # a local model's folder is nobody's business
    return Results(folder, record["preset"], model, record["provenance"], arms, table)


def _read_config(path: epath.Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a report needs the results folder of an experiment")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_transcripts(path: epath.Path, columns: Sequence[str]) -> pa.Table:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: no evaluation of this experiment has finished yet")
    try:
        parquet = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    missing = [column for column in columns if column not in parquet.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} of the transcripts")
    table = parquet.read(columns=list(columns))
    if table.num_rows == 0:
        raise ValueError(f"{path} holds no completions: no evaluation of this experiment has finished yet")
    return table


def _kind(train_prompt: str | None) -> str | None:
    return library.PROMPTS[train_prompt].kind if train_prompt in library.PROMPTS else None
