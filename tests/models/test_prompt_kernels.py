"""The accelerators' kernels over completions that share a prompt, interpreted on a CPU, against a
naive float64 attention; compiled for a TPU.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_near
from jax.sharding import NamedSharding, PartitionSpec

from ip_jax.models import kernels
from ip_jax.models.families import AttentionKind, Rope
from ip_jax.models.grouped import grouped_attend
from ip_jax.models.kernels import AttentionCase, KernelAttention, SharedPrompt, refusal
from ip_jax.training.sharding import make_mesh

# no multiples of a block: prompt and completions meet within blocks
SLOTS, SAMPLES, LENGTH = 150, 3, 70
POSITIONS = SLOTS + SAMPLES * LENGTH
PROMPTS = np.array([[150, 1], [97, 40]], np.int32)  # [R, B]
PLACE = np.arange(POSITIONS)
COUNTS = (PLACE < PROMPTS[..., None]) | (PLACE >= SLOTS)
SHARING = {
    "splash": ((2, 2, 64), {}),
    "splash, soft cap": ((1, 2, 64), {"softcap": 1.5}),
    "cudnn": ((2, 2, 64), {}),
    "cudnn, window": ((1, 2, 64), {"window": 33}),
}


def arrays(kv_heads: int, groups: int, head_dim: int):
    """q, k, v and a cotangent that is zero on what pads prompts, as a loss's is."""
    rng = np.random.default_rng(0)
    shapes = [
        (kv_heads, groups, head_dim),
        (kv_heads, head_dim),
        (kv_heads, head_dim),
        (kv_heads, groups, head_dim),
    ]
    q, k, v, cotangent = (
        rng.standard_normal((*PROMPTS.shape, POSITIONS, *shape)).astype(np.float32)
        for shape in shapes
    )
    return q, k, v, cotangent * COUNTS[..., None, None, None]


def context_and_gradients(attention, q, k, v, cotangent):
    rows = SharedPrompt(jnp.asarray(PROMPTS), SLOTS, SAMPLES)
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, rows), q, k, v)
    return [jnp.where(COUNTS[..., None, None, None], out, 0), *pull(cotangent.astype(out.dtype))]


