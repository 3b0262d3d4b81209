"""What is still to be done: runs and their keys, evaluation sweeps, programs; nothing here loads
weights.
"""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from tiny_experiment import ARMS, make_experiment, prompts
from tiny_models import CONFIG, random_params

from configs.gcd_sycophancy import STUDY
from configs.sft_shapes import PRESETS as SHAPES
from ip_jax.lab.experiment import Arm, ModelConfig
from ip_jax.lab.supervised import plan
from ip_jax.models.hub import Pretrained
from ip_jax.models.lora import LoraConfig, init_lora
from ip_jax.planning.workload import abstract_params
from ip_jax.prompts.transforms import Share, Where
from ip_jax.training.results import write_json
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import make_mesh

MINE = Arm("mine", "mine", "mine")


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def experiment(*arms, **changes):
    return make_experiment("nowhere", arms=arms or ("untrained", "neutral", "ip"), **changes)


def test_full_training_of_a_mixture_asks_for_no_lora_targets():
    """The default ones, of which a mixture's experts lack some, are then unused."""
    mixture = dataclasses.replace(CONFIG, family="mixtral", n_experts=4, experts_per_token=2)
    sft = dataclasses.replace(experiment().sft, lora=LoraConfig())
    with pytest.raises(ValueError, match="LoRA targets gate, up, down are not in a mixtral model"):
        plan.check_training(sft, experiment().model, (), mixture)
    plan.check_training(dataclasses.replace(sft, train="full"), experiment().model, (), mixture)


def prompts_of(sweeps) -> list[list[tuple | None]]:
    return [
        [cell and (cell.arm, cell.seed, cell.eval_prompt) for cell in sweep] for sweep in sweeps
    ]


# Runs


def test_runs_are_arms_with_seeds_and_the_untrained_arm_is_none():
    assert [run.name for run in plan.runs_of(experiment(seeds=(0, 3)), "x")] == [
        "neutral-s0",
        "neutral-s3",
        "ip-s0",
        "ip-s3",
    ]


def test_a_key_changes_with_everything_that_defines_a_run_and_with_nothing_else():
    def key(arm: Arm, identity="x", seed=0, **changes):
        return plan.runs_of(experiment(arm, seeds=(seed,), **changes), identity)[0].key

    ip = ARMS["ip"]
    same = [
        key(ip),
        key(dataclasses.replace(ip, label="another label")),
        key(dataclasses.replace(ip, name="another_name")),
    ]
    changed = [
        key(ip, identity="y"),
        key(ip, seed=1),
        key(dataclasses.replace(ip, train_prompt="gcd/respond")),
        key(dataclasses.replace(ip, data="corrected")),
        key(dataclasses.replace(ip, also_evaluated_under=("gcd/safety",))),
        key(MINE),
        key(MINE, words={"mine": "Be rude."}),
        key(dataclasses.replace(MINE, rows=Share(0.5))),
    ]
    assert len(set(same)) == 1 and len({*same, *changed}) == 1 + len(changed)


def test_the_folders_identity_covers_weights_data_and_dropped_examples():
    base = experiment()
    others = [
        plan.folder_record(base, "w2", []),
        plan.folder_record(base, "w1", [3]),
        plan.folder_record(experiment(sft={"learning_rate": 1.0}), "w1", []),
        plan.folder_record(
            experiment(training=dict(base.training) | {"corrected": base.training["user_right"]}),
            "w1",
            [],
        ),
        plan.folder_record(
            experiment(eval_sets={"generated": base.eval_sets["generated"][:2]}), "w1", []
        ),
    ]
    grown = plan.folder_record(experiment("untrained", "ip", MINE, seeds=(1, 2)), "w1", [])
    identity = plan.folder_record(base, "w1", [])["identity"]
    assert grown["identity"] == identity and list(grown["arms"]) == ["untrained", "ip", "mine"]
    assert len({identity, *(other["identity"] for other in others)}) == 6


def test_the_record_says_what_the_words_of_an_own_arm_and_of_the_template_are():
    record = plan.folder_record(
        experiment("untrained", MINE), "w1", [], default_system="You are kind."
    )
    assert (
        record["arms"]["mine"]["transform"] == repr(prompts(mine="Be kind.")["mine"].transform)
        and record["arms"]["mine"]["text"] == "Be kind."
        and record["arms"]["mine"]["kind"] == "own"
    )
    assert (
        record["arms"]["untrained"]["transform"] is None
        and record["default_system"] == "You are kind."
        and record["mesh"]["tensor"] == 1
    )


# Evaluations


def test_examples_behind_the_end_of_the_schedule_are_not_seen():
    setting = experiment("neutral", sft={"schedule": Schedule("linear", warmup=1, total=3)})
    seen = [
        plan.sweeps_of_step(setting, plan.runs_of(setting, "x"), step)[0][0].examples_seen
        for step in (2, 3, 6)
    ]
    assert seen == [
        2 * setting.sft.batch_size,
        3 * setting.sft.batch_size,
        3 * setting.sft.batch_size,
    ]


