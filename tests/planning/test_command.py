"""`ip-jax plan` as a user sees it."""

import importlib.util
import json

import pytest

from configs.sft_shapes import PRESETS
from ip_jax import cli
from ip_jax.planning import chips, search, workload
from ip_jax.planning.command import subject_of

TINY = (
    "--hf.num-hidden-layers 2 --hf.hidden-size 64 --hf.intermediate-size 96"
    " --hf.num-attention-heads 4 --hf.num-key-value-heads 2 --hf.vocab-size 256".split()
)
SHORT = (
    "--batches.rows 4 --batches.length 64 --batches.responses 32 --questions.prompts 5"
    " --questions.length 16 --evaluation.max-new-tokens 8 --evaluation.slots 8".split()
)


def planned(capsys, tmp_path, *arguments):
    """(what is printed, the JSON)."""
    cli.main(["plan", *arguments, "--json", str(tmp_path / "plan.json")])
    return capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())


def failure(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "preset, billions",
    [
        ("qwen2-7b", 7.615616512),
        ("llama-3-8b", 8.030261248),
        ("gcd-gemma-2b", 2.506172416),
        ("mixtral-8x7b", 46.702792704),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, billions):
    config = PRESETS[preset].hf.decoder_config()
    params = workload.abstract_params(config, "bfloat16")
    assert sum(
        a.size
        for a in [
            *params["layers"].values(),
            *(a for name, a in params.items() if name != "layers"),
        ]
    ) == round(billions * 1e9)


def test_one_h200_by_formula(capsys, tmp_path):
    said, record = planned(
        capsys, tmp_path, "sft_shapes", "--preset", "qwen2-7b", "--topology", "h200:1"
    )
    assert record["memory"]["training"]["weights"] == 2 * 7_615_616_512
    # keys and values, bfloat16, two runs of 128 slots
    assert record["memory"]["sampling"]["caches"] == 2 * 2 * 28 * 4 * 128 * 2 * 128 * (320 + 512)
    assert record["fits"] and "fits" in said and "14.19" in said and "estimates" in said
    hours = (
        sum(phase["times"] * max(phase["seconds"].values()) for phase in record["phases"]) / 3600
    )
    assert sum(record["hours"].values()) == pytest.approx(hours)


@pytest.mark.slow
def test_the_figure_of_a_gpu_is_one_program_that_fits(capsys, tmp_path):
    """The preset `full`: seven arms that are trained, five seeds."""
    said, record = planned(
        capsys,
        tmp_path,
        "gcd_sycophancy",
        "--preset",
        "full",
        "--data.eval-sets",
        "generated",
        "--topology",
        "h100:1",
    )
    assert (record["runs"], record["programs"], record["fits"]) == (35, 1, True) and not record[
        "advice"
    ]
    crowded = "--seeds", "0", "1", "--sft.tokens-per-micro-batch", "200000"
    _, record = planned(
        capsys,
        tmp_path,
        "gcd_sycophancy",
        "--preset",
        "full",
        "--data.eval-sets",
        "generated",
        "--topology",
        "h100:1",
        *crowded,
    )
    assert record["programs"] > 1 and any(
        "--sft.tokens-per-micro-batch" in line for line in record["advice"]
    )


def test_what_does_not_fit_says_what_to_change(capsys, tmp_path):
    said, record = planned(
        capsys,
        tmp_path,
        "sft_shapes",
        "--topology",
        "a100:1",
        "--runs",
        "64",
        "--evaluation.slots",
        "1024",
    )
    assert not record["fits"] and "does not fit" in said and "--evaluation.slots 512" in said


@pytest.mark.slow
def test_a_plan_for_this_machine_is_compiled(capsys, tmp_path):
    said, record = planned(capsys, tmp_path, "sft_shapes", "--topology", "local", *TINY, *SHORT)
    assert record["mesh"] == {"run": 1, "data": 8, "tensor": 1} and record["fits"] is None
    assert [phase["name"] for phase in record["phases"]] == ["step", "prefill", "decoding a token"]
    assert all(
        phase["cost"]["flops"] > 0 and phase["compile_seconds"] > 0 for phase in record["phases"]
    )
    assert "all-gather" in said and "is not known" in said


def test_the_mesh_is_that_of_the_config(capsys, tmp_path):
    assert "does not divide the 8 devices" in failure(
        capsys, "sft_shapes", "--topology", "h100:8", "--mesh.data", "4"
    )
    assert "does not divide the model's 28 heads" in failure(
        capsys, "sft_shapes", "--topology", "h100:8", "--mesh.tensor", "8"
    )
    assert "demands the platform 'tpu'" in failure(
        capsys, "sft_shapes", "--topology", "h100:8", "--mesh.platform", "tpu"
    )
    _, record = planned(
        capsys,
        tmp_path,
        "sft_shapes",
        "--topology",
        "h100:8",
        "--mesh.run",
        "2",
        "--mesh.tensor",
        "2",
    )
    assert record["mesh"] == {"run": 2, "data": 2, "tensor": 2}
    _, record = planned(
        capsys, tmp_path, "sft_shapes", "--topology", "h100:8", "--mesh.run", "2", "--runs", "3"
    )
    assert record["mesh"] == {
        "run": 1,
        "data": 8,
        "tensor": 1,
    }, "what does not divide the runs joins data"


def test_full_training_is_one_program_a_run(capsys, tmp_path):
    _, record = planned(
        capsys, tmp_path, "sft_shapes", "--topology", "h100:8", "--sft.train", "full"
    )
    params = 7_615_616_512
    assert record["runs"] == 1 and record["programs"] == 2
    assert [phase["times"] for phase in record["phases"]][0] == 2 * 45
    sampling = record["memory"]["sampling"]
    assert sampling["weights"] == pytest.approx(4 * params / 8, rel=1e-3) and sampling[
        "weights, cast"
    ] == pytest.approx(2 * params / 8, rel=1e-3)
    assert sampling["optimizer"] == pytest.approx(8 * params / 8, rel=1e-3)
    scattered = record["phases"][0]["cost"]["collectives"]["reduce-scatter"]["moved"]
    assert scattered == pytest.approx(4 * params * 7 / 8, rel=1e-3), "float32 gradients"


def test_experts_stay_where_they_lie_and_tokens_are_sent(capsys, tmp_path):
    def sent(*mesh: str) -> dict:
        _, record = planned(
            capsys,
            tmp_path,
            "sft_shapes",
            "--preset",
            "mixtral-8x7b",
            "--topology",
            "h200:16",
            *mesh,
        )
        return {
            kind: collective["moved"]
            for kind, collective in record["phases"][0]["cost"]["collectives"].items()
        }

    # all layers' hidden states and experts, bfloat16
    tokens, experts = 32 * 65_536 * 4096 * 2, 2 * 32 * 8 * 3 * 4096 * 14336
    staying, moving = sent("--mesh.tensor", "2"), sent("--mesh.tensor", "1")
    assert staying["reduce-scatter"] == 2 * tokens * 7 / 8, "forward and backward"
    others = 2 * 46_702_792_704 - experts
    assert staying["all-gather"] == pytest.approx(
        (3 * tokens + 3 * others / 2) * 7 / 8, rel=0.01
    ), "activations, and their gradients in the backward pass"
    assert moving["all-gather"] > 3 * experts * 15 / 16 and "reduce-scatter" not in moving, (
        "16 does not divide 8"
    )


def test_what_no_program_trains_is_refused(capsys):
    said = failure(
        capsys,
        "sft_shapes",
        "--preset",
        "mixtral-8x7b",
        "--topology",
        "h100:8",
        "--sft.lora.targets",
        "q",
        "down",
    )
    assert "LoRA targets down are not in a mixtral model" in said


def test_a_quantised_base_that_cannot_be_loaded_does_not_fit(capsys, tmp_path):
    """Llama-3-70B's layers: 4 bits fit one H100, the bfloat16 weights that they are made of do not;
    eight hold both.
    """
    pytest.importorskip("qwix")
    llama_70b = (
        "--preset llama-3-8b --hf.num-hidden-layers 80 --hf.hidden-size 8192 --hf.intermediate-size"
        " 28672 --hf.num-attention-heads 64 --model.quantised nf4 --runs 1".split()
    )
    _, one = planned(
        capsys,
        tmp_path,
        "sft_shapes",
        *llama_70b,
        "--topology",
        "h100:1",
        "--questions.sweeps",
        "0",
        "--sft.tokens-per-micro-batch",
        "2048",
    )
    layers, rest = 80 * (2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672), 2 * 128256 * 8192
    assert one["memory"]["training"]["weights"] == pytest.approx(
        layers * (0.5 + 2 / 64) + 2 * rest, rel=1e-3
    )
    assert one["memory"]["loading"] == {
        "weights, unquantised": pytest.approx(2 * (layers + rest), rel=1e-3)
    }
    assert (
        one["needed"]["training"] < one["allowed"]
        and not one["fits"]
        and one["advice"] == ["loading: more chips: the weights are cut over all of them"]
    )
    _, eight = planned(capsys, tmp_path, "sft_shapes", *llama_70b, "--topology", "h100:8")
    assert eight["fits"] and list(eight["memory"]) == ["loading", "training", "sampling"]
    gathered = [eight["phases"][i]["cost"]["collectives"]["all-gather"]["moved"] for i in (1, 2)]
    assert gathered[0] == pytest.approx((2 * layers + rest) * 7 / 8, rel=0.02), (
        "a prefill gathers dense layers, the vocabulary's matrix and its caches"
    )
    assert gathered[1] < 1e-3 * gathered[0], "decoding has them whole, in 4 bits"
    assert eight["memory"]["sampling"]["weights by layer"] == pytest.approx(
        layers * (0.5 + 2 / 64), rel=1e-3
    )


def test_decoding_gathers_the_layers_for_every_token_where_they_would_take_too_much_memory(
    capsys, tmp_path
):
    """On 8 H100 each has them whole, and sends logits and hidden states alone."""
    layers, rows = 2 * 28 * 233_046_016, 2 * 128
    _, record = planned(
        capsys, tmp_path, "sft_shapes", "--preset", "qwen2-7b", "--topology", "h100:8"
    )
    decoding, hidden, logits = record["phases"][2], rows * 3584 * 2, rows / 8 * 152064 * 4
    assert record["memory"]["sampling"]["weights by layer"] == pytest.approx(layers, rel=1e-3)
    assert not record["advice"]
    assert {kind: found["moved"] for kind, found in decoding["cost"]["collectives"].items()} == {
        "all-gather": hidden * 7 / 8,
        "all-to-all": logits * 7 / 8,
    }
    _, record = planned(
        capsys,
        tmp_path,
        "sft_shapes",
        "--preset",
        "qwen2-7b",
        "--topology",
        "h100:16",
        "--hf.num-hidden-layers",
        "112",
    )
    decoding = record["phases"][2]
    assert record["memory"]["sampling"]["weights by layer"] == pytest.approx(
        4 * layers / 16, rel=1e-3
    )
    assert decoding["cost"]["collectives"]["all-gather"]["moved"] == pytest.approx(
        4 * layers * 15 / 16, rel=1e-3
    )
    (advice,) = record["advice"]
    assert (
        advice.startswith("sampling: each token gathers the layers") and "--mesh.tensor" in advice
    )
    assert (
        decoding["seconds"]["links"] == pytest.approx(4 * layers * 15 / 16 / 450e9, rel=2e-3)
        and decoding["seconds"]["links"] > decoding["seconds"]["memory"]
    )
    _, record = planned(
        capsys,
        tmp_path,
        "sft_shapes",
        "--preset",
        "qwen2-7b",
        "--topology",
        "h100:4",
        "--mesh.tensor",
        "4",
    )
    assert record["memory"]["sampling"]["caches"] == 2 * 2 * 28 * 128 * 2 * 128 * (320 + 512), (
        "one of four kv heads on each device"
    )


def test_empty_rows_are_not_useful_work(capsys, tmp_path):
    """16 rows of each of two runs: on 64 devices half of the rows are empty, and take as long."""
    said, full = planned(capsys, tmp_path, "sft_shapes", "--topology", "h100:32")
    assert not full["advice"]
    said, padded = planned(capsys, tmp_path, "sft_shapes", "--topology", "h100:64")
    assert (
        padded["mfu"] == pytest.approx(full["mfu"] / 2, rel=0.02)
        and padded["tokens_per_step"] == full["tokens_per_step"] == 2 * 16 * 2048
    )
    assert padded["phases"][0]["cost"]["flops"] == full["phases"][0]["cost"]["flops"]
    assert "a step has 32 rows for data=64 devices" in padded["advice"][0] and "others are" in said
    _, by_tensor = planned(
        capsys, tmp_path, "sft_shapes", "--topology", "h100:64", "--mesh.tensor", "4"
    )
    assert not by_tensor["advice"]


def test_search_by_formula_ranks_what_fits_first(capsys, tmp_path):
    said, record = planned(capsys, tmp_path, "sft_shapes", "--topology", "h100:8", "--search")
    assert 1 < len(record) <= search.MOST and "by formula" in said
    topology = chips.read_topology("h100:8")
    subject = subject_of(PRESETS["qwen2-7b"], None, "gpu", None)
    found = search.ranked(search.candidates(subject.work_on, topology), topology)
    fitting = [c.needed <= topology.chip.memory for c in found]
    assert fitting == sorted(fitting, reverse=True)
    times = [c.seconds(topology) for c, fits in zip(found, fitting, strict=True) if fits]
    assert "none" in {c.workload.sft.remat for c in found} and all(
        list(c.memory) == ["training", "sampling"] for c in found
    )
    assert times == sorted(times) and len(
        {(c.sizes, c.workload.sft.remat, c.workload.shapes) for c in found}
    ) == len(found)


def test_search_tries_every_remat_policy(capsys, tmp_path):
    _, record = planned(capsys, tmp_path, "sft_shapes", "--topology", "h100:1", "--search")
    assert {"attention", "full"} <= {candidate["remat"] for candidate in record} and len(
        record
    ) <= search.MOST


def test_what_trains_but_cannot_be_sampled_from_does_not_fit(capsys, tmp_path):
    long = (
        "--questions.prompts",
        "8",
        "--evaluation.max-new-tokens",
        "100000",
        "--evaluation.slots",
        "128",
        "--runs",
        "16",
    )
    said, record = planned(
        capsys, tmp_path, "sft_shapes", "--topology", "h100:8", "--search", *long
    )
    allowed = 80e9 - 0.25 * 2**30
    assert (
        min(c["memory"]["training"] for c in record)
        < allowed
        < min(c["memory"]["sampling"] for c in record)
    )
    assert "yes" not in said
    said, record = planned(
        capsys,
        tmp_path,
        "sft_shapes",
        "--topology",
        "h100:8",
        "--search",
        *long,
        "--questions.sweeps",
        "0",
    )
    assert all(list(c["memory"]) == ["training"] for c in record) and "yes" in said


def test_meshes_divide_devices_runs_and_heads():
    found = search.meshes(16, runs=2, heads=28)
    assert (
        (1, 16, 1) in found and (2, 4, 2) in found and (1, 4, 4) in found and (4, 4, 1) not in found
    )
    assert all(run * data * tensor == 16 and 28 % tensor == 0 for run, data, tensor in found)


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v5e", "no topology is called 'v5e': did you mean v5e:...? known are v5e:4x4"),
        ("h20:1", "did you mean h200:..."),
        ("h200:2x2", "number of GPUs, like h200:8"),
    ],
    ids=["no size", "unknown", "GPUs have no shape"],
)
def test_unknown_topologies(capsys, topology, message):
    assert message in failure(capsys, "sft_shapes", "--topology", topology)


def test_no_topology_is_one_sentence(capsys):
    assert "plan needs --topology: known are" in failure(capsys, "sft_shapes")


def test_without_libtpu_one_sentence_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = failure(capsys, "sft_shapes", "--topology", "v5e:4x4")
    assert 'pip install "jax[tpu]"' in said and said.count("\n") == 1


def test_the_toy_is_not_planned_and_says_why(capsys):
    said = failure(capsys, "estimators", "--topology", "h200:1")
    assert (
        "this config trains the toy, which needs minutes on any machine" in said
        and said.count("\n") == 1
    )


def test_shapes_cannot_be_run(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "sft_shapes"])
    assert "it can only be planned" in capsys.readouterr().err