def naive(this: KernelAttention, q, k, v, cotangent):
    """Scores of all pairs of a row and one mask, in float64. Positions of completions count from
    their prompt's end.
    """
    completion = np.where(PLACE < SLOTS, -1, (PLACE - SLOTS) // LENGTH)
    position = np.where(PLACE < SLOTS, PLACE, PROMPTS[..., None] + (PLACE - SLOTS) % LENGTH)
    ago = position[..., :, None] - position[..., None, :]
    seen = (completion == -1) | (completion[:, None] == completion)
    seen = (
        seen
        & (ago >= 0)
        & (ago < (this.window or POSITIONS))
        & (PLACE[:, None] >= PLACE)
        & (COUNTS[..., None, :] | np.eye(POSITIONS, dtype=bool))
    )

    def attention(q, k, v):
        scores = this.scale * jnp.einsum("rbtkgh,rbskh->rbkgts", q, k)
        scores = scores if this.softcap is None else this.softcap * jnp.tanh(scores / this.softcap)
        weights = jax.nn.softmax(jnp.where(seen[:, :, None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("rbkgts,rbskh->rbtkgh", weights, v) * COUNTS[..., None, None, None]

    with jax.enable_x64(True):
        both = jax.jit(
            lambda q, k, v, cotangent: (lambda out, pull: [out, *pull(cotangent)])(
                *jax.vjp(attention, q, k, v)
            )
        )
        return jax.device_get(both(*(x.astype(np.float64) for x in (q, k, v, cotangent))))


@pytest.mark.parametrize("name", SHARING)
def test_context_and_gradients_equal_the_naive_ones(name, cudnn_in_xla, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 128)
    heads, options = SHARING[name]
    this = KernelAttention(name.split(",")[0], scale=0.17, interpret=True, **options)
    inputs = arrays(*heads)
    for mine, reference in zip(
        jax.jit(lambda *x: context_and_gradients(this, *x))(*inputs),
        naive(this, *inputs),
        strict=True,
    ):
        assert np.isfinite(mine).all()
        assert_near(mine, reference, 6e-6)


@pytest.mark.parametrize("window", [None, 33])
def test_the_path_of_xla_equals_the_naive_one_too(window):
    kind = AttentionKind(0.17, Rope(1e4), window)

    def attend(q, k, v, rows):
        return grouped_attend(rows.length, rows.slots, rows.samples)(q, k, v, None, kind)[0]

    inputs = arrays(2, 2, 64)
    for mine, reference in zip(
        jax.jit(lambda *x: context_and_gradients(attend, *x))(*inputs),
        naive(KernelAttention("xla", 0.17, window), *inputs),
        strict=True,
    ):
        assert_near(mine, reference, 6e-6)


@pytest.mark.parametrize(("kernel", "data"), [("splash", 2), ("cudnn", 2), ("splash", 4)])
def test_a_mesh_gives_the_same(kernel, data, cudnn_in_xla):
    """Also one whose axis data does not divide the rows: they lie there whole."""
    this = KernelAttention(kernel, scale=0.17, interpret=True)
    inputs = arrays(2, 1, 64)
    mesh = make_mesh(run=2, data=data, tensor=4 // data)

    def on_mesh(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return context_and_gradients(this, *inputs)

    by_row = NamedSharding(mesh, PartitionSpec("run", "data" if data == 2 else None))
    sharded = jax.jit(on_mesh, in_shardings=(by_row,) * 4, out_shardings=by_row)(*inputs)
    for mine, reference in zip(sharded, naive(this, *inputs), strict=True):
        assert_near(mine, reference, 6e-6)


def test_a_window_counts_only_where_it_is_shorter_than_a_sequence(monkeypatch):
    """Rows that it holds whole go to the kernel without it."""
    asked = []
    monkeypatch.setattr(
        KernelAttention, "__call__", lambda this, q, k, v, rows: asked.append(this) or q
    )
    q, k, v, _ = arrays(1, 1, 8)
    for window in (SLOTS + LENGTH - 1, SLOTS + LENGTH, None):
        grouped_attend(PROMPTS, SLOTS, SAMPLES, "splash")(
            q, k, v, None, AttentionKind(1.0, Rope(1e4), window)
        )
    assert [this.window for this in asked] == [SLOTS + LENGTH - 1, None, None]


def test_what_a_kernel_cannot_share_is_refused():
    case = AttentionCase("bfloat16", 2040, 2, 4, 64, shared_prompt=True)
    assert refusal("splash", case) is None and refusal("cudnn", case) is None, "rows of any length"
    assert "cannot share a prompt" in refusal("pallas", case)
    windowed = AttentionCase("bfloat16", 2040, 2, 4, 64, window=512, shared_prompt=True)
    assert (
        "no sliding window over completions" in refusal("splash", windowed)
        and refusal("cudnn", windowed) is None
    )


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("heads", "sizes"), [((8, 4, 128), (1536, 1, 1536)), ((4, 2, 64), (300, 4, 130))]
)
def test_splash_compiles_for_a_tpu(heads, sizes):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    mesh = jax.sharding.Mesh(
        np.array(
            topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:4]
        ).reshape(1, 4, 1),
        ("run", "data", "tensor"),
    )
    (kv_heads, groups, head_dim), (slots, samples, length) = heads, sizes

    def of(*shape):
        return jax.ShapeDtypeStruct(
            (1, 4, slots + samples * length, *shape, head_dim), jnp.bfloat16
        )

    def on_mesh(q, k, v, cotangent, prompts):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            rows = SharedPrompt(prompts, slots, samples)
            out, pull = jax.vjp(
                lambda q, k, v: KernelAttention("splash", 0.1)(q, k, v, rows), q, k, v
            )
            return out, pull(cotangent)

    q, k, prompts = of(kv_heads, groups), of(kv_heads), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    compiled = (
        jax.jit(on_mesh, in_shardings=NamedSharding(mesh, PartitionSpec("run", "data")))
        .lower(q, k, k, q, prompts)
        .compile()
    )
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, dq and dkv kernels
