"""What an experiment trained goes out to PEFT and transformers by the command line, and comes back
as an arm's starting point.
"""

import io
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny_experiment import make_experiment, make_tokenizer, write_model
from tiny_models import hf_model, hidden_states, multimodal_model, random_lora

from ip_jax import cli
from ip_jax.data.packing import RowRules
from ip_jax.data.pipeline import RunSource, batch_reader, renderer
from ip_jax.lab.base_model import load_base
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import Arm, ModelConfig
from ip_jax.lab.supervised.run import run_supervised
from ip_jax.lab.trained import TrainedRun, decoder_of, export_run, read_run
from ip_jax.models import hub, peft
from ip_jax.models.lora import LoraConfig
from ip_jax.prompts.transforms import Identity
from ip_jax.training.sharding import make_mesh

LORA = LoraConfig(rank=2, alpha=3, rslora=True, targets=("q", "down"))
TOKENS = np.random.default_rng(0).integers(0, 300, (1, 2, 17))


def train(model: Path, folder: Path, **changes):
    """Six steps without dropout, so that a step's loss is a function of weights and batch;
    evaluated at the end.
    """
    shared = {
        "model": {
            "name": str(model),
            "revision": None,
            "weights": "float32",
            "activations": "float32",
        }
    }
    sft = {"lora": LORA} | changes.pop("sft", {})
    options = (
        dict(
            shared=shared,
            sft=sft,
            evaluation=dict(full_steps=(sft.get("steps", 6),), neutral_steps=()),
        )
        | changes
    )
    run_supervised(
        make_experiment(model, **options), epath.Path(folder), Display(Console(file=io.StringIO()))
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def results(tmp_path_factory, model):
    """neutral and ip with two seeds each."""
    folder = tmp_path_factory.mktemp("results") / "out"
    train(model, folder, arms=("neutral", "ip"), seeds=(0, 1))
    return folder


def recorded(results: Path, run: str) -> dict:
    """{target: {"a", "b"}} as the run's own file has it."""
    tensors = load_file(results / "runs" / run / "adapter.safetensors")
    assert all(array.any() for array in tensors.values())
    return {
        target: {kind: tensors[f"{target}.{kind}"] for kind in ("a", "b")}
        for target in LORA.targets
    }


def our_logits(model: Path, adapter: dict):
    pretrained = hub.load_pretrained(str(model), np.float32)
    return hidden_states(
        pretrained.config,
        pretrained.params,
        TOKENS,
        {t: {k: a[None] for k, a in m.items()} for t, m in adapter.items()},
        LORA,
    )[1][0]


def logits_of(module) -> np.ndarray:
    import torch

    with torch.no_grad():
        return module(torch.tensor(TOKENS[0])).logits.numpy()


def test_the_command_writes_a_peft_folder(model, results, tmp_path, capsys):
    library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    cli.main(
        ["export", str(results), "--arm", "ip", "--seed", "1", "--to", str(tmp_path / "adapter")]
    )
    assert "ip, seed 1: " in capsys.readouterr().out
    loaded = library.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter"
    )
    np.testing.assert_allclose(
        logits_of(loaded.eval()), our_logits(model, recorded(results, "ip-s1")), atol=3e-5
    )
    run, other = recorded(results, "ip-s1"), recorded(results, "ip-s0")
    read = peft.read_matching(tmp_path / "adapter", hub.load_config(str(model)), LORA)
    for target in LORA.targets:
        np.testing.assert_array_equal(read[target]["b"], run[target]["b"])
        assert (read[target]["b"] != other[target]["b"]).any()
    assert json.loads((tmp_path / "adapter" / "run.json").read_text()) == json.loads(
        (results / "runs" / "ip-s1" / "run.json").read_text()
    )


def test_the_command_writes_a_merged_folder(model, results, tmp_path):
    transformers = pytest.importorskip("transformers")
    cli.main(
        ["export", str(results), "--arm", "neutral", "--to", str(tmp_path / "merged"), "--merged"]
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = our_logits(model, recorded(results, "neutral-s0"))
    np.testing.assert_allclose(logits_of(loaded.eval()), expected, atol=3e-5)
    assert np.abs(expected - our_logits(model, {})).max() > 0.01
    messages = [{"role": "user", "content": "Is 3 and 4 7?"}]
    ours, theirs = (
        hub.load_tokenizer(str(model)),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "merged"),
    )
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )


