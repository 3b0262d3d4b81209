"""`ip-jax plan` of reinforcement learning as a user sees it, by formula: hand-computed bytes and
FLOPs, shares, advice.
"""

import dataclasses
import json

import pytest
from test_command import failure, planned
from tiny_experiment import make_tokenizer

from configs.rl_shapes import PRESETS, QWEN3_4B
from ip_jax.planning import workload
from ip_jax.planning.chips import read_topology
from ip_jax.planning.reinforced_workload import declared
from ip_jax.planning.workload import Questions
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.gates import Gate
from ip_jax.studies.gcd_sycophancy import generate

PARAMS = 4_022_468_096  # of Qwen3-4B as published
LAYERS = 36 * (2560 * 4096 + 2 * 2560 * 1024 + 4096 * 2560 + 3 * 2560 * 9728)
VOCABULARY = 151936 * 2560
ROW, SAMPLES = 1536 + 4 * 1536, 256  # tokens of a row: a prompt and four completions


def test_the_preset_has_the_published_number_of_parameters():
    params = workload.abstract_params(PRESETS["qwen3-4b"].hf.decoder_config(), "bfloat16")
    assert (
        sum(
            a.size
            for a in [
                *params["layers"].values(),
                *(a for name, a in params.items() if name != "layers"),
            ]
        )
        == PARAMS
    )


def test_one_h200_by_formula(capsys, tmp_path):
    said, record = planned(
        capsys, tmp_path, "rl_shapes", "--topology", "h200:1", "--rl.tokens-per-micro-batch", "8192"
    )
    assert record["fits"] and list(record["memory"]) == [
        "update",
        "reference at generation prompt",
        "rollouts",
        "evaluation",
    ]
    assert all(
        kinds["weights"] == 2 * PARAMS and kinds["optimizer"] > 0
        for kinds in record["memory"].values()
    )
    cache = 2 * 2 * 36 * 8 * 128  # keys and values of a position, bfloat16
    assert record["memory"]["rollouts"]["caches"] == cache * (16 * 1536 + SAMPLES * 1536), (
        "each prompt once, each completion its own"
    )
    phases = {phase["name"]: phase for phase in record["phases"]}
    assert (
        phases["rollouts: decoding a token"]["times"] == 200 * 1536
        and phases["update"]["times"] == 200
    )
    assert phases["evaluation: decoding a token"]["times"] == 10 * 1536, (
        "119 questions in 128 slots"
    )
    tokens, responses = 64 * ROW, SAMPLES * 1536
    pairs = 36 * 64 * (1536**2 / 2 + 4 * (1536 * 1536 + 1536**2 / 2))
    assert (
        phases["reference at generation prompt"]["cost"]["flops"]
        == 2 * LAYERS * tokens + 2 * VOCABULARY * responses + 4 * 4096 * pairs
    )
    lora = 36 * 32 * ((2560 + 4096) * 2 + (2560 + 1024) * 2 + (2560 + 9728) * 3)
    # the forward pass once more but for its last product (remat)
    again = 2 * (LAYERS - 36 * 2560 * 9728) * tokens
    by_hand = (
        4 * LAYERS * tokens
        + again
        + 6 * lora * tokens
        + 12 * 4096 * pairs
        + 4 * VOCABULARY * responses
    )
    assert phases["update"]["cost"]["flops"] == pytest.approx(by_hand, rel=1e-6)
    assert record["tokens_per_step"] == tokens
    spent = {
        name: phase["times"] * max(phase["seconds"].values()) / 3600
        for name, phase in phases.items()
    }
    assert record["hours"]["updates"] == pytest.approx(
        spent["update"] + spent["reference at generation prompt"]
    )
    assert sum(record["hours"].values()) == pytest.approx(sum(spent.values()))
    assert record["shares"]["rollouts"] == pytest.approx(
        record["hours"]["rollouts"] / (record["hours"]["rollouts"] + record["hours"]["updates"])
    )
    assert (
        sum(record["shares"].values()) == pytest.approx(1)
        and "an iteration's time" in said
        and "grading left out" in said
    )


def test_a_quantised_base_is_loaded_whole_and_lies_in_four_bits(capsys, tmp_path):
    pytest.importorskip("qwix")
    _, record = planned(
        capsys, tmp_path, "rl_shapes", "--topology", "h200:1", "--model.quantised", "nf4"
    )
    assert list(record["memory"]) == [
        "loading",
        "update",
        "reference at generation prompt",
        "rollouts",
        "evaluation",
    ]
    assert record["memory"]["loading"] == {"weights, unquantised": 2 * PARAMS}
    assert {
        kinds.get("weights") for stage, kinds in record["memory"].items() if stage != "loading"
    } == {2 * PARAMS - LAYERS * (2 - 0.5 - 2 / 64)}


def test_empty_rows_are_not_useful_work(capsys, tmp_path):
    """64 rows of four completions: on 128 devices half of the rows are empty."""
    _, full = planned(capsys, tmp_path, "rl_shapes", "--topology", "h200:64")
    _, padded = planned(capsys, tmp_path, "rl_shapes", "--topology", "h200:128")
    assert (
        padded["mfu"] == pytest.approx(full["mfu"] / 2, rel=1e-3)
        and padded["tokens_per_step"] == full["tokens_per_step"] == 64 * ROW
    )
    assert (
        not full["advice"]
        and "update: a step has 64 rows of each run for data=128 devices" in padded["advice"][0]
    )


