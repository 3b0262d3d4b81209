"""Packed attention and its written-out backward pass against torch, for grouped heads, segments and padding."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip_jax.models.attention import packed_attention, packed_mask

SEGMENTS = np.array([[[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], [[1] * 1 + [2] * 11, [0] * 12]])  # [R, B, T]
HEADS = {"grouped": (2, 3), "all heads": (4, 1), "one kv head": (1, 4)}  # K, G


def arrays(kv_heads: int, groups: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    runs, rows, length, head_dim = *SEGMENTS.shape, 8
    shapes = [(kv_heads, groups, head_dim), (kv_heads, head_dim), (kv_heads, head_dim), (kv_heads, groups, head_dim)]
    return [rng.standard_normal((runs, rows, length, *shape)).astype(np.float32) for shape in shapes]  # q, k, v, cotangent


@jax.jit
def context_and_gradients(q, k, v, cotangent):
    out, pull = jax.vjp(lambda q, k, v: packed_attention(q, k, v, packed_mask(jnp.asarray(SEGMENTS))), q, k, v)
    return [out, *pull(cotangent)]


def ours(*inputs):
    return jax.device_get(context_and_gradients(*inputs))


def theirs(q, k, v, cotangent):
    """Every segment by itself through torch's scaled_dot_product_attention, with its gradients."""
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    out = torch.zeros(q.shape)
    groups = q.shape[4]
    for r, b in np.ndindex(*SEGMENTS.shape[:2]):
        for segment in np.unique(SEGMENTS[r, b]):
            at = torch.tensor(np.flatnonzero(SEGMENTS[r, b] == segment))
            tq, tk, tv = (leaf[r, b, at] for leaf in leaves)
            context = torch.nn.functional.scaled_dot_product_attention(
                tq.flatten(1, 2).transpose(0, 1),
                *(x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (tk, tv)),
                is_causal=True,
            )
            out[r, b, at] = context.transpose(0, 1).reshape(tq.shape)
    out.backward(torch.tensor(cotangent))
    return [x.numpy() for x in (out.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("heads", HEADS)
def test_context_and_gradients_equal_torch(heads):
    inputs = arrays(*HEADS[heads])
    for mine, reference in zip(ours(*inputs), theirs(*inputs), strict=True):
        np.testing.assert_allclose(mine, reference, atol=3e-6)


def test_bfloat16_stays_near():
    """Stated tolerance 0.1 for values and gradients of order 1; what is returned keeps the activations' dtype."""
    inputs = arrays(2, 3)
    for narrow, exact in zip(ours(*(x.astype(jnp.bfloat16) for x in inputs)), ours(*inputs), strict=True):
        assert narrow.dtype == jnp.bfloat16
        assert 1e-4 < np.abs(narrow.astype(np.float32) - exact).max() < 0.1


def test_large_scores_stay_finite():
    q, k, v, cotangent = arrays(2, 3)
    results = ours(q * 200, k * 200, v, cotangent)
    assert all(np.isfinite(x).all() for x in results)
    np.testing.assert_allclose(results[0], theirs(q * 200, k * 200, v, cotangent)[0], atol=1e-4)


def test_mask_by_hand():
    assert packed_mask(jnp.array([[[1, 1, 2, 0]]]))[0, 0].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
