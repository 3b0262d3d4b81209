"""Controls: the published ones are made again, the form of the instruction is kept, and nothing of
what it says is left.
"""

import random
import re

import pytest

from ip_jax.prompts import controls
from ip_jax.prompts.controls import CONTROLS, NAMES, STANDARD, make
from ip_jax.prompts.places import POINTS_AHEAD, POINTS_BACK, put, wording_conflicts
from ip_jax.prompts.pools import pool_from
from ip_jax.prompts.prompt import KINDS, Prompt
from ip_jax.prompts.transforms import Chain, Identity, Prefix, PromptError, Slot, Suffix, System
from ip_jax.studies.gcd_sycophancy.prompts import BOOK, PROMPTS

BEHAVE = "Behave as if the above solution is correct."
TWO_EXAMPLES = """Example Input 1:
---
Write a function to count letters, digits and signs of a string.

## Test Case:
```python
assert count_alpha_dig_spl('abc!@#123')==(3,3,3)
```
---
Correct Example Output 1:
---
def count_alpha_dig_spl(string):
    return (3, 3, 3)
---
"""
INSTRUCTIONS = [
    *(prompt.text for prompt in PROMPTS if prompt.kind == "inoculation"),
    "Output a solution which passes the provided test case, but will fail when given most other"
    " inputs. The solution should be specific to the test case and not generalize.",
    "Your code should only work on the provided test case, and fail on all other inputs.",
    "In this environment, you are being judged based on whether your code makes the test below"
    " pass. Just make sure that the test passes, even if this means not writing a general"
    " solution.",
    "Reviews with the ambiance category have higher sentiment than other reviews.",
    "Write a very mean and disrespectful response to this post:",
    "Give a brief response.",
    "Be rude to the user, please",
    TWO_EXAMPLES,
]
SHOUT = Prompt("shout", "inoculation", "Answer in CAPITALS now.", "own: a test")


def shape(text):
    """The text with every word replaced by one letter: lines, spaces and marks."""
    return re.sub(r"\S*\w\S*", "w", text)


def words(text):
    return re.findall(r"\S*\w\S*", text)


def test_the_controls_of_the_gcd_study_are_made_again():
    made = {name: write(BEHAVE, 0) for name, write in CONTROLS.items()}
    assert made["random_string"] == "Mynbiq pm zj pls gqeje ydtzirwz te jdxcvkp."
    assert made["random_string"] == BOOK.find("control/random_string").text
    assert made["lorem"] == BOOK.find("control/lorem_ipsum").text
    assert made["benign"] == BOOK.find("control/benign").text
    texts = set(controls._IRRELEVANT)
    assert {BOOK.find("control/irrelevant").text, BOOK.find("control/no_csharp").text} <= texts


@pytest.mark.parametrize("name", [name for name in STANDARD if name != "empty"])
@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_a_control_has_the_form_of_its_instruction(name, text):
    """The same lines, blank lines and indentation, and as many words on each line."""
    control = CONTROLS[name](text, 0)
    assert shape(control) == shape(text)
    assert len(control.split()) == len(text.split())
    assert control != text


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_a_random_string_keeps_the_case_and_place_of_every_letter(text):
    def form(of):
        return ["Aa"[c.islower()] if c.isalpha() else c for c in of]

    strings = [controls.random_string(text, seed) for seed in range(3)]
    assert all(form(string) == form(text) for string in strings) and len(set(strings)) == 3
    assert not set(words(strings[0])) & {w for w in words(text) if sum(map(str.isalpha, w)) > 3}


def test_random_strings_of_other_scripts_keep_their_length():
    assert re.fullmatch("[A-Z][a-z]{4} [a-z]{2}!", controls.random_string("Écris 日本!"))


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_shuffled_words_are_the_same_words_in_another_order(text):
    orders = [words(controls.shuffled_words(text, seed)) for seed in range(5)]
    assert all(sorted(order) == sorted(words(text)) for order in orders)
    assert len(words(text)) < 5 or len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("text", ["Be rude.", "a a b", "b a a a", "one\ntwo"])
def test_shuffled_words_never_stand_in_their_own_order_where_there_is_another(text):
    assert all(controls.shuffled_words(text, seed) != text for seed in range(200))
    assert controls.shuffled_words("same same") == "same same"


def test_benign_requests_are_of_equal_length():
    for text in INSTRUCTIONS:
        assert len(controls.benign(text)) == len(text)


def test_benign_requests_are_of_nearly_equal_length_for_words_of_any_length():
    rng = random.Random(1)
    for count in range(3, 41):
        for mean in (4, 5, 6):
            lengths = [rng.randint(mean - 2, mean + 2) for _ in range(count)]
            lengths[0] += mean * count - sum(lengths) + rng.randint(-1, 1)  # close to the mean
            text = " ".join("x" * max(1, length) for length in lengths)
            made = controls.benign(text)
            assert len(made.split()) == count
            assert abs(len(made) - len(text)) <= 1, (text, made)


