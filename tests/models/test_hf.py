"""Safetensors folders that transformers wrote, against the very tensors it wrote; damaged folders;
placement and host memory.
"""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ip_jax.models import hf
from ip_jax.training.sharding import make_mesh, param_shardings

torch = pytest.importorskip("torch")

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODELS = {
    "llama": ("LlamaForCausalLM", {"head_dim": 16}),  # heads * head_dim is not the model's width
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 24}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 24}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 24}),
}


def make_model(kind: str, **changes):
    import transformers

    torch.manual_seed(0)
    name, options = MODELS[kind]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**TINY | options | changes))
    with torch.no_grad():  # transformers starts norms at a constant and biases at 0
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def load(folder, dtype=jnp.float32, sharding=None):
    return hf.read_params(folder, hf.read_config(folder), dtype, sharding)


def assert_same(params: dict, model):
    """Bit for bit: every array of params is the stack of the model's own tensors."""
    theirs = {
        name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()
    }
    used = set()
    for (*branch, name), array in (
        ((*(key.key for key in path),), array) for path, array in jax.tree.leaves_with_path(params)
    ):
        layers = range(array.shape[0]) if branch else [None]
        for layer in layers:
            tensor_name = hf.hf_name((*branch, name), layer)
            one = np.asarray(array if layer is None else array[layer], np.float32)
            np.testing.assert_array_equal(
                one if name == "embed" else one.T, theirs[tensor_name], err_msg=tensor_name
            )
            used.add(tensor_name)
    assert used == set(theirs)


