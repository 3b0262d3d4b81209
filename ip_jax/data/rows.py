"""The rows of a study: conversations from JSON lines or Parquet, on this machine or on the Hugging
Face hub.

A row has `messages`, or `prompt` and `completion` as TRL has them (two texts, or two lists of
messages). Everything else in it is kept.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ip_jax.data.sources import (
    Example,
    SourceError,
    as_example,
    half_characters,
    mended,
    read_jsonl,
)

HUB = "hf:"


@dataclass(frozen=True)
class StudyData:
    """`training`: kind -> rows, equally many; `evaluation`: set -> rows; `provenance`: where they
    are from, for captions.
    """

    training: Mapping[str, Sequence[Example]]
    evaluation: Mapping[str, Sequence[Example]]
    provenance: str


@dataclass(frozen=True)
class Rows:
    """What a file held, and the SHA-256 of its bytes."""

    examples: list[Example]
    source: str
    sha256: str
    replaced: int = 0  # halves of characters

    def describe(self) -> str:
        """For captions."""
        mended = f", {self.replaced} broken characters replaced" if self.replaced else ""
        return f"{len(self.examples)} rows of {self.source} (sha256 {self.sha256[:8]}{mended})"


@dataclass(frozen=True)
class FilesSpec:
    """What a preset may change of a study's files: another file of training rows, how many of the
    rows are used, and whether halves of characters, which cannot be encoded, are replaced (and
    counted in the caption) rather than refused.
    """

    training_file: str | None = None
    rows: int | None = None
    mend: bool = False


@dataclass(frozen=True)
class Files:
    """A study's `load` for rows in files. `beside`: the study's own `__file__`, next to which
    relative paths lie. Several kinds of training rows, or evaluation sets, are given as dicts.
    """

    training: str | Mapping[str, str]
    evaluation: str | Mapping[str, str]
    beside: str | None = None

    def __call__(self, spec: FilesSpec | None, tokenizer: Any) -> StudyData:
        """Raises SourceError or OSError as `read_rows`, and ValueError for kinds that have
        different numbers of rows and for more rows than there are.
        """
        spec = spec or FilesSpec()
        kinds = _named(self.training, "train")
        if spec.training_file:
            training = {next(iter(kinds)): read_rows(spec.training_file, mend=spec.mend)}
        else:
            training = {kind: self._read(file, spec.mend) for kind, file in kinds.items()}
        asked = _named(self.evaluation, "eval")
        evaluation = {name: self._read(file, spec.mend) for name, file in asked.items()}
        counts = {kind: len(rows.examples) for kind, rows in training.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"kinds of training rows are paired by their number, and these have {counts}"
            )
        most = next(iter(counts.values()))
        if spec.rows is not None and not 0 < spec.rows <= most:
            raise ValueError(f"{spec.rows} training rows were asked for: there are {most}")
        read = [*training.values(), *evaluation.values()]
        used = "" if spec.rows is None else f"the first {spec.rows} of "
        return StudyData(
            {kind: rows.examples[: spec.rows] for kind, rows in training.items()},
            {name: rows.examples for name, rows in evaluation.items()},
            used + "; ".join(rows.describe() for rows in read),
        )

    def _read(self, where: str, mend: bool) -> Rows:
        root = Path(self.beside).resolve().parent if self.beside else None
        return read_rows(where, root, mend)


def read_rows(where: str, root: Path | None = None, mend: bool = False) -> Rows:
    """The rows of a .jsonl or .parquet file, or of `hf:owner/dataset[@revision][/file]`; relative
    paths are below `root`. Without an id a row is called after its file and number. `mend`: halves
    of characters are replaced and counted.

    Raises SourceError, which names file and row, for a row that is no conversation and an id that
    stands twice; ValueError for another kind of file and for a dataset of several files of which
    none is named; OSError for a file that is not there or cannot be fetched.
    """
    if where.startswith(HUB):
        path, name = _from_hub(where), where
    else:
        path = (root or Path()) / where
        name = path.name
    replaced = 0

    def convert(record: Any) -> Any:
        nonlocal replaced
        record = conversation(record)
        if mend:
            record, count = _mended(record)
            replaced += count
        return record

    if path.suffix == ".jsonl":
        examples = read_jsonl(path, convert)
    elif path.suffix == ".parquet":
        examples = [
            as_example(convert(record), f"{path}, row {i}", f"{path.stem}:{i}")
            for i, record in enumerate(pq.read_table(path).to_pylist())
        ]
    else:
        raise ValueError(f"{where} is no file of rows: it must end in .jsonl or .parquet")
    if not examples:
        raise SourceError(f"{path} holds no rows")
    check_ids(examples, str(path))
    return Rows(examples, name, hashlib.sha256(path.read_bytes()).hexdigest(), replaced)


def conversation(record: Any) -> Any:
    """A record of a file with `messages`, where it has `prompt` and `completion` instead."""
    if not isinstance(record, Mapping) or "messages" in record or "prompt" not in record:
        return record
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    turns = _turns(record["prompt"], "user")
    if record.get("completion") is not None:
        turns = turns + _turns(record["completion"], "assistant")
    return {"messages": turns, **rest}


def _mended(record: Any) -> tuple[Any, int]:
    """The record with every half of a character in its messages replaced, and how many."""
    messages = record.get("messages") if isinstance(record, Mapping) else None
    if not isinstance(messages, list):
        return record, 0
    count, whole = 0, []
    for message in messages:
        text = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(text, str):
            count += len(half_characters(text))
            message = {**message, "content": mended(text)}
        whole.append(message)
    return {**record, "messages": whole}, count


def _turns(said: Any, role: str) -> list:
    """TRL's plain form is a text, its conversational one a list of messages."""
    return [{"role": role, "content": said}] if isinstance(said, str) else list(said)


