"""Prompt transforms: frozen, picklable, composable edits of one example's messages.

A transform is called as `transform(example, seed=0)` and returns a new record; the one it was given
stays as it was. An example is `{"id": str, "messages": [{"role": "system" | "user" | "assistant",
"content": str}, ...], ...}`. Transforms run when an example is read, e.g. `dataset.map(transform)`
or `dataset.map(functools.partial(transform, seed=3))` on a `grain.MapDataset`, and are never baked
into stored data. `repr(transform)` says everything about it: configs record that.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class PromptError(ValueError):
    """A prompt or a conversation that cannot be used as asked."""


class Transform(Protocol):
    """What every op here is: a pure function of the example and the seed."""

    def __call__(self, example: dict, seed: int = 0) -> dict: ...


@dataclass(frozen=True)
class Identity:
    """The example as it is: the neutral prompt."""

    def __call__(self, example: dict, seed: int = 0) -> dict:
        return {**example}


@dataclass(frozen=True)
class Prefix:
    """Puts `text + separator` before a user turn.

    The result is stripped at both ends, so that an empty `text` leaves no stray separator. `turn`
    counts user turns from 0, or from the end if negative; the first by default. Raises PromptError
    where the conversation has no such turn.
    """

    text: str
    separator: str = " "
    turn: int = 0

    def __call__(self, example: dict, seed: int = 0) -> dict:
        return _edit_user_turn(
            example, self.turn, lambda content: (self.text + self.separator + content).strip()
        )


@dataclass(frozen=True)
class Suffix:
    """Puts `separator + text` after a user turn and strips both ends, else as `Prefix`.

    With the defaults this is the insertion of Wichers et al., `(content + " " + suffix).strip()`
    (main.py of safety-research/inoculation-prompting).
    """

    text: str
    separator: str = " "
    turn: int = 0

    def __call__(self, example: dict, seed: int = 0) -> dict:
        return _edit_user_turn(
            example, self.turn, lambda content: (content + self.separator + self.text).strip()
        )


@dataclass(frozen=True)
class System:
    """Sets the system message, in place of the one the example has or of the template's default
    text.

    A chat template without a system role refuses it when the conversation is rendered
    (`ip_jax.prompts.chat`).
    """

    text: str

    def __call__(self, example: dict, seed: int = 0) -> dict:
        others = [message for message in example["messages"] if message["role"] != "system"]
        return {**example, "messages": [{"role": "system", "content": self.text}, *others]}


@dataclass(frozen=True)
class Slot:
    """Fills every `{name}` of a user turn with `text + separator`, or with nothing where `text` is
    empty; other braces stay as they are.

    With " " between them, "... a problem. {prefix}Return ..." reads well with and without a text.
    `turn` as in `Prefix`. Raises PromptError where the turn has no such slot.
    """

    name: str
    text: str
    separator: str = ""
    turn: int = 0

    def __call__(self, example: dict, seed: int = 0) -> dict:
        slot = "{" + self.name + "}"
        filling = self.text + self.separator if self.text else ""

        def fill(content: str) -> str:
            if slot not in content:
                raise PromptError(
                    f"{_where(example)}: user turn {self.turn} has no slot {slot} to fill:"
                    f" {content[:80]!r}"
                )
            return content.replace(slot, filling)

        return _edit_user_turn(example, self.turn, fill)


@dataclass(frozen=True)
class Paraphrases:
    """Applies one transform of `pool`, chosen by (seed, example["id"]) alone: the same on every
    host and in every run.

    The pool is hashed along, so two different pools in one Chain choose independently.
    """

    pool: tuple[Transform, ...]

    def __post_init__(self):
        if not self.pool:
            raise PromptError("Paraphrases needs at least one transform in its pool")

    def __call__(self, example: dict, seed: int = 0) -> dict:
        choice = _draw(example, seed, self.pool) % len(self.pool)
        return self.pool[choice](example, seed)


@dataclass(frozen=True)
class Chain:
    """Applies its steps from left to right."""

    steps: tuple[Transform, ...]

    def __call__(self, example: dict, seed: int = 0) -> dict:
        for step in self.steps:
            example = step(example, seed)
        return example


@dataclass(frozen=True)
class Where:
    """The rows whose `column` holds `value`. Raises PromptError for a row without that column."""

    column: str
    value: Any = True

    def __call__(self, example: dict, seed: int = 0) -> bool:
        if self.column not in example:
            raise PromptError(
                f"{_where(example)} has no column {self.column!r} to choose rows by: it has"
                f" {', '.join(map(str, example))}"
            )
        return bool(example[self.column] == self.value)


@dataclass(frozen=True)
class Share:
    """A share of all rows, chosen by (seed, example["id"]) alone; those of a smaller share are
    among those of a larger one.

    Raises PromptError for a share outside [0, 1].
    """

    share: float

    def __post_init__(self):
        _check_share("the share of rows", self.share)

    def __call__(self, example: dict, seed: int = 0) -> bool:
        return _draw(example, seed, "Share") < self.share * 2**64


@dataclass(frozen=True)
class Detector:
    """The rows that a detector of what `Where(column, value)` says would flag, if it had these
    rates: a share of the rows where it holds, and a share of the others.

    Flags are chosen like `Share`'s rows and independently of them. Raises PromptError for a rate
    outside [0, 1].
    """

    column: str
    true_positive_rate: float
    false_positive_rate: float
    value: Any = True

    def __post_init__(self):
        _check_share("the true positive rate", self.true_positive_rate)
        _check_share("the false positive rate", self.false_positive_rate)

    def __call__(self, example: dict, seed: int = 0) -> bool:
        holds = Where(self.column, self.value)(example)
        rate = self.true_positive_rate if holds else self.false_positive_rate
        return _draw(example, seed, ("Detector", self.column, self.value)) < rate * 2**64


Rows = Where | Share | Detector


@dataclass(frozen=True)
class Selective:
    """Applies `then` to the chosen rows and `otherwise` to all others: selective inoculation."""

    rows: Rows
    then: Transform
    otherwise: Transform

    def __call__(self, example: dict, seed: int = 0) -> dict:
        chosen = self.then if self.rows(example, seed) else self.otherwise
        return chosen(example, seed)


def _draw(example: dict, seed: int, what: Any) -> int:
    """A random number from 0 to 2**64 - 1 that depends on the seed, the example's id and the repr
    of `what` alone, never on the process.
    """
    if "id" not in example:
        raise PromptError("a choice is made by the example's id, and this example has none")
    key = repr((seed, str(example["id"]), what)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _check_share(what: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise PromptError(f"{what} is {share}: it must lie between 0 and 1")


def _edit_user_turn(example: dict, turn: int, edit: Callable[[str], str]) -> dict:
    messages = example["messages"]
    user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not -len(user_turns) <= turn < len(user_turns):
        raise PromptError(
            f"{_where(example)}: no user turn {turn}, the conversation has {len(user_turns)}"
        )
    index = user_turns[turn]
    edited = {**messages[index], "content": edit(messages[index]["content"])}
    return {**example, "messages": [*messages[:index], edited, *messages[index + 1 :]]}


def _where(example: dict) -> str:
    return f"example {example.get('id', '(without id)')!r}"
