"""Hugging Face configs -> one `DecoderConfig`: what differs between families is a field, never a
subclass.

Sources: the configuration and modeling files of transformers (models/llama, mistral, mixtral,
qwen2, qwen3, gemma, gemma2, gemma3) for names, defaults and meaning; modeling_rope_utils.py for the
scaling of rotary frequencies.
"""

import math
from dataclasses import dataclass

ParamPath = tuple[str, ...]  # where an array lies in params, for example ("layers", "q")

SUPPORTED = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",  # its language model
}

# What a config.json may leave out: the defaults of transformers' configuration classes.
_ALL = dict(rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False)
_GEMMA = _ALL | dict(head_dim=256, tie_word_embeddings=True, max_position_embeddings=8192)
_GEMMA_2 = _GEMMA | dict(
    num_attention_heads=8,
    num_key_value_heads=4,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    sliding_window_pattern=2,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
_QWEN = _ALL | dict(max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
_DEFAULTS = {
    "llama": _ALL | dict(max_position_embeddings=2048),
    "mistral": (
        _ALL | dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096)
    ),
    "mixtral": (
        _ALL
        | dict(
            max_position_embeddings=131072,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    ),
    "qwen2": _QWEN,
    "qwen3": _QWEN | dict(head_dim=128),
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2,
    "gemma3": (
        _GEMMA_2
        | dict(
            vocab_size=262208,
            max_position_embeddings=131072,
            sliding_window_pattern=6,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        )
    ),
}
# they change the arithmetic
_REFUSED = (
    "attention_bias",
    "mlp_bias",
    "use_bidirectional_attention",
    "quantization_config",
    "router_jitter_noise",
)
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LinearScaling:
    """Every rotary frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling; `factor` divides the low frequencies, the other three place
    the transition.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions: frequencies theta^(-2i / head_dim), scaled or not."""

    theta: float
    scaling: LinearScaling | RopeScaling | None = None


@dataclass(frozen=True)
class AttentionKind:
    """What may differ from layer to layer: how scores are made of queries and keys, and which keys
    a position sees.
    """

    scale: float  # of the scores
    rope: Rope
    # a position sees itself and the window - 1 positions before it; None: all before it
    window: int | None = None
    softcap: float | None = None  # c: a score s becomes c * tanh(s / c)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape and the arithmetic of one decoder-only transformer (sizes in elements)."""

    family: str  # a value of SUPPORTED
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    # one period: layer i is of the kind attention[i % len(attention)]
    attention: tuple[AttentionKind, ...]
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    activation: str = "silu"  # "silu" | "gelu_tanh"
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before it is rotated
    # RMSNorm of what attention and MLP return, besides that of what they are given
    post_norms: bool = False
    embedding_scale: float = 1.0  # Gemma: sqrt(d_model)
    norm_offset: float = 0.0  # Gemma stores norm weights as w - 1: multiply by (1 + w)
    n_experts: int = 0  # 0: one MLP for all tokens; else each token's MLP is a mixture of
    experts_per_token: int = 0  # so many of n_experts
    experts_kernel: str = "auto"  # how they are multiplied: see `expert_kernel.choose_experts`
    logit_softcap: float | None = None  # c: a next-token logit z becomes c * tanh(z / c)

    @property
    def layer_kinds(self) -> tuple[AttentionKind, ...]:
        """The kind of each layer."""
        return tuple(self.attention[i % len(self.attention)] for i in range(self.n_layers))

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The distinct rotary tables that the layers need."""
        return tuple(dict.fromkeys(kind.rope for kind in self.attention))


def uniform_attention(
    head_dim: int, rope_theta: float, rope_scaling: LinearScaling | RopeScaling | None = None
) -> tuple[AttentionKind]:
    """The plain kind for all layers: scores divided by sqrt(head_dim), every earlier position
    seen.
    """
    return (AttentionKind(head_dim**-0.5, Rope(rope_theta, rope_scaling)),)


def from_hf_config(config: dict) -> DecoderConfig:
    """The `DecoderConfig` of a parsed config.json (transformers 4 and 5 layouts).

    Raises ValueError for an architecture or an option that is not supported, or a missing field.
    """
    family = _family(config)
    config = _DEFAULTS[family] | config | config.get("text_config", {})
    _refuse_options(config, family)
    n_heads, d_model = _required(config, "num_attention_heads"), _required(config, "hidden_size")
    head_dim = config.get("head_dim") or d_model // n_heads
    is_gemma = family.startswith("gemma")
    return DecoderConfig(
        family=family,
        vocab_size=_required(config, "vocab_size"),
        d_model=d_model,
        d_ff=_required(config, "intermediate_size"),
        n_layers=_required(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        head_dim=head_dim,
        attention=_attention(config, family, head_dim),
        norm_eps=config["rms_norm_eps"],
        max_positions=config["max_position_embeddings"],
        tied_embeddings=config["tie_word_embeddings"],
        activation=_activation(config, family),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=family in ("gemma2", "gemma3"),
        embedding_scale=math.sqrt(d_model) if is_gemma else 1.0,
        norm_offset=1.0 if is_gemma else 0.0,
        n_experts=config.get("num_local_experts", 0) if family == "mixtral" else 0,
        experts_per_token=config.get("num_experts_per_tok", 0) if family == "mixtral" else 0,
        logit_softcap=config.get("final_logit_softcapping"),
    )


def param_shapes(config: DecoderConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Shape of every array in params. Kernels are [in, out]; everything under "layers" has the
    layer axis L in front.
    """
    L, D, F, V = config.n_layers, config.d_model, config.d_ff, config.vocab_size
    query, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layers = {
        "attn_norm": (D,),
        "q": (D, query),
        "k": (D, kv),
        "v": (D, kv),
        "o": (query, D),
        "mlp_pre_norm" if config.post_norms else "mlp_norm": (D,),
    }
    if E := config.n_experts:
        layers |= {
            "router": (D, E),
            "expert_gate": (E, D, F),
            "expert_up": (E, D, F),
            "expert_down": (E, F, D),
        }
    else:
        layers |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
    if config.post_norms:
        layers |= {"attn_post_norm": (D,), "mlp_post_norm": (D,)}
    if config.qkv_bias:
        layers |= {"q_bias": (query,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.qk_norm:
        layers |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    outside = {"embed": (V, D), "final_norm": (D,)}
    if not config.tied_embeddings:
        outside["head"] = (D, V)
    return {(name,): shape for name, shape in outside.items()} | {
        ("layers", name): (L, *shape) for name, shape in layers.items()
    }


def _family(config: dict) -> str:
    architectures = config.get("architectures") or ["(none named)"]
    if architectures[0] not in SUPPORTED:
        raise ValueError(
            f"The architecture {architectures[0]} is not supported; supported are"
            f" {', '.join(SUPPORTED)}."
        )
    return SUPPORTED[architectures[0]]


def _required(config: dict, field: str):
    if config.get(field) is None:
        raise ValueError(
            f"The model's config.json has no field {field!r}, which a decoder of this kind needs."
        )
    return config[field]


def _refuse_options(config: dict, family: str) -> None:
    # transformers takes it and computes without it
    unread = ("attn_logit_softcapping",) if family == "gemma3" else ()
    if "text_config" in config:  # so does its multimodal model with this one
        unread += ("final_logit_softcapping",)
    for field in _REFUSED + unread:
        if config.get(field):
            raise ValueError(
                f"The model's config.json sets {field} = {config[field]!r}, which is not supported"
                f" for the {family} family."
            )


def _activation(config: dict, family: str) -> str:
    # early Gemma configs say "gelu" and mean the tanh form; transformers reads them so too
    if family == "gemma":
        return "gelu_tanh"
    name = (
        config.get("hidden_activation", "gelu_pytorch_tanh")
        if family.startswith("gemma")
        else config.get("hidden_act", "silu")
    )
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"The model's activation {name!r} is not supported; supported are"
            f" {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _attention(config: dict, family: str, head_dim: int) -> tuple[AttentionKind, ...]:
    """The shortest period of the layers' kinds."""
    layer_types, ropes = _layer_types(config, family), _ropes(config, family)
    scale, softcap = (
        config.get("query_pre_attn_scalar", head_dim) ** -0.5,
        config.get("attn_logit_softcapping"),
    )
    window = {
        layer_type: _required(config, "sliding_window") if layer_type == _SLIDING else None
        for layer_type in set(layer_types)
    }
    kinds = [
        AttentionKind(scale, ropes[layer_type], window[layer_type], softcap)
        for layer_type in layer_types
    ]
    period = next(
        p for p in range(1, len(kinds) + 1) if kinds == (kinds[:p] * len(kinds))[: len(kinds)]
    )
    return tuple(kinds[:period])


def _layer_types(config: dict, family: str) -> list[str]:
    """ "full_attention" or "sliding_attention" for each layer, as written or by the family's
    rule.
    """
    layers = range(_required(config, "num_hidden_layers"))
    written = config.get("layer_types")
    if written and (
        len(written) != len(layers)
        or set(written) - {_FULL, _SLIDING}
        or family in ("llama", "gemma", "mistral", "mixtral")
    ):
        raise ValueError(
            f"The model's config.json sets layer_types = {written!r}, which is not supported for"
            f" {len(layers)} layers of the {family} family."
        )
    if family in ("gemma2", "gemma3"):
        by_rule = [
            _SLIDING if (i + 1) % config["sliding_window_pattern"] else _FULL for i in layers
        ]
    elif family in ("qwen2", "qwen3"):
        slides = config.get("use_sliding_window") and config.get("sliding_window") is not None
        by_rule = [
            _SLIDING if slides and i >= config["max_window_layers"] else _FULL for i in layers
        ]
    else:
        by_rule = [
            (
                _SLIDING
                if family in ("mistral", "mixtral") and config.get("sliding_window") is not None
                else _FULL
            )
            for _ in layers
        ]
    return written or by_rule


def _ropes(config: dict, family: str) -> dict[str, Rope]:
    """The rotary positions of each type of layer.

    transformers 5 writes `rope_parameters`, transformers 4 `rope_scaling`. Both are one entry for
    all layers, or one for each type; a single entry of Gemma 3 is that of its full layers.
    """
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    ropes = {}
    for layer_type in (_FULL, _SLIDING):
        local = family == "gemma3" and layer_type == _SLIDING
        single = {} if local else written
        entry = (written.get(layer_type) or {}) if {_FULL, _SLIDING} & set(written) else single
        theta = entry.get("rope_theta") or config["rope_local_base_freq" if local else "rope_theta"]
        ropes[layer_type] = Rope(float(theta), _rope_scaling(entry, config))
    return ropes


def _rope_scaling(entry: dict, config: dict) -> LinearScaling | RopeScaling | None:
    """Older files call the kind "type"."""
    rotated = entry.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise ValueError(
            f"The model's config.json sets partial_rotary_factor = {rotated!r}, which is not"
            " supported: whole heads are rotated."
        )
    match entry.get("rope_type", entry.get("type", "default")):
        case "default":
            return None
        case "linear":
            return LinearScaling(_required(entry, "factor"))
        case "llama3":
            original = entry.get(
                "original_max_position_embeddings", config["max_position_embeddings"]
            )
            return RopeScaling(
                _required(entry, "factor"),
                _required(entry, "low_freq_factor"),
                _required(entry, "high_freq_factor"),
                original,
            )
        case kind:
            raise ValueError(
                f"The model's rope scaling {kind!r} is not supported; supported are 'default',"
                " 'linear' and 'llama3'."
            )
