"""The prompts of a study by name, and those that are made from them.

Wherever a prompt is named (an arm, an evaluation, the command line) the name is one of

    neutral              nothing added, unless the study declares words of its own
    NAME                 a prompt that the study declares
    NAME=words           words of your own, at the study's place
    NAME=@file[:n]       a pool of paraphrases, one a line of the file (its first n), drawn anew for
                         each example
    NAME.CONTROL         a control made from a declared prompt: NAME.random_string, NAME.lorem, ...
"""

import difflib
import re
from dataclasses import dataclass, replace

from ip_jax.prompts import controls
from ip_jax.prompts.places import Place, put
from ip_jax.prompts.pools import pool_from, read_pool
from ip_jax.prompts.prompt import NEUTRAL, Prompt, check_prompts
from ip_jax.prompts.transforms import PromptError, Suffix

BEHIND = Suffix("", separator="\n\n")  # a paragraph of its own behind the user's words


@dataclass(frozen=True)
class PromptBook:
    """The declared `prompts`, and the `place` where a study's instruction goes.

    Raises PromptError for two prompts of one name.
    """

    prompts: tuple[Prompt, ...] = ()
    place: Place = BEHIND

    def __post_init__(self):
        check_prompts(self.prompts)

    def find(self, name: str) -> Prompt:
        """The prompt of that name, with its transform. Raises PromptError with the nearest names
        where there is none, and for an own name that is taken or made of other characters than
        letters, digits and _.
        """
        if "=" in name:
            return self._own(*name.split("=", 1))
        declared = next((prompt for prompt in self.prompts if prompt.name == name), None)
        if declared is not None:
            return self._placed(declared)
        if name == NEUTRAL.name:
            return replace(NEUTRAL, transform=put(self.place, ""))
        base, dot, control = name.rpartition(".")
        if dot and control in controls.NAMES:
            return self.control(self.find(base), control)
        near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise PromptError(
            f"no prompt is called {name!r}: {hint}there is {', '.join(self.names)}; NAME=words"
            f" makes one of your own, and NAME.CONTROL a control ({', '.join(controls.NAMES)})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Neutral and the declared ones."""
        return tuple(dict.fromkeys([NEUTRAL.name, *(prompt.name for prompt in self.prompts)]))

    def knows(self, name: str) -> bool:
        """Whether `find` finds it."""
        try:
            self.find(name)
        except PromptError:
            return False
        return True

    def control(self, of: Prompt, control: str) -> Prompt:
        """The control of that name, made from the words of a prompt. Raises PromptError for an
        unknown control, and for the negation of a prompt that gives none.
        """
        return self._placed(controls.make(control, of))

    def _placed(self, prompt: Prompt) -> Prompt:
        if prompt.transform is not None:
            return prompt
        return replace(prompt, transform=put(self.place, prompt.text))

    def _own(self, name: str, words: str) -> Prompt:
        # files are named after prompts, and there a/b is a_b
        taken = {NEUTRAL.name, *(prompt.name.replace("/", "_") for prompt in self.prompts)}
        if name in taken or any(prompt.name == name for prompt in self.prompts):
            raise PromptError(f"the prompt {name!r} needs another name: this one is taken")
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or not words.strip():
            raise PromptError(
                f"the prompt {name + '=' + words!r} must read name=text: a name of letters, digits"
                " and _, then its words, or @ and a file with a paraphrase on each line"
            )
        if not words.startswith("@"):
            return Prompt(name, "own", words, "your own", transform=put(self.place, words))
        path, _, count = words[1:].partition(":")
        lines = read_pool(path, _whole(count, words))
        pool = pool_from(lines, None, self.place)
        return Prompt(name, "own", lines[0], f"a pool of {len(lines)} of {path}", transform=pool)


def _whole(count: str, words: str) -> int | None:
    if count and not re.fullmatch("[0-9]+", count):
        raise PromptError(f"{words!r} must read @file or @file:n, n a whole number")
    return int(count) if count else None
