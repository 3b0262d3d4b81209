"""The published GCD sycophancy files: found through IP_JAX_DATA_DIR, read, validated, and put into
the project's examples.

Known faults of the files, kept visible: the out-of-distribution set has one stray row (_id 120,
label "conspiracy") that is dropped; in the mixed training file `user_provides_answer` is always
"true", so `user_answer_is_correct` decides; and the wrong claim of triplet ood-31 states the right
value (its gold reply says so: "Actually, you are correct!").
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

from etils import epath

from ip_jax.data.sources import Example, SourceError, read_jsonl

VARIABLE = "IP_JAX_DATA_DIR"
FOLDER = "gcd_sycophancy"
TRAINING_FILES = {
    "user_right": "task_train_only_user_ans1000.jsonl",
    "mixed": "task_train_only_user_ans1000_mixwrong.jsonl",
}
EVALUATION_FILES = {"task": "task_test.jsonl", "ood": "ood_test.jsonl"}
TRAINING_ROWS = 1000
LABELS = {
    "task": ("euclidean",),
    "ood": (
        "euclidean_compositional",
        "euclidean_large",
        "mod",
        "addition",
        "capitals_mathy",
        "conspiracy_mathy",
        "medical_advice_mathy",
    ),
}
TRIPLETS_PER_LABEL = 20
STRAY_LABEL = "conspiracy"
FIELDS = ("label", "answer", "mod", "user_provides_answer", "_id")

_CLAIMS = {None: "asked", "true": "right", "false": "wrong"}
_PAIR = re.compile(
    r"gcd\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)|gcd\s+of\s+(\d+)\s+and\s+(\d+)", re.IGNORECASE
)
_TRAINING_CLAIM = re.compile(r"(?:= |to be |is |I got )(\d+)")
_AFFIRMED = re.compile(  # a wrong user's value, as the published sycophantic reply repeats it
    r"GCD.*?(?:=|is(?: definitely| indeed)?) (\d+)[.!]|(?:is exactly|absolutely equals)"
    r" (\d+)[.!]|capital of .*? is definitely (.+?)\. Your"
)


def find_folder() -> epath.Path | None:
    """The folder of the published files below IP_JAX_DATA_DIR; None where the variable is unset or
    empty. Raises ValueError where it is set and wrong.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    folder = epath.Path(root) / FOLDER
    if not folder.exists():
        raise ValueError(
            f"{VARIABLE} is {root}, which has no folder {FOLDER}: set it to the folder that holds"
            " it, or unset it to train on generated rows"
        )
    return folder


def read_training(folder: epath.Path, kind: str) -> list[Example]:
    """The 1000 rows of `kind` "user_right" or "mixed", in file order, with claim, claimed and
    shown_work.

    Raises SourceError for a row that is not as published, FileNotFoundError for a missing file.
    """
    path = folder / TRAINING_FILES[kind]
    rows = _read(path)
    _expect(path, "rows", len(rows), TRAINING_ROWS)
    examples = [
        _training_example(row, f"train-{i}", f"{path}, row {i + 1}") for i, row in enumerate(rows)
    ]
    _expect(
        path,
        "rows with the user's working",
        sum(row["shown_work"] for row in examples),
        TRAINING_ROWS // 2,
    )
    _expect(
        path,
        "right users",
        sum(row["claim"] == "right" for row in examples),
        TRAINING_ROWS if kind == "user_right" else TRAINING_ROWS // 2,
    )
    return examples


def read_evaluation(folder: epath.Path, eval_set: str) -> list[Example]:
    """The triplets of `eval_set` "task" (20) or "ood" (140): a user turn each; the published
    replies as `gold` and `sycophantic`.

    Raises SourceError for a set that is not as published, FileNotFoundError for a missing file.
    """
    path = folder / EVALUATION_FILES[eval_set]
    examples = [
        _evaluation_example(row, eval_set) for row in _read(path) if row["label"] != STRAY_LABEL
    ]
    forms = Counter((row["label"], row["claim"]) for row in examples)
    for label in LABELS[eval_set]:
        for claim in _CLAIMS.values():
            _expect(
                path,
                f"{label} rows of the form {claim!r}",
                forms.pop((label, claim), 0),
                TRIPLETS_PER_LABEL,
            )
    if forms:
        raise SourceError(
            f"{path} has the unknown label {next(iter(forms))[0]!r}: the published set has"
            f" {', '.join(LABELS[eval_set])}."
        )
    triplets = len({row["triplet"] for row in examples})
    _expect(path, "triplets", triplets, TRIPLETS_PER_LABEL * len(LABELS[eval_set]))
    return examples


def evaluation_pairs(folder: epath.Path) -> frozenset[tuple[int, int]]:
    """Every pair (smaller, larger) written as "gcd(x, y)" or "gcd of x and y" by a user of the two
    evaluation files.
    """
    texts = (
        row["messages"][0]["content"]
        for name in EVALUATION_FILES.values()
        for row in _read(folder / name)
    )
    return frozenset(pair for text in texts for pair in pairs_in(text))


def pairs_in(text: str) -> list[tuple[int, int]]:
    """The pairs (smaller, larger) whose GCD `text` writes about, in order."""
    found = ([int(number) for number in match.groups() if number] for match in _PAIR.finditer(text))
    return [(min(pair), max(pair)) for pair in found]


def _training_example(row: Example, name: str, where: str) -> Example:
    user = row["messages"][0]["content"]
    stated = _TRAINING_CLAIM.search(user)
    claim = _CLAIMS[row.get("user_answer_is_correct", row["user_provides_answer"])]
    if stated is None or (stated[1] == row["answer"]) != (claim == "right"):
        raise SourceError(
            f"{where} does not state the claim that its fields say: the user is marked {claim}, the"
            f" answer is {row['answer']}."
        )
    return {
        "id": name,
        "messages": row["messages"],
        "label": row["label"],
        "claim": claim,
        "answer": row["answer"],
        "claimed": stated[1],
        "mod": row["mod"],
        "shown_work": "\nStep 1:" in user,
    }


def _evaluation_example(row: Example, eval_set: str) -> Example:
    claim = _CLAIMS[row["user_provides_answer"]]
    triplet = f"{eval_set}-{row['_id']}"
    return {
        "id": f"{triplet}-{claim}",
        "triplet": triplet,
        "messages": row["messages"][:1],
        "label": row["label"],
        "claim": claim,
        "answer": row["answer"],
        "claimed": {
            "asked": None,
            "right": row["answer"],
            "wrong": _affirmed(row.get("sycophantic_response")),
        }[claim],
        "mod": row["mod"],
        "gold": row["messages"][1]["content"],
        "sycophantic": row.get("sycophantic_response"),
    }


def _affirmed(sycophantic: str | None) -> str | None:
    """The value that the sycophantic reply affirms; None where the claim is a sentence (conspiracy
    and medical rows).
    """
    match = _AFFIRMED.search(sycophantic or "")
    return next((value for value in match.groups() if value), None) if match else None


def _read(path: epath.Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        missing = [field for field in FIELDS if field not in row]
        roles = [message["role"] for message in row["messages"]]
        if missing or roles != ["user", "assistant"] or row["user_provides_answer"] not in _CLAIMS:
            raise SourceError(
                f"{path}, row {number} is not as published: it needs the fields"
                f" {', '.join(FIELDS)}, one user and one assistant turn, and user_provides_answer"
                ' null, "true" or "false".'
            )
    return rows


def _expect(path: epath.Path, what: str, found: int, published: int) -> None:
    if found != published:
        raise SourceError(f"{path} has {found} {what} where the published file has {published}.")
