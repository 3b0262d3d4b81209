"""Merged Hugging Face folders: transformers' logits against base + adapter, shards, GGUF, host
memory, a kill in the middle.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_experiment import make_tokenizer, write_model
from tiny_gguf import SPECIALS, write_gguf

from ip_jax.models import export, hf, hub
from ip_jax.models.export import Precision, whole_folder, write_merged, write_trained
from ip_jax.models.lora import LoraConfig
from ip_jax.models.quantised import KERNELS, dense, quantise
from ip_jax.training.sharding import base_shardings, make_mesh

LORAS = {
    "all": LoraConfig(rank=4, alpha=8),
    "subset, rslora": LoraConfig(rank=6, alpha=3, rslora=True, targets=("down", "q")),
    "attention": LoraConfig(rank=4, alpha=8, targets=("q", "k", "v", "o")),
}
EXACT = Precision("float32", "float32")
TOKENS = np.random.default_rng(0).integers(0, 97, (1, 2, 17))


def adapter_of(config, lora: LoraConfig) -> dict:
    return {
        target: {kind: array[1] for kind, array in matrices.items()}
        for target, matrices in tiny.random_lora(config, lora, runs=2).items()
    }


def our_logits(config, params, adapter, lora):
    return tiny.hidden_states(
        config,
        params,
        TOKENS,
        {t: {k: a[None] for k, a in m.items()} for t, m in adapter.items()},
        lora,
    )[1][0]


def their_logits(folder, **options):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    with torch.no_grad():
        return model(torch.tensor(TOKENS[0])).logits.float().numpy()


def tensors_of(folder) -> dict[str, np.ndarray]:
    """All tensors of a model folder, whatever its files."""
    found = {}
    for path in hf.weight_files(folder):
        with safe_open(path, framework="numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("llama-wide-heads", "all"),
        ("gemma", "all"),
        ("qwen2", "all"),
        ("mixtral", "attention"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama-3.1", "subset, rslora"),
                ("qwen2-tied-one-kv-head", "subset, rslora"),
                ("qwen3", "all"),
                ("gemma2", "all"),
                ("gemma3-odd", "all"),
                ("mistral", "all"),
            )
        ),
    ],
)
def test_transformers_loads_it_with_the_logits_of_base_and_adapter(
    kind, lora, tmp_path, monkeypatch
):
    """From a base in several files to an export in several others; this program loads it by the
    same call as any model.
    """
    pytest.importorskip("torch")
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    base, out = tmp_path / "base", tmp_path / "out"
    tiny.hf_model(kind).save_pretrained(base, max_shard_size="10KB")
    make_tokenizer().save_pretrained(base)
    config = hf.read_config(base)
    params, lora = hf.read_params(base, config, jnp.float32), LORAS[lora]
    adapter = adapter_of(config, lora)
    out.mkdir()
    write_merged(out, hub.resolve(str(base)), adapter, lora, EXACT)
    expected = our_logits(config, params, adapter, lora)
    np.testing.assert_allclose(their_logits(out), expected, atol=1e-5)
    assert np.abs(expected - our_logits(config, params, {}, None)).max() > 0.1, (
        "the adapter matters"
    )
    again = hub.load_pretrained(str(out), jnp.float32)
    assert again.config == config
    np.testing.assert_allclose(our_logits(config, again.params, {}, None), expected, atol=1e-5)


def multimodal_base(folder: Path, prefix: str) -> Path:
    """A Gemma 3 that sees, its language model under `prefix`, in bfloat16 but for what sees."""
    tiny.multimodal_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tensors = {
        name.replace("language_model.model.", prefix): array
        for name, array in tensors_of(folder).items()
    }
    save_file(
        {
            name: array.astype(jnp.bfloat16) if name.startswith(prefix) else array
            for name, array in tensors.items()
        },
        folder / hf.SINGLE,
        {"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("way", ["merged", "trained"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_model_that_sees_keeps_its_names_and_what_it_sees_with(
    prefix, way, tmp_path, monkeypatch
):
    """transformers loads it as the multimodal model that it is, with our logits for text."""
    pytest.importorskip("torch")
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    base, out, lora = multimodal_base(tmp_path / "base", prefix), tmp_path / "out", LORAS["all"]
    config = hf.read_config(base)
    params, adapter = hf.read_params(base, config, jnp.float32), adapter_of(config, lora)
    out.mkdir()
    if way == "merged":
        write_merged(out, hub.resolve(str(base)), adapter, lora, EXACT)
        expected = our_logits(config, params, adapter, lora)
    else:
        params = jax.tree.map(lambda a: a * 1.1, params)
        write_trained(out, hub.resolve(str(base)), weights_file(tmp_path, params), "float32")
        expected = our_logits(config, params, {}, None)
    np.testing.assert_allclose(their_logits(out), expected, atol=1e-5)
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    unchanged = {name for name in before if np.array_equal(before[name], after[name])}
    seeing = {name for name in before if "vision" in name or "multi_modal" in name}
    assert seeing and (unchanged == seeing if way == "trained" else seeing < unchanged)
    again = hub.load_pretrained(str(out), jnp.float32)
    assert again.config == config
    np.testing.assert_allclose(our_logits(config, again.params, {}, None), expected, atol=1e-5)


def test_what_sees_is_not_rounded_with_the_rest(tmp_path):
    base, out = multimodal_base(tmp_path / "base", "language_model.model."), tmp_path / "out"
    out.mkdir()
    write_merged(out, hub.resolve(str(base)), {}, None, Precision("bfloat16", "bfloat16"))
    for name, array in tensors_of(out).items():
        assert str(array.dtype) == ("bfloat16" if name.startswith("language_model.") else "float32")


def weights_file(folder: Path, params: dict) -> Path:
    """As a run leaves all its weights."""
    path = folder / "weights.safetensors"
    save_file(
        {name: np.asarray(array) for name, array in flatten_dict(params, sep=".").items()}, path
    )
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "mixtral",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("qwen3", "gemma2", "gemma3", "mistral")
        ),
    ],
)
def test_transformers_loads_trained_weights_with_our_logits(kind, tmp_path):
    """Of a mixture one tensor for each expert, as the base has them."""
    pytest.importorskip("torch")
    base, out = tmp_path / "base", tmp_path / "out"
    tiny.hf_model(kind).save_pretrained(base)
    config = hf.read_config(base)
    params = jax.tree.map(lambda a: a * 1.1, hf.read_params(base, config, jnp.float32))
    out.mkdir()
    write_trained(out, hub.resolve(str(base)), weights_file(tmp_path, params), "float32")
    shapes = [
        {name: array.shape for name, array in tensors_of(folder).items()} for folder in (base, out)
    ]
    assert shapes[0] == shapes[1] and (
        "model.layers.2.block_sparse_moe.experts.7.w2.weight" in shapes[0]
    ) == (kind == "mixtral")
    np.testing.assert_allclose(their_logits(out), our_logits(config, params, {}, None), atol=1e-5)


def test_the_base_of_a_mixture_may_have_its_experts_in_one_tensor(tmp_path):
    """An adapter's folder keeps these, trained weights are one tensor an expert: transformers loads
    both with our logits.
    """
    pytest.importorskip("torch")
    base, lora = tmp_path / "base", LORAS["attention"]
    tiny.hf_model("mixtral-top-1").save_pretrained(base, save_original_format=False)
    make_tokenizer().save_pretrained(base)
    config = hf.read_config(base)
    params, adapter = hf.read_params(base, config, jnp.float32), adapter_of(config, lora)
    for way in ("merged", "trained"):
        (tmp_path / way).mkdir()
    write_merged(tmp_path / "merged", hub.resolve(str(base)), adapter, lora, EXACT)
    write_trained(
        tmp_path / "trained", hub.resolve(str(base)), weights_file(tmp_path, params), "float32"
    )
    assert tensors_of(tmp_path / "merged").keys() == tensors_of(base).keys()
    np.testing.assert_allclose(
        their_logits(tmp_path / "merged"), our_logits(config, params, adapter, lora), atol=1e-5
    )
    np.testing.assert_allclose(their_logits(tmp_path / "trained"), their_logits(base), atol=1e-5)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_goes_out_with_the_numbers_of_the_run(kind, held, tmp_path):
    """Bit for bit those of the base as it is loaded for training, in every projection whether it
    has an adapter or not.
    """
    pytest.importorskip("qwix")
    base, out = write_model(tmp_path / "base"), tmp_path / "out"
    params = hub.load_pretrained(str(base), jnp.dtype(held)).params
    plain = jax.device_get(params)
    layers = quantise(params, kind, functools.partial(base_shardings, make_mesh(data=1)))["layers"]
    out.mkdir()
    write_merged(out, hub.resolve(str(base)), {}, None, Precision(held, "float32", kind))
    again = hub.load_pretrained(str(out), jnp.float32).params
    for name in KERNELS:
        expected = jax.vmap(dense)(layers[name]).astype(jnp.float32)
        np.testing.assert_array_equal(again["layers"][name], expected)
        assert (again["layers"][name] != plain["layers"][name]).mean() > 0.5
    np.testing.assert_array_equal(again["embed"], plain["embed"].astype(np.float32))


def test_shards_their_index_and_what_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    base, out, lora = write_model(tmp_path / "base"), tmp_path / "out", LORAS["subset, rslora"]
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    with_buffer = load_file(base / "model.safetensors") | {"some.buffer": np.arange(5)}
    save_file(with_buffer, base / "model.safetensors")
    config = hf.read_config(base)
    out.mkdir()
    write_merged(out, hub.resolve(str(base)), adapter_of(config, lora), lora, EXACT)
    index = json.loads((out / hf.INDEX).read_text())
    before, after = tensors_of(base), tensors_of(out)
    assert index["weight_map"].keys() == before.keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in after.values())
    largest = max(array.nbytes for array in after.values())
    sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert set(sizes) == set(index["weight_map"].values()) and len(sizes) > 2
    assert max(sizes.values()) < max(30_000, largest) + 2000, "the header comes on top"
    changed = {hf.hf_name(("layers", target), 0) for target in lora.targets}
    assert {name for name in before if not np.array_equal(before[name], after[name])} == changed
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    ends = hub.load_tokenizer(str(base)).convert_tokens_to_ids(["<|im_end|>"])
    assert [generation["eos_token_id"]] == ends, "every token at which sampling ends"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    ) | {"torch_dtype": "float32"}


def test_half_precision_is_rounded_once_from_what_the_run_held(tmp_path):
    """torch rounds the base to bfloat16 as the run held it, adds the update in float32, and rounds
    the sum.
    """
    torch = pytest.importorskip("torch")
    base, lora = tmp_path / "base", LORAS["all"]
    tiny.hf_model("llama").save_pretrained(base)
    config = hf.read_config(base)
    adapter = adapter_of(config, lora)
    stored = {}
    for name in ("float32", "bfloat16"):
        (tmp_path / name).mkdir()
        write_merged(
            tmp_path / name, hub.resolve(str(base)), adapter, lora, Precision("bfloat16", name)
        )
        stored[name] = tensors_of(tmp_path / name)
        assert {str(array.dtype) for array in stored[name].values()} == {name}
    for name, array in tensors_of(base).items():
        held = torch.tensor(array).to(torch.bfloat16).float()
        target = name.split(".")[-2].removesuffix("_proj")
        if target in lora.targets:
            a, b = (
                torch.tensor(adapter[target][kind][int(name.split(".")[2])]) for kind in ("a", "b")
            )
            held = held + lora.scale * (a.double() @ b.double()).T.float()
        np.testing.assert_allclose(stored["float32"][name], held.numpy(), atol=1e-6)
        np.testing.assert_array_equal(
            stored["bfloat16"][name], stored["float32"][name].astype(jnp.bfloat16)
        )
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16, (
        "config.json says so"
    )


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_gguf_file_becomes_a_folder_of_its_family(family, tmp_path):
    """Against the transformers model that the file was written from: rows of q and k are back in
    their order.
    """
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    kind, pre = ("llama-wide-heads", "gpt-2") if family == "llama" else ("qwen2", "qwen2")
    model = tiny.hf_model(kind, vocab_size=400, rms_norm_eps=1e-5)
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model.config,
        {name: p.detach().numpy() for name, p in model.named_parameters()},
        pre=pre,
    )
    source, lora, plain, out = (
        hub.resolve(str(path)),
        LORAS["all"],
        tmp_path / "plain",
        tmp_path / "out",
    )
    pretrained = hub.load_pretrained(str(path), jnp.float32)
    adapter = adapter_of(pretrained.config, lora)
    for folder, of_run in ((plain, {}), (out, adapter)):
        folder.mkdir()
        write_merged(folder, source, of_run, lora, EXACT)
    model.save_pretrained(tmp_path / "hf")
    np.testing.assert_allclose(their_logits(plain), their_logits(tmp_path / "hf"), atol=1e-5)
    np.testing.assert_allclose(
        their_logits(out),
        our_logits(pretrained.config, pretrained.params, adapter, lora),
        atol=1e-5,
    )
    again = hub.load_pretrained(str(plain), jnp.float32)
    assert again.config == pretrained.config
    jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)
    text = f"gcd(48, 36) = 12\n\n{SPECIALS[1]}It's 1071!"
    for tokenizer in (again.tokenizer, AutoTokenizer.from_pretrained(plain)):
        assert tokenizer(text).input_ids == pretrained.tokenizer(text).input_ids
    assert json.loads((plain / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.slow
def test_the_embedded_model_as_a_llama_folder(smollm2, tmp_path):
    """Against transformers' own reading of the GGUF file."""
    torch = pytest.importorskip("torch")
    source = hub.resolve("smollm2-135m-instruct")
    write_merged(tmp_path, source, {}, None, EXACT)
    expected = their_logits(source.path.parent, gguf_file=source.path.name, dtype=torch.float32)
    np.testing.assert_allclose(their_logits(tmp_path), expected, atol=1e-5)
    again = hub.load_pretrained(str(tmp_path), jnp.float32)
    assert again.config == smollm2.config
    jax.tree.map(np.testing.assert_array_equal, again.params, smollm2.params)
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Is 12 right?\n\n345"}]
    for tokenizer in (again.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.apply_chat_template(
            messages, return_dict=False
        ) == smollm2.tokenizer.apply_chat_template(messages, return_dict=False)


def test_host_memory_stays_at_one_shard(tmp_path, monkeypatch):
    """Python's own allocations (numpy and safetensors buffers) while 40 MB of weights are written
    in shards of 2 MB.
    """
    pytest.importorskip("torch")
    base, lora = tmp_path / "base", LORAS["all"]
    tiny.hf_model(
        "llama", num_hidden_layers=12, hidden_size=256, intermediate_size=1024
    ).save_pretrained(base, max_shard_size="5MB")
    total, kernel = sum(path.stat().st_size for path in base.glob("*.safetensors")), 256 * 1024 * 4
    adapter = adapter_of(hf.read_config(base), lora)
    monkeypatch.setattr(export, "SHARD_BYTES", 2_000_000)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    write_merged(tmp_path / "out", hub.resolve(str(base)), adapter, lora, EXACT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a shard; a kernel as read, its update, their sum, and in its other order
    assert peak < 2_000_000 + 5 * kernel < 0.2 * total


KILLED = """
import os, signal, sys
from pathlib import Path
from ip_jax.models import export, hub
save, written = export.save_file, []

def killed(*arguments):
    save(*arguments)
    written.append(arguments[1])
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

export.save_file, export.SHARD_BYTES = killed, 20_000
with export.whole_folder(Path(sys.argv[2])) as folder:
    precision = export.Precision("float32", "float32")
    export.write_merged(folder, hub.resolve(sys.argv[1]), {}, None, precision)
"""


def test_a_killed_export_leaves_nothing_that_looks_whole_and_the_next_one_is(tmp_path, monkeypatch):
    base, out = write_model(tmp_path / "base"), tmp_path / "out"
    root = str(Path(hub.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, base, out],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = tmp_path / ".out.partial"
    assert not out.exists() and len(list(left.iterdir())) == 2
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        hub.load_pretrained(str(left), jnp.float32)
    with whole_folder(out) as folder:
        write_merged(folder, hub.resolve(str(base)), {}, None, EXACT)
    assert not left.exists() and {path.name for path in out.glob("*.safetensors")} == {
        "model.safetensors"
    }, "what was left is gone"
    for name, array in tensors_of(base).items():
        np.testing.assert_array_equal(array, tensors_of(out)[name])


def test_a_failed_export_leaves_nothing_and_an_existing_folder_is_kept(tmp_path):
    with pytest.raises(OSError, match="no space"):
        with whole_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            raise OSError("no space")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(
        FileExistsError, match="out exists already: choose another folder, or delete it first"
    ):
        with whole_folder(tmp_path / "out"):
            pytest.fail("it is written to")


def test_a_full_disk_is_one_sentence(tmp_path):
    base, disk = write_model(tmp_path / "base"), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    try:
        with pytest.raises(
            OSError, match=r"^cannot write .*model\.safetensors \(.*No space left on device.*\)\.$"
        ):
            with whole_folder(disk / "out") as folder:
                write_merged(folder, hub.resolve(str(base)), {}, None, EXACT)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_an_adapter_for_another_model_is_refused(tmp_path):
    base, lora = write_model(tmp_path / "base"), LORAS["all"]
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(
        ValueError,
        match="base has no tensor 'model.layers.0.mlp.up_proj.weight', which the adapter changes",
    ):
        write_merged(
            tmp_path, hub.resolve(str(base)), adapter_of(hf.read_config(base), lora), lora, EXACT
        )