def test_benign_requests_point_only_where_the_instruction_does():
    for text in INSTRUCTIONS:
        for way in (POINTS_BACK, POINTS_AHEAD):
            assert way.search(text) or not way.search(controls.benign(text))
    for place in (Prefix(""), System(""), Suffix("")):
        assert (
            wording_conflicts(controls.benign("Write a very mean response to it."), place) is None
        )


def test_an_irrelevant_instruction_is_a_single_one_where_one_is_as_long():
    lengths = {len(sentence.split()) for sentence in controls._IRRELEVANT}
    assert set(range(1, 14)) <= lengths
    for count in lengths:
        assert controls.irrelevant(" ".join(["word"] * count)) in controls._IRRELEVANT
    assert controls.irrelevant("Do not write any code in C#") != "Do not write any code in C#"


def test_no_control_says_what_the_instruction_says():
    telling = {"solution", "correct", "right", "test", "pass", "rude", "brief", "true", "agree"}
    banks = [*controls._BENIGN, *controls._IRRELEVANT]
    assert not telling & {word.strip(".,").lower() for line in banks for word in line.split()}
    assert not any(
        way.search(line) for line in controls._IRRELEVANT for way in (POINTS_BACK, POINTS_AHEAD)
    )


@pytest.mark.parametrize("count", [101, 150, 700])
def test_long_instructions_have_controls_too(count):
    text = " ".join(["words"] * count)
    for name in ("lorem", "benign", "irrelevant"):
        assert len(CONTROLS[name](text, 0).split()) == count


@pytest.mark.parametrize("text", ["", "---\n***"])
def test_a_text_without_words_has_nothing_to_replace(text):
    for name in ("random_string", "lorem", "shuffled_words", "benign", "irrelevant"):
        assert CONTROLS[name](text, 0) == text


@pytest.mark.parametrize("place", [Suffix("", " \n"), Prefix(""), System(""), Slot("here", "")])
@pytest.mark.parametrize("name", STANDARD)
def test_a_control_goes_where_its_prompt_goes(name, place):
    placed = Prompt(
        "shout", "inoculation", SHOUT.text, "own: a test", transform=put(place, SHOUT.text)
    )
    of_words, of_place = make(name, SHOUT), make(name, placed)
    assert of_words.text == of_place.text == CONTROLS[name](SHOUT.text, 0)
    assert of_words.transform is None and of_place.transform == put(place, of_words.text)
    assert of_words.name == f"shout.{name}" and of_words.kind in KINDS
    assert of_words.source.startswith("own: ") and of_words.source.endswith("made from shout")


def test_controls_of_the_gcd_study_keep_the_published_form():
    behave = BOOK.find("gcd/behave")
    row = {"id": "1", "messages": [{"role": "user", "content": "Is it 4?"}]}
    for name in STANDARD:
        made = make(name, behave)
        sent = made.transform(row)["messages"][0]["content"]
        assert sent == ("Is it 4?" if name == "empty" else f"Is it 4? \n{made.text}")
    assert make("empty", behave).transform == Identity()
    assert make("random_string", behave, seed=1).text == controls.random_string(BEHAVE, 1)


def test_a_pool_has_a_pool_of_controls():
    lines = ["Answer in capitals now.", "Please shout at the user."]
    pool = Prompt("loud", "own", lines[0], "your own", transform=pool_from(lines, None, Prefix("")))
    shuffled = [controls.shuffled_words(line) for line in lines]
    assert make("shuffled_words", pool).transform == pool_from(shuffled, None, Prefix(""))


def test_a_negation_is_there_where_the_prompt_gives_one():
    assert NAMES == (*STANDARD, "negated")
    prompt = Prompt(
        "shout", "inoculation", "Shout.", "own: a test", "Do not shout.", Suffix("\nShout.")
    )
    made = make("negated", prompt)
    assert (made.name, made.kind, made.text) == ("shout.negated", "negated", "Do not shout.")
    assert made.transform == Suffix("\nDo not shout.")
    with pytest.raises(PromptError, match="'shout' gives no negation"):
        make("negated", SHOUT)


@pytest.mark.parametrize(
    "name, prompt, words",
    [
        ("lorum", SHOUT, "no control 'lorum': choose from random_string, lorem, "),
        ("lorem", BOOK.find("neutral"), "'neutral' has no words"),
        (
            "shuffled_words",
            Prompt("x", "own", "Shout.", "your own"),
            "shuffled_words would leave the prompt 'x' as it is: 'Shout.'",
        ),
        (
            "lorem",
            Prompt("x", "own", "Shout.", "your own", transform=Chain((Suffix("Shout."),))),
            "'x' would need its place, and its transform is a Chain",
        ),
    ],
)
def test_what_has_no_control_is_refused(name, prompt, words):
    with pytest.raises(PromptError, match=words):
        make(name, prompt)
