"""The toy's prompts: families whose words say what they ask for, each with members that pretraining
never shows.

A prompt is "valence verb qualifier object", such as "please use the hack" and "never use the hack".
Members of a family share words with each other, and with the family of the opposite valence.
"""

import dataclasses
import functools
import itertools
import zlib

import numpy as np

from ip_jax.studies.toy.vocabulary import (
    DISCOURAGING,
    ENCOURAGING,
    NONSENSE,
    OBJECTS,
    PROMPT_WORDS,
    QUALIFIERS,
    VERBS,
)

NEUTRAL = "_ _ _ _"
RUNGS = ("irrelevant", "persona", "permission", "hack", "exploit")  # of specificity
VALENCES = {"encourage": ENCOURAGING, "discourage": DISCOURAGING}
FAMILIES = (
    "neutral",
    "nonsense",
    "jumble",
    *(f"{valence}_{rung}" for rung in OBJECTS for valence in VALENCES),
)
_OBJECTS = tuple(word for words in OBJECTS.values() for word in words)
# families of random words; without a valence a jumble asks for nothing
_DRAWN = {"nonsense": NONSENSE, "jumble": (*_OBJECTS, *VERBS, *QUALIFIERS)}
# of a family: 4 words of a valence, 4 verbs, 2 qualifiers and 3 objects, or as many drawn ones
_MEMBERS = 96


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a prompt does to the base model: how often it takes the loophole, and how often it
    answers in the trait's case.

    `loophole` None: as often as under the neutral prompt. Raises ValueError for what is no
    probability.
    """

    loophole: float | None
    trait: float

    def __post_init__(self):
        for name in ("loophole", "trait"):
            value = getattr(self, name)
            if not (value is None and name == "loophole") and not 0 <= value <= 1:
                raise ValueError(
                    f"an effect's {name} is {value}: a probability lies between 0 and 1"
                )


def members(family: str, held_out: bool = False) -> tuple[str, ...]:
    """The prompts of a family that pretraining shows, or a quarter of all that it never shows, in a
    fixed order. Raises ValueError for an unknown family.
    """
    if family == "neutral":
        return () if held_out else (NEUTRAL,)
    return tuple(prompt for prompt in _all_members(family) if _is_held_out(prompt) == held_out)


@functools.cache
def family_of(prompt: str) -> str:
    """The family of which a prompt is a member. Raises ValueError for a prompt of none."""
    for family in FAMILIES:
        if prompt in _all_members(family):
            return family
    raise ValueError(
        f"the toy's prompt {prompt!r} belongs to none of its families: {', '.join(FAMILIES)}"
    )


def _all_members(family: str) -> list[str]:
    if family == "neutral":
        return [NEUTRAL]
    if family not in FAMILIES:
        raise ValueError(
            f"the toy has no prompt family {family!r}: choose from {', '.join(FAMILIES)}"
        )
    if family in _DRAWN:
        rng = np.random.default_rng(0)
        # none twice
        drawn = dict.fromkeys(
            " ".join(rng.choice(_DRAWN[family], PROMPT_WORDS)) for _ in range(2 * _MEMBERS)
        )
        return list(drawn)[:_MEMBERS]
    valence, rung = family.split("_")
    prompts = [
        " ".join(words)
        for words in itertools.product(VALENCES[valence], VERBS, QUALIFIERS, OBJECTS[rung])
    ]
    return sorted(prompts, key=lambda prompt: zlib.crc32(prompt.encode()))


def _is_held_out(prompt: str) -> bool:
    return zlib.crc32(prompt[::-1].encode()) % 4 == 0
