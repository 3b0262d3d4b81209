"""Named prompts: found by name, refused when two share one."""

import pytest

from ip_jax.prompts.prompt import KINDS, NEUTRAL, Prompt, check_prompts, find
from ip_jax.prompts.transforms import PromptError

SHOUT = Prompt("shout", "inoculation", "Answer in capitals.", "own: a test")
CALM = Prompt("echo/calm", "safety", "Answer calmly.", "own: a test")


def test_a_prompt_is_declared_by_words_alone():
    assert (SHOUT.negation, SHOUT.transform) == (None, None)
    assert (NEUTRAL.name, NEUTRAL.kind, NEUTRAL.text) == ("neutral", "neutral", "")


def test_a_kind_that_does_not_exist_is_refused():
    assert all(Prompt("x", kind, "words", "own: a test").kind == kind for kind in KINDS)
    with pytest.raises(PromptError, match="'x' is of kind 'inoculating': .* neutral, inoculation"):
        Prompt("x", "inoculating", "words", "own: a test")


def test_prompts_are_found_by_name_and_a_wrong_one_is_answered_with_the_nearest():
    assert find((NEUTRAL, SHOUT, CALM), "echo/calm") is CALM
    with pytest.raises(PromptError, match="no prompt named 'shuot'; the nearest are shout$"):
        find((NEUTRAL, SHOUT, CALM), "shuot")
    with pytest.raises(PromptError, match="nearest are neutral, shout, echo/calm"):
        find((NEUTRAL, SHOUT, CALM), "zzz")


@pytest.mark.parametrize("other", ["echo/calm", "echo_calm"])
def test_two_prompts_of_one_name_are_refused(other):
    check_prompts((NEUTRAL, SHOUT, CALM))
    with pytest.raises(PromptError, match=f"one name, 'echo/calm' and '{other}'"):
        check_prompts((CALM, SHOUT, Prompt(other, "own", "words", "own: a test")))
