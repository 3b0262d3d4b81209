"""Rotary positions against transformers (torch)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from ip_jax.models.rope import apply_rope, rope_tables

POSITIONS = np.array([0, 1, 31, 32, 33, 100, 2000])


@pytest.mark.parametrize("kind", ["llama", "llama-3.1", "llama-linear-rope"])
def test_tables_are_transformers(kind):
    torch = pytest.importorskip("torch")
    model = tiny.hf_model(kind, max_position_embeddings=4096)
    config, _ = tiny.from_hf(model)
    expected = model.model.rotary_emb(torch.zeros(1), torch.tensor(POSITIONS[None]))
    for mine, theirs in zip(
        rope_tables(jnp.asarray(POSITIONS), config.ropes[0], config.head_dim), expected, strict=True
    ):
        np.testing.assert_allclose(mine[:, 0, 0], theirs[0], atol=2e-4)  # float32 angles up to 2000


def test_each_type_of_gemma_3s_layers_has_its_own():
    torch = pytest.importorskip("torch")
    model = tiny.hf_model("gemma3", max_position_embeddings=4096)
    config, _ = tiny.from_hf(model)
    for rope, layer_type in zip(config.ropes, ("sliding_attention", "full_attention"), strict=True):
        expected = model.model.rotary_emb(torch.zeros(1), torch.tensor(POSITIONS[None]), layer_type)
        for mine, theirs in zip(
            rope_tables(jnp.asarray(POSITIONS), rope, config.head_dim), expected, strict=True
        ):
            np.testing.assert_allclose(mine[:, 0, 0], theirs[0], atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_and_gradient_are_transformers(dtype):
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    tables = rope_tables(
        jnp.asarray(POSITIONS)[None, None], tiny.CONFIG.ropes[0], tiny.CONFIG.head_dim
    )
    rng = np.random.default_rng(0)
    x, cotangent = (
        jnp.asarray(rng.normal(size=(1, 1, len(POSITIONS), 2, 3, tiny.CONFIG.head_dim)), dtype)
        for _ in range(2)
    )
    out, pull = jax.vjp(lambda x: apply_rope(x, tables), x)
    assert out.dtype == pull(cotangent)[0].dtype == dtype

    def torch_heads(a):  # [heads, T, H]
        return torch.tensor(
            np.asarray(a, np.float32)[0, 0].reshape(len(POSITIONS), 6, -1)
        ).swapaxes(0, 1)[None]

    theirs = torch_heads(x).requires_grad_()
    rotated, _ = apply_rotary_pos_emb(
        theirs, theirs, *(torch.tensor(np.asarray(table)[0, :, :, 0, 0]) for table in tables)
    )
    rotated.backward(torch_heads(cotangent))
    # bfloat16: the result's last bit, three times
    tolerance = {"atol": 3e-6} if dtype == jnp.float32 else {"rtol": 3 * 2**-8, "atol": 1e-6}
    for mine, reference in ((out, rotated), (pull(cotangent)[0], theirs.grad)):
        np.testing.assert_allclose(torch_heads(mine), reference.detach(), **tolerance)


def test_it_is_a_product_on_a_cpu_only():
    """An accelerator would round float32 heads to bfloat16 in a product."""
    x, tables = (
        jnp.ones((1, 1, 7, 1, 1, tiny.CONFIG.head_dim)),
        rope_tables(jnp.asarray(POSITIONS)[None, None], tiny.CONFIG.ropes[0], tiny.CONFIG.head_dim),
    )
    lowered = {
        platform: (
            jax.jit(apply_rope).trace(x, tables).lower(lowering_platforms=(platform,)).as_text()
        )
        for platform in ("cpu", "cuda", "tpu")
    }
    assert {platform: "dot_general" in text for platform, text in lowered.items()} == {
        "cpu": True,
        "cuda": False,
        "tpu": False,
    }
