"""Which prompt a rollout is sampled or trained under: a distribution over prompts, drawn by (seed,
iteration, group, sample) alone.

Draws need no state: a resumed run, another host and another batch size find the same prompts.
"""

import hashlib
from dataclasses import dataclass, replace

from ip_jax.prompts.book import PromptBook
from ip_jax.prompts.prompt import NEUTRAL, Prompt
from ip_jax.prompts.transforms import Identity, PromptError

PER = ("group", "example", "step")
NOTHING_ADDED = replace(NEUTRAL, transform=Identity())


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

    `prompts` are names that the study's book finds, until `resolved` turns them into `Prompt`s. A
    `Prompt` may have a transform of its own: a template is a Chain of a Suffix with slots and
    Paraphrases of Slots. `per`: one draw for a "group" (all completions of a task, so that they
    stay comparable), an "example" (each completion) or a "step" (all groups of an iteration). Equal
    distributions draw alike, different ones independently; arms of one seed share their draws.
    Raises PromptError for a name that is listed twice, another `per`, and a `keep` outside [0, 1].
    """

    prompts: tuple[str | Prompt, ...] = (NOTHING_ADDED,)
    per: str = "group"
    keep: float = 1.0
    neutral: Prompt = NOTHING_ADDED  # of the study: its slot filled with nothing, where it has one

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
        names = self.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise PromptError(
                f"the prompt {twice!r} is listed twice in one distribution: each needs a name of"
                " its own"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of its prompts."""
        return tuple(prompt if isinstance(prompt, str) else prompt.name for prompt in self.prompts)

    def resolved(self, book: PromptBook) -> "PromptDistribution":
        """With the prompts themselves in place of their names. Raises PromptError as the book."""
        found = tuple(
            book.find(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompts
        )
        return replace(self, prompts=found, neutral=book.find("neutral"))

    @property
    def pool(self) -> tuple[Prompt, ...]:
        """The prompts themselves. Raises PromptError where they are only named."""
        named = next((prompt for prompt in self.prompts if isinstance(prompt, str)), None)
        if named is not None:
            raise PromptError(
                f"the prompt {named!r} is only named here: PromptDistribution.resolved finds it in"
                " a study's book"
            )
        return self.prompts

    def draw(self, seed: int, iteration: int, group: int, sample: int) -> Choice:
        """The prompt of one completion; `seed` is the run's."""
        place = {"step": (), "group": (group,), "example": (group, sample)}[self.per]
        digest = hashlib.blake2b(
            repr((seed, iteration, place, self.names)).encode(), digest_size=16
        ).digest()
        kept, drawn = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
        chosen = self.pool[drawn % len(self.pool)] if kept < self.keep * 2**64 else self.neutral
        return Choice(chosen, drawn)
