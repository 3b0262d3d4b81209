"""A .gguf file (llama.cpp's format) -> config, params and tokenizer.

Sources: llama.cpp's convert_hf_to_gguf.py (tensor names, the row permutation of q and k),
src/llama-vocab.cpp (what each value of tokenizer.ggml.pre means), gguf's constants (metadata keys).
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ip_jax.models.assemble import Reader, ShardingOf, assemble
from ip_jax.models.families import DecoderConfig, ParamPath, from_hf_config
from ip_jax.models.gguf_file import GgufFile

# in the metadata -> in config.json
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_OUTSIDE = {
    ("embed",): "token_embd.weight",
    ("final_norm",): "output_norm.weight",
    ("head",): "output.weight",
}
_LAYER = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Splitter:
    """How text is cut into words before byte-level BPE."""

    regex: str | None = None  # None: GPT-2's own
    single_digits: bool = False
    whole_words_first: bool = False  # a word that is itself a token skips the merges
    nfc: bool = False
    adds_bos: bool = False


_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt-2": Splitter(),
    "smollm": Splitter(single_digits=True),
    "llama-bpe": Splitter(_LLAMA3_REGEX, whole_words_first=True, adds_bos=True),
    "qwen2": Splitter(_LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}"), nfc=True),
}


def read_config(file: GgufFile) -> DecoderConfig:
    """The model's shape from the metadata. Raises ValueError for an architecture or option that is
    not supported.
    """
    return from_hf_config(hf_config(file))


def hf_config(file: GgufFile) -> dict:
    """The metadata as the fields of a Hugging Face config.json. Raises as `read_config`."""
    family = _required(file, "general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} holds the architecture {family!r}, which is not supported; supported in"
            f" GGUF files are {', '.join(ARCHITECTURES)}."
        )
    scaling = file.metadata.get(f"{family}.rope.scaling.type", "none")
    if (
        "rope_freqs.weight" in file.tensors
        or scaling != "none"
        or file.metadata.get(f"{family}.expert_count")
    ):
        raise ValueError(
            f"{file.path} uses scaled rope or experts, which are not read from GGUF files; load the"
            " model's safetensors folder instead."
        )
    d_model = _required(file, f"{family}.embedding_length")
    n_heads = _required(file, f"{family}.attention.head_count")
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": len(_required(file, "tokenizer.ggml.tokens")),
        "hidden_size": d_model,
        "intermediate_size": _required(file, f"{family}.feed_forward_length"),
        "num_hidden_layers": _required(file, f"{family}.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": file.metadata.get(f"{family}.attention.head_count_kv", n_heads),
        "head_dim": file.metadata.get(f"{family}.attention.key_length", d_model // n_heads),
        "rope_theta": file.metadata.get(f"{family}.rope.freq_base", 10000.0),
        "rms_norm_eps": _required(file, f"{family}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _required(file, f"{family}.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def read_params(
    file: GgufFile, config: DecoderConfig, dtype, sharding: ShardingOf | None = None
) -> dict:
    """The params of `config`, dequantised to float32 and converted to `dtype`, kernels as [in,
    out].

    Raises ValueError for a missing tensor, a tensor of another shape, or a quantisation that the
    gguf library cannot read.
    """
    return assemble(config, reader(file, config, dtype), dtype, sharding, file.path)


def reader(file: GgufFile, config: DecoderConfig, dtype=np.float32) -> Reader:
    """Reads one array of params (of one layer) at a time in `dtype`. It raises as `read_params`."""

    def read(path: ParamPath, layer: int | None) -> np.ndarray:
        name = _OUTSIDE[path] if layer is None else f"blk.{layer}.{_LAYER[path[-1]]}"
        array = _dequantize(file, name, dtype)
        if config.family == "llama" and path[-1] in ("q", "k"):
            array = _undo_rope_permutation(array, config.head_dim)
        return array if path == ("embed",) or array.ndim == 1 else array.T

    return read


def read_tokenizer(file: GgufFile):
    """The transformers.PreTrainedTokenizerFast that the metadata describes (byte-level BPE), with
    special tokens and chat template.

    Raises ValueError for another kind of vocabulary or an unknown way to split text.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre = (
        _required(file, "tokenizer.ggml.model"),
        file.metadata.get("tokenizer.ggml.pre", "(none)"),
    )
    if kind != "gpt2" or pre not in SPLITTERS:
        raise ValueError(
            f"{file.path} has a tokenizer of kind {kind!r} that splits text as {pre!r}; supported"
            f" is kind 'gpt2' with {', '.join(SPLITTERS)}."
        )
    tokens, splitter = _required(file, "tokenizer.ggml.tokens"), SPLITTERS[pre]
    backend = _byte_level_bpe(tokens, _required(file, "tokenizer.ggml.merges"), splitter)
    types = _required(file, "tokenizer.ggml.token_type")
    backend.add_special_tokens(_added(tokens, types, _CONTROL))
    backend.add_tokens(_added(tokens, types, _USER_DEFINED))
    named = {
        role: tokens[file.metadata[f"tokenizer.ggml.{key}"]]
        for role, key in _SPECIAL.items()
        if f"tokenizer.ggml.{key}" in file.metadata
    }
    if file.metadata.get("tokenizer.ggml.add_bos_token", splitter.adds_bos):
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=_required(file, f"{file.metadata['general.architecture']}.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        **named,
    )


def _added(tokens: list[str], types: list[int], wanted: int) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=wanted == _CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind == wanted
    ]


def _byte_level_bpe(tokens: list[str], merges: list[str], splitter: Splitter) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=pairs, ignore_merges=splitter.whole_words_first)
    )
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splitter.single_digits else []
    if splitter.regex:
        steps.append(pre_tokenizers.Split(Regex(splitter.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if splitter.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _required(file: GgufFile, key: str):
    if key not in file.metadata:
        raise ValueError(
            f"{file.path} lacks the metadata {key!r}, so the model cannot be read from it."
        )
    return file.metadata[key]


def _dequantize(file: GgufFile, name: str, dtype) -> np.ndarray:
    if name not in file.tensors:
        raise ValueError(f"{file.path} has no tensor {name!r}, which its metadata promises.")
    tensor = file.tensors[name]
    try:
        return tensor.values(dtype)
    except NotImplementedError as error:
        raise ValueError(
            f"{file.path}: the tensor {name} is stored as {tensor.kind.name}, which the gguf"
            " library cannot read."
        ) from error


def _undo_rope_permutation(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * head_dim, D] from llama.cpp's order (pairs of a rotation adjacent) to Hugging Face's
    (first halves, then second).
    """
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
