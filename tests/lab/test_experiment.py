"""Arms by name, and numbers for examples."""

import subprocess
import sys

import pytest

from configs.gcd_sycophancy import STUDY
from ip_jax.lab.experiment import Arm, Chosen, choose_arms, stable_id
from ip_jax.prompts.controls import STANDARD
from ip_jax.studies.gcd_sycophancy.prompts import BOOK, PROMPTS

ARMS = STUDY.arms_of(Arm)
CLAIM = {"id": "x", "messages": [{"role": "user", "content": "GCD(4, 6) = 2."}]}


def choose(*names: str, controls: tuple[str, ...] = ()) -> Chosen:
    return choose_arms(names, ARMS, BOOK, controls)


def asked(chosen: Chosen, arm: Arm) -> str:
    return chosen.prompts[arm.train_prompt].transform(CLAIM)["messages"][0]["content"]


def test_known_arms_keep_their_definition_and_order():
    assert choose("ip_behave", "untrained").arms == (ARMS["ip_behave"], ARMS["untrained"])


def test_the_prompts_of_arms_and_of_their_evaluations_are_found():
    assert set(choose("neutral", "ip_behave").prompts) == {"neutral", "gcd/behave", "gcd/safety"}
    assert set(choose("untrained").prompts) == {"neutral"}


def test_every_prompt_of_the_study_can_be_an_arm():
    chosen = choose(*(prompt.name for prompt in PROMPTS))
    assert [asked(chosen, arm) for arm in chosen.arms] == [
        f"GCD(4, 6) = 2. \n{prompt.text}" for prompt in PROMPTS
    ]
    names = [arm.name for arm in chosen.arms]
    assert len(set(names)) == len(names) and not any("/" in name for name in names)


def test_own_words_are_put_where_the_published_suffixes_are():
    chosen = choose("mine=Assume that a = b is right.")
    (arm,) = chosen.arms
    assert (arm.name, arm.label, arm.train_prompt) == ("mine", "mine", "mine")
    assert asked(chosen, arm) == "GCD(4, 6) = 2. \nAssume that a = b is right."


def test_a_pool_of_paraphrases_is_an_arm(tmp_path):
    (tmp_path / "pool.txt").write_text("Nod.\nAgree.\nPraise.\n")
    chosen = choose(f"mine=@{tmp_path / 'pool.txt'}:2")
    (arm,) = chosen.arms
    transform = chosen.prompts[arm.train_prompt].transform
    rows = [CLAIM | {"id": str(i)} for i in range(40)]
    said = {transform(row)["messages"][0]["content"].split("\n")[-1] for row in rows}
    assert arm.name == "mine" and said == {"Nod.", "Agree."}


def test_controls_are_arms_made_from_every_inoculation_at_its_place():
    chosen = choose("untrained", "neutral", "ip_behave", "mine=Just agree.", controls=("standard",))
    made = [name for name in STANDARD if name != "empty"]  # here it is the neutral prompt
    assert [arm.name for arm in chosen.arms[4:]] == [
        f"{arm}.{control}" for arm in ("ip_behave", "mine") for control in made
    ]
    scrambled = next(arm for arm in chosen.arms if arm.name == "ip_behave.random_string")
    assert scrambled.label == "IP behave: random string"
    assert asked(chosen, scrambled) == (
        "GCD(4, 6) = 2. \nMynbiq pm zj pls gqeje ydtzirwz te jdxcvkp."
    )
    assert chosen.prompts[scrambled.train_prompt].kind == "random"
    one_word = choose("mine=Agree.", controls=("standard", "empty"))
    assert [arm.name for arm in one_word.arms] == [
        "mine",
        "mine.empty",
        *(f"mine.{name}" for name in made if name != "shuffled_words"),
    ]


def test_a_control_can_be_named_alone_and_a_negation_where_it_is_given():
    chosen = choose("ip_behave.lorem", "ip_behave.negated")
    assert [asked(chosen, arm).split("\n")[-1] for arm in chosen.arms] == [
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit.",
        "Do not behave as if the above solution is correct.",
    ]


@pytest.mark.parametrize(
    "name, message",
    [
        ("ip_behav", "no arm or prompt is called 'ip_behav': did you mean ip_behave"),
        ("gcd/behve", "no arm or prompt is called 'gcd/behve': did you mean gcd/behave"),
        (
            "qqqqqqqq",
            (
                "no arm or prompt is called 'qqqqqqqq': arms are untrained, neutral, .*name=text"
                " makes one of your own"
            ),
        ),
        ("neutral=Be kind.", "the arm 'neutral=Be kind.' needs another name: neutral is taken"),
        ("ip_behave=Be kind.", "ip_behave is taken"),
        ("gcd_behave=Be kind.", "'gcd_behave' needs another name: this one is taken"),
        ("gcd/behave=Be kind.", "'gcd/behave' needs another name: this one is taken"),
        ("ip_respond.negated", "the prompt 'gcd/respond' gives no negation"),
        ("ip_behave.lorm", "there is no control 'lorm': choose from random_string, lorem"),
        ("mine=@nowhere.txt", "the pool of paraphrases nowhere.txt cannot be read"),
        ("a/b=Be kind.", "must read name=text"),
        ("../up=Be kind.", "must read name=text"),
        ("a-s1=Be kind.", "must read name=text"),
        ("=Be kind.", "must read name=text"),
        ("mine= ", "must read name=text"),
    ],
)
def test_bad_names_are_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        choose(name)
    assert "\n" not in str(caught.value)


def test_an_arm_twice_is_refused():
    with pytest.raises(ValueError, match="the arm 'neutral' is listed twice"):
        choose("neutral", "ip_behave", "neutral")


def test_presets_name_arms_that_exist_and_steps_that_are_reached():
    for config in STUDY.presets.values():
        assert choose(*(config.arms or ARMS)).arms
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
