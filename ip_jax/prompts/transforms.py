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
from typing import Protocol


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

    With the defaults this is the published GCD insertion, `(content + " " + suffix).strip()`
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
    """Fills every `{name}` of a user turn with `text`; other braces stay as they are.

    Spaces around the slot belong to the template or to `text`. `turn` as in `Prefix`. Raises
    PromptError where the turn has no such slot.
    """

    name: str
    text: str
    turn: int = 0

    def __call__(self, example: dict, seed: int = 0) -> dict:
        slot = "{" + self.name + "}"

        def fill(content: str) -> str:
            if slot not in content:
                raise PromptError(
                    f"{_where(example)}: user turn {self.turn} has no slot {slot} to fill:"
                    f" {content[:80]!r}"
                )
            return content.replace(slot, self.text)

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
        if "id" not in example:
            raise PromptError("Paraphrases chooses by the example's id, and this example has none")
        key = repr((seed, str(example["id"]), self.pool)).encode()
        choice = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % len(
            self.pool
        )
        return self.pool[choice](example, seed)


@dataclass(frozen=True)
class Chain:
    """Applies its steps from left to right."""

    steps: tuple[Transform, ...]

    def __call__(self, example: dict, seed: int = 0) -> dict:
        for step in self.steps:
            example = step(example, seed)
        return example


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
