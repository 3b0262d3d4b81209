"""Small random models for tests: a transformers model and our params from the same weights,
adapters, batches.
"""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ip_jax.data.packing import segment_index
from ip_jax.models import hf
from ip_jax.models.decoder import causal_attend, packed_attend, split_decoder
from ip_jax.models.families import DecoderConfig, RopeScaling, param_shapes, uniform_attention
from ip_jax.models.lora import LoraConfig, projection_shapes
from ip_jax.training.sharding import AXES
from ip_jax.training.state import Batch

SIZES = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
LLAMA_31 = dict(
    rope_type="llama3",
    rope_theta=1000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=1000.0, factor=4.0)
# low enough to bend what is of order 1
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=20)
TWO_ROPES = dict(
    full_attention=dict(rope_type="linear", rope_theta=10000.0, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
)
GEMMA_3 = dict(query_pre_attn_scalar=20, rope_parameters=TWO_ROPES, tie_word_embeddings=True)
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
HF_MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True, vocab_size=97)),
    # heads * head_dim is not the model's width; the shape of CONFIG
    "llama-wide-heads": ("Llama", dict(head_dim=16)),
    "llama-all-heads": ("Llama", dict(num_key_value_heads=4)),
    "llama-3.1": ("Llama", dict(rope_parameters=LLAMA_31)),
    "llama-linear-rope": ("Llama", dict(rope_parameters=LINEAR)),
    "mistral": ("Mistral", dict(sliding_window=7)),
    "mistral-global": (
        "Mistral",
        dict(sliding_window=None, head_dim=16, num_key_value_heads=1, vocab_size=97),
    ),
    "mixtral": (
        "Mixtral",
        dict(
            num_local_experts=8,
            num_experts_per_tok=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
    ),
    "mixtral-top-1": (
        "Mixtral",
        dict(
            num_local_experts=3,
            num_experts_per_tok=1,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=97,
        ),
    ),
    "mixtral-window": (
        "Mixtral",
        dict(num_local_experts=3, num_experts_per_tok=2, sliding_window=7, num_hidden_layers=2),
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied-one-kv-head": (
        "Qwen2",
        dict(
            tie_word_embeddings=True,
            num_key_value_heads=1,
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
    ),
    # no period but the whole
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=24)),
    "qwen3-tied-one-kv-head": (
        "Qwen3",
        dict(head_dim=8, tie_word_embeddings=True, num_key_value_heads=1, vocab_size=97),
    ),
    "gemma": ("Gemma", dict(head_dim=24, num_key_value_heads=1, tie_word_embeddings=True)),
    "gemma-odd": (
        "Gemma",
        dict(
            head_dim=12,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=97,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "gemma2": (
        "Gemma2",
        dict(head_dim=24, sliding_window=5, num_hidden_layers=4, tie_word_embeddings=True, **CAPS),
    ),
    "gemma2-odd": (
        "Gemma2",
        dict(
            head_dim=8,
            sliding_window=2,
            num_key_value_heads=1,
            vocab_size=97,
            **CAPS | dict(attn_logit_softcapping=None),
        ),
    ),
    # two periods and a layer
    "gemma3": (
        "Gemma3",
        dict(head_dim=24, sliding_window=5, num_hidden_layers=7, layer_types=PATTERN, **GEMMA_3),
    ),
    "gemma3-odd": (
        "Gemma3",
        dict(
            head_dim=8,
            sliding_window=9,
            num_key_value_heads=1,
            vocab_size=97,
            num_hidden_layers=2,
            final_logit_softcapping=3.0,
            **GEMMA_3,
        ),
    ),
}
# one GPU that is not there: from jax 0.11 on Pallas asks which one it lowers for
H200 = AbstractMesh(
    (1, 1, 1),
    AXES,
    axis_types=(AxisType.Auto,) * 3,
    abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"),
)
CONFIG = DecoderConfig(
    "llama", 101, 32, 48, 3, 4, 2, 16, uniform_attention(16, 1000.0), 1e-5, 256, True
)
SCALED_ROPE = RopeScaling(8.0, 1.0, 4.0, 32)


def hf_model(kind: str, **changes):
    """A transformers model in float32 whose every parameter matters: norms and biases are random
    too, logits of order 1.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    family, options = HF_MODELS[kind]
    model_class = getattr(transformers, f"{family}ForCausalLM")
    return _randomised(
        model_class(
            model_class.config_class(**SIZES | options | changes, attn_implementation="eager")
        )
    )


def multimodal_model():
    """A Gemma 3 that sees, as `hf_model` makes others: its language model is that of "gemma3-odd",
    without the cap.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = SIZES | HF_MODELS["gemma3-odd"][1] | dict(final_logit_softcapping=None)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager"
    )
    return _randomised(transformers.Gemma3ForConditionalGeneration(config))


def _randomised(model):
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.add_(0.2 * noise)  # around 1, or around 0 where the family stores w - 1
            else:
                parameter.copy_(
                    noise * (0.3 if parameter.ndim == 1 else 0.7 * parameter.shape[1] ** -0.5)
                )
    return model.eval()


