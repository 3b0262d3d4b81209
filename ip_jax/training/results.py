"""The results folder of an experiment: whose it is, what is complete, and writes that are whole or
absent.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath


def digest(value: Any) -> str:
    """12 hex digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file so that a reader, or a restart, sees all of it or nothing.

    On a local disk through a temporary file and a rename; on an object store a write is whole by
    itself. A kill leaves the temporary file behind, and the next write takes its place. Raises
    OSError with one sentence on a full or read-only disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "://" in os.fspath(path):
            path.write_bytes(data)
            return
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; what was finished is kept, and the"
            " same command goes on from it"
        ) from error


def write_json(path: epath.Path, value: Any) -> None:
    """`value` as indented JSON, whole or absent."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def write_binary(path: epath.Path, write: Callable[[io.BytesIO], None]) -> None:
    """What `write` puts into a buffer, whole or absent."""
    buffer = io.BytesIO()
    write(buffer)
    write_whole(path, buffer.getvalue())


def claim_folder(folder: epath.Path, record: dict, runs: Mapping[str, str]) -> None:
    """Makes `folder` the results folder of `record["identity"]` and of `runs` (name -> key of its
    definition), or checks that it is.

    Stores the record as config.json and each key in its run's folder. Raises ValueError, before
    anything is written, if the folder or a run in it belongs to another definition or the folder
    holds other things; OSError if it cannot be written.
    """
    path = folder / "config.json"
    if path.exists():
        found = read_record(path)
        if found.get("identity") != record["identity"]:
            fields = differences(found.get("config", {}), record["config"])
            raise ValueError(
                f"the results folder {folder} belongs to another config (it differs in"
                f" {', '.join(fields) or 'the model or the data'}): choose another one with --out"
            )
    elif folder.exists() and any(
        entry.name != ".config.json.partial" for entry in folder.iterdir()
    ):
        raise ValueError(
            f"the folder {folder} is not empty and holds no results of this program: choose another"
            " one with --out"
        )
    new = {name: key for name, key in runs.items() if not _key_path(folder, name).exists()}
    for name in sorted(runs.keys() - new.keys()):
        if json.loads(_key_path(folder, name).read_text())["key"] != runs[name]:
            raise ValueError(
                f"run {name} in {folder} was made with another definition of its arm (prompts, data"
                " or starting point): give the arm another name, or choose another folder with"
                " --out"
            )
    write_json(path, record)
    for name, key in new.items():
        write_json(_key_path(folder, name), {"key": key})


def _key_path(folder: epath.Path, run: str) -> epath.Path:
    return folder / "runs" / run / "key.json"


def read_record(path: epath.Path) -> dict:
    """The config.json of a results folder. Raises ValueError for a file that holds no JSON
    object.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a record of this program: choose another results folder")
    return found


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two nested dicts differ once they are JSON (a tuple is a
    list there).
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return (
            [] if json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True) else [prefix]
        )
    return [
        name
        for key in sorted({*old, *new})
        for name in differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    ]


class MetricsLog:
    """A run's metrics.jsonl: one row a step, written whole at every flush, rows from a restored
    step on cut when it is opened.
    """

    def __init__(self, path: epath.Path, first_step: int):
        self.path = path
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.rows = [row for row in rows if row["step"] < first_step]

    def add(self, row: dict) -> None:
        """Appends a row; it reaches the disk with the next flush. JSON has no NaN or infinity: they
        become null.
        """
        self.rows.append(
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            }
        )

    def flush(self) -> None:
        """Writes all rows."""
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
