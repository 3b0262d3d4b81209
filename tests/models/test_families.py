"""Configs: published config.json files field by field, shapes against transformers' own modules,
refusals.
"""

import dataclasses
import math

import pytest

from ip_jax.models.families import (
    SUPPORTED,
    AttentionKind,
    DecoderConfig,
    LinearScaling,
    Rope,
    RopeScaling,
    from_hf_config,
    param_shapes,
    uniform_attention,
)
from ip_jax.models.hf import hf_name

# config.json of google/gemma-2b-it, meta-llama/Llama-3.1-8B-Instruct, Qwen/Qwen2.5-0.5B-Instruct,
# Qwen/Qwen3-4B, mistralai/Mistral-7B-v0.1, google/gemma-2-27b, google/gemma-3-1b-it,
# google/gemma-3-4b-it: the fields that matter, as published.
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "vocab_size": 128256,
}
QWEN_25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GEMMA_2_27B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    },
}
PUBLISHED = {
    "gemma": GEMMA_2B,
    "llama": LLAMA_31_8B,
    "qwen2": QWEN_25_05B,
    "qwen3": QWEN_3_4B,
    "mistral": MISTRAL_7B,
    "gemma2": GEMMA_2_27B,
    "gemma3": GEMMA_3_1B,
    "gemma3-text-part": GEMMA_3_4B,
}


def transformers_config(published):
    """transformers' own reading of a config.json."""
    import transformers

    model_class = getattr(transformers, published["architectures"][0])
    return model_class.config_class(
        **{
            key: value
            for key, value in published.items()
            if value is not None or "softcapping" in key or key == "sliding_window"
        }
    )


def test_gemma_2b():
    assert from_hf_config(GEMMA_2B) == DecoderConfig(
        family="gemma",
        vocab_size=256000,
        d_model=2048,
        d_ff=16384,
        n_layers=18,
        n_heads=8,
        n_kv_heads=1,
        head_dim=256,
        attention=uniform_attention(256, 10000.0),
        norm_eps=1e-6,
        max_positions=8192,
        tied_embeddings=True,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(2048),
        norm_offset=1.0,
    )


def test_llama_31_8b():
    assert from_hf_config(LLAMA_31_8B) == DecoderConfig(
        family="llama",
        vocab_size=128256,
        d_model=4096,
        d_ff=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        attention=uniform_attention(128, 500000.0, RopeScaling(8.0, 1.0, 4.0, 8192)),
        norm_eps=1e-5,
        max_positions=131072,
        tied_embeddings=False,
    )


def test_qwen_25_05b():
    assert from_hf_config(QWEN_25_05B) == DecoderConfig(
        family="qwen2",
        vocab_size=151936,
        d_model=896,
        d_ff=4864,
        n_layers=24,
        n_heads=14,
        n_kv_heads=2,
        head_dim=64,
        attention=uniform_attention(64, 1e6),
        norm_eps=1e-6,
        max_positions=32768,
        tied_embeddings=True,
        qkv_bias=True,
    )


def test_qwen_3_4b():
    assert from_hf_config(QWEN_3_4B) == DecoderConfig(
        family="qwen3",
        vocab_size=151936,
        d_model=2560,
        d_ff=9728,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        attention=uniform_attention(128, 1e6),
        norm_eps=1e-6,
        max_positions=40960,
        tied_embeddings=True,
        qk_norm=True,
    )


def test_mistral_7b():
    kind = AttentionKind(scale=128**-0.5, rope=Rope(10000.0), window=4096)
    assert from_hf_config(MISTRAL_7B) == DecoderConfig(
        family="mistral",
        vocab_size=32000,
        d_model=4096,
        d_ff=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        attention=(kind,),
        norm_eps=1e-5,
        max_positions=32768,
        tied_embeddings=False,
    )
    later = from_hf_config(MISTRAL_7B | {"sliding_window": None, "rope_theta": 1e6})
    assert later.attention == uniform_attention(128, 1e6)


def test_gemma_2_27b():
    sliding = AttentionKind(scale=144**-0.5, rope=Rope(10000.0), window=4096, softcap=50.0)
    assert from_hf_config(GEMMA_2_27B) == DecoderConfig(
        family="gemma2",
        vocab_size=256000,
        d_model=4608,
        d_ff=36864,
        n_layers=46,
        n_heads=32,
        n_kv_heads=16,
        head_dim=128,
        attention=(sliding, dataclasses.replace(sliding, window=None)),
        norm_eps=1e-6,
        max_positions=8192,
        tied_embeddings=True,
        activation="gelu_tanh",
        post_norms=True,
        embedding_scale=math.sqrt(4608),
        norm_offset=1.0,
        logit_softcap=30.0,
    )


