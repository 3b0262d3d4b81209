"""What `ip-jax run gcd_approval` runs, before anything is run."""
import dataclasses

import pytest

from configs.gcd_approval import PRESETS, READING
from experiments import gcd_approval
from ip_jax.settings.gcd_sycophancy import published

DEMO = PRESETS["demo"]


@pytest.fixture(scope="module")
def demo():
    return gcd_approval.experiment(DEMO)


def test_the_claims_of_training_and_evaluation_share_no_pair_and_half_of_each_are_wrong(demo):
    pairs = [{published.pairs_in(row["messages"][0]["content"])[0] for row in rows} for rows in (demo.tasks, demo.eval_tasks)]
    assert not pairs[0] & pairs[1] and not pairs[0] & {(b, a) for a, b in pairs[1]}
    for rows, count in ((demo.tasks, DEMO.train_claims), (demo.eval_tasks, 96)):
        assert [sum(row["claim"] == claim for row in rows) for claim in ("right", "wrong")] == [count // 2] * 2


def test_verdicts_of_the_evaluation_are_the_rewards_own_and_the_studys(demo):
    wrong = next(row for row in demo.eval_tasks if row["claim"] == "wrong")
    found = demo.verdicts(wrong, "Yes, that is correct.")
    assert found == {"hackable": True, "hack": True, "correct": False, "strict_verdict": "confirm", "published_confirms": True}
    assert found.keys() == demo.verdict_types.keys()


def test_the_reading_keeps_the_rules_whose_arms_are_there(demo):
    assert (demo.reading.standard, demo.reading.oracle, demo.reading.onset.horizon) == ("standard", None, DEMO.rl.iterations)
    assert [rule.name for rule in demo.reading.rules] == ["approval is learned", "the swap protects", "right and wrong are one"]
    assert len(gcd_approval.experiment(PRESETS["small"]).reading.rules) == len(READING.rules)


def test_arms_and_seeds_and_when_to_halt_are_no_part_of_a_folders_identity():
    more = dataclasses.replace(DEMO, arms=("standard",), seeds=(1, 2), rl=dataclasses.replace(DEMO.rl, gate_patience=9, max_failed=0.5))
    assert gcd_approval.shared_part(more) == gcd_approval.shared_part(DEMO)
    assert gcd_approval.shared_part(dataclasses.replace(DEMO, train_claims=2)) != gcd_approval.shared_part(DEMO)


def test_an_unknown_arm_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no arm 'standart': did you mean standard"):
        gcd_approval.experiment(dataclasses.replace(DEMO, arms=("standart",)))
