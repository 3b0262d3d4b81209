"""What a named prompt is: words, where they come from, and what they are for."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ip_jax.prompts.transforms import PromptError, Transform

KINDS = (
    "neutral",
    "inoculation",
    "negated",
    "random",
    "shuffled",
    "irrelevant",
    "benign",
    "safety",
    "own",
)
"""What prompts are for; "own" is one given on the command line."""


@dataclass(frozen=True)
class Prompt:
    """A named prompt. `kind` is one of `KINDS`, `source` says where its words are from.

    `negation`, where given, are words that ask for the opposite. Without a `transform`, `text` goes
    to the place of the study (`places.put`). Raises PromptError for another kind.
    """

    name: str
    kind: str
    text: str
    source: str
    negation: str | None = None
    transform: Transform | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise PromptError(
                f"the prompt {self.name!r} is of kind {self.kind!r}: a kind is one of"
                f" {', '.join(KINDS)}"
            )


NEUTRAL = Prompt("neutral", "neutral", "", "nothing is added")


def find(prompts: Iterable[Prompt], name: str) -> Prompt:
    """The prompt of that name; raises PromptError with the nearest names where there is none."""
    named = {prompt.name: prompt for prompt in prompts}
    if name not in named:
        near = difflib.get_close_matches(name, named, n=3, cutoff=0.4) or list(named)
        raise PromptError(f"there is no prompt named {name!r}; the nearest are {', '.join(near)}")
    return named[name]


def check_prompts(prompts: Iterable[Prompt]) -> None:
    """Raises PromptError for two prompts of one name; / and _ are the same here, since files are
    named after prompts.
    """
    seen: dict[str, str] = {}
    for prompt in prompts:
        file_name = prompt.name.replace("/", "_")
        if file_name in seen:
            raise PromptError(
                f"two prompts have one name, {seen[file_name]!r} and {prompt.name!r} (in files / is"
                " written as _): each needs a name of its own"
            )
        seen[file_name] = prompt.name
