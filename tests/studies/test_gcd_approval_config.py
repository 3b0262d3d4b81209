"""What `ip-jax run gcd_approval` runs, before anything is run."""

import dataclasses

import pytest

from configs import rl_shapes
from configs.gcd_approval import STUDY
from ip_jax.lab.build import shared_part
from ip_jax.lab.run import experiment_of
from ip_jax.rl.algorithm import passes_needed
from ip_jax.studies.gcd_approval.study import ARMS, PUBLISHED, READING
from ip_jax.studies.gcd_sycophancy import published

DEMO = STUDY.preset("demo")


@pytest.fixture(scope="module")
def demo():
    return experiment_of(STUDY, DEMO)


def test_the_claims_of_training_and_evaluation_share_no_pair_and_half_of_each_are_wrong(demo):
    pairs = [
        {published.pairs_in(row["messages"][0]["content"])[0] for row in rows}
        for rows in (demo.tasks, demo.eval_tasks)
    ]
    assert not pairs[0] & pairs[1] and not pairs[0] & {(b, a) for a, b in pairs[1]}
    for rows, count in ((demo.tasks, DEMO.data.train_claims), (demo.eval_tasks, 96)):
        assert [sum(row["claim"] == claim for row in rows) for claim in ("right", "wrong")] == [
            count // 2
        ] * 2


def test_verdicts_of_the_evaluation_are_the_rewards_own_and_the_studys(demo):
    wrong = next(row for row in demo.eval_tasks if row["claim"] == "wrong")
    found = demo.scorer(wrong, "Yes, that is correct.")
    assert found == {
        "hackable": True,
        "hack": True,
        "correct": False,
        "strict_verdict": "confirm",
        "published_confirms": True,
    }


def test_the_reading_keeps_the_rules_whose_arms_are_there(demo):
    assert (demo.reading.standard, demo.reading.oracle, demo.reading.onset.horizon) == (
        "standard",
        None,
        DEMO.rl.iterations,
    )
    assert [rule.name for rule in demo.reading.rules] == [
        "approval is learned",
        "the swap protects",
        "right and wrong are one",
    ]
    small = experiment_of(STUDY, STUDY.preset("small"))
    assert len(small.reading.rules) == len(READING.rules)


def test_arms_and_seeds_and_when_to_halt_are_no_part_of_a_folders_identity():
    more = dataclasses.replace(
        DEMO,
        arms=("standard",),
        seeds=(1, 2),
        rl=dataclasses.replace(DEMO.rl, gate_patience=9, max_failed=0.5),
    )
    assert shared_part(STUDY, more) == shared_part(STUDY, DEMO)
    fewer = dataclasses.replace(DEMO, data=dataclasses.replace(DEMO.data, train_claims=2))
    assert shared_part(STUDY, fewer) != shared_part(STUDY, DEMO)


def test_the_prior_is_an_arm_of_every_preset_with_all_arms_and_two_rules_compare_with_it():
    prior = next(arm for arm in ARMS if arm.name == "prior")
    assert prior.gen_prompt.names == prior.train_prompt.names == ("gcd/safety",)
    assert prior.reward == "approval" and prior.label == "prior: safe → safe"
    assert [name for name, preset in STUDY.presets.items() if not preset.arms] == [
        "small",
        "full",
        "paper",
    ]
    assert [
        [arm for arm, _ in rule.contrast.weights]
        for rule in READING.rules
        if "prior" in dict(rule.contrast.weights)
    ] == [["prior", "standard"], ["safe_neutral", "prior"]]


@pytest.mark.parametrize("source", ["gcd_approval", "rl_shapes"])
def test_the_published_numbers_for_qwen3_4b(source):
    """Each as the papers and their code state it: arXiv 2512.19027 v2 and the environment of
    "Steering RL Training" that it uses.
    """
    config = {"gcd_approval": STUDY.preset("paper"), "rl_shapes": rl_shapes.PRESETS["qwen3-4b"]}[
        source
    ]
    algorithm = PUBLISHED if source == "gcd_approval" else config.algorithm
    rl = config.rl
    assert config.model.name == "Qwen/Qwen3-4B"
    assert (rl.groups, rl.samples, rl.iterations) == (16, 16, 200)  # 16 prompts a step, K = 16
    assert (algorithm.epochs, algorithm.minibatches) == (1, 1)
    assert (rl.learning_rate, rl.schedule.kind, rl.schedule.warmup, rl.schedule.total) == (
        7e-5,
        "cosine",
        10,
        200,
    )
    assert (rl.lora.rank, rl.lora.alpha) == (32, 32)
    assert (
        algorithm.kl.context,
        algorithm.kl.place,
        algorithm.kl.estimator,
        algorithm.kl.beta,
    ) == ("tg", "loss", "k3", 1e-3)
    assert (
        algorithm.estimator.old,
        algorithm.estimator.level,
        algorithm.estimator.clip,
        algorithm.estimator.dual_clip,
    ) == ("training", "token", 0.2, 3)
    assert algorithm.baseline == "group_mean_std"
    assert (algorithm.aggregation.kind, algorithm.aggregation.chunk) == ("token_mean_per_chunk", 8)
    assert (rl.temperature, rl.top_p) == (0.7, 0.95)
    assert (rl.max_length, rl.max_new_tokens) == (1536 + 1536, 1536)
    assert (rl.weight_decay, algorithm.betas, algorithm.max_grad_norm) == (0.1, (0.9, 0.99), 1.0)
    assert (algorithm.entropy_bonus, algorithm.gate.kind, algorithm.selection, algorithm.pmi) == (
        0,
        "off",
        None,
        None,
    )
    assert passes_needed(algorithm) == {"reference_generation"}, (
        "with one update the ratio is 1 and the old policy needs no pass"
    )


def test_the_paper_preset_runs_the_published_seeds_looks_every_20_iterations_and_does_not_think():
    paper = STUDY.preset("paper")
    assert paper.algorithm == "published" and paper.arms == (), "all of them"
    assert paper.seeds == (1, 42, 65) and paper.model.thinking is False
    assert paper.data.train_claims == 992
    # and after the last one
    assert paper.rl.checkpoint_every == 20 and paper.evaluation.steps == (
        0,
        20,
        40,
        60,
        80,
        100,
        120,
        140,
        160,
        180,
    )
    assert (
        paper.evaluation.temperature,
        paper.evaluation.top_p,
        paper.evaluation.max_new_tokens,
    ) == (0.7, 0.95, 1536)
    shapes = rl_shapes.PRESETS["qwen3-4b"]
    assert (
        shapes.prompts.generation,
        shapes.prompts.training,
        shapes.questions.prompts,
        shapes.questions.sweeps,
    ) == (1536, 1536, 119, 10)


def test_an_unknown_arm_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no arm 'standart': did you mean standard"):
        experiment_of(STUDY, dataclasses.replace(DEMO, arms=("standart",)))


def test_a_preset_may_name_an_algorithm_for_all_arms():
    published = experiment_of(STUDY, dataclasses.replace(DEMO, algorithm="published"))
    assert {arm.algorithm for arm in published.arms} == {PUBLISHED}
    with pytest.raises(ValueError, match="no algorithm 'publishd': did you mean published"):
        experiment_of(STUDY, dataclasses.replace(DEMO, algorithm="publishd"))