@pytest.mark.parametrize("published", [GEMMA_3_1B, GEMMA_3_4B], ids=["1b", "4b"])
def test_gemma_3(published):
    """Five sliding layers with a base of their own to one full layer, whose positions the larger
    models stretch.
    """
    scaling, window = (None, 512) if published is GEMMA_3_1B else (LinearScaling(8.0), 1024)
    sizes = dict(
        vocab_size=262144,
        d_model=1152,
        d_ff=6912,
        n_layers=26,
        n_heads=4,
        n_kv_heads=1,
        max_positions=32768,
    )
    if published is GEMMA_3_4B:  # what its config.json leaves out are transformers' defaults
        sizes = dict(
            vocab_size=262208,
            d_model=2560,
            d_ff=10240,
            n_layers=34,
            n_heads=8,
            n_kv_heads=4,
            max_positions=131072,
        )
    sliding, full = (
        AttentionKind(1 / 16, Rope(10000.0), window),
        AttentionKind(1 / 16, Rope(1e6, scaling)),
    )
    config = from_hf_config(published)
    assert config == DecoderConfig(
        family="gemma3",
        head_dim=256,
        attention=(sliding,) * 5 + (full,),
        norm_eps=1e-6,
        tied_embeddings=True,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embedding_scale=math.sqrt(sizes["d_model"]),
        norm_offset=1.0,
        **sizes,
    )
    assert config.ropes == (Rope(10000.0), Rope(1e6, scaling))


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_transformers_5_layout_means_the_same(published):
    """transformers 5 rewrites a config into its own layout (rope_parameters and all); both say one
    thing.
    """
    pytest.importorskip("torch")  # model classes are dummies without it
    rewritten = transformers_config(published).to_dict()
    assert "rope_scaling" not in rewritten
    assert from_hf_config(rewritten) == from_hf_config(published)


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_shapes_are_those_of_the_real_model(published):
    """Every parameter of transformers' language model (on torch's meta device) has its place, and
    nothing is left over.
    """
    torch = pytest.importorskip("torch")
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, published["architectures"][0])(transformers_config(published))
    # tied weights once
    theirs = {
        name.replace("language_model.", ""): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    theirs = {
        name: shape
        for name, shape in theirs.items()
        if "vision" not in name and "multi_modal" not in name
    }
    ours = {}
    for path, shape in param_shapes(from_hf_config(published)).items():
        layers = range(shape[0]) if path[0] == "layers" else [None]
        for layer in layers:
            one = shape if layer is None else shape[1:]
            ours[hf_name(path, layer)] = one if path == ("embed",) else one[::-1]
    assert ours == theirs


def test_the_shortest_period_is_found():
    def period(**changes):
        return [
            kind.window
            for kind in from_hf_config(GEMMA_2_27B | {"num_hidden_layers": 7} | changes).attention
        ]

    full, sliding = "full_attention", "sliding_attention"
    assert period() == [4096, None]
    assert period(layer_types=[full] * 7) == [None]
    assert period(layer_types=[sliding, full, full] * 2 + [sliding]) == [4096, None, None]
    assert period(layer_types=[sliding] + [full] * 6) == [4096] + [None] * 6
    assert period(sliding_window_pattern=3, sliding_window=64) == [64, 64, None]


def test_qwen_slides_from_a_layer_on_when_told_to():
    config = from_hf_config(QWEN_25_05B | {"use_sliding_window": True})
    assert [kind.window for kind in config.layer_kinds] == [None] * 21 + [32768] * 3


def test_a_null_turns_a_default_off():
    config = from_hf_config(
        GEMMA_2_27B | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    )
    assert config.logit_softcap is None and {kind.softcap for kind in config.attention} == {None}


def test_llama_with_explicit_head_dim_and_no_kv_heads():
    config = from_hf_config(
        QWEN_25_05B
        | {
            "architectures": ["LlamaForCausalLM"],
            "head_dim": 96,
            "num_key_value_heads": None,
        }
    )
    assert (config.head_dim, config.n_kv_heads) == (96, 14)
    assert param_shapes(config)["layers", "q"] == (24, 896, 14 * 96)


def test_unsupported_architecture_lists_the_supported_ones():
    with pytest.raises(ValueError) as error:
        from_hf_config(LLAMA_31_8B | {"architectures": ["GPTNeoXForCausalLM"]})
    assert "GPTNeoXForCausalLM" in str(error.value) and all(
        name in str(error.value) for name in SUPPORTED
    )
    with pytest.raises(ValueError, match="none named"):
        from_hf_config({"hidden_size": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'.*'llama3'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'.*silu"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "no field 'hidden_size'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no field 'factor'"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "relu"},
            "activation 'relu'",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "sliding_window": None},
            "no field 'sliding_window'",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention = True",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping = 50.0",
        ),
        (
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "text_config": {"final_logit_softcapping": 30.0},
            },
            "final_logit_softcapping = 30.0",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]},
            "layer_types = .* 32 layers of the qwen3 family",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 32},
            "layer_types = .* qwen3 family",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 32},
            "layer_types = .* mistral family",
        ),
    ],
)
def test_refused_options(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(LLAMA_31_8B | changes)