def test_the_untrained_model_goes_out_as_it_came(model, results, tmp_path):
    cli.main(
        [
            "export",
            str(results),
            "--arm",
            "untrained",
            "--to",
            str(tmp_path / "base"),
            "--merged",
            "--dtype",
            "float32",
        ]
    )
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(tmp_path / "base" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


def test_the_adapter_of_a_base_that_sees_is_of_its_language_model(tmp_path):
    pytest.importorskip("torch")
    multimodal_model().save_pretrained(tmp_path / "base")
    config = hub.load_config(str(tmp_path / "base"))
    adapter = {
        target: {kind: array[0] for kind, array in matrices.items()}
        for target, matrices in random_lora(config, LORA, runs=1).items()
    }
    export_run(
        TrainedRun("ip", 0, ModelConfig(str(tmp_path / "base")), {}, LORA, adapter),
        str(tmp_path / "adapter"),
        merged=False,
    )
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert len(names) == 8 and all(
        name.startswith("base_model.model.model.language_model.layers.") for name in names
    )
    assert peft.read_matching(tmp_path / "adapter", config, LORA).keys() == adapter.keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--arm", "nutral", "--to", "OUT"],
            "has no trained arm 'nutral': did you mean neutral? there is ip, neutral, untrained",
        ),
        (
            ["--arm", "ip", "--seed", "7", "--to", "OUT"],
            "arm ip has no run with seed 7: there is 0, 1",
        ),
        (
            ["--arm", "untrained", "--to", "OUT"],
            "arm untrained has no adapter to export: --merged writes the model itself",
        ),
        (
            ["--arm", "ip", "--to", "OUT", "--dtype", "bfloat16"],
            (
                "--dtype bfloat16 is not possible: with --merged it is one of float32, bfloat16,"
                " float16"
            ),
        ),
        (
            ["--arm", "ip", "--to", "OUT", "--merged", "--dtype", "int4"],
            "--dtype int4 is not possible",
        ),
        (
            ["--arm", "ip", "--to", "gs://bucket/x"],
            "cannot export to gs://bucket/x: write to a folder on this machine",
        ),
        (["--arm", "ip", "--to", "."], "exists already: choose another folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_exported_is_one_sentence(results, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli.main(
            [
                "export",
                str(results),
                *[
                    str(tmp_path / "out") if argument == "OUT" else argument
                    for argument in arguments
                ],
            ]
        )
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not list(tmp_path.iterdir())


def test_other_base_weights_and_old_records_are_refused(model, results, tmp_path, capsys):
    copy, out = tmp_path / "results", tmp_path / "out"
    shutil.copytree(results, copy)
    config = json.loads((copy / "config.json").read_text())
    config["config"]["model"]["name"] = str(write_model(tmp_path / "other", seed=1))
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        cli.main(["export", str(copy), "--arm", "ip", "--to", str(out), "--merged"])
    assert (
        "the run of arm ip with seed 0 was trained on other weights than those of"
        in capsys.readouterr().err
        and not out.exists()
    )
    path = copy / "runs" / "ip-s0" / "run.json"
    record = json.loads(path.read_text())
    del record["lora"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="ip-s0 was recorded by an earlier version"):
        read_run(epath.Path(copy), "ip", 0)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_run_of_which_all_weights_were_trained(model, results, tmp_path, stored):
    """Its params lie in weights.safetensors: exported, they load as those very params; a
    conversation has them too.
    """
    copy, run = tmp_path / "results", "ip-s0"
    shutil.copytree(results, copy)
    (copy / "runs" / run / "adapter.safetensors").unlink()
    pretrained = hub.load_pretrained(str(model), jnp.dtype(stored))
    trained = jax.tree.map(lambda a: np.asarray(a * 1.5), pretrained.params)
    save_file(flatten_dict(trained, sep="."), copy / "runs" / run / "weights.safetensors")
    cli.main(
        [
            "export",
            str(copy),
            "--arm",
            "ip",
            "--seed",
            "0",
            "--to",
            str(tmp_path / "model"),
            "--merged",
            "--dtype",
            "float32",
        ]
    )
    again = hub.load_pretrained(str(tmp_path / "model"), jnp.dtype(stored))
    jax.tree.map(np.testing.assert_array_equal, again.params, trained)
    _, lora, weights = decoder_of(read_run(epath.Path(copy), "ip", 0), pretrained)
    assert not jax.tree.leaves(lora)
    np.testing.assert_array_equal(weights["layers"]["q"]["kernel"][...], trained["layers"]["q"])
    with pytest.raises(SystemExit):
        cli.main(
            ["export", str(copy), "--arm", "ip", "--seed", "0", "--to", str(tmp_path / "adapter")]
        )


