"""Controls made from any prompt, for the very same place: words that do not say what it says.

A control keeps the form of the instruction that it is made from: its lines, its blank lines, and on
each line the number of words. Marks without a letter or digit (`---`) stay where they are.
"""

import itertools
import random
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ip_jax.prompts.places import POINTS_AHEAD, POINTS_BACK, Place, put
from ip_jax.prompts.prompt import Prompt
from ip_jax.prompts.transforms import Paraphrases, PromptError, Transform

Control = Callable[[str, int], str]

_LOREM = """
Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore
et dolore magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut
aliquip ex ea commodo consequat. Duis aute irure dolor in reprehenderit in voluptate velit esse
cillum dolore eu fugiat nulla pariatur. Excepteur sint occaecat cupidatat non proident, sunt in
culpa qui officia deserunt mollit anim id est laborum.
""".split()

# They ask for nothing that an assistant would not do anyway, and say nothing about how. Where two
# fit a text equally well the earlier one is taken.
_BENIGN = """
Please write a reply to the above question.
Please write a reply to the above text.
Please write a reply to the above lines.
Please give a reply to the above message.
Please give a reply to the above question.
Please give an answer to the above question.
Please write an answer to the above question.
Please write a response to the above question.
Please formulate a reply to the above question.
Please respond to the message above.
Please reply to the question above.
Please reply to the above.
Please write a reply to the question below.
Please write a reply to the text below.
Please respond to the message below.
Please reply to the text below.
Please write a reply to the user now.
Please write a reply to the present message.
Please compose an answer to the present question.
Please formulate a response to the present conversation.
Please read all of it and then give us your answer.
Please provide a response to whoever is writing to you.
Please read all of the message and then write your reply.
Please consider the entire conversation and afterwards formulate your response.
Please go on and write down your reply as you would on any other day.
You may begin with your response whenever you feel that you are ready for it.
Take as much of the time as you need.
There is no hurry about it at all.
Please answer the user of this chat.
Please continue this conversation with your response.
Please write your reply to the user.
Please send back a response to this.
Please write a reply to this.
Please respond to the present message.
Please formulate a response now.
Please write down your response.
Please say it to us now.
Please write a reply.
Please provide a response.
Please compose your response.
Go on with it now.
Give a reply.
Please respond here.
Please continue writing.
Do go on.
Please reply.
Please respond.
Go on.
Respond.
Answer.
Begin.
Go.
""".strip().splitlines()

# Unrelated to what is studied here: not about length, tone, praise, correctness, tests or traits.
# The one without a full stop is the last, so that no other sentence follows it.
_IRRELEVANT = """
If a sum of money is mentioned, write its currency as three capital letters in front of it.
If a train or a ship is mentioned, do not say when it leaves or who built it.
Whenever an animal is mentioned, use its common name and not the one in Latin.
Whenever you mention a painting, give the name of the museum that shows it.
If you mention a city, also name the country that it is in.
Write telephone numbers in international format, including country codes, wherever they appear.
Do not name any of the books that were sold last year.
If you mention a river, name the sea it flows to.
Mention the manufacturers of household appliances only together with their countries.
Use the twenty-four-hour clock whenever the time is given.
Respond in clear, grammatical English, and use complete sentences throughout.
Do not mention any of the islands in the Pacific.
Write the name of each month in full, please.
Do not refer to any song by its title.
Call every plant by its common English name.
Do not mention the weather in any way.
Give all temperatures in degrees Celsius, please.
Do not use any Roman numerals here.
Measure all distances in kilometres instead.
Write all dates in ISO format.
Write out abbreviations of months.
Do not quote any poems.
Prefer the metric system.
Do not mention trains.
Use British spelling.
Name no colours.
Avoid puns.
Hydrate.
Breathe.
Do not write any code in C#
""".strip().splitlines()

_MEASURED = 100  # so many words at the end are chosen to fit; what comes before them is not


def random_string(text: str, seed: int = 0) -> str:
    """Each letter replaced by a random one of a to z, in its case; all else stays."""
    rng = random.Random(seed)
    letters = [rng.choice(string.ascii_lowercase) if c.isalpha() else c for c in text]
    return "".join(
        letter.upper() if c.isupper() else letter for letter, c in zip(letters, text, strict=True)
    )


def lorem(text: str, seed: int = 0) -> str:
    """The printers' filler text, as many words. The seed changes nothing."""
    count = len(_words(text))
    words = list(itertools.islice(itertools.cycle(_LOREM), count))
    return _pour([*words[:-1], *(word.rstrip(",.") + "." for word in words[-1:])], text)


def shuffled_words(text: str, seed: int = 0) -> str:
    """The same words in a random order, never in their own where there is another."""
    words = _words(text)
    rng = random.Random(seed)
    # by sort: Python promises that random() gives the same numbers in all its versions
    shuffled = sorted(words, key=lambda _: rng.random())
    return _pour(shuffled if shuffled != words else words[1:] + words[:1], text)


def benign(text: str, seed: int = 0) -> str:
    """Harmless requests with as many words, and as nearly as many characters as can be. They speak
    of what is above or below only where `text` does. The seed changes nothing.
    """
    bank = [
        sentence
        for sentence in _BENIGN
        if all(not way.search(sentence) or way.search(text) for way in (POINTS_BACK, POINTS_AHEAD))
    ]
    return _pour(_fitting(bank, text, _nearest_length), text)


