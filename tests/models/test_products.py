"""The written-out products against jax.numpy and its own gradients, with few rows and with enough
for a CPU to lay kernels side by side.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip_jax.models import products

WIDTHS = (24, 8, 8)


def arrays(rows: int):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x, kernels = draw(2, 3, rows, 16), tuple(draw(16, width) for width in WIDTHS)
    downs, ups = tuple(draw(2, 16, 4) for _ in WIDTHS), tuple(draw(2, 4, width) for width in WIDTHS)
    return x, kernels, downs, ups, tuple(draw(2, 3, rows, width) for width in WIDTHS)


def results_and_gradients(function, cotangents, *inputs):
    out, pull = jax.vjp(function, *inputs)
    return jax.tree.leaves((out, pull(cotangents)))


def test_row_sum_is_a_product_on_a_cpu_only():
    """An accelerator would round the float32 operands of a product to bfloat16."""
    x = arrays(5)[0]
    np.testing.assert_allclose(
        products.row_sum(x), x.sum(axis=-1, keepdims=True), rtol=1e-5, atol=1e-5
    )
    lowered = {
        platform: jax.jit(products.row_sum).trace(x).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert {platform: "dot_general" in text for platform, text in lowered.items()} == {
        "cpu": True,
        "cuda": False,
        "tpu": False,
    }


@pytest.mark.parametrize("rows", [5, 100])
def test_base_products(rows):
    x, kernels, _, _, cotangents = arrays(rows)
    assert products._merging_pays(x, kernels) == (rows == 100)

    def plain(x, kernels):
        return tuple(x @ kernel for kernel in kernels)

    ours = jax.jit(results_and_gradients, static_argnums=0)(
        products.base_products, cotangents, x, kernels
    )
    for mine, expected in zip(
        ours, results_and_gradients(plain, cotangents, x, kernels), strict=True
    ):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, count", [(5, 3), (100, 1)])
def test_narrow_kernels_share_one_product_where_there_are_many_rows(rows, count):
    x, kernels, *_ = arrays(rows)
    compiled = jax.jit(products.base_products).lower(x, kernels).compile().as_text()
    assert len(re.findall(r" dot\(", compiled)) == count


@pytest.mark.parametrize("rows", [5, 100])
def test_lora_products(rows):
    x, _, downs, ups, cotangents = arrays(rows)

    def plain(x, downs, ups):
        return tuple(
            jnp.einsum("rbti,rik,rko->rbto", x, down, up)
            for down, up in zip(downs, ups, strict=True)
        )

    def function(x, downs, ups):
        return products.lora_products(x, downs, ups, jnp.float32)

    ours = jax.jit(results_and_gradients, static_argnums=0)(function, cotangents, x, downs, ups)
    for mine, expected in zip(
        ours, results_and_gradients(plain, cotangents, x, downs, ups), strict=True
    ):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-3)


def test_many_runs_are_one_batched_product():
    """One product for each run is quick for a few; a program that writes out a hundred of them
    takes minutes to compile.
    """
    rng = np.random.default_rng(0)
    for runs, count in ((products.FEW_RUNS, products.FEW_RUNS), (products.FEW_RUNS + 1, 1)):
        a, b = (
            jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for shape in ((runs, 2, 150, 8), (runs, 8, 4))
        )
        compiled = (
            jax.jit(lambda a, b: products.run_product("rbti,rik->rbtk", a, b, jnp.float32))
            .lower(a, b)
            .compile()
        )
        np.testing.assert_allclose(
            compiled(a, b), np.einsum("rbti,rik->rbtk", a, b), rtol=1e-4, atol=1e-4
        )
        assert len(re.findall(r" dot\(", compiled.as_text())) == count
