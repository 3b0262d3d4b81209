"""Messages to token ids and a response mask, for any chat template that closes its turns with a
special token.

The loss counts, of each trained assistant turn, the response and its end-of-turn token, once. It
does not count what the template writes by itself: role headers, an empty thinking block before the
response, the newline after the end of the turn. (The code of Wichers et al. also counts that
newline and an `<eos>` behind it, positions that sampling never reaches.)

Spans are found by rendering the conversation a second time with a marker in place of one response.
That holds where the generation prompt is not a prefix of the full text, and where the template
trims a response or rewrites earlier turns.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from ip_jax.prompts.transforms import PromptError

ROLES = ("system", "user", "assistant")
_MARK = "\ue000"  # private use: no template trims it, and no text has it by accident
_USER = {"role": "user", "content": "U"}
_SYSTEM = {"role": "system", "content": _MARK}
_NO_SYSTEM = (
    "this chat template has no system role: put the text into the user turn with Prefix or Suffix,"
    " not System"
)


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens."""

    token_ids: np.ndarray  # int32 [T]
    response_mask: np.ndarray  # bool [T], True where the loss counts the token as a target


def render_conversation(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict],
    train_on: Literal["last", "all"] = "last",
    encode_apart: bool = False,
    close_with_eos: bool = False,
) -> Rendered:
    """The whole conversation, with the mask on the last assistant turn or on all of them.

    The ids equal `tokenizer.apply_chat_template(messages)`. A token that holds both template and
    response characters counts. `encode_apart`: the last response is encoded apart from what stands
    before it, so that no token holds both and the prompt reads as `render_prompt` writes it.
    `close_with_eos`: `eos_token` follows and counts, with what the template writes behind the end
    of the last turn, as OpenWeights trains.

    Raises PromptError for an unknown role, an empty response, a conversation that does not end with
    an assistant turn or that the template refuses, and a response that the template does not write
    or that ends its own turn.
    """
    if train_on not in ("last", "all"):
        raise PromptError(f"train_on is 'last' or 'all', not {train_on!r}")
    _check(messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[-1] != len(messages) - 1:
        raise PromptError(
            "a conversation to train on ends with an assistant turn, and this one does not"
        )
    text = _render(tokenizer, messages)
    counted = {index: _counted_characters(tokenizer, messages, index, text) for index in turns}
    if close_with_eos and not text.endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
        counted[turns[-1]] = (counted[turns[-1]][0], len(text))
    cuts = [0, counted[turns[-1]][0], len(text)] if encode_apart else [0, len(text)]
    ids, begins, ends = _encoded(tokenizer, text, cuts)
    mask = np.zeros(len(ids), bool)
    for index in turns if train_on == "all" else turns[-1:]:
        start, stop = counted[index]
        # by the edges alone: some tokenizers report spaces as zero characters wide
        mask |= (ends > start) & (begins < stop)
    return Rendered(ids, mask)


def _encoded(
    tokenizer: PreTrainedTokenizerFast, text: str, cuts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int32 [T], first and last characters [T] in `text`) of the pieces between `cuts`, each
    encoded by itself. As apply_chat_template does: the template has written bos, a second one must
    not be added.
    """
    ids, begins, ends = [], [], []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        encoded = tokenizer(
            text[start:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids += encoded["input_ids"]
        begins += [start + begin for begin, _ in encoded["offset_mapping"]]
        ends += [start + end for _, end in encoded["offset_mapping"]]
    return np.array(ids, np.int32), np.array(begins), np.array(ends)


def render_prompt(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> np.ndarray:
    """int32 [T]: the conversation and the generation prompt, as `apply_chat_template(messages,
    add_generation_prompt=True)`.

    Raises PromptError as `render_conversation`, and for a conversation that does not end with a
    user turn.
    """
    _check(messages)
    if messages[-1]["role"] != "user":
        raise PromptError(
            "a prompt ends with a user turn, and this one ends with a turn of"
            f" {messages[-1]['role']}"
        )
    text = _render(tokenizer, messages, add_generation_prompt=True)
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def with_thinking(
    tokenizer: PreTrainedTokenizerFast, thinking: bool | None
) -> PreTrainedTokenizerFast:
    """A tokenizer whose template renders as with `enable_thinking=thinking`, whoever renders with
    it; None: the tokenizer itself.

    Raises PromptError for a template whose generation prompt is the same with True and False: it
    does not know the variable.
    """
    if thinking is None:
        return tokenizer
    on, off = (_bound(tokenizer, value) for value in (True, False))
    if _apply(on, [_USER], add_generation_prompt=True) == _apply(
        off, [_USER], add_generation_prompt=True
    ):
        raise PromptError(
            "this chat template does not know enable_thinking, so model.thinking cannot be"
            f" {thinking}: set it to None"
        )
    return on if thinking else off


def _bound(tokenizer: PreTrainedTokenizerFast, thinking: bool) -> PreTrainedTokenizerFast:
    bound = copy.copy(tokenizer)
    # what the template sets hides what a caller passes; apply_chat_template swallows the newline
    # after a block
    if tokenizer.chat_template:
        bound.chat_template = (
            f"{{% set enable_thinking = {str(thinking).lower()}"
            f" %}}\n{tokenizer.get_chat_template()}"
        )
    return bound


def has_system_role(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template writes a system message, so that a System transform can be used."""
    try:
        return _MARK in _apply(tokenizer, [_SYSTEM, _USER])
    except TemplateError:
        return False


def default_system_text(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The system text that the template writes where a conversation has none, or None; a System
    transform replaces it.

    What a template adds to every system turn (the dates of Llama-3.1) is not replaced, and so is no
    default.
    """
    if not has_system_role(tokenizer):
        return None
    before, after = _apply(tokenizer, [_SYSTEM, _USER]).split(_MARK)
    bare = _apply(tokenizer, [_USER])
    if not (bare.startswith(before) and bare.endswith(after)):
        return None
    return bare[len(before) : len(bare) - len(after)] or None


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that closes an assistant turn; it need not be `eos_token` (Gemma's is not)."""
    text = _apply(tokenizer, [_USER, {"role": "assistant", "content": _MARK}])
    return tokenizer.convert_tokens_to_ids(_end_of_turn(tokenizer, text, text.index(_MARK) + 1)[1])


def end_ids(tokenizer: PreTrainedTokenizerFast, of_model: Sequence[int] = ()) -> tuple[int, ...]:
    """Every token at which a completion ends: the template's end of turn, the tokenizer's
    `eos_token`, and those that the model's files name (`hub.end_ids`).

    A base model ends with `eos_token` whatever the template says, and what is sampled behind it is
    nobody's answer.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([end_of_turn_id(tokenizer), *eos, *of_model]))


def completion_text(tokenizer: PreTrainedTokenizerFast, token_ids, ended: bool) -> str:
    """A completion's text, without the token that ended it and without special tokens."""
    return tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)


def _check(messages: list[dict]) -> None:
    if not messages:
        raise PromptError("a conversation has at least one message, and this one is empty")
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise PromptError(
                f"message {index} has the role {message['role']!r}, allowed are {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise PromptError(
                f"the content of message {index} is {type(message['content']).__name__}, only text"
                " is allowed"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise PromptError(
                f"the response in message {index} is empty: there is nothing to train on"
            )


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], add_generation_prompt: bool = False
) -> str:
    system = [message["content"].strip() for message in messages if message["role"] == "system"]
    try:
        text = _apply(tokenizer, messages, add_generation_prompt)
    except TemplateError as error:
        if system and not has_system_role(tokenizer):
            raise PromptError(_NO_SYSTEM) from error
        raise PromptError(f"the chat template refuses this conversation: {error}") from error
    if not all(content in text for content in system):
        raise PromptError(_NO_SYSTEM)
    return text