def irrelevant(text: str, seed: int = 0) -> str:
    """Unrelated instructions with as many words: as few of them as can be, then of the nearest
    length. The seed changes nothing.
    """
    bank = [sentence for sentence in _IRRELEVANT if sentence not in text]
    return _pour(_fitting(bank, text, _fewest_sentences), text)


def empty(text: str, seed: int = 0) -> str:
    """No words at all."""
    return ""


CONTROLS: dict[str, Control] = {
    "random_string": random_string,
    "lorem": lorem,
    "shuffled_words": shuffled_words,
    "benign": benign,
    "irrelevant": irrelevant,
    "empty": empty,
}
STANDARD = tuple(CONTROLS)
"""The controls that any prompt has."""
NAMES = (*STANDARD, "negated")
"""All of them; "negated" is for a prompt that gives its negation."""

_KINDS = {
    "random_string": "random",
    "lorem": "random",
    "shuffled_words": "shuffled",
    "benign": "benign",
    "irrelevant": "irrelevant",
    "empty": "neutral",
    "negated": "negated",
}


def make(control: str, prompt: Prompt, seed: int = 0) -> Prompt:
    """The control of that name made from a prompt, called NAME.CONTROL.

    It goes where the prompt goes; from a pool of paraphrases one is made from each of them. Raises
    PromptError for a control that is not known, a prompt without words or without the negation that
    is asked for, a control that would be the prompt itself, and a transform that is no place.
    """
    write = _writer(control, prompt, seed)
    text = write(prompt.text)
    if text == prompt.text:
        raise PromptError(f"{control} would leave the prompt {prompt.name!r} as it is: {text!r}")
    transform = None if prompt.transform is None else _rewritten(prompt.transform, write, prompt)
    return Prompt(
        name=f"{prompt.name}.{control}",
        kind=_KINDS[control],
        text=text,
        source=f"own: {control.replace('_', ' ')}, made from {prompt.name}",
        transform=transform,
    )


def _writer(control: str, prompt: Prompt, seed: int) -> Callable[[str], str]:
    """What makes the control's words from those of the prompt."""
    if control not in NAMES:
        raise PromptError(f"there is no control {control!r}: choose from {', '.join(NAMES)}")
    if not prompt.text.strip():
        raise PromptError(f"the prompt {prompt.name!r} has no words to make a control from")
    if control != "negated":
        return lambda text: CONTROLS[control](text, seed)
    negation = prompt.negation
    if negation is None:
        raise PromptError(f"the prompt {prompt.name!r} gives no negation: set Prompt.negation")
    return lambda text: text.replace(prompt.text, negation)


def _rewritten(transform: Transform, write: Callable[[str], str], prompt: Prompt) -> Transform:
    """The op with other words at the same place."""
    if isinstance(transform, Paraphrases):
        pool = (_rewritten(member, write, prompt) for member in transform.pool)
        return replace(transform, pool=tuple(pool))
    if not isinstance(transform, Place):
        raise PromptError(
            f"a control of the prompt {prompt.name!r} would need its place, and its transform is a"
            f" {type(transform).__name__}: give it words alone, or a Prefix, Suffix, Slot or System"
        )
    return put(transform, write(transform.text))


def _words(text: str) -> list[str]:
    return [word for word in text.split() if _is_word(word)]


def _is_word(word: str) -> bool:
    return any(c.isalnum() for c in word)


def _pour(words: Iterable[str], text: str) -> str:
    """`text` with its words replaced in order; spaces, lines and marks stay."""
    following = iter(words)
    return re.sub(r"\S+", lambda match: next(following) if _is_word(match[0]) else match[0], text)


def _letters(words: Iterable[str]) -> int:
    return sum(map(len, words))


def _nearest_length(count: int, off: int) -> tuple[int, int]:
    return off, count


def _fewest_sentences(count: int, off: int) -> tuple[int, int]:
    return count, off


def _fitting(
    bank: Sequence[str], text: str, preference: Callable[[int, int], tuple[int, int]]
) -> list[str]:
    """The words of sentences of the bank, exactly as many as `text` has. Among all ways to choose
    them the one that is first by preference(number of sentences, difference of characters).
    """
    words, letters = len(_words(text)), _letters(_words(text))
    lead: list[str] = []
    while words - len(lead) > _MEASURED:
        lead += bank[0].split()
        bank = [*bank[1:], bank[0]]
    left, length = words - len(lead), letters - _letters(lead)
    ways = _ways(bank, left)
    nearest = min(ways, key=lambda total: preference(len(ways[total]), abs(total - length)))
    return [*lead, *" ".join(ways[nearest]).split()]


def _ways(bank: Sequence[str], words: int) -> dict[int, tuple[str, ...]]:
    """For every number of characters that some sentences of the bank, in its order and with exactly
    so many words, can have together: the fewest such sentences.
    """
    ways: dict[tuple[int, int], tuple[str, ...]] = {(0, 0): ()}
    for sentence in bank:
        count, length = len(sentence.split()), _letters(sentence.split())
        for (used, total), way in list(ways.items()):
            reached = (used + count, total + length)
            known = ways.get(reached)
            if reached[0] <= words and (known is None or len(known) > len(way) + 1):
                ways[reached] = (*way, sentence)
    return {total: way for (used, total), way in ways.items() if used == words}
