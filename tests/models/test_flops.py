"""Model FLOPs against torch's counter on transformers and PEFT models, and against masks counted
one by one.
"""

import dataclasses

import numpy as np
import pytest
from tiny_models import CONFIG, from_hf, hf_model, pack, peft_model, random_examples

from ip_jax.data.packing import PackedShape
from ip_jax.models import flops
from ip_jax.models.chips import CHIPS, chip_of
from ip_jax.models.families import AttentionKind, Rope
from ip_jax.models.lora import LoraConfig

ROWS, LENGTH = 2, 24


def counted_by_torch(model) -> int:
    """FLOPs of one forward and backward pass with eager attention, which makes whole squares of
    scores.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model.set_attn_implementation("eager")
    model.enable_input_require_grads()  # so that the first layer's backward pass is whole too
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 90, (ROWS, LENGTH))).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "llama-wide-heads", "qwen2-tied-one-kv-head", "gemma"])
@pytest.mark.parametrize(
    "lora", [None, LoraConfig(rank=3, alpha=6, targets=("q", "v", "down"))], ids=["full", "lora"]
)
def test_as_many_as_torch_counts(kind, lora):
    model = hf_model(kind)
    config, _ = from_hf(model)
    tokens = ROWS * LENGTH
    work = flops.StepWork(tokens, tokens, config.n_layers * ROWS * LENGTH**2)
    if lora:
        model = peft_model(model, lora)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    assert flops.step_flops(config, lora, work) == counted_by_torch(model)


def test_a_token_meets_only_the_experts_that_it_is_sent_to():
    config, _ = from_hf(hf_model("mixtral"))
    d, f = config.d_model, config.d_ff
    attention = d * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    assert flops.layer_matrix_params(config) == config.n_layers * (
        attention + d * config.n_experts + 2 * 3 * d * f
    )


@pytest.fixture
def windowed():
    kinds = AttentionKind(0.25, Rope(1e4), window=5), AttentionKind(0.25, Rope(1e4))
    return dataclasses.replace(CONFIG, attention=kinds)


def test_pairs_of_a_packed_batch_are_those_of_its_masks(windowed):
    batch = pack([[run[:2], run[2:]] for run in random_examples(2, (11, 7, 19, 4))], 32, 32)
    segments, positions = np.asarray(batch.segment_ids), np.asarray(batch.positions)
    work = flops.batch_work(windowed, segments, positions, np.asarray(batch.response_weight))
    mask = (segments[..., :, None] == segments[..., None, :]) & (segments[..., :, None] > 0)
    back = positions[..., :, None] - positions[..., None, :]
    by_layer = [np.count_nonzero(mask & (back >= 0) & (back < window)) for window in (5, 10**6, 5)]
    assert work == flops.StepWork(
        2 * (11 + 7 + 19 + 4), np.count_nonzero(batch.response_weight), sum(by_layer)
    )
    assert 0 < work.responses < work.tokens


@pytest.mark.parametrize("length", [4, 64])
def test_a_shape_is_a_batch_without_padding_but_for_the_diagonal(windowed, length):
    """Half of each square where the real triangle has its diagonal whole: a part of 1 / length
    more.
    """
    shape = PackedShape(2 * length, 2, length, 6, micro_batches=3, micro_rows=2)
    ids = np.broadcast_to(np.repeat([1, 2], length), (3, 4, 2, 2 * length))
    work = flops.batch_work(
        windowed,
        ids,
        np.broadcast_to(np.tile(np.arange(length), 2), ids.shape),
        np.ones((3, 4, 2, 6), np.float32),
    )
    planned = flops.shape_work(windowed, shape, rows=3 * 4 * 2)
    assert (planned.tokens, planned.responses) == (work.tokens, work.responses)
    assert planned.pairs < work.pairs <= planned.pairs * (1 + 1 / 4)


def test_a_device_is_a_chip_by_its_whole_name():
    assert [chip_of(kind) for kind in ("TPU v5 lite", "NVIDIA H200", "NVIDIA H100 80GB HBM3")] == [
        CHIPS["v5e"],
        CHIPS["h200"],
        CHIPS["h100"],
    ]
    assert [
        chip_of(kind)
        for kind in (
            "cpu",
            "NVIDIA H100 PCIe",
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA GH200 480GB",
        )
    ] == [None] * 4
