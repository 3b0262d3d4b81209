"""The accelerators' attention kernels, interpreted on a CPU, against a naive float64 attention;
compiled ahead of time for a TPU.
"""

import dataclasses
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from closeness import assert_near
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec

from ip_jax.data.packing import segment_index
from ip_jax.models import kernels
from ip_jax.models.decoder import packed_attend
from ip_jax.models.families import uniform_attention
from ip_jax.models.kernels import AttentionCase, KernelAttention, choose_attention, packing, refusal
from ip_jax.models.remat import ATTENTION
from ip_jax.training.sharding import make_mesh

LENGTH = 256
EXAMPLES = [[[100, 120], [256]], [[1, 200, 30], []]]  # segment lengths of each row, [R][B]
SEGMENTS = np.array(
    [
        [np.repeat([*range(1, len(row) + 1), 0], [*row, LENGTH - sum(row)]) for row in run]
        for run in EXAMPLES
    ]
)
POSITIONS = np.array(
    [
        [
            np.concatenate([np.arange(n) for n in [*row]] + [np.zeros(LENGTH - sum(row), int)])
            for row in run
        ]
        for run in EXAMPLES
    ]
)
INDEX = segment_index(SEGMENTS, POSITIONS, 3, LENGTH)
ROWS = SEGMENTS.astype(np.int32), POSITIONS.astype(np.int32), INDEX


def arrays(kv_heads: int, groups: int, head_dim: int, seed: int = 0):
    """q, k, v and a cotangent that is zero on padding, as a loss's is."""
    rng = np.random.default_rng(seed)
    shapes = [
        (kv_heads, groups, head_dim),
        (kv_heads, head_dim),
        (kv_heads, head_dim),
        (kv_heads, groups, head_dim),
    ]
    q, k, v, cotangent = (
        rng.standard_normal((*SEGMENTS.shape, *shape)).astype(np.float32) for shape in shapes
    )
    return q, k, v, cotangent * (SEGMENTS > 0)[..., None, None, None]


def context_and_gradients(attention, q, k, v, cotangent):
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, packing(*ROWS)), q, k, v)
    return [out, *pull(cotangent.astype(out.dtype))]


def naive(this: KernelAttention, q, k, v, cotangent):
    """Scores of all pairs of a row and one mask, in float64."""
    ago = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (
        (SEGMENTS[..., :, None] == SEGMENTS[..., None, :])
        & (ago >= 0)
        & (ago < (this.window or LENGTH))
    )

    def attention(q, k, v):
        scores = this.scale * jnp.einsum("rbtkgh,rbskh->rbkgts", q, k)
        scores = scores if this.softcap is None else this.softcap * jnp.tanh(scores / this.softcap)
        weights = jax.nn.softmax(jnp.where(seen[:, :, None, None], scores, -jnp.inf), axis=-1)
        return (
            jnp.einsum("rbkgts,rbskh->rbtkgh", weights, v) * (SEGMENTS > 0)[..., None, None, None]
        )

    with jax.enable_x64(True):
        both = jax.jit(
            lambda q, k, v, cotangent: (lambda out, pull: [out, *pull(cotangent)])(
                *jax.vjp(attention, q, k, v)
            )
        )
        return jax.device_get(both(*(x.astype(np.float64) for x in (q, k, v, cotangent))))


SPLASH = {
    "grouped": ((2, 2, 64), {}),
    "one kv head, 128": ((1, 4, 128), {}),
    "all heads": ((2, 1, 64), {"window": 70}),
    "soft cap": ((1, 2, 64), {"softcap": 1.5}),
    "soft cap and window": ((2, 2, 64), {"softcap": 1.5, "window": 130}),
    "window of one": ((1, 1, 64), {"window": 1}),
}
PALLAS = {"grouped": ((2, 2, 64), {}), "one kv head, 128": ((1, 2, 128), {})}
BY_SEGMENT = {"grouped": ((2, 2, 64), {}), "window": ((1, 2, 64), {"window": 70})}
CASES = [
    (kernel, *case)
    for kernel, cases in [("splash", SPLASH), ("pallas", PALLAS), ("cudnn", BY_SEGMENT)]
    for case in cases.items()
]


@pytest.mark.parametrize(
    ("kernel", "name", "case"), CASES, ids=[f"{kernel}: {name}" for kernel, name, _ in CASES]
)
def test_context_and_gradients_equal_the_naive_ones(kernel, name, case, cudnn_in_xla, monkeypatch):
    # more than one block, so that blocks are skipped and joined
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 128)
    heads, options = case
    this = KernelAttention(kernel, scale=0.17, interpret=True, **options)
    inputs = arrays(*heads)
    for mine, reference in zip(
        jax.jit(lambda *x: context_and_gradients(this, *x))(*inputs),
        naive(this, *inputs),
        strict=True,
    ):
        assert np.isfinite(mine).all()
        assert_near(mine, reference, 6e-6)


