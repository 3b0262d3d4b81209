"""Where examples come from: plain JSON lines, records in memory, and TFDS datasets read without
TensorFlow.

Every source is a random-access sequence (`len`, integer index) of examples, which is what Grain
maps over. An example is `{"id": str, "messages": [{"role": "system" | "user" | "assistant",
"content": str}, ...], ...metadata}`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

Example = dict[str, Any]
ROLES = ("system", "user", "assistant")


class SourceError(ValueError):
    """A record that is no example; the message names the file and line (or index) and what is
    allowed.
    """


def read_jsonl(
    path: epath.PathLike, convert: Callable[[Any], Any] = lambda record: record
) -> list[Example]:
    """The examples of a JSON-lines file, one object on each line; blank lines are skipped.
    `convert` turns what a line holds into a record with messages.

    A record without "id" gets "<file name without suffix>:<line number>". Raises SourceError, with
    the file and line number, for a line that is not a JSON object, has no messages, an unknown role
    or an empty response; FileNotFoundError for no file.
    """
    path = epath.Path(path)
    examples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # also bytes that are not UTF-8
            raise SourceError(
                f"{where} is not JSON ({error}): each line must be one JSON object."
            ) from error
        examples.append(as_example(convert(record), where, default_id=f"{path.stem}:{number}"))
    return examples


def from_records(records: Iterable[Mapping[str, Any]], name: str = "memory") -> list[Example]:
    """The examples among records in memory; a record without "id" gets "<name>:<index>". Raises
    SourceError as read_jsonl does.
    """
    return [
        as_example(record, f"{name}, record {i}", default_id=f"{name}:{i}")
        for i, record in enumerate(records)
    ]


@dataclass(frozen=True)
class TfdsSource:
    """Examples of a TFDS data source (`builder.as_data_source(split)`), decoded when they are read.

    TFDS gives bytes for text and a dict of lists for a sequence of dicts; both are turned back
    here, and numpy scalars into Python's. Fields whose name ends in "_json" hold one JSON value,
    for what TFDS has no type for (None).
    """

    data_source: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, index: int) -> Example:
        # array_record raises ValueError, which would not end a for loop
        if not 0 <= index < len(self):
            raise IndexError(f"The source has the records 0 to {len(self) - 1}, not {index}.")
        record = {name: _plain(value) for name, value in self.data_source[index].items()}
        turns = record["messages"]
        record["messages"] = [
            dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)
        ]
        decoded = {
            name.removesuffix("_json"): json.loads(value) if name.endswith("_json") else value
            for name, value in record.items()
        }
        return as_example(decoded, f"TFDS record {index}", default_id=str(index))


def read_tfds(
    name: str, split: str = "train", data_dir: epath.PathLike | None = None
) -> TfdsSource:
    """A prepared TFDS dataset by name, for example "my_chats:1.0.0"; it must be stored as
    array_record (no TensorFlow is used).
    """
    import tensorflow_datasets as tfds  # seconds to import, and only this function needs it

    return TfdsSource(tfds.data_source(name, split=split, data_dir=data_dir))


def as_example(record: Any, where: str, default_id: str) -> Example:
    """`record` as an example, other fields kept. Raises SourceError, one sentence that begins with
    `where`, if it is none.
    """
    if not isinstance(record, Mapping):
        raise SourceError(
            f"{where} is a JSON {type(record).__name__}: each line must be one JSON object."
        )
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise SourceError(
            f'{where} has no messages: it needs "messages", a non-empty list of {{"role",'
            ' "content"}.'
        )
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"{where}, message {number}")
    return {**record, "id": str(record.get("id", default_id))}


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise SourceError(
            f'{where} has no text: it needs a "role" and a "content" that is a string.'
        )
    broken = half_characters(message["content"])
    if broken:
        raise SourceError(
            f"{where} holds half of a character at position {broken[0]} (a surrogate without its"
            " other half), which no tokenizer can encode: replace it."
        )
    role = message.get("role")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SourceError(
            f"{where} has the unknown role {role!r}{hint}: allowed are {', '.join(ROLES)}."
        )
    if role == "assistant" and not message["content"].strip():
        raise SourceError(
            f"{where} is an empty response: the content of an assistant message must not be blank."
        )


def half_characters(text: str) -> list[int]:
    """Where a text holds a surrogate without its other half: scraped JSON is full of them."""
    return [i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"]


def mended(text: str) -> str:
    """The text with each half of a character replaced by U+FFFD."""
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


def _plain(value: Any) -> Any:
    """TFDS's bytes, arrays and numpy scalars as Python values."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return [_plain(item) for item in value] if isinstance(value, list) else value
