"""Model FLOPs of a training step: what the mathematics needs, the numerator of the MFU (Chowdhery
et al. 2022, appendix B).

What remat or a compiler computes twice does not count.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int

from ip_jax.data.packing import PackedShape
from ip_jax.models.families import DecoderConfig, param_shapes
from ip_jax.models.lora import LoraConfig, projection_shapes


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What a step computes, over all of its runs: `tokens` pass through the layers, `responses`
    positions reach the vocabulary, `pairs` of a query and a key that it sees meet in all layers
    together (one for each pair, whatever the number of heads).
    """

    tokens: float
    responses: float
    pairs: float


def shape_work(config: DecoderConfig, shape: PackedShape, rows: float) -> StepWork:
    """The work of so many rows whose every position is taken: an upper bound, known before there is
    data.
    """
    windows = [min(kind.window or math.inf, shape.segment_length) for kind in config.layer_kinds]
    pairs = sum(window * shape.segment_length - window**2 / 2 for window in windows)
    return StepWork(rows * shape.length, rows * shape.responses, rows * shape.segments * pairs)


def batch_work(
    config: DecoderConfig,
    segment_ids: Int[np.ndarray, "*rows T"],
    positions: Int[np.ndarray, "*rows T"],
    response_weight: Float[np.ndarray, "*rows P"],
) -> StepWork:
    """The work of the real tokens of a packed batch (see training.state.Batch); padding is none."""
    seen = positions[segment_ids > 0] + 1  # keys that each token would see without a window
    pairs = {
        window: float((seen if window is None else np.minimum(seen, window)).sum())
        for window in {kind.window for kind in config.attention}
    }
    return StepWork(
        len(seen),
        np.count_nonzero(response_weight),
        sum(pairs[kind.window] for kind in config.layer_kinds),
    )


def layer_matrix_params(config: DecoderConfig, but: str = "") -> int:
    """Elements of all layers' matrices that one token is multiplied with (of E experts those that
    it is sent to), without those called `but`.
    """
    active = config.experts_per_token / max(config.n_experts, 1)
    return int(
        sum(
            math.prod(shape) * (active if "expert" in path[-1] else 1)
            for path, shape in param_shapes(config).items()
            if path[0] == "layers" and len(shape) > 2 and path[-1] not in (but, f"expert_{but}")
        )
    )


def lora_params(config: DecoderConfig, lora: LoraConfig) -> int:
    """Elements of one run's adapter."""
    shapes = projection_shapes(config)
    return config.n_layers * lora.rank * sum(sum(shapes[target]) for target in lora.targets)


def step_flops(config: DecoderConfig, lora: LoraConfig | None, work: StepWork) -> float:
    """Model FLOPs of one training step. For each token and weight, and for each response and
    element of the vocabulary's matrix: 4 where the base is frozen (forward, and backward through
    the activations) and 6 for the weights of the adapters; with `lora` None (full training) 6.
    Attention makes two products forward and four backward of 2 FLOPs for each pair and element of a
    head; keys that the causal mask or a window hides do not count.
    """
    passes = 6 if lora is None else 4
    weights = passes * layer_matrix_params(config) + (
        0 if lora is None else 6 * lora_params(config, lora)
    )
    attention = 12 * config.n_heads * config.head_dim * work.pairs
    return (
        weights * work.tokens
        + attention
        + passes * config.vocab_size * config.d_model * work.responses
    )