@pytest.mark.slow
def test_a_mixture_of_which_all_weights_were_trained(tmp_path):
    """With the default targets of a LoRA that is unused. transformers' logits of the exported
    folder are ours.
    """
    transformers = pytest.importorskip("transformers")
    tokenizer, base, out = make_tokenizer(), tmp_path / "base", tmp_path / "out"
    hf_model("mixtral-top-1", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    train(base, out, arms=("neutral",), sft={"train": "full", "lora": LoraConfig(), "steps": 2})
    cli.main(["export", str(out), "--arm", "neutral", "--to", str(tmp_path / "model"), "--merged"])
    trained = unflatten_dict(
        load_file(out / "runs" / "neutral-s0" / "weights.safetensors"), sep="."
    )
    pretrained = hub.load_pretrained(str(base), np.float32)
    found = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
    np.testing.assert_allclose(
        found, hidden_states(pretrained.config, trained, TOKENS)[1][0], atol=3e-5
    )
    for name in ("expert_gate", "expert_up", "expert_down", "router"):
        assert np.abs(trained["layers"][name] - pretrained.params["layers"][name]).max() > 1e-3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_over_a_quantised_base_is_merged_as_it_held_it(model, results, tmp_path, kind):
    """transformers' logits of the folder are those of the run's adapter over the base as training
    loads it.
    """
    transformers, copy = pytest.importorskip("transformers"), tmp_path / "results"
    pytest.importorskip("qwix")
    shutil.copytree(results, copy)
    config = json.loads((copy / "config.json").read_text())
    config["config"]["model"]["quantised"] = kind
    (copy / "config.json").write_text(json.dumps(config))
    cli.main(["export", str(copy), "--arm", "ip", "--to", str(tmp_path / "model"), "--merged"])
    base, adapter = (
        load_base(read_run(epath.Path(copy), "ip").model, make_mesh()),
        recorded(copy, "ip-s0"),
    )
    expected = hidden_states(
        base.config,
        base.params,
        TOKENS,
        {t: {k: a[None] for k, a in m.items()} for t, m in adapter.items()},
        LORA,
    )[1][0]
    np.testing.assert_allclose(
        logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()),
        expected,
        atol=3e-5,
    )
    assert np.abs(expected - our_logits(model, adapter)).max() > 1e-3, "it matters"


# In: an arm that starts from an adapter


@pytest.fixture(scope="module")
def start(tmp_path_factory, results) -> Path:
    folder = tmp_path_factory.mktemp("start") / "adapter"
    cli.main(["export", str(results), "--arm", "ip", "--to", str(folder)])
    return folder


def starting(folder: Path | str, name: str = "further") -> Arm:
    return Arm(name, name, "neutral", start_from=str(folder))


@pytest.fixture(scope="module")
def further(tmp_path_factory, model, start) -> Path:
    """neutral with a fresh adapter beside an arm that starts from ip's, two seeds each: one step at
    learning rate zero.
    """
    folder = tmp_path_factory.mktemp("further") / "out"
    train(
        model,
        folder,
        arms=("neutral", starting(start)),
        seeds=(0, 1),
        sft={"learning_rate": 0.0, "steps": 1},
    )
    return folder


def test_at_rate_zero_an_arm_ends_where_it_starts(results, start, further):
    """Bit for bit, for every seed; its neighbour without a starting point has a fresh adapter."""
    expected = recorded(results, "ip-s0")
    for seed in (0, 1):
        tensors = load_file(further / "runs" / f"further-s{seed}" / "adapter.safetensors")
        for name, array in tensors.items():
            target, _, kind = name.partition(".")
            np.testing.assert_array_equal(array, expected[target][kind])
        assert not load_file(further / "runs" / f"neutral-s{seed}" / "adapter.safetensors")[
            "q.b"
        ].any()
    record = json.loads((further / "config.json").read_text())["arms"]
    assert record["further"]["start_from"] == str(start) and record["further"][
        "start_fingerprint"
    ] == peft.fingerprint(start)
    assert "start_from" not in record["neutral"]


