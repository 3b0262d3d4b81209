"""Arms by name, and numbers for examples."""

import subprocess
import sys

import pytest

from configs.gcd_sycophancy import ARMS, PRESETS
from ip_jax.lab.experiment import Arm, choose_arms, stable_id
from ip_jax.prompts import library

CLAIM = {"id": "x", "messages": [{"role": "user", "content": "GCD(4, 6) = 2."}]}


def asked(arm: Arm) -> str:
    return arm.transform(CLAIM)["messages"][0]["content"]


def test_known_arms_keep_their_definition_and_order():
    assert choose_arms(["ip_behave", "untrained"], ARMS) == (ARMS["ip_behave"], ARMS["untrained"])


def test_every_prompt_of_the_library_can_be_an_arm():
    arms = choose_arms(library.PROMPTS, {})
    assert [asked(arm) for arm in arms] == [
        prompt.transform(CLAIM)["messages"][0]["content"] for prompt in library.PROMPTS.values()
    ]
    assert len({arm.name for arm in arms}) == len(arms) and not any("/" in arm.name for arm in arms)


def test_own_words_are_put_where_the_published_suffixes_are():
    (arm,) = choose_arms(["mine=Assume that a = b is right."], ARMS)
    assert (arm.name, arm.train_prompt) == ("mine", "mine")
    published = library.get("gcd/behave").transform(CLAIM)["messages"][0]["content"]
    assert asked(arm) == published.replace(
        library.get("gcd/behave").text, "Assume that a = b is right."
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("ip_behav", "no arm or prompt is called 'ip_behav': did you mean ip_behave"),
        ("gcd/behve", "no arm or prompt is called 'gcd/behve': did you mean gcd/behave"),
        (
            "qqqqqqqq",
            (
                "no arm or prompt is called 'qqqqqqqq': Arms are untrained, neutral, .*name=text"
                " makes one of your own"
            ),
        ),
        ("neutral=Be kind.", "the arm 'neutral=Be kind.' needs another name: neutral is taken"),
        ("ip_behave=Be kind.", "ip_behave is taken"),
        ("gcd_behave=Be kind.", "gcd_behave is taken"),
        ("gcd/behave=Be kind.", "gcd/behave is taken"),
        ("a/b=Be kind.", "must read name=text"),
        ("../up=Be kind.", "must read name=text"),
        ("a-s1=Be kind.", "must read name=text"),
        ("=Be kind.", "must read name=text"),
        ("mine= ", "must read name=text"),
    ],
)
def test_bad_names_are_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        choose_arms([name], ARMS)
    assert "\n" not in str(caught.value)


def test_an_arm_twice_is_refused():
    with pytest.raises(ValueError, match="the arm 'neutral' is listed twice"):
        choose_arms(["neutral", "ip_behave", "neutral"], ARMS)


def test_presets_name_arms_that_exist_and_steps_that_are_reached():
    for config in PRESETS.values():
        assert choose_arms(config.arms, ARMS)
        assert (
            max(*config.evaluation.full_steps, *config.evaluation.neutral_steps) <= config.sft.steps
        )


def test_stable_ids_are_the_same_in_every_process_and_differ():
    texts = [f"claim-{i}" for i in range(1000)]
    ids = [stable_id(text) for text in texts]
    assert len(set(ids)) == 1000 and all(0 <= i < 2**31 for i in ids)
    code = "from ip_jax.lab.experiment import stable_id; print(stable_id('claim-7'))"
    assert (
        int(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        == ids[7]
    )
