"""Configs: published config.json files field by field, shapes against transformers' own modules, refusals."""
import math

import pytest

from ip_jax.models.families import SUPPORTED, DecoderConfig, RopeScaling, from_hf_config, param_shapes
from ip_jax.models.hf import hf_name

# config.json of google/gemma-2b-it, meta-llama/Llama-3.1-8B-Instruct, Qwen/Qwen2.5-0.5B-Instruct: the fields that matter, as published.
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None,
    "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "vocab_size": 128256,
}  # fmt: skip
QWEN_25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_gemma_2b():
    assert from_hf_config(GEMMA_2B) == DecoderConfig(
        family="gemma", vocab_size=256000, d_model=2048, d_ff=16384, n_layers=18, n_heads=8, n_kv_heads=1, head_dim=256,
        rope_theta=10000.0, norm_eps=1e-6, max_positions=8192, tied_embeddings=True,
        activation="gelu_tanh", embedding_scale=math.sqrt(2048), norm_offset=1.0,
    )  # fmt: skip


def test_llama_31_8b():
    assert from_hf_config(LLAMA_31_8B) == DecoderConfig(
        family="llama", vocab_size=128256, d_model=4096, d_ff=14336, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
        rope_theta=500000.0, norm_eps=1e-5, max_positions=131072, tied_embeddings=False, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    )  # fmt: skip


def test_qwen_25_05b():
    assert from_hf_config(QWEN_25_05B) == DecoderConfig(
        family="qwen2", vocab_size=151936, d_model=896, d_ff=4864, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64,
        rope_theta=1e6, norm_eps=1e-6, max_positions=32768, tied_embeddings=True, qkv_bias=True,
    )  # fmt: skip


@pytest.mark.parametrize("published", [GEMMA_2B, LLAMA_31_8B, QWEN_25_05B], ids=["gemma", "llama", "qwen2"])
def test_transformers_5_layout_means_the_same(published):
    """transformers 5 rewrites a config into its own layout (rope_parameters and all); both say one thing."""
    from transformers import GemmaConfig, LlamaConfig, Qwen2Config

    config_class = {"Gemma": GemmaConfig, "Llama": LlamaConfig, "Qwen2": Qwen2Config}[published["architectures"][0].removesuffix("ForCausalLM")]
    rewritten = config_class(**{key: value for key, value in published.items() if value is not None}).to_dict()
    assert "rope_scaling" not in rewritten
    assert from_hf_config(rewritten) == from_hf_config(published)


@pytest.mark.parametrize("published", [GEMMA_2B, LLAMA_31_8B, QWEN_25_05B], ids=["gemma", "llama", "qwen2"])
def test_shapes_are_those_of_the_real_model(published):
    """Every parameter of transformers' module (on torch's meta device) has its place, and nothing is left over."""
    torch = pytest.importorskip("torch")
    import transformers

    model_class = getattr(transformers, published["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**{key: value for key, value in published.items() if value is not None}))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied weights once
    ours = {}
    for path, shape in param_shapes(from_hf_config(published)).items():
        layers = range(shape[0]) if path[0] == "layers" else [None]
        for layer in layers:
            one = shape if layer is None else shape[1:]
            ours[hf_name(path, layer)] = one if path == ("embed",) else one[::-1]
    assert ours == theirs


def test_llama_with_explicit_head_dim_and_no_kv_heads():
    config = from_hf_config(QWEN_25_05B | {"architectures": ["LlamaForCausalLM"], "head_dim": 96, "num_key_value_heads": None})
    assert (config.head_dim, config.n_kv_heads) == (96, 14)
    assert param_shapes(config)["layers", "q"] == (24, 896, 14 * 96)


def test_unsupported_architecture_lists_the_supported_ones():
    with pytest.raises(ValueError) as error:
        from_hf_config(LLAMA_31_8B | {"architectures": ["GPTNeoXForCausalLM"]})
    assert "GPTNeoXForCausalLM" in str(error.value) and all(name in str(error.value) for name in SUPPORTED)
    with pytest.raises(ValueError, match="none named"):
        from_hf_config({"hidden_size": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'.*'llama3'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'.*silu"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "no field 'hidden_size'"),
    ],
)
def test_refused_options(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(LLAMA_31_8B | changes)