def test_scores_lie_in_memory_where_xla_attends(capsys, tmp_path):
    """One layer's, four times, of the rows of a micro-batch of 32,768 positions: four, each with
    four completions' over 3072 keys. cuDNN holds none.
    """
    _, kernel = planned(capsys, tmp_path, "rl_shapes", "--topology", "h200:1")
    _, xla = planned(
        capsys, tmp_path, "rl_shapes", "--topology", "h200:1", "--model.attention", "xla"
    )
    scores = 4 * 4 * 4 * (4 * 1536 * 3072) * 32
    assert xla["memory"]["update"]["activations"] - kernel["memory"]["update"][
        "activations"
    ] == pytest.approx(scores)
    assert "attention 'splash' runs on a TPU" in failure(
        capsys, "rl_shapes", "--topology", "h200:1", "--model.attention", "splash"
    )


def test_rollouts_say_where_each_token_gathers_the_layers(capsys, tmp_path):
    _, eight = planned(capsys, tmp_path, "rl_shapes", "--topology", "h100:8")
    assert not eight["advice"]
    _, deeper = planned(
        capsys, tmp_path, "rl_shapes", "--topology", "h100:8", "--hf.num-hidden-layers", "216"
    )
    assert any(
        line.startswith("sampling: each token gathers the layers") for line in deeper["advice"]
    )


def test_declared_sizes_are_checked_as_a_run_checks_its_arms():
    shapes = PRESETS["qwen3-4b"]
    config, mesh = shapes.hf.decoder_config(), read_topology("h200:1").mesh(1, 1, 1)
    absolute = Algorithm(gate=Gate("absolute", quantile=0.5))
    (program,) = declared(dataclasses.replace(shapes, algorithm=absolute), config, mesh).programs
    assert program.sampling.times == 400 and program.batch().policy.tokens.shape[-1] == 1536, (
        "200 rollouts, and as often its own samples"
    )
    for changes, words in (
        (
            {"algorithm": Algorithm(pmi=(0.5, 1.0), pmi_against="guide")},
            "for which text experiments make no pass",
        ),
        ({"runs": 0}, "runs is 0"),
        ({"questions": Questions(0, 100, 1)}, "questions.prompts is 0"),
        ({"questions": Questions(1, 50_000, 1)}, "a prompt of 50000 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            declared(dataclasses.replace(shapes, **changes), config, mesh)


def test_what_does_not_fit_says_what_to_change(capsys, tmp_path):
    said, record = planned(
        capsys,
        tmp_path,
        "rl_shapes",
        "--topology",
        "a100:1",
        "--runs",
        "8",
        "--rl.runs-per-program",
        "8",
        "--rl.remat",
        "products",
        "--rl.tokens-per-micro-batch",
        "61440",
    )
    assert not record["fits"] and "does not fit" in said and record["runs"] == 8
    advice = "\n".join(record["advice"])
    assert (
        "update: recompute activations: --rl.remat full" in advice
        and "update: fewer completions in a row: --rl.samples-per-row 2" in advice
    )
    assert (
        "rollouts: fewer completions side by side: --rl.slots 128" in advice
        and "evaluation: fewer completions side by side: --evaluation.slots 64" in advice
    )
    assert "rollouts: fewer runs in one program: --rl.runs-per-program 4" in advice


def test_the_published_experiment_is_planned_from_a_tokenizer_and_a_config_alone(capsys, tmp_path):
    fields = {
        name: value
        for name, value in QWEN3_4B.__dict__.items()
        if value is not None and name != "architecture"
    }
    (tmp_path / "config.json").write_text(
        json.dumps(fields | {"architectures": [QWEN3_4B.architecture], "model_type": "qwen3"})
    )
    rows = generate.generate_training(
        100, "user_right", "without", 1, generate.has_allowed_gcd, lambda messages: 0
    )
    tokenizer = make_tokenizer(
        tuple(message["content"] for row in rows for message in row["messages"]), 600
    )
    tokenizer.chat_template += (
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking"
        " %}<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    few = (
        "--arms standard neutral_ip --seeds 1 42 --rl.iterations 4 --evaluation.steps 0 2"
        " --data.train-claims 40 --data.eval-claims.wrong 4 --data.eval-claims.right 4".split()
    )
    _, record = planned(
        capsys,
        tmp_path,
        "gcd_approval",
        "--preset",
        "paper",
        "--topology",
        "h200:8",
        "--model",
        str(tmp_path),
        *few,
    )
    assert record["runs"] == 1 and record["programs"] == 4, "rl.runs_per_program is 1"
    assert "reference at generation prompt" in record["memory"] and record["memory"]["update"][
        "weights"
    ] == pytest.approx(2 * PARAMS / 8, rel=1e-3)
    assert "optimizer" not in record["memory"]["untrained model"], (
        "it is evaluated before anything is trained"
    )
    phases = {phase["name"]: phase for phase in record["phases"]}
    assert (
        phases["update"]["times"] == 4 * 4
        and phases["untrained model: decoding a token"]["times"] > 0
    )


def test_what_cannot_be_planned_is_one_sentence(capsys):
    assert "are more than rl.max_length = 3072" in failure(
        capsys, "rl_shapes", "--topology", "h200:1", "--prompts.training", "1600"
    )
    assert "--search covers supervised training" in failure(
        capsys, "rl_shapes", "--topology", "h200:1", "--search"
    )
    assert "demands the platform 'tpu'" in failure(
        capsys, "rl_shapes", "--topology", "h200:1", "--mesh.platform", "tpu"
    )