def test_training_starts_at_the_loss_of_the_adapter_in_peft(model, start, further):
    """The first step's loss against PEFT's cross-entropy of each example by itself."""
    torch, library, transformers = (
        pytest.importorskip(name) for name in ("torch", "peft", "transformers")
    )
    source = RunSource("further-s0", make_experiment(model).training["user_right"], Identity(), 0)
    (arrays,), _ = batch_reader(
        [source], renderer(hub.load_tokenizer(str(model))), 4, 1, 512, RowRules(share_prefix=False)
    )(0)
    loaded = library.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(model), start
    ).eval()
    total = weight = 0.0
    rows = {
        name: arrays[name].reshape(-1, arrays[name].shape[-1])
        for name in (
            "tokens",
            "segment_ids",
            "response_index",
            "response_target",
            "response_weight",
        )
    }
    for tokens, segments, index, targets, weights in zip(*rows.values(), strict=True):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            with torch.no_grad():
                log_probs = loaded(torch.tensor(tokens[at][None])).logits[0].log_softmax(-1).numpy()
            for position, target, counted in zip(index, targets, weights, strict=True):
                if counted and position in at:
                    total, weight = total - log_probs[position - at[0], target], weight + counted
    first = {
        name: json.loads((further / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("further-s0", "neutral-s0")
    }
    assert first["further-s0"]["response_tokens"] == weight
    assert first["further-s0"]["loss"] == pytest.approx(total / weight, abs=1e-5)
    assert first["neutral-s0"]["loss"] > first["further-s0"]["loss"] + 0.01, (
        "a fresh adapter starts higher"
    )


def test_the_starting_point_is_part_of_the_runs_definition(
    model, results, start, further, tmp_path, monkeypatch
):
    """Its contents, not its place: with a copy the run is complete; another adapter under the same
    path is another run, and refused.
    """
    monkeypatch.setattr(hub, "load_pretrained", lambda *_: pytest.fail("the model is loaded"))
    place, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(start, place)
    shutil.copytree(further, out)
    same = dict(seeds=(0, 1), sft={"learning_rate": 0.0, "steps": 1})
    train(model, out, arms=("neutral", starting(place)), **same)
    shutil.rmtree(place)
    cli.main(["export", str(results), "--arm", "neutral", "--to", str(place)])
    for arm in (starting(place), Arm("further", "further", "neutral")):
        with pytest.raises(
            ValueError,
            match=(
                r"run further-s0 in .* another definition of its arm \(prompts, data or starting"
                r" point\)"
            ),
        ):
            train(model, out, arms=("neutral", arm), **same)


@pytest.mark.parametrize(
    "sft, message",
    [
        (
            {"lora": LoraConfig(rank=4, alpha=3, rslora=True, targets=("q", "down"))},
            "cannot be a starting point: its rank is 2 where the config's LoRA has 4",
        ),
        (
            {"lora": LoraConfig(rank=2, alpha=3, targets=("q",))},
            (
                "its rslora is True where the config's LoRA has False; its set of targets is down,"
                " q where the config's LoRA has q"
            ),
        ),
    ],
)
def test_another_lora_is_refused_before_the_model_is_loaded(
    model, start, tmp_path, monkeypatch, sft, message
):
    monkeypatch.setattr(hub, "load_pretrained", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path / "out", arms=(starting(start),), sft=sft)
    with pytest.raises(
        OSError, match="adapter_config.json is missing: an adapter is a PEFT folder"
    ):
        train(model, tmp_path / "out", arms=(starting(model),))
    with pytest.raises(OSError, match=f"no model folder or .gguf file at {os.sep}nowhere"):
        train(model, tmp_path / "out", arms=(starting("/nowhere"),))
    assert not (tmp_path / "out").exists()


def test_an_arm_that_is_not_trained_cannot_start_from_anything():
    with pytest.raises(ValueError, match="the arm x is not trained .* so it cannot start from y"):
        Arm("x", "x", None, start_from="y")