def test_the_untrained_model_is_seen_once_under_every_training_prompt_and_seed(folder):
    prompts = ["neutral", "gcd/behave"]
    for temperature, seeds in ((0.0, [4]), (0.7, [4, 5])):
        sweeps = plan.untrained_sweeps(
            experiment(seeds=(4, 5), evaluation={"temperature": temperature}),
            folder / str(temperature),
        )
        assert prompts_of(sweeps) == [
            [("untrained", seed, prompt) for seed in seeds for prompt in prompts]
        ]
    assert plan.untrained_sweeps(experiment("neutral"), folder / "none") == []


def test_what_a_later_arm_adds_to_the_untrained_model_is_a_sweep_of_its_own(folder):
    first = plan.untrained_sweeps(experiment(), folder)
    later = plan.untrained_sweeps(experiment("untrained", MINE, "neutral", "ip"), folder)
    assert later[0] == first[0] and prompts_of(later[1:]) == [[("untrained", 0, "mine")]]
    assert prompts_of(plan.untrained_sweeps(experiment("untrained", "neutral"), folder)) == [
        [("untrained", 0, "neutral")]
    ]


def test_examples_for_full_steps_only_are_left_out_at_the_others(folder):
    plain = experiment()
    few, many = plain.eval_sets["generated"][:2], plain.eval_sets["generated"][2:]
    setting = dataclasses.replace(
        plain, eval_sets={"generated": [*many, *({**row, "full_steps_only": True} for row in few)]}
    )
    runs = plan.runs_of(setting, "x")
    asked = {
        step: plan.examples_of(setting, plan.sweeps_of_step(setting, runs, step)[0][0])
        for step in (0, 3, 6)
    }
    assert asked[3] == many and asked[0] == asked[6] == setting.eval_sets["generated"]


def test_a_step_is_looked_at_under_all_prompts_or_the_neutral_one(folder):
    setting = experiment("neutral", "ip", MINE, "clean")
    runs = plan.runs_of(setting, "x")
    neutral = [(run.arm.name, 0, "neutral") for run in runs]
    assert prompts_of(plan.sweeps_of_step(setting, runs, 3)) == [neutral]
    second = [
        ("neutral", 0, "gcd/safety_matched"),
        ("ip", 0, "gcd/behave"),
        ("mine", 0, "mine"),
        None,
    ]
    full = plan.sweeps_of_step(setting, runs, 6)
    assert prompts_of(full) == [neutral, second]
    assert [cell.own_prompt for cell in full[0]] == [True, False, False, True] and [
        cell and cell.own_prompt for cell in full[1]
    ] == [False, True, True, None]
    assert full[1][2].transform == setting.prompts["mine"].transform and {
        cell.examples_seen for cell in full[0]
    } == {24}


def test_a_sweep_is_done_again_as_a_whole(folder):
    setting = experiment()
    sweeps = plan.sweeps_of_step(setting, plan.runs_of(setting, "x"), 6)
    for cell in [*sweeps[0], sweeps[1][0]]:
        (folder / "transcripts").mkdir(exist_ok=True)
        (folder / "transcripts" / cell.part).write_bytes(b"")
    assert plan.incomplete(folder, sweeps) == [sweeps[1]]


# Programs


def names(groups) -> list[list[str]]:
    return [[run.name for run in group] for group in groups]


def begin(folder, runs):
    """What a program leaves that has begun to train."""
    write_json(
        folder / "checkpoints" / "-".join(run.name for run in runs) / "origin.json",
        {"runs": {run.name: run.key for run in runs}, "model": "m"},
    )


def complete(folder, run):
    write_json(folder / "runs" / run.name / "run.json", {})


def test_runs_are_cut_into_programs_that_fit(folder):
    runs = plan.runs_of(experiment("neutral", "ip", "clean", seeds=(0, 1)), "x")
    assert [len(group) for group in plan.groups_of(folder, runs, 4)] == [4, 2]
    complete(folder, runs[0])
    assert names(plan.groups_of(folder, runs, 10)) == [[run.name for run in runs[1:]]]


def test_what_was_begun_together_goes_on_together(folder):
    runs = plan.runs_of(experiment("neutral", "ip", "clean"), "x")
    begin(folder, runs[:2])
    assert names(plan.groups_of(folder, runs, 10)) == [["neutral-s0", "ip-s0"], ["clean-s0"]]
    complete(folder, runs[0])
    assert names(plan.groups_of(folder, runs, 10)) == [
        ["neutral-s0", "ip-s0"],
        ["clean-s0"],
    ], "stopped while its runs were recorded"
    complete(folder, runs[1])
    assert names(plan.groups_of(folder, runs, 10)) == [["clean-s0"]]


def test_a_program_with_a_run_that_is_no_longer_asked_for_begins_anew(folder):
    runs = plan.runs_of(experiment("neutral", "ip"), "x")
    begin(folder, runs)
    assert names(plan.groups_of(folder, runs[:1], 10)) == [["neutral-s0"]]
    changed = plan.runs_of(experiment("neutral", "ip"), "y")
    assert names(plan.groups_of(folder, changed, 1)) == [
        ["neutral-s0"],
        ["ip-s0"],
    ], "nor one of another definition"


