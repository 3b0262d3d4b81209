"""Which prompt a rollout is sampled or trained under: a distribution over prompts, drawn by (seed,
iteration, group, sample) alone.

Draws need no state: a resumed run, another host and another batch size find the same prompts.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

from ip_jax.prompts import library
from ip_jax.prompts.library import Prompt
from ip_jax.prompts.transforms import PromptError, Suffix

PER = ("group", "example", "step")


@dataclass(frozen=True)
class Choice:
    """A drawn prompt. `seed` is that of the prompt's own choices (`Paraphrases`), alike for all to
    whom the draw applies.
    """

    prompt: Prompt
    seed: int

    def messages(self, messages: list[dict]) -> list[dict]:
        """The conversation under this prompt. Raises PromptError where the prompt finds no place in
        it.
        """
        # one id for all tasks: what is drawn once for a step is one paraphrase for all of its tasks
        return self.prompt.transform({"id": "", "messages": messages}, self.seed)["messages"]


@dataclass(frozen=True)
class PromptDistribution:
    """One of `prompts` at random (fixed where there is one), with probability 1 - `keep` the
    neutral prompt instead.

    `prompts` are names of the library, `name=text` for words of one's own (put behind the user turn
    like the published suffixes), or `Prompt` objects with a transform of their own: a template is a
    Chain of a Suffix with slots and Paraphrases of Slots. `per`: one draw for a "group" (all
    completions of a task, so that they stay comparable), an "example" (each completion) or a "step"
    (all groups of an iteration). Equal distributions draw alike, different ones independently; arms
    of one seed share their draws. Raises PromptError for a name that is not known or listed twice,
    another `per`, and a `keep` outside [0, 1].
    """

    prompts: tuple[str | Prompt, ...] = ("neutral",)
    per: str = "group"
    keep: float = 1.0

    def __post_init__(self):
        if self.per not in PER:
            raise PromptError(
                f"a prompt is drawn per {', '.join(PER[:-1])} or {PER[-1]}, not per {self.per!r}"
            )
        if not 0 <= self.keep <= 1:
            raise PromptError(f"keep is {self.keep}: a probability lies between 0 and 1")
        if isinstance(self.prompts, str) or not self.prompts:
            raise PromptError(
                f"prompts is {self.prompts!r}: a distribution needs a tuple of at least one prompt"
            )
        names = [prompt.name for prompt in self.pool]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise PromptError(
                f"the prompt {twice!r} is listed twice in one distribution: each needs a name of"
                " its own"
            )

    @cached_property
    def pool(self) -> tuple[Prompt, ...]:
        """The prompts themselves."""
        return tuple(
            resolve(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompts
        )

    def draw(self, seed: int, iteration: int, group: int, sample: int) -> Choice:
        """The prompt of one completion; `seed` is the run's."""
        place = {"step": (), "group": (group,), "example": (group, sample)}[self.per]
        digest = hashlib.blake2b(
            repr((seed, iteration, place, self.prompts)).encode(), digest_size=16
        ).digest()
        kept, drawn = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
        return Choice(
            (
                self.pool[drawn % len(self.pool)]
                if kept < self.keep * 2**64
                else library.get("neutral")
            ),
            drawn,
        )


def resolve(prompt: str) -> Prompt:
    """A prompt of the library by its name, or one of the user's own from `name=text`, of kind
    "own".

    Raises PromptError for a name that is not known (with the nearest ones) and for an own name that
    is taken or not made of letters, digits and _.
    """
    name, equals, text = prompt.partition("=")
    if not equals:
        return library.get(name)
    # files are named after prompts
    if name in {known.replace("/", "_") for known in library.PROMPTS} | library.PROMPTS.keys():
        raise PromptError(
            f"the prompt {prompt!r} needs another name: {name} is taken by a prompt of the library"
        )
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or not text.strip():
        raise PromptError(
            f"the prompt {prompt!r} must read name=text: a name of letters, digits and _, then its"
            " words"
        )
    return Prompt(name, "own", text, "the config's own", transform=Suffix("\n" + text))