def check_ids(examples: Iterable[Example], where: str) -> None:
    """Raises SourceError, which names both rows, where an id stands twice: ids key sampling,
    paraphrases and transcripts.
    """
    first: dict[str, int] = {}
    for number, example in enumerate(examples, start=1):
        name = example["id"]
        if name in first:
            raise SourceError(
                f"{where}: rows {first[name]} and {number} have the same id {name!r}: each needs"
                " one of its own"
            )
        first[name] = number


def user_words(example: Example) -> str:
    """What the users of a conversation say, without regard to spaces and case."""
    turns = [turn["content"] for turn in example["messages"] if turn["role"] == "user"]
    return " ".join(" ".join(turns).split()).lower()


def overlaps(training: Iterable[Example], evaluation: Iterable[Example]) -> list[tuple[str, str]]:
    """(training id, evaluation id) of evaluation rows whose user says what one of training says."""
    known = {user_words(example): example["id"] for example in training}
    return [
        (known[words], example["id"])
        for example in evaluation
        if (words := user_words(example)) in known
    ]


def duplicates(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """(first id, id) of rows whose users say what those of an earlier row say."""
    first: dict[str, str] = {}
    found = []
    for example in examples:
        words = user_words(example)
        if words in first:
            found.append((first[words], example["id"]))
        first.setdefault(words, example["id"])
    return found


def _named(files: str | Mapping[str, str], name: str) -> dict[str, str]:
    return {name: files} if isinstance(files, str) else dict(files)


def _from_hub(where: str) -> Path:
    """The local copy of a dataset's file. Raises ValueError for a name that is none, and where the
    file has to be named; OSError where it cannot be fetched.
    """
    named = re.fullmatch(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.+))?", where)
    if named is None:
        raise ValueError(f"{where} is no dataset: it must read hf:owner/name[@revision][/file]")
    repo, revision, file = named.groups()
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if file is None:
            file = _only_file(HfApi().list_repo_files(repo, revision=revision, repo_type="dataset"))
        if file is None:
            raise ValueError(
                f"{where} has several files of rows, or none: name one as {where}/path.parquet"
            )
        return Path(hf_hub_download(repo, file, revision=revision, repo_type="dataset"))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"the dataset {where} cannot be fetched: {reason}") from error


def _only_file(files: Sequence[str]) -> str | None:
    """The file of training rows, where there is no doubt which it is."""
    rows = [file for file in files if file.endswith((".parquet", ".jsonl"))]
    train = [file for file in rows if "train" in file]
    return rows[0] if len(rows) == 1 else train[0] if len(train) == 1 else None
