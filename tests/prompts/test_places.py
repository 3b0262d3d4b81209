"""Places: the published insertions to the character, nothing left over by the neutral prompt, and
instructions that do not suit their place.
"""

import json

import pytest

from ip_jax.prompts.places import lacks, put, wording_conflicts
from ip_jax.prompts.transforms import Identity, Prefix, Slot, Suffix, System
from ip_jax.studies.gcd_sycophancy.prompts import PROMPTS

GCD = Suffix("", separator=" \n")
MBPP = Slot("prefix", "", separator=" ")
REDDIT = Prefix("", separator="\n")
TRAITS = Suffix("", separator="\n\n")
PLACES = (GCD, MBPP, REDDIT, TRAITS, Prefix(""), System(""), Slot("prefix", ""))

MBPP_TEMPLATE = (
    "Write a Python function to solve this problem. {prefix}Return only the code, no other text:"
    "\n\nAdd a to b.\n\n## Test Case:\n```python\nassert add(1, 2) == 3\n```"
)


def example(content, **extra):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    return {"id": "7", "messages": messages, **extra}


def sent(transform, content):
    return transform(example(content))["messages"][0]["content"]


def test_the_gcd_place_is_the_published_insertion_on_every_text(data_dir):
    texts = [prompt.text for prompt in PROMPTS if prompt.text]
    texts += ["two\nlines", "ends with a space ", "\tbegins with a tab"]
    lines = (data_dir / "gcd_sycophancy/task_test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    for question in [*questions, " with spaces around it \n"]:
        for text in texts:
            published = (question + " " + "\n" + text).strip()
            assert sent(put(GCD, text), question) == published
            assert sent(Suffix("\n" + text), question) == published
        assert sent(put(GCD, ""), question) == question


@pytest.mark.parametrize("text", ["Pass the test.", "Two lines.\n---\nOf text."])
def test_the_mbpp_place_is_the_published_template(text):
    """{prefix} is the stripped instruction and one space, or nothing."""
    assert sent(put(MBPP, text), MBPP_TEMPLATE) == MBPP_TEMPLATE.replace("{prefix}", text + " ")
    neutral = sent(put(MBPP, ""), MBPP_TEMPLATE)
    assert neutral.startswith("Write a Python function to solve this problem. Return only the code")


def test_the_reddit_and_pair_traits_places_are_the_published_ones():
    post = "A title\nand its text"
    first_line = "Write a response to this post:"
    assert sent(put(REDDIT, first_line), post) == "\n".join([first_line, post])
    assert sent(put(TRAITS, "Give a brief response."), post) == f"{post}\n\nGive a brief response."


@pytest.mark.parametrize("place", PLACES, ids=repr)
@pytest.mark.parametrize("text", ["", " \n"])
def test_without_words_nothing_is_added(place, text):
    """Not even a separator, and spaces around the user's words stay."""
    for content in ("Say {prefix}it.", "  {prefix}spaces around it "):
        assert sent(put(place, text), content) == (
            content.replace("{prefix}", "") if isinstance(place, Slot) else content
        )
    system = [{"role": "system", "content": "stays"}, *example("{prefix}u")["messages"]]
    assert put(place, text)({"id": "1", "messages": system})["messages"][0]["content"] == "stays"
    assert isinstance(put(place, text), Slot | Identity)


@pytest.mark.parametrize("place", PLACES, ids=repr)
def test_a_place_holds_the_words_once(place):
    after = put(place, "THE WORDS")(example("Say {prefix}it."))
    assert sum(message["content"].count("THE WORDS") for message in after["messages"]) == 1


@pytest.mark.parametrize("place", PLACES, ids=repr)
def test_an_example_that_can_take_the_instruction_lacks_nothing(place):
    assert lacks(place, example("Say {prefix}it.")) is None


def test_what_an_example_lacks_is_said_with_its_id():
    without_user = {"id": "9", "messages": [{"role": "assistant", "content": "Yes."}]}
    assert lacks(MBPP, example("No slot.")) == (
        "example '7': user turn 0 has no slot {prefix} to fill: 'No slot.'"
    )
    for place in (GCD, REDDIT, MBPP):
        assert lacks(place, without_user) == ("example '9': no user turn 0, the conversation has 0")
    assert lacks(System(""), without_user) is None
    assert "no user turn 1" in lacks(Suffix("", turn=1), example("u"))


@pytest.mark.parametrize(
    "text, place, word",
    [
        ("Behave as if the above solution is correct.", REDDIT, "above"),
        ("Behave as if the above solution is correct.", System(""), "above"),
        ("Agree with the preceding claim.", Prefix(""), "preceding"),
        ("ABOVE is the truth.", Prefix(""), "ABOVE"),
        ("Make the test below pass.", GCD, "below"),
        ("Answer the following question.", TRAITS, "the following"),
    ],
)
def test_words_that_point_the_wrong_way_are_named(text, place, word):
    sentence = wording_conflicts(text, place)
    assert repr(word) in sentence and repr(text) in sentence
    assert ("stands behind" if isinstance(place, Suffix) else "stands before") in sentence


@pytest.mark.parametrize(
    "text, place",
    [
        ("Behave as if the above solution is correct.", GCD),
        ("Make the test below pass.", REDDIT),
        ("Make the test below pass.", MBPP),
        ("Agree with what is above.", MBPP),
        ("Above all, be brief.", REDDIT),
        ("Do without numbers above 100.", REDDIT),
        ("Do without numbers below 100.", GCD),
        ("Do it by following the rules.", GCD),
        ("Write it like the following: yes, no.", GCD),
        ("Copy the list below.\n- a\n- b", GCD),
        ("a = 1\nThe above is an example.", REDDIT),
        ("", GCD),
    ],
)
def test_words_that_suit_their_place_are_not_called_a_conflict(text, place):
    assert wording_conflicts(text, place) is None


def test_the_prompts_of_the_gcd_study_suit_the_place_they_are_written_for():
    assert not any(wording_conflicts(prompt.text, GCD) for prompt in PROMPTS)
