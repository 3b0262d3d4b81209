"""Hugging Face configs -> one `DecoderConfig`: what differs between families is a field, never a subclass.

Sources: the configuration and modeling files of transformers (models/llama, models/gemma, models/qwen2) for names, defaults
and meaning; modeling_rope_utils.py for Llama 3.1's rope scaling.
"""
import math
from dataclasses import dataclass

ParamPath = tuple[str, ...]  # where an array lies in params, for example ("layers", "q")

SUPPORTED = {"LlamaForCausalLM": "llama", "GemmaForCausalLM": "gemma", "Qwen2ForCausalLM": "qwen2"}

_TIED_BY_DEFAULT = {"llama": False, "gemma": True, "qwen2": False}
_MAX_POSITIONS_BY_DEFAULT = {"llama": 2048, "gemma": 8192, "qwen2": 32768}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling; `factor` divides the low frequencies, the other three place the transition."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class DecoderConfig:
    """The shape and the arithmetic of one decoder-only transformer (sizes in elements)."""

    family: str  # "llama", "gemma", "qwen2"
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    activation: str = "silu"  # "silu" | "gelu_tanh"
    qkv_bias: bool = False
    embedding_scale: float = 1.0  # Gemma: sqrt(d_model)
    norm_offset: float = 0.0  # Gemma stores norm weights as w - 1: multiply by (1 + w)
    rope_scaling: RopeScaling | None = None


def from_hf_config(config: dict) -> DecoderConfig:
    """The `DecoderConfig` of a parsed config.json (transformers 4 and 5 layouts).

    Raises ValueError for an architecture or an option that is not supported, or a missing field.
    """
    family = _family(config)
    _refuse_options(config, family)
    n_heads = _required(config, "num_attention_heads")
    d_model = _required(config, "hidden_size")
    is_gemma = family == "gemma"
    rope = config.get("rope_parameters") or {}
    return DecoderConfig(
        family=family,
        vocab_size=_required(config, "vocab_size"),
        d_model=d_model,
        d_ff=_required(config, "intermediate_size"),
        n_layers=_required(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        head_dim=config.get("head_dim") or (256 if is_gemma else d_model // n_heads),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_positions=config.get("max_position_embeddings", _MAX_POSITIONS_BY_DEFAULT[family]),
        tied_embeddings=config.get("tie_word_embeddings", _TIED_BY_DEFAULT[family]),
        activation=_activation(config, family),
        qkv_bias=family == "qwen2",
        embedding_scale=math.sqrt(d_model) if is_gemma else 1.0,
        norm_offset=1.0 if is_gemma else 0.0,
        rope_scaling=_rope_scaling(config),
    )


def param_shapes(config: DecoderConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Shape of every array in params. Kernels are [in, out]; everything under "layers" has the layer axis L in front."""
    L, D, F, V = config.n_layers, config.d_model, config.d_ff, config.vocab_size
    query, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layers = {
        "attn_norm": (D,), "q": (D, query), "k": (D, kv), "v": (D, kv), "o": (query, D),
        "mlp_norm": (D,), "gate": (D, F), "up": (D, F), "down": (F, D),
    }  # fmt: skip
    if config.qkv_bias:
        layers |= {"q_bias": (query,), "k_bias": (kv,), "v_bias": (kv,)}
    outside = {"embed": (V, D), "final_norm": (D,)}
    if not config.tied_embeddings:
        outside["head"] = (D, V)
    return {(name,): shape for name, shape in outside.items()} | {
        ("layers", name): (L, *shape) for name, shape in layers.items()
    }


def _family(config: dict) -> str:
    architectures = config.get("architectures") or ["(none named)"]
    if architectures[0] not in SUPPORTED:
        raise ValueError(f"The architecture {architectures[0]} is not supported; supported are {', '.join(SUPPORTED)}.")
    return SUPPORTED[architectures[0]]


def _required(config: dict, field: str) -> int:
    if config.get(field) is None:
        raise ValueError(f"The model's config.json has no field {field!r}, which a decoder of this kind needs.")
    return config[field]


def _refuse_options(config: dict, family: str) -> None:
    """These options change the arithmetic in ways that the decoder does not have."""
    unsupported = ["attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention", "quantization_config"]
    for field in unsupported:
        if config.get(field):
            raise ValueError(f"The model's config.json sets {field} = {config[field]!r}, which is not supported for the {family} family.")


def _activation(config: dict, family: str) -> str:
    if family == "gemma":  # early Gemma configs say "gelu" and mean the tanh form; transformers reads them so too
        return "gelu_tanh"
    name = config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise ValueError(f"The model's activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _rope_scaling(config: dict) -> RopeScaling | None:
    """transformers 5 writes `rope_parameters`, transformers 4 `rope_scaling`; older files call the kind "type"."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"The model's rope scaling {kind!r} is not supported; supported are 'default' and 'llama3'.")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_positions=rope["original_max_position_embeddings"],
    )