def from_hf(model, dtype=jnp.float32) -> tuple[DecoderConfig, dict]:
    """(config, params) by way of the files that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = hf.read_config(folder)
        return config, hf.read_params(folder, config, dtype)


def random_params(config: DecoderConfig, dtype=np.float32, seed: int = 0) -> dict:
    """Params of a config as numpy arrays, scaled so that logits are of order 1."""
    rng, params = np.random.default_rng(seed), {}
    for path, shape in param_shapes(config).items():
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        noise = rng.standard_normal(shape)
        fan_in = shape[-1] if path == ("embed",) else shape[-2] if len(shape) > 1 else 1
        branch[path[-1]] = (1 + 0.2 * noise if "norm" in path[-1] else noise * fan_in**-0.5).astype(
            dtype
        )
    return params


def random_lora(config: DecoderConfig, lora: LoraConfig, runs: int, seed: int = 0) -> dict:
    """Non-zero A and B that differ by run, as numpy arrays."""
    rng, layers, shapes = np.random.default_rng(seed), config.n_layers, projection_shapes(config)

    def noise(*shape, scale):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    return {
        target: {
            "a": noise(runs, layers, shapes[target][0], lora.rank, scale=shapes[target][0] ** -0.5),
            "b": noise(runs, layers, lora.rank, shapes[target][1], scale=0.2 * lora.rank**-0.5),
        }
        for target in lora.targets
    }


def peft_model(model, lora: LoraConfig, adapter: dict | None = None):
    """PEFT's LoRA around `model`, with the weights of one run where `adapter` is given ({target:
    {"a": [L, in, r], "b": [L, r, out]}}).
    """
    import peft
    import torch

    names = [f"{target}_proj" for target in lora.targets]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=names,
    )
    wrapped = peft.get_peft_model(model, config)
    if adapter is not None:
        with torch.no_grad():
            for target, layer, which, parameter in peft_parameters(wrapped):
                parameter.copy_(torch.tensor(np.asarray(adapter[target][which][layer]).T))
    return wrapped


def peft_parameters(wrapped):
    """(target, layer, "a" | "b", parameter [out, in]) of every trained matrix."""
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parts = name.split(".")
            yield (
                next(p for p in parts if p.endswith("_proj")).removesuffix("_proj"),
                int(parts[parts.index("layers") + 1]),
                "ab"["lora_B" in name],
                parameter,
            )


def of_run(tree, run: int):
    """The part of one run, with a run axis of 1 (for a pytree whose leaves all lead with the run
    axis).
    """
    return jax.tree.map(lambda a: a[run : run + 1], tree)


def hidden_states(
    config, params, tokens, lora=None, lora_config=None, positions=None, segment_ids=None, **options
):
    """(hidden [R, B, T, D], logits [R, B, T, V]) as numpy arrays, of rows [R, B, T] that are one
    segment each unless told otherwise.
    """
    graphdef, lora_state, base = split_decoder(config, params, lora, lora_config)
    tokens = jnp.asarray(tokens)
    positions = (
        jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        if positions is None
        else jnp.asarray(positions)
    )
    layout = ()
    if segment_ids is not None:
        layout = (
            segment_ids,
            positions,
            segment_index(
                np.asarray(segment_ids),
                np.asarray(positions),
                int(segment_ids.max()),
                tokens.shape[-1],
            ),
        )

    return jax.device_get(
        _hidden_and_logits(
            graphdef, lora_state, base, tokens, positions, layout, tuple(options.items())
        )
    )


@functools.partial(jax.jit, static_argnums=(0, 6))
def _hidden_and_logits(graphdef, lora_state, base, tokens, positions, layout, options):
    decoder = nnx.merge(graphdef, lora_state, base)
    hidden, _ = decoder(
        tokens, positions, packed_attend(*layout) if layout else causal_attend, **dict(options)
    )
    return hidden, decoder.logits(hidden)


def pack(
    examples: list[list[list[tuple[list[int], int]]]],
    length: int,
    responses: int,
    micro_batches: int = 1,
    blocks: int = 1,
) -> Batch:
    """A Batch from examples[run][row] = [(token ids, how many of the first are prompt), ...]: each
    packed in turn into its row.

    Written for the tests apart from ip_jax.data.packing. A block's rows are dealt out to the
    micro-batches in order.
    """
    runs, rows = len(examples), len(examples[0])
    fields = {
        name: np.zeros((runs, rows, length), np.int32)
        for name in ("tokens", "segment_ids", "positions")
    }
    fields |= {
        "runs": np.repeat(np.arange(runs, dtype=np.int32)[:, None] % (runs // blocks), rows, axis=1)
    }
    fields |= {"row_numbers": np.tile(np.arange(rows, dtype=np.int32), (runs, 1))}
    fields |= {
        name: np.zeros((runs, rows, responses), np.int32)
        for name in ("response_index", "response_target")
    }
    fields["response_weight"] = np.zeros((runs, rows, responses), np.float32)
    for r, run in enumerate(examples):
        for b, row in enumerate(run):
            start = counted = 0
            for segment, (ids, n_prompt) in enumerate(row, start=1):
                for position, token in enumerate(ids):
                    at = r, b, start + position
                    fields["tokens"][at], fields["segment_ids"][at], fields["positions"][at] = (
                        token,
                        segment,
                        position,
                    )
                    if position >= n_prompt:
                        at = r, b, counted
                        fields["response_index"][at], fields["response_target"][at] = (
                            start + position - 1,
                            token,
                        )
                        fields["response_weight"][at] = 1
                        counted += 1
                start += len(ids)
    fields["segment_index"] = segment_index(
        fields["segment_ids"], fields["positions"], max(map(len, sum(examples, []))), length
    )

    def split(a):
        return jnp.asarray(np.moveaxis(a.reshape(blocks, micro_batches, -1, *a.shape[2:]), 1, 0))

    return Batch(**{name: split(array) for name, array in fields.items()})


def random_examples(runs: int, lengths: tuple[int, ...], vocab: int = 101, seed: int = 0):
    """[run][example] = (token ids, how many of them are prompt), every run its own."""
    rng = np.random.default_rng(seed)
    return [
        [(rng.integers(0, vocab, n).tolist(), int(rng.integers(1, n - 1))) for n in lengths]
        for _ in range(runs)
    ]
