"""The grouped products of experts as a Pallas kernel, interpreted, against plain products; what it
refuses; that it lowers for a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from jax.sharding import AbstractDevice
from test_moe import (
    MESHES,
    assert_close,
    random_mixture,
    result_and_gradients,
    truth,
)

from ip_jax.models import expert_kernel, moe
from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.training.sharding import make_mesh

WIDTH, HIDDEN = 48, 32  # three tiles and two


def assert_equals_every_expert(shape, n_experts, per_token, **mesh):
    """Also where one expert has all tokens."""
    mixture = functools.partial(moe.mixture, jax.nn.silu, "pallas")
    x, weights, chosen, experts, pull = random_mixture(n_experts, per_token, shape, WIDTH, HIDDEN)
    for choice in (chosen, np.broadcast_to(np.arange(per_token)[::-1] + 1, chosen.shape)):
        expected = truth(x, weights, choice, experts, pull)
        with jax.set_mesh(make_mesh(**mesh)):
            assert_close(result_and_gradients(mixture, x, weights, choice, experts, pull), expected)


@pytest.mark.parametrize(("n_experts", "per_token"), [(3, 1), (8, 2)])
def test_the_kernel_equals_every_expert_on_every_token(n_experts, per_token, monkeypatch):
    """Values and all gradients, over several blocks of rows, chunks of more than one tile, and
    experts with several chunks.
    """
    monkeypatch.setattr(moe, "BLOCK", 128)
    monkeypatch.setattr(moe, "LONGEST_CHUNK", 32)
    monkeypatch.setattr(expert_kernel, "ROWS", 16)
    assert_equals_every_expert((2, 4, 17), n_experts, per_token)


def test_few_tokens_have_chunks_as_long_as_a_tile():
    assert_equals_every_expert((1, 2, 1), 8, 2)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_on_any_mesh(mesh):
    assert_equals_every_expert((2, 8, 3), 8, 2, **mesh)


@pytest.mark.parametrize("chunk", [256, 16])
@pytest.mark.parametrize(
    "step",
    [expert_kernel.product, expert_kernel.transposed, expert_kernel.outer],
    ids=lambda step: step.__name__,
)
def test_it_lowers_for_a_gpu(step, chunk):
    """To Triton, for Mixtral-8x7B's own sizes, in training and where few tokens are decoded. It is
    not compiled, and nothing is run.
    """
    rows, width, hidden = 32 * chunk, 4096, 14336
    x, d, kernels = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((rows, width), (rows, hidden), (8, width, hidden))
    )
    of_chunks, of_experts = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (rows // chunk, 8))
    given = {
        expert_kernel.product: (x, kernels, of_chunks),
        expert_kernel.transposed: (d, kernels, of_chunks),
        expert_kernel.outer: (x, d, of_experts, of_experts),
    }[step]
    with jax.sharding.use_abstract_mesh(tiny.H200):
        traced = jax.jit(
            functools.partial(step, chunk=chunk) if step is expert_kernel.outer else step
        ).trace(*given)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


MIXTRAL = DecoderConfig(
    "mixtral",
    512,
    64,
    96,
    2,
    4,
    2,
    16,
    uniform_attention(16, 1e4),
    1e-5,
    1024,
    False,
    n_experts=8,
    experts_per_token=2,
)


@pytest.mark.parametrize(
    ("platform", "change", "dtype", "tensor", "sentence"),
    [
        ("cpu", {}, "bfloat16", 1, "runs on a GPU, and the mesh is made of CPU devices"),
        ("gpu", {}, "float32", 1, "works in bfloat16 or float16, not in float32"),
        (
            "gpu",
            dict(n_experts=0),
            "bfloat16",
            1,
            "is for a mixture of experts, and mixtral has none",
        ),
        ("gpu", dict(d_model=72), "bfloat16", 1, "needs a width that is a multiple of 16, not 72"),
        (
            "gpu",
            {},
            "bfloat16",
            4,
            "needs a hidden dimension of a device that is a multiple of 16, not 24",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(platform, change, dtype, tensor, sentence):
    config = dataclasses.replace(MIXTRAL, **change)
    with pytest.raises(ValueError, match=f"experts 'pallas' {sentence}"):
        expert_kernel.choose_experts(
            "pallas", AbstractDevice("any", None, platform), config, dtype, tensor
        )


def test_xla_multiplies_unless_the_kernel_is_named():
    choose = functools.partial(
        expert_kernel.choose_experts,
        device=AbstractDevice("any", None, "gpu"),
        config=MIXTRAL,
        dtype="bfloat16",
    )
    assert (choose("auto"), choose("pallas")) == ("auto", "pallas")
    with pytest.raises(ValueError, match="experts 'cudnn' is unknown: it is one of auto, pallas"):
        choose("cudnn")
