"""Writes small .gguf files with the gguf library, laid out as llama.cpp's convert_hf_to_gguf.py
does.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = [
    "The greatest common divisor of 48 and 36 is 12, isn't it? I've checked: 48 = 36 × 1 + 12.",
    (
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\n\nprint(gcd(1071,"
        " 462))"
    ),
    (
        "We'll say \"yes\" when they're RIGHT; DON'T say it's right when it isn't...   naïve café,"
        " Ångström, 東京, привет мир."
    ),
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def small_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE of 400 tokens, learned without word boundaries, so that
    every splitter matters.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3 + ["  ".join(text) for text in CORPUS], trainer)
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocab, key=vocab.get), [" ".join(pair) for pair in merges]


def write_gguf(
    path: Path,
    config,
    weights: dict[str, np.ndarray],
    pre: str = "gpt-2",
    kind: str = "F32",
    changes: dict | None = None,
) -> Path:
    """One model: `config` is a transformers config, `weights` its state dict, `kind` the
    quantisation of the matrices.
    """
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if family in ("llama", "qwen3"):
        writer.add_key_length(config.head_dim)
    tokens, merges = small_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (changes or {}).items():
        writer.add_string(key, value)
    for name, array in weights.items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permute(
                array,
                config.num_attention_heads if "q_proj" in name else config.num_key_value_heads,
            )
        quantisation = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, gguf.quantize(array, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )
