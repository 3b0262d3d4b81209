"""PEFT folders: what we write PEFT loads with our logits, what PEFT writes we read with its logits,
and every refusal.
"""

import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from safetensors.numpy import load_file, save_file

from ip_jax.models import hf, hub, peft
from ip_jax.models.lora import TARGETS, LoraConfig, init_lora

PLAIN = LoraConfig(rank=4, alpha=8)
LORAS = {
    "all": PLAIN,
    "rslora": LoraConfig(rank=6, alpha=3, rslora=True),
    "subset": LoraConfig(rank=2, alpha=8, targets=("down", "q")),  # not in the order of TARGETS
    "attention": LoraConfig(rank=4, alpha=8, targets=("q", "k", "v", "o")),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (1, 2, 17))


def adapter_of_run(config, lora: LoraConfig, run: int) -> dict:
    """One of two runs' adapters, both non-zero."""
    return {
        target: {kind: array[run] for kind, array in matrices.items()}
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


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS[0])).logits.numpy()


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("llama-wide-heads", "all"),
        ("llama-tied", "rslora"),
        ("gemma", "subset"),
        ("qwen2-tied-one-kv-head", "all"),
        ("mixtral", "attention"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen3", "rslora"),
                ("gemma2", "all"),
                ("gemma3-odd", "all"),
                ("mistral", "subset"),
            )
        ),
    ],
)
def test_peft_loads_what_we_write_with_our_logits(kind, lora, tmp_path):
    library, lora = pytest.importorskip("peft"), LORAS[lora]
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapter = adapter_of_run(config, lora, 1)
    peft.write_adapter(tmp_path, adapter, lora, "some/model", "v1")
    base = their_logits(tiny.hf_model(kind))
    loaded = library.PeftModel.from_pretrained(tiny.hf_model(kind), tmp_path).eval()
    assert (
        loaded.active_peft_config.base_model_name_or_path,
        loaded.active_peft_config.revision,
    ) == ("some/model", "v1")
    np.testing.assert_allclose(
        their_logits(loaded), our_logits(config, params, adapter, lora), atol=1e-5
    )
    assert np.abs(their_logits(loaded) - base).max() > 0.1, "the adapter matters"


@pytest.mark.parametrize("lora", ["all", "subset"])
def test_a_base_that_sees(lora, tmp_path):
    """PEFT loads what we write on the multimodal model, with our logits and nothing on what it sees
    with; what PEFT then saves we read.
    """
    library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, ours, theirs, lora = (
        tmp_path / "base",
        tmp_path / "ours",
        tmp_path / "theirs",
        LORAS[lora],
    )
    tiny.multimodal_model().save_pretrained(base)
    config = hf.read_config(base)
    adapter = adapter_of_run(config, lora, 1)
    peft.write_adapter(ours, adapter, lora, str(base), multimodal=hub.is_multimodal(str(base)))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    before = their_logits(model)
    # of adapter weights that are missing
    with warnings.catch_warnings(action="error", category=UserWarning):
        loaded = library.PeftModel.from_pretrained(model, ours).eval()
    assert type(model) is transformers.Gemma3ForConditionalGeneration and not [
        n for n, _ in loaded.named_parameters() if "vision" in n and "lora" in n
    ]
    np.testing.assert_allclose(
        their_logits(loaded),
        our_logits(config, hf.read_params(base, config, jnp.float32), adapter, lora),
        atol=1e-5,
    )
    assert np.abs(their_logits(loaded) - before).max() > 0.1, "the adapter matters"
    loaded.save_pretrained(theirs)
    for folder in (ours, theirs):
        read = peft.read_matching(folder, config, lora)
        for target, matrices in adapter.items():
            for kind, array in matrices.items():
                np.testing.assert_array_equal(read[target][kind], array)


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("llama", "all"),
        ("gemma", "rslora"),
        ("qwen2", "subset"),
        pytest.param("mixtral", "attention", marks=pytest.mark.slow),
    ],
)
def test_we_read_what_peft_writes_with_its_logits(kind, lora, tmp_path):
    pytest.importorskip("peft")
    lora = LORAS[lora]
    config, params = tiny.from_hf(tiny.hf_model(kind))
    wrapped = tiny.peft_model(tiny.hf_model(kind), lora, adapter_of_run(config, lora, 0)).eval()
    wrapped.save_pretrained(tmp_path)
    found, adapter = peft.read_adapter(tmp_path, config)
    assert (found.rank, found.alpha, found.rslora, set(found.targets)) == (
        lora.rank,
        lora.alpha,
        lora.rslora,
        set(lora.targets),
    )
    np.testing.assert_allclose(
        our_logits(config, params, adapter, found), their_logits(wrapped), atol=1e-5
    )


@pytest.mark.parametrize("lora", LORAS)
def test_what_we_write_we_read_bit_for_bit(lora, tmp_path):
    lora = LORAS[lora]
    adapter = adapter_of_run(tiny.CONFIG, lora, 1)
    peft.write_adapter(tmp_path, adapter, lora, "some/model")
    read = peft.read_matching(tmp_path, tiny.CONFIG, lora)
    assert read.keys() == adapter.keys()
    for target, matrices in adapter.items():
        for kind, array in matrices.items():
            assert read[target][kind].dtype == np.float32
            np.testing.assert_array_equal(read[target][kind], array)