@pytest.fixture
def folder(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", MODELS)
def test_every_family_from_one_file(kind, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_shards_and_bfloat16(kind, tmp_path):
    model = make_model(kind).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(hf.weight_files(tmp_path)) > 2
    params = load(tmp_path, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(params, model)
    assert_same(load(tmp_path, jnp.float32), model)  # widening is exact


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_checkpoint(prefix, tmp_path):
    """With both names that transformers has given its tensors; the vision part is left where it
    is.
    """
    import transformers
    from safetensors.numpy import load_file, save_file

    model = tiny.multimodal_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any("vision" in name for name in tensors)
    renamed = {
        name.replace("model.language_model.", prefix).replace(
            "language_model.model.", prefix
        ): tensor
        for name, tensor in tensors.items()
    }
    assert sum(name.startswith(prefix) for name in renamed) == 2 * 13 + 2
    save_file(renamed, tmp_path / "model.safetensors")
    language_model = transformers.Gemma3ForCausalLM(model.config.text_config)
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    assert_same(load(tmp_path), language_model)


def test_narrowing_rounds_as_torch_does(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path, jnp.bfloat16), model.to(torch.bfloat16))


def test_placed_on_a_mesh(folder):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "q": PartitionSpec(None, "data", "tensor"),
        "down": PartitionSpec(None, "tensor"),
        "embed": PartitionSpec("tensor", "data"),
    }
    params = load(
        folder, sharding=lambda path: NamedSharding(mesh, specs.get(path[-1], PartitionSpec()))
    )
    alone = load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    layers = params["layers"]
    assert {shard.data.shape for shard in layers["q"].addressable_shards} == {(3, 16, 16)}
    assert {shard.data.shape for shard in layers["down"].addressable_shards} == {(3, 12, 32)}
    assert {shard.data.shape for shard in params["embed"].addressable_shards} == {(24, 16)}
    assert layers["o"].sharding.is_fully_replicated
    with pytest.raises(ValueError, match="layer axis"):
        load(folder, sharding=lambda path: NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("stored, wanted", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=["one device", "eight devices"])
def test_host_memory_stays_at_one_tensor_of_one_layer(tmp_path, mesh, stored, wanted):
    """Python's own allocations (numpy and safetensors buffers; jax's target arrays are not among
    them) while 12 layers load from shards.

    On the mesh every array lies where the rules for training say, cut over all eight devices.
    """
    model = make_model("llama", num_hidden_layers=12, hidden_size=256, intermediate_size=2048).to(
        getattr(torch, stored)
    )
    model.save_pretrained(tmp_path, max_shard_size="5MB")
    assert len(hf.weight_files(tmp_path)) > 2
    sharding = mesh and param_shardings(make_mesh(*mesh), hf.read_config(tmp_path))
    load(tmp_path, jnp.dtype(wanted), sharding)  # compiles
    largest = 256 * 2048 * (2 + 4)  # one kernel as stored and as asked for
    tracemalloc.start()
    params = load(tmp_path, jnp.dtype(wanted), sharding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * largest  # one stacked kernel alone would be 4 or 8 times that
    assert_same(params, model.to(getattr(torch, wanted)))
    if mesh:
        assert {shard.data.shape for shard in params["layers"]["gate"].addressable_shards} == {
            (12, 64, 1024)
        }
        assert {shard.data.shape for shard in params["embed"].addressable_shards} == {(12, 256)}
        assert len({shard.device for shard in params["layers"]["down"].addressable_shards}) == 8


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        load(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        hf.fingerprint(folder)


@pytest.mark.parametrize(
    "content", [b"", b"<html>Not found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_not_safetensors_at_all(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        load(folder)


def test_incomplete_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        hf.read_config(tmp_path)
    make_model("qwen2").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    gone = entries["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{gone} is missing"):
        load(tmp_path)
    entries["weight_map"] = {
        name: file for name, file in entries["weight_map"].items() if file != gone
    }
    index.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="no tensor 'model.layers"):
        load(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        load(tmp_path)


def test_config_of_another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(
        ValueError, match=r"gate of layer 0 have the shape \(32, 48\) .* asks for \(32, 64\)"
    ):
        load(folder)
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["MambaForCausalLM"]})
    )
    with pytest.raises(
        ValueError, match="MambaForCausalLM is not supported; supported are LlamaForCausalLM"
    ):
        hf.read_config(folder)


def changed(folder, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("model.layers.2.mlp.down_proj.weight"),
            r"has no tensor 'model\.layers\.2\.mlp\.down_proj\.weight'",
        ),
        (
            lambda t: t.update(
                {
                    "model.layers.2.mlp.down_proj.weight": (
                        t["model.layers.2.mlp.down_proj.weight"].T.copy()
                    )
                }
            ),
            r"down of layer 2 have the shape \(32, 48\) .* asks for \(48, 32\)",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.down_proj.weight": t["model.norm.weight"]}),
            (
                r"has the tensor 'model\.layers\.3\.mlp\.down_proj\.weight', which a llama model of"
                r" this config\.json does not have"
            ),
        ),
        (
            lambda t: t.update(
                {
                    "model.layers.0.self_attn.q_norm.weight": t["model.norm.weight"],
                    "model.layers.1.self_attn.q_norm.weight": t["model.norm.weight"],
                }
            ),
            r"q_norm\.weight' \(and 1 more\), which a llama",
        ),
    ],
    ids=["missing", "shape", "another layer", "another kind"],
)
def test_a_wrong_tensor_is_named_before_any_is_placed(folder, monkeypatch, change, message):
    changed(folder, change)
    monkeypatch.setattr(hf, "assemble", lambda *_: pytest.fail("weights are placed"))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def test_harmless_extra_tensors_are_passed_over(tmp_path):
    """Old Llama checkpoints carry rope's frequencies; some with tied embeddings carry the head as
    well; multimodal ones see.
    """
    model = make_model("llama-tied")
    model.save_pretrained(tmp_path)
    extras = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)
        for layer in range(3)
    }
    extras |= {
        "lm_head.weight": np.zeros((96, 32), np.float32),
        "model.vision_tower.embeddings.weight": np.ones(4, np.float32),
    }
    changed(tmp_path, lambda t: t.update(extras))
    assert_same(load(tmp_path), model)


def test_integer_weights_are_refused(folder):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is stored as I8; supported are"):
        load(folder)


def test_fingerprint_follows_the_weights(folder, tmp_path_factory):
    """The same for a copy; another for a fine-tune, which has the same names, sizes and headers;
    another for another config.
    """
    copy = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(folder, copy)
    assert hf.fingerprint(copy) == hf.fingerprint(folder)
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight += 1e-3
    model.save_pretrained(copy)
    assert hf.fingerprint(copy) != hf.fingerprint(folder)
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text(
        (copy / "config.json").read_text().replace('"hidden_act": "silu"', '"hidden_act": "relu"')
    )
    assert hf.fingerprint(copy) != hf.fingerprint(folder)