def test_a_kernel_equals_the_path_of_xla_on_padding_too():
    inputs = arrays(2, 2, 64)
    attend = packed_attend(*(jnp.asarray(x) for x in ROWS))
    expected = jax.jit(
        lambda *x: context_and_gradients(
            lambda q, k, v, _: attend(q, k, v, None, *uniform_attention(64, 1e4))[0], *x
        )
    )(*inputs)
    this = KernelAttention("splash", scale=64**-0.5, interpret=True)
    for mine, reference in zip(
        jax.jit(lambda *x: context_and_gradients(this, *x))(*inputs), expected, strict=True
    ):
        assert_near(mine, reference, 6e-6)


def test_bfloat16_stays_near():
    """Stated tolerance 0.1 for values and gradients of order 1; what is returned keeps the
    dtype.
    """
    inputs = arrays(1, 2, 64)
    this = KernelAttention("splash", scale=0.17, interpret=True)
    narrow = jax.jit(lambda *x: context_and_gradients(this, *x))(
        *(x.astype(jnp.bfloat16) for x in inputs)
    )
    for mine, reference in zip(narrow, naive(this, *inputs), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert 1e-4 < np.abs(mine.astype(np.float32) - reference).max() < 0.1


@pytest.mark.parametrize(
    "heads",
    [(2, 1, 64), (1, 4, 64)],
    ids=["kv heads are cut", "query heads of one kv head are cut"],
)
@pytest.mark.parametrize("kernel", ["splash", "pallas", "cudnn"])
def test_a_mesh_gives_the_same(kernel, heads, cudnn_in_xla):
    this = KernelAttention(
        kernel, scale=0.17, window=None if kernel == "pallas" else 70, interpret=True
    )
    inputs = arrays(*heads)
    mesh = make_mesh(run=2, data=2, tensor=2)

    def on_mesh(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return context_and_gradients(this, *inputs)

    by_row = NamedSharding(mesh, PartitionSpec("run", "data"))
    sharded = jax.jit(on_mesh, in_shardings=(by_row,) * 4, out_shardings=by_row)(*inputs)
    for mine, reference in zip(sharded, naive(this, *inputs), strict=True):
        assert_near(mine, reference, 6e-6)


def test_a_layer_keeps_the_output_and_the_normaliser_for_its_backward_pass(capsys):
    this = KernelAttention("splash", scale=0.17, interpret=True)
    q, k, v, _ = arrays(1, 2, 64)

    def kept(policy):
        layer = jax.checkpoint(lambda q: this(q, k, v, packing(*ROWS)).sum(), policy=policy)
        jax.ad_checkpoint.print_saved_residuals(layer, q)
        return [
            line.split()[0]
            for line in capsys.readouterr().out.splitlines()
            if "_splash_attention" in line
        ]

    assert kept(jax.checkpoint_policies.save_only_these_names(ATTENTION)) == [
        "f32[4,2,256,64]",
        "f32[4,2,256]",
    ]
    assert kept(None) == []


CASE = AttentionCase("bfloat16", 2048, 4, 7, 128)
TPU = types.SimpleNamespace(platform="tpu")
H100 = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
A100 = types.SimpleNamespace(platform="gpu", compute_capability="8.0")
CPU = types.SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("kernel", "device", "changed", "reason"),
    [
        ("splash", TPU, {}, None),
        (
            "splash",
            TPU,
            {"window": 4096, "softcap": 50.0, "head_dim": 256, "dtype": "float32"},
            None,
        ),
        ("splash", H100, {}, "runs on a TPU, and the mesh is made of GPU devices"),
        ("splash", TPU, {"row_length": 2040}, "multiples of 128, not 2040"),
        ("splash", TPU, {"tensor": 8}, "4 kv heads with 7 query heads each do not over tensor=8"),
        ("splash", TPU, {"tensor": 7}, None),
        ("splash", TPU, {"dtype": "float16"}, "bfloat16 or float32, not in float16"),
        ("cudnn", H100, {"row_length": 2040, "window": 4096, "head_dim": 256}, None),
        ("cudnn", A100, {}, None),
        ("cudnn", A100, {"head_dim": 256}, "up to 128 here, not 256"),
        ("cudnn", H100, {"head_dim": 100}, "multiples of 8 up to 256 here, not 100"),
        ("cudnn", H100, {"softcap": 50.0}, "no soft cap"),
        ("cudnn", H100, {"dtype": "float32"}, "bfloat16 or float16, not in float32"),
        ("cudnn", CPU, {}, "made of CPU devices"),
        ("pallas", A100, {"dtype": "float32"}, None),
        ("pallas", H100, {"window": 4096}, "no sliding window"),
        ("pallas", H100, {"softcap": 50.0}, "no soft cap"),
        ("pallas", H100, {"head_dim": 256}, "up to 128"),
        ("pallas", H100, {"row_length": 8}, "multiples of 128"),
        (
            "flash",
            H100,
            {},
            "attention 'flash' is unknown: it is one of auto, xla, splash, cudnn, pallas",
        ),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(kernel, device, changed, reason):
    case = dataclasses.replace(CASE, **changed)
    if reason is None:
        assert choose_attention(kernel, device, case) == kernel
    else:
        assert reason in refusal(kernel, case, device)
        with pytest.raises(ValueError, match="attention"):
            choose_attention(kernel, device, case)


@pytest.mark.parametrize(
    ("device", "changed", "chosen"),
    [
        (TPU, {}, "splash"),
        (H100, {}, "cudnn"),
        (CPU, {}, "xla"),
        (TPU, {"row_length": 8}, "xla"),
        (H100, {"softcap": 50.0}, "xla"),
        (A100, {"head_dim": 256}, "xla"),
        (H100, {"dtype": "float32"}, "xla"),
    ],
)
def test_auto_follows_the_device_of_the_mesh(device, changed, chosen):
    assert choose_attention("auto", device, dataclasses.replace(CASE, **changed)) == chosen
    assert choose_attention("xla", device, dataclasses.replace(CASE, **changed)) == "xla"


@pytest.mark.parametrize(
    ("this", "reason"),
    [
        (KernelAttention("pallas", scale=1.0, window=3), "no sliding window"),
        (KernelAttention("cudnn", scale=1.0), "not in float32"),
        (KernelAttention("flash", scale=1.0), "unknown"),
    ],
)
def test_a_call_that_cannot_be_expressed_is_refused_when_it_is_traced(this, reason):
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda *x: context_and_gradients(this, *x), *arrays(1, 2, 64))


@pytest.fixture(scope="module")
def tpu_topology():
    """Four chips of a TPU v5e that are not there."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    # nothing is run on a chip, so processes need not take turns
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("heads", "length", "options", "dtype"),
    [
        ((4, 7, 128), 2048, {}, "bfloat16"),
        ((3, 3, 64), 1024, {"window": 300}, "bfloat16"),
        ((1, 8, 256), 512, {"softcap": 50.0}, "bfloat16"),
        ((4, 2, 256), 4096, {"softcap": 50.0, "window": 4096}, "bfloat16"),
        ((2, 4, 96), 640, {}, "bfloat16"),
        ((4, 2, 128), 1024, {}, "float32"),
    ],
)
def test_splash_compiles_for_a_tpu(heads, length, options, dtype, tpu_topology):
    mesh = jax.sharding.Mesh(
        np.array(tpu_topology.devices[:4]).reshape(1, 4, 1), ("run", "data", "tensor")
    )
    if heads[0] % 2 == 0:
        mesh = jax.sharding.Mesh(mesh.devices.reshape(1, 2, 2), mesh.axis_names)
    this = KernelAttention("splash", scale=0.1, **options)
    kv_heads, groups, head_dim = heads

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((1, 4, length, *shape), dtype)

    ints = of(dtype="int32"), of(dtype="int32"), jax.ShapeDtypeStruct((1, 4, 4, length), "int32")

    def on_mesh(q, k, v, cotangent, *rows):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, pull = jax.vjp(lambda q, k, v: this(q, k, v, packing(*rows)), q, k, v)
            return out, pull(cotangent)

    q, k = of(kv_heads, groups, head_dim), of(kv_heads, head_dim)
    compiled = (
        jax.jit(on_mesh, in_shardings=NamedSharding(mesh, PartitionSpec("run", "data")))
        .lower(q, k, k, q, *ints)
        .compile()
    )
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, dq and dkv kernels


@pytest.mark.parametrize(("kernel", "window"), [("cudnn", None), ("cudnn", 70), ("pallas", None)])
def test_kernels_of_gpus_lower_for_cuda(kernel, window, monkeypatch):
    """Values and gradients, to custom calls. They are not compiled. cuDNN, which is not here, is
    asked for its version and for the GPU's kind.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(
        fused_attention_stablehlo, "check_compute_capability", lambda capability: True
    )
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arrays(1, 2, 64)]
    this = KernelAttention(kernel, scale=0.17, window=window)
    with jax.sharding.use_abstract_mesh(tiny.H200):
        text = (
            jax.jit(lambda *x: context_and_gradients(this, *x))
            .trace(*inputs)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert {"cudnn": "__cudnn$fmha", "pallas": "triton"}[kernel] in text