def _apply(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], add_generation_prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise PromptError(
            "this tokenizer has no chat template: take the instruction-tuned model, or set one"
        )
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=False
    )


def _counted_characters(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], index: int, text: str
) -> tuple[int, int]:
    """Where in `text`, the rendered messages, the response of message `index` begins and its
    end-of-turn token ends.
    """
    mark = next(char for char in map(chr, range(ord(_MARK), 0xF900)) if char not in text)
    marked = [*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]]
    before, _, after = _apply(tokenizer, marked).partition(mark)
    response = messages[index]["content"].strip()
    end = len(text) - len(after)
    # a template may write another header for this response than for the mark (Qwen3 does if it
    # holds thinking)
    start = len(before) if text.startswith(before) else end - len(response)
    as_given = text.startswith(before) or text[start:end] == response
    if not (as_given and text.endswith(after) and start < end):
        raise PromptError(
            f"the chat template does not write the response in message {index} as given:"
            f" {response[:80]!r}"
        )
    stop, token = _end_of_turn(tokenizer, text, end)
    if text[start:end].rstrip().endswith(token):
        raise PromptError(
            f"the response in message {index} ends with {token}, which the template adds itself:"
            " remove it"
        )
    return start, stop


def _end_of_turn(tokenizer: PreTrainedTokenizerFast, text: str, end: int) -> tuple[int, str]:
    """Where the end-of-turn token after the response that ends at `end` stops, and the token."""
    closing = _special_token(tokenizer).match(text, end)
    if closing is None:
        raise PromptError(
            f"the chat template closes its assistant turns with {text[end : end + 20]!r} and not"
            " with a special token, so a model could not learn where to stop"
        )
    return closing.end(), closing[1]


@lru_cache(maxsize=4)
def _special_token(tokenizer: PreTrainedTokenizerFast) -> re.Pattern:
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # the longest first, as the tokenizer matches them; "(?!)" where there are none never matches
    return re.compile(
        r"\s*(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")"
    )
