"""Attention by segments and its written-out backward pass against torch, for grouped heads,
segments and padding.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_near

from ip_jax.data.packing import segment_index
from ip_jax.models import attention
from ip_jax.models.attention import to_rows, to_segments
from ip_jax.models.decoder import packed_attend
from ip_jax.models.families import uniform_attention

# [R, B, T]
SEGMENTS = np.array([[[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], [[1] * 1 + [2] * 11, [0] * 12]])
POSITIONS = np.array([[[*range(5), *range(4), 0, 0, 0], [*range(12)]], [[0, *range(11)], [0] * 12]])
KIND = uniform_attention(8, 1000.0)[0]
KINDS = {
    "window": dataclasses.replace(KIND, window=3),
    "itself alone": dataclasses.replace(KIND, window=1),
    "soft cap": dataclasses.replace(KIND, softcap=1.5),
    "both": dataclasses.replace(KIND, window=5, softcap=0.7, scale=0.6),
}
HEADS = {"grouped": (2, 3), "all heads": (4, 1), "one kv head": (1, 4)}  # K, G


def arrays(kv_heads: int, groups: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    runs, rows, length, head_dim = *SEGMENTS.shape, 8
    shapes = [
        (kv_heads, groups, head_dim),
        (kv_heads, head_dim),
        (kv_heads, head_dim),
        (kv_heads, groups, head_dim),
    ]
    # q, k, v, cotangent
    return [
        rng.standard_normal((runs, rows, length, *shape)).astype(np.float32) for shape in shapes
    ]


def context_and_gradients(q, k, v, cotangent, kind=KIND):
    attend = packed_attend(
        jnp.asarray(SEGMENTS),
        jnp.asarray(POSITIONS),
        jnp.asarray(segment_index(SEGMENTS, POSITIONS, 2, 12)),
    )
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, None, kind)[0], q, k, v)
    return [out, *pull(cotangent)]


def ours(*inputs):
    return jax.device_get(jax.jit(context_and_gradients, static_argnums=4)(*inputs))


def theirs(q, k, v, cotangent, kind=KIND):
    """Every segment by itself, its scores written out in torch, with torch's gradients."""
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    out = torch.zeros(q.shape)
    for r, b in np.ndindex(*SEGMENTS.shape[:2]):
        for segment in set(SEGMENTS[r, b]) - {0}:
            at = torch.tensor(np.flatnonzero(SEGMENTS[r, b] == segment))
            tq, tk, tv = (leaf[r, b, at] for leaf in leaves)
            scores = torch.einsum("tkgh,skh->kgts", tq, tk) * kind.scale
            if kind.softcap:
                scores = torch.tanh(scores / kind.softcap) * kind.softcap
            distance = at[:, None] - at
            hidden = (distance < 0) | (distance >= (kind.window or len(at)))
            out[r, b, at] = torch.einsum(
                "kgts,skh->tkgh", scores.masked_fill(hidden, -torch.inf).softmax(-1), tv
            )
    out.backward(torch.tensor(cotangent))
    return [x.numpy() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("chunk", [128, 5])
@pytest.mark.parametrize("heads", HEADS)
def test_context_and_gradients_equal_torch(heads, chunk, monkeypatch):
    # 12 positions in one chunk, and in chunks of 4
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    inputs = arrays(*HEADS[heads])
    for mine, reference in zip(ours(*inputs), theirs(*inputs), strict=True):
        assert_near(mine, reference, 4e-6)


@pytest.mark.parametrize("chunk", [128, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_soft_caps_equal_torch(kind, chunk, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    inputs = arrays(2, 3)
    for mine, reference in zip(
        ours(*inputs, KINDS[kind]), theirs(*inputs, KINDS[kind]), strict=True
    ):
        assert_near(mine, reference, 4e-6)


def test_a_window_leaves_out_the_keys_that_no_query_of_a_chunk_sees(monkeypatch):
    """12 positions in chunks of 4 with a window of 3: at most 6 keys a chunk."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    q, k, v, _ = arrays(2, 3)
    text = (
        jax.jit(lambda q, k, v: attention.causal_attention(q, k, v, scale=1.0, window=3))
        .lower(q, k, v)
        .as_text()
    )
    scores = {
        tuple(map(int, shape)) for shape in re.findall(r"-> tensor<1x1x2x(12)x(\d+)xf32>", text)
    }
    # products with ones and with values besides
    assert {keys for _, keys in scores} - {1, 8} == {4, 6}


@pytest.mark.parametrize("window", [None, 4])
def test_queries_behind_a_prefix_are_the_last_ones_of_the_whole(window):
    q, k, v, cotangent = (x[:, :1] for x in arrays(2, 3))

    def whole(q, k, v):
        return attention.causal_attention(q, k, v, scale=8**-0.5, window=window)[:, :, 5:]

    def behind(q, k, v):
        return attention.causal_attention(q[:, :, 5:], k, v, scale=8**-0.5, window=window)

    (expected, pull), (out, pull_behind) = jax.vjp(whole, q, k, v), jax.vjp(behind, q, k, v)
    for mine, reference in zip(
        [out, *pull_behind(cotangent[:, :, 5:])],
        [expected, *pull(cotangent[:, :, 5:])],
        strict=True,
    ):
        assert_near(mine, reference, 4e-6)


def test_bfloat16_stays_near():
    """Stated tolerance 0.1 for values and gradients of order 1; what is returned keeps the
    activations' dtype.
    """
    inputs = arrays(2, 3)
    for narrow, exact in zip(
        ours(*(x.astype(jnp.bfloat16) for x in inputs)), ours(*inputs), strict=True
    ):
        assert narrow.dtype == jnp.bfloat16
        assert 1e-4 < np.abs(narrow.astype(np.float32) - exact).max() < 0.1


def test_large_scores_stay_finite():
    q, k, v, cotangent = arrays(2, 3)
    results = ours(q * 200, k * 200, v, cotangent)
    assert all(np.isfinite(x).all() for x in results)
    np.testing.assert_allclose(results[0], theirs(q * 200, k * 200, v, cotangent)[0], atol=1e-4)


def test_segments_by_hand_and_back():
    segment_ids, positions = np.array([[[1, 1, 2, 0]]]), np.array([[[0, 1, 0, 0]]])
    place = segment_index(segment_ids, positions, segments=2, length=3)
    assert place[0, 0].tolist() == [[0, 1, 4], [2, 4, 4]]
    source = jnp.array([[[0, 1, 3, 6]]])
    x = jnp.arange(1.0, 5)[None, None, :, None]
    blocks = to_segments(x, jnp.asarray(place), source, 0)
    assert blocks[0, :, :, 0].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert to_rows(blocks, jnp.asarray(place), source, 0)[0, 0, :, 0].tolist() == [1, 2, 3, 0]
    weights = jnp.arange(6.0).reshape(1, 2, 3, 1)
    written = jax.grad(lambda x: (to_segments(x, jnp.asarray(place), source, 0) * weights).sum())(x)
    assert written[0, 0, :, 0].tolist() == [0, 1, 3, 0]


def test_shared_prefix_by_hand_and_its_gradients():
    """A row of [0 1 2 | 2 3]: both segments begin with the row's first two tokens. The gradient of
    a copy goes to its original.
    """
    segment_ids, positions = np.array([[[1, 1, 1, 2, 2, 0]]]), np.array([[[0, 1, 2, 2, 3, 0]]])
    place = jnp.asarray(segment_index(segment_ids, positions, segments=3, length=4, shared=2))
    assert place[0, 0].tolist() == [[0, 1, 2, 6], [0, 1, 3, 4], [6, 6, 6, 6]]
    source = jnp.array([[[0, 1, 2, 6, 7, 12]]])
    x = jnp.arange(1.0, 7)[None, None, :, None]
    assert to_segments(x, place, source, 2)[0, :, :, 0].tolist() == [
        [1, 2, 3, 0],
        [1, 2, 4, 5],
        [0, 0, 0, 0],
    ]
    rearranged = jax.vjp(lambda x: to_segments(x, place, source, 2), x)[1]
    # a plain gather, whose gradient is a scatter
    expected = jax.vjp(lambda x: jnp.pad(x[0, 0, :, 0], (0, 1))[place[0, 0]], x)[1]
    cotangent = jnp.arange(1.0, 13).reshape(3, 4)
    assert (
        rearranged(cotangent[None, :, :, None])[0][0, 0, :, 0].tolist()
        == expected(cotangent)[0][0, 0, :, 0].tolist()
    )
    blocks = jnp.arange(1.0, 13).reshape(1, 3, 4, 1)
    rows, back = jax.vjp(lambda blocks: to_rows(blocks, place, source, 2), blocks)
    assert rows[0, 0, :, 0].tolist() == [1, 2, 3, 7, 8, 0]
    assert back(x)[0][0, :, :, 0].tolist() == [
        [1, 2, 3, 0],
        [0, 0, 4, 5],
        [0, 0, 0, 0],
    ], "the copies' contexts are not read"
