"""Where a study's instruction goes, said once: a place is a transform without its text.

Suffix("", separator="\\n\\n")              behind the user's words
Prefix("", separator="\\n")                in a first line of its own
Slot("instruction", "", separator=" ")    in mid-prompt, where the rows say {instruction}
System("")                                in the system message
"""

import re
from dataclasses import replace

from ip_jax.prompts.transforms import (
    Identity,
    Prefix,
    PromptError,
    Slot,
    Suffix,
    System,
    Transform,
)

Place = Prefix | Suffix | System | Slot

# the words that point out of an instruction, to what stands before or behind it; "above all" and
# "below 100" do not
POINTS_BACK = re.compile(
    r"\b(?:above(?! (?:all|average|\d))|preceding|foregoing|aforementioned)\b", re.IGNORECASE
)
POINTS_AHEAD = re.compile(
    r"\b(?:below(?! (?:average|\d))|(?:the|this|these|as) following|as follows)\b", re.IGNORECASE
)


def put(place: Place, text: str) -> Transform:
    """The op that puts `text` at a place. Without words it is the neutral prompt: a slot is filled
    with nothing, and anywhere else nothing is done.
    """
    if text.strip():
        return replace(place, text=text)
    return replace(place, text="") if isinstance(place, Slot) else Identity()


def lacks(place: Place, example: dict) -> str | None:
    """Why an instruction cannot be put at a place of this example, in one sentence; None where it
    can.
    """
    try:
        put(place, "words")(example)
    except PromptError as error:
        return str(error)
    return None


def wording_conflicts(text: str, place: Place) -> str | None:
    """Why an instruction's words do not suit its place, in one sentence; None where they do.

    "above" and the like must not stand before what they speak of, "below" and the like not behind
    it. In mid-prompt both are right, and so are words that point to other lines of the instruction.
    """
    if isinstance(place, Prefix | System):
        wrong, where, others = POINTS_BACK.search(text), "before", "behind"
        own_lines = wrong and "\n" in text[: wrong.start()]
    elif isinstance(place, Suffix):
        wrong, where, others = POINTS_AHEAD.search(text), "behind", "before"
        own_lines = wrong and re.search("[:\n]", text[wrong.end() :])
    else:
        return None
    if not wrong or own_lines:
        return None
    return (
        f"the instruction {text!r} says {wrong[0]!r}, but it stands {where} the user's words:"
        f" put it {others} them, or change the wording"
    )
