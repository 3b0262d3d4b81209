"""Draws of prompts: pure, at the right grain, at the right rates, and nothing bad gets in."""

import collections

import pytest

from ip_jax.prompts.prompt import Prompt
from ip_jax.prompts.transforms import Chain, Paraphrases, PromptError, Slot, Suffix
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

POOL = ("gcd/behave", "gcd/act", "gcd/note", "gcd/treat")
ASKED = [{"role": "user", "content": "Is it 4?"}]


def made(prompts, **how):
    """A distribution over prompts of the GCD study."""
    return PromptDistribution(prompts, **how).resolved(BOOK)


def names(distribution, seed=0, iterations=50, groups=4, samples=8):
    return [
        [
            [distribution.draw(seed, t, q, i).prompt.name for i in range(samples)]
            for q in range(groups)
        ]
        for t in range(iterations)
    ]


def test_one_prompt_is_fixed_and_is_the_studys_own():
    drawn = made(("gcd/behave",)).draw(3, 1, 2, 0)
    assert drawn.prompt == BOOK.find("gcd/behave")
    assert (
        drawn.messages(ASKED)
        == BOOK.find("gcd/behave").transform({"id": "x", "messages": ASKED})["messages"]
    )


@pytest.mark.parametrize(
    ("per", "within_group", "within_step"),
    [("example", False, False), ("group", True, False), ("step", True, True)],
)
def test_a_draw_reaches_as_far_as_per_says(per, within_group, within_step):
    drawn = names(made(POOL, per=per))
    assert all(len(set(group)) == 1 for step in drawn for group in step) == within_group
    assert all(len({group[0] for group in step}) == 1 for step in drawn) == within_step
    assert len({step[0][0] for step in drawn}) == len(POOL)  # and differs from step to step


def test_draws_are_a_pure_function_of_their_place_and_uniform_over_the_pool():
    distribution = made(POOL)
    assert names(distribution) == names(made(tuple(POOL)))
    assert names(distribution) != names(distribution, seed=1)
    counts = collections.Counter(
        group[0] for step in names(distribution, iterations=500) for group in step
    )
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values()), (
        counts
    )


def test_equal_distributions_draw_alike_and_different_ones_independently():
    other = tuple(reversed(POOL))
    pairs = collections.Counter(
        (a, b)
        for a_step, b_step in zip(
            names(made(POOL), iterations=500),
            names(made(other), iterations=500),
            strict=True,
        )
        for (a, *_), (b, *_) in zip(a_step, b_step, strict=True)
    )
    assert len(pairs) == 16 and max(pairs.values()) < 2 * min(pairs.values())


def test_keep_is_the_probability_of_not_being_neutral():
    drawn = [
        name
        for step in names(made(("gcd/behave",), per="example", keep=0.7), iterations=100)
        for group in step
        for name in group
    ]
    assert set(drawn) == {"gcd/behave", "neutral"}
    assert abs(drawn.count("gcd/behave") - 0.7 * 3200) < 5 * (3200 * 0.21) ** 0.5
    assert {name for step in names(made(POOL, keep=0.0)) for group in step for name in group} == {
        "neutral"
    }


def test_a_template_fills_its_slots_anew_for_each_draw_and_once_for_a_step():
    template = Prompt(
        "polite",
        "inoculation",
        "{please} behave as if the solution is correct.",
        "this test",
        transform=Chain(
            (
                Suffix("\n{please} behave as if the solution is correct."),
                Paraphrases(
                    (Slot("please", "Please"), Slot("please", "Kindly"), Slot("please", "Do"))
                ),
            )
        ),
    )
    texts = {
        per: {
            made((template,), per=per).draw(0, t, q, 0).messages(ASKED)[0]["content"]
            for t in range(1)
            for q in range(40)
        }
        for per in ("group", "step")
    }
    assert texts["group"] == {
        f"Is it 4? \n{word} behave as if the solution is correct."
        for word in ("Please", "Kindly", "Do")
    }
    assert len(texts["step"]) == 1


def test_words_of_ones_own_are_put_where_the_published_suffixes_stand():
    (own,) = made(("mine=Assume that I am right.",)).pool
    assert (own.name, own.text) == ("mine", "Assume that I am right.")
    behave = BOOK.find("gcd/behave")
    swapped = own.transform({"id": "x", "messages": ASKED})["messages"][0]["content"].replace(
        own.text, behave.text
    )
    assert swapped == behave.transform({"id": "x", "messages": ASKED})["messages"][0]["content"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": "gcd/behave"}, "tuple"),
        ({"prompts": ("neutral", "neutral")}, "listed twice"),
        ({"per": "batch"}, "group, example or step"),
        ({"keep": 1.5}, "between 0 and 1"),
    ],
)
def test_a_distribution_that_makes_no_sense_is_refused(change, words):
    with pytest.raises(PromptError, match=words):
        PromptDistribution(**change)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gcd/behav", "gcd/behave"),
        ("neutral=x", "another name"),
        ("gcd_behave=x", "another name"),
        ("my prompt=x", "name=text"),
        ("mine= ", "name=text"),
    ],
)
def test_a_name_that_the_study_does_not_have_is_refused(name, words):
    with pytest.raises(PromptError, match=words):
        made((name,))


def test_a_distribution_of_names_alone_cannot_be_drawn_from():
    with pytest.raises(PromptError, match="'gcd/behave' is only named here"):
        PromptDistribution(("gcd/behave",)).draw(0, 0, 0, 0)
