"""Which kernel attends and how rows are packed for it, by the devices of the mesh."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from configs.rl_shapes import PRESETS
from ip_jax.lab.experiment import ModelConfig, SftConfig
from ip_jax.lab.reinforced.programs import Kind, decoders
from ip_jax.lab.supervised import run as supervised
from ip_jax.lab.supervised.programs import (
    Program,
    attention_kernel,
    chosen_kernel,
    initial_state,
    layers_fit_whole,
    row_rules,
)
from ip_jax.models.decoder import packed_attend
from ip_jax.models.families import AttentionKind, DecoderConfig, uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.planning.reinforced_programs import untrained_decoder
from ip_jax.planning.workload import abstract_base
from ip_jax.rl.algorithm import Algorithm
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import AXES

PLAIN = uniform_attention(64, 1e4)
CAPPED = (dataclasses.replace(PLAIN[0], softcap=50.0),)
SFT = SftConfig(1, 1, 1e-4, Schedule("constant"))


def program(
    platform: str,
    attention: tuple[AttentionKind, ...] = PLAIN,
    wanted: str = "auto",
    sft: SftConfig = SFT,
) -> Program:
    mesh = AbstractMesh(
        (1, 4, 1),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
        abstract_device=AbstractDevice("any", None, platform),
    )
    config = DecoderConfig("llama", 512, 128, 256, 2, 4, 2, 64, attention, 1e-5, 1024, False)
    return Program(mesh, config, sft, ModelConfig("x", weights="bfloat16", attention=wanted))


@pytest.mark.parametrize(
    "platform, attention, kernel, quantum",
    [
        ("cpu", PLAIN, "xla", 8),
        ("tpu", PLAIN, "splash", 128),
        ("tpu", CAPPED, "splash", 128),
        ("gpu", PLAIN, "cudnn", 8),
        ("gpu", CAPPED, "xla", 8),
        ("gpu", (*PLAIN, *CAPPED), "xla", 8),
    ],
)
def test_kernel_and_rows_follow_the_devices(platform, attention, kernel, quantum):
    """Only XLA lets a row's segments share its beginning; one layer that a kernel cannot do keeps
    all from it.
    """
    asked = program(platform, attention)
    rules = row_rules(asked)
    assert (attention_kernel(asked), rules.quantum, rules.multiple, rules.share_prefix) == (
        kernel,
        quantum,
        4,
        kernel == "xla",
    )


@pytest.mark.parametrize(
    "platform, window, softcap, kernel",
    [
        ("tpu", None, None, "splash"),
        ("tpu", 4096, None, "splash"),
        ("tpu", 4095, None, "xla"),
        ("tpu", None, 50.0, "splash"),
        ("gpu", None, None, "cudnn"),
        ("gpu", 512, None, "cudnn"),
        ("gpu", None, 50.0, "xla"),
        ("cpu", None, None, "xla"),
    ],
)
def test_behind_a_shared_prompt_a_window_that_holds_all_positions_hides_nothing(
    platform, window, softcap, kernel
):
    """Prompt and completion have 4096 positions at most."""
    asked = program(platform, (dataclasses.replace(PLAIN[0], window=window, softcap=softcap),))
    assert chosen_kernel(asked.mesh, asked.config, asked.model, longest=4096) == kernel


def test_the_routers_loss_counts_the_tokens_of_each_example():
    assert not row_rules(
        program("cpu", sft=dataclasses.replace(SFT, router_aux_loss_coef=0.02))
    ).share_prefix


def test_a_named_kernel_that_the_devices_lack_and_a_shared_beginning_are_refused():
    with pytest.raises(
        ValueError, match="attention 'splash' runs on a TPU, and the mesh is made of GPU devices"
    ):
        row_rules(program("gpu", wanted="splash"))
    ids = jnp.ones((1, 1, 128), int)
    with pytest.raises(
        ValueError, match="attention 'splash' cannot share the first 3 tokens of a row"
    ):
        jax.eval_shape(
            lambda: packed_attend(
                ids, ids, jnp.zeros((1, 1, 1, 128), int), shared=3, kernel="splash"
            )
        )


def test_frozen_weights_are_sampled_from_where_they_lie():
    """Not from a copy, which a jitted function would make of all base weights."""
    session = types.SimpleNamespace(
        mesh=None,
        model=types.SimpleNamespace(config=None),
        experiment=types.SimpleNamespace(sft=SFT, model=ModelConfig("x")),
    )
    frozen = {"weight": jnp.ones(3)}
    assert (
        supervised._sampled(session, types.SimpleNamespace(trained={}), frozen)[1]["weight"]
        is frozen["weight"]
    )


@pytest.mark.parametrize(
    "kind, sizes, layers, quantised, whole",
    [
        ("h100", (1, 8, 1), 28, None, True),
        ("TPU v5 lite", (1, 8, 1), 28, None, False),
        ("TPU v5 lite", (1, 4, 4), 28, None, True),
        ("h100", (1, 8, 1), 90, None, False),
        ("h100", (1, 8, 1), 90, "nf4", True),
        ("cpu", (1, 8, 1), 1, None, False),
    ],
)
def test_layers_are_whole_while_sampling_where_they_leave_half_of_the_memory(
    kind, sizes, layers, quantised, whole
):
    """Of Qwen2-7B's width, 233 million parameters a layer in bfloat16. Of a CPU's memory nothing is
    published.
    """
    mesh = AbstractMesh(
        sizes,
        AXES,
        axis_types=(AxisType.Auto,) * 3,
        abstract_device=AbstractDevice(kind, None, "gpu"),
    )
    config = DecoderConfig(
        "qwen2", 152064, 3584, 18944, layers, 28, 4, 128, PLAIN, 1e-5, 1024, False
    )
    assert (
        layers_fit_whole(mesh, config, ModelConfig("x", weights="bfloat16", quantised=quantised))
        is whole
    )


@pytest.mark.parametrize("wanted", ["auto", "pallas"])
def test_the_kernel_of_experts_is_in_every_decoder(wanted):
    """And so in every program that is made of them: steps, passes, sampling."""
    lora = LoraConfig(targets=("q", "k", "v", "o"))
    asked = program("gpu", sft=dataclasses.replace(SFT, lora=lora))
    asked = dataclasses.replace(
        asked,
        config=dataclasses.replace(asked.config, n_experts=8, experts_per_token=2),
        model=dataclasses.replace(asked.model, experts=wanted),
    )
    params = abstract_base(asked.config, asked.model, asked.mesh)
    rl = dataclasses.replace(PRESETS["qwen3-4b"].rl, lora=lora)
    graph, state, frozen = initial_state(asked, params, [0], evaluate=jax.eval_shape)
    rl_decoders, start = decoders(
        Kind(asked.mesh, asked.config, rl, asked.model, Algorithm()),
        params,
        [0],
        [1e-4],
        jax.eval_shape,
    )
    untrained = untrained_decoder(
        types.SimpleNamespace(config=asked.config, model=asked.model, untrained_mesh=asked.mesh)
    )
    split = [
        (graph, state.trained, frozen),
        (rl_decoders.policy, start().trained, rl_decoders.frozen),
        (rl_decoders.reference, {}, rl_decoders.reference_frozen),
        untrained,
    ]
    assert [nnx.merge(*parts).config.experts_kernel for parts in split] == [wanted] * 4


def test_experts_do_not_count_because_they_stay():
    mesh = AbstractMesh(
        (1, 8, 1),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
        abstract_device=AbstractDevice("h100", None, "gpu"),
    )
    config = DecoderConfig(
        "mixtral",
        32000,
        4096,
        14336,
        32,
        32,
        8,
        128,
        PLAIN,
        1e-5,
        1024,
        False,
        n_experts=8,
        experts_per_token=2,
    )
    assert layers_fit_whole(mesh, config, ModelConfig("x", weights="bfloat16"))
