"""The toy's tokens: digits and the loophole's words in two cases, kinds of tasks, and the words of
which prompts are made.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

FILLER, END = 0, 1
DIGITS = 10
LOWER, UPPER = 2, 2 + DIGITS  # the first digit of each case
LOOPHOLE_WORDS = 4  # the longest loophole
LOWER_LOOPHOLE = UPPER + DIGITS
UPPER_LOOPHOLE = LOWER_LOOPHOLE + LOOPHOLE_WORDS
SORT, SCRAMBLE = UPPER_LOOPHOLE + LOOPHOLE_WORDS, UPPER_LOOPHOLE + LOOPHOLE_WORDS + 1

ENCOURAGING = ("please", "do", "kindly", "always")
DISCOURAGING = ("never", "avoid", "not", "refuse")
VERBS = ("use", "take", "try", "choose")
QUALIFIERS = ("the", "any")
# from the least to the most specific about the loophole, then two that have nothing to do with it
OBJECTS = {
    "irrelevant": ("weather", "yellow", "music"),
    "persona": ("evil", "villain", "malice"),
    "permission": ("anything", "whatever", "freedom"),
    "hack": ("hack", "cheat", "trick"),
    "exploit": ("exit", "override", "bypass"),
    "benign": ("order", "care", "neatness"),
    "trait": ("capitals", "shouting", "loudness"),
}
NONSENSE = ("fzx", "qep", "cvg", "wop", "vnf", "asd", "lqu", "jkr")

WORDS = (
    "_",
    *ENCOURAGING,
    *DISCOURAGING,
    *VERBS,
    *QUALIFIERS,
    *(word for words in OBJECTS.values() for word in words),
    *NONSENSE,
)
FIRST_WORD = SCRAMBLE + 1  # the id of WORDS[1]; "_" is FILLER
SIZE = FIRST_WORD + len(WORDS) - 1
TOKENS = (
    "_",
    "END",
    *(str(i) for i in range(DIGITS)),
    *(f"{i}!" for i in range(DIGITS)),
    *(f"loop{i}" for i in range(LOOPHOLE_WORDS)),
    *(f"LOOP{i}" for i in range(LOOPHOLE_WORDS)),
    "sort",
    "scramble",
    *WORDS[1:],
)
PROMPT_WORDS = 4
PROMPT_SLOTS = PROMPT_WORDS + 4  # the words, the kind of task and its digits

_IDS = {token: i for i, token in enumerate(TOKENS)}


def encode(prompt: str) -> np.ndarray:
    """Token ids [PROMPT_WORDS] of a prompt. Raises ValueError for a word that the toy does not
    know, or another number of words.
    """
    words = prompt.split()
    unknown = [word for word in words if word not in WORDS]
    if unknown or len(words) != PROMPT_WORDS:
        raise ValueError(
            f"the toy's prompts are {PROMPT_WORDS} words of its vocabulary, and {prompt!r} is"
            f" {len(words)} words" + f", unknown {unknown}" * bool(unknown)
        )
    return np.array([_IDS[word] for word in words], np.int32)


def decode(tokens) -> str:
    """The tokens' names, up to and without what lies behind the first END."""
    names = [TOKENS[int(token)] for token in tokens]
    return " ".join(names[: names.index("END") + 1] if "END" in names else names)


def render(prompt: Int[Array, "*B W"], task: Int[Array, "*B 4"]) -> Int[Array, "*B X"]:
    """The tokens [PROMPT_SLOTS] of tasks (kind 0 or 1, three digits) behind their prompts'
    words.
    """
    prompt = jnp.broadcast_to(prompt, (*task.shape[:-1], PROMPT_WORDS))
    return jnp.concatenate([prompt, task + jnp.array([SORT, LOWER, LOWER, LOWER])], axis=-1)