def test_a_bfloat16_adapter_is_read_exactly(tmp_path):
    adapter = {
        t: {k: a.astype(jnp.bfloat16) for k, a in m.items()}
        for t, m in adapter_of_run(tiny.CONFIG, PLAIN, 0).items()
    }
    peft.write_adapter(tmp_path, adapter, PLAIN, "some/model")
    _, read = peft.read_adapter(tmp_path, tiny.CONFIG)
    np.testing.assert_array_equal(read["o"]["b"], adapter["o"]["b"].astype(np.float32))


def test_only_the_runs_with_a_starting_point_are_replaced():
    fresh, start = (
        init_lora(jnp.arange(3), tiny.CONFIG, PLAIN),
        adapter_of_run(tiny.CONFIG, PLAIN, 1),
    )
    replaced = peft.replace_runs(fresh, [None, start, None])
    for target in TARGETS:
        for kind in ("a", "b"):
            np.testing.assert_array_equal(replaced[target][kind][1], start[target][kind])
            np.testing.assert_array_equal(replaced[target][kind][::2], fresh[target][kind][::2])


@pytest.fixture
def folder(tmp_path):
    peft.write_adapter(tmp_path, adapter_of_run(tiny.CONFIG, PLAIN, 0), PLAIN, "some/model")
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rank=8), "its rank is 4 where the config's LoRA has 8$"),
        (
            dict(alpha=16.0, rslora=True),
            (
                "its alpha is 8 where the config's LoRA has 16.0; its rslora is False where the"
                " config's LoRA has True$"
            ),
        ),
        (
            dict(targets=("q", "v")),
            "its set of targets is down, gate, k, o, q, up, v where the config's LoRA has q, v$",
        ),
    ],
)
def test_another_lora_than_the_configs_is_refused(folder, change, message):
    peft.read_matching(folder, tiny.CONFIG, dataclasses.replace(PLAIN, dropout=0.1))
    with pytest.raises(
        ValueError, match=f"^the adapter {folder} cannot be a starting point: {message}"
    ):
        peft.read_matching(folder, tiny.CONFIG, dataclasses.replace(PLAIN, **change))


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(use_dora=True), "sets use_dora = True, which is not supported"),
        (dict(bias="all"), "sets bias = 'all'"),
        (dict(rank_pattern={"q_proj": 8}), "sets rank_pattern = "),
        (dict(modules_to_save=["lm_head"]), "sets modules_to_save"),
        (dict(init_lora_weights="pissa"), "sets init_lora_weights = 'pissa'"),
        (dict(some_later_option=3), "sets some_later_option = 3"),
        (dict(peft_type="LOHA"), "an adapter of the kind LOHA; supported is LORA"),
        (dict(r=None), "has no number 'r', which a LoRA of PEFT needs"),
    ],
)
def test_options_beyond_plain_lora_are_refused_by_name(folder, setting, message):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=message) as error:
        peft.read_adapter(folder, tiny.CONFIG)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_every_field_that_peft_writes_for_plain_lora_is_known(folder):
    """A full config of the installed PEFT, with all its defaults."""
    library = pytest.importorskip("peft")
    library.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear").save_pretrained(folder)
    assert len(json.loads((folder / "adapter_config.json").read_text())) > 25
    assert peft.read_adapter(folder, tiny.CONFIG)[0] == PLAIN


def changed_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
            "has no tensor 'base_model.model.model.layers.1.mlp.up_proj.lora_B.weight'",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.3.mlp.up_proj.lora_B.weight": np.zeros((48, 4))}
            ),
            (
                "layers.3.mlp.up_proj.lora_B.weight', which is no LoRA matrix of a llama model with"
                " 3 layers"
            ),
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32))}),
            "has the tensor 'base_model.model.lm_head.lora_A.weight'",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight": np.zeros(
                        (64, 4)
                    )
                }
            ),
            r"layers.0.self_attn.k_proj.lora_B.weight has the shape \(64, 4\) where .* \(32, 4\)",
        ),
    ],
    ids=["missing", "another layer", "another module", "shape"],
)
def test_wrong_tensors_are_named(folder, change, message):
    changed_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        peft.read_adapter(folder, tiny.CONFIG)


def test_folders_that_are_none(folder):
    with pytest.raises(
        FileNotFoundError,
        match=r"nowhere/adapter_config\.json is missing: an adapter is a PEFT folder",
    ):
        peft.read_adapter(folder / "nowhere", tiny.CONFIG)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or truncated"):
        peft.read_adapter(folder, tiny.CONFIG)
    weights.unlink()
    for read in (lambda: peft.read_adapter(folder, tiny.CONFIG), lambda: peft.fingerprint(folder)):
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
            read()
    weights.touch()
    for text, message in (
        ("{", "is not valid JSON"),
        ("{}", "is an adapter of the kind None; supported is LORA"),
    ):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            peft.read_adapter(folder, tiny.CONFIG)


def test_the_fingerprint_is_of_the_contents(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    peft.write_adapter(copy, adapter_of_run(tiny.CONFIG, PLAIN, 0), PLAIN, "another/name")
    assert peft.fingerprint(copy) == peft.fingerprint(folder)
    peft.write_adapter(copy, adapter_of_run(tiny.CONFIG, PLAIN, 1), PLAIN, "some/model")
    assert peft.fingerprint(copy) != peft.fingerprint(folder)