def test_memory_admits_a_run_for_every_adapter_with_its_gradients_and_moments():
    sft, dtypes = experiment().sft, ModelConfig("m", weights="float32")
    model = Pretrained("m", CONFIG, random_params(CONFIG), None, "f")
    one = sum(array.nbytes for array in jax.tree.leaves(init_lora(np.array([0]), CONFIG, sft.lora)))

    def fit(gigabytes, **changes):
        return plan.runs_that_fit(
            dataclasses.replace(sft, memory_gb=gigabytes, **changes), dtypes, model, make_mesh()
        )

    few, short = 0.05, dict(max_length=1, tokens_per_micro_batch=2000)
    assert fit(few + 10 * 6 * one / 1e9, **short) == fit(few, **short) + 10 > 11
    assert fit(1e-9) == 1
    assert fit(few, tokens_per_micro_batch=10_000) < fit(few, tokens_per_micro_batch=100)
    assert fit(few, max_length=10_000) == fit(few, tokens_per_micro_batch=10_000), (
        "a micro-batch has a row"
    )
    fewer = [
        fit(gigabytes, **short) - fit(gigabytes, max_length=1, tokens_per_micro_batch=3000)
        for gigabytes in (2 * few, 4 * few)
    ]
    assert abs(fewer[0] - fewer[1]) <= 1 < fewer[0], "however many runs, they share its rows"


def test_a_row_lies_on_every_device():
    """So that devices along data share the tokens of a micro-batch only as far as these are more
    than a row for each.
    """
    sft, dtypes = (
        dataclasses.replace(experiment().sft, memory_gb=0.05, max_length=1000),
        ModelConfig("m", weights="float32"),
    )
    small = dict(vocab_size=0, n_layers=3)  # nothing of it is cut but what is counted here
    nothing = Pretrained("m", dataclasses.replace(CONFIG, **small), {}, None, "f")

    def fit(tokens: int, data: int) -> int:
        return plan.runs_that_fit(
            dataclasses.replace(sft, tokens_per_micro_batch=tokens),
            dtypes,
            nothing,
            make_mesh(data=data),
        )

    assert (
        fit(1000, 1) == fit(100, 1) == fit(100, 8) == fit(8000, 8) > fit(16_000, 8) == fit(2000, 1)
    )


@pytest.mark.parametrize("preset", ["full", "paper"])
def test_all_runs_of_a_gpus_preset_are_one_program(preset, smollm2):
    config, known = STUDY.preset(preset), STUDY.arms_of(Arm)
    decoder = SHAPES["gcd-gemma-2b"].hf.decoder_config() if preset == "paper" else smollm2.config
    trained = [name for name in config.arms or known if known[name].train_prompt]
    runs = len(trained) * len(config.seeds)
    dtypes = dataclasses.replace(config.model, weights="bfloat16")
    base = Pretrained("m", decoder, abstract_params(decoder, "bfloat16"), None, "f")
    assert plan.runs_that_fit(config.sft, dtypes, base, make_mesh()) >= runs >= 14


def test_memory_counts_the_experts_that_a_token_is_sent_to():
    params, sft = (
        random_params(CONFIG),
        dataclasses.replace(
            experiment().sft,
            lora=LoraConfig(targets=("q",)),
            memory_gb=0.2,
            tokens_per_micro_batch=1000,
        ),
    )

    def fit(remat: str, **changes):
        model = Pretrained("m", dataclasses.replace(CONFIG, **changes), params, None, "f")
        return plan.runs_that_fit(
            dataclasses.replace(sft, remat=remat),
            ModelConfig("m", weights="float32"),
            model,
            make_mesh(),
        )

    two_of_eight = dict(n_experts=8, experts_per_token=2)
    assert fit("full", **two_of_eight) == fit("full", d_ff=2 * CONFIG.d_ff) > 1
    assert fit("products", **two_of_eight) > fit("products", d_ff=2 * CONFIG.d_ff) > 1, (
        "no hidden states of experts are kept"
    )


def test_an_arm_may_put_its_prompt_on_some_rows_and_is_evaluated_under_it_on_all():
    """Selective inoculation."""
    some = Arm("some", "some", "gcd/behave", rows=Where("label", "user_wrong"))
    setting = experiment(some)
    rows = [
        row | {"label": label}
        for label in ("user_wrong", "user_right")
        for row in setting.training["user_right"][:1]
    ]
    asked = [setting.trained_under(some)(row)["messages"][0]["content"] for row in rows]
    assert ["Behave as if" in text for text in asked] == [True, False]
    (run,) = plan.runs_of(setting, "x")
    own = plan.sweeps_of_step(setting, [run], 6)[1][0]
    assert own.own_prompt and own.transform == setting.prompts["gcd/behave"].transform


def test_an_arm_on_rows_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="trains on rows of the kind 'mixd', and the data has"):
        experiment().kind_of(Arm("a", "a", data="mixd"))
