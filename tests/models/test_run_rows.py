"""Rows of several runs side by side: each gets what its run has, sums go back to the run, nothing
passes between runs; on a mesh too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ip_jax.models.decoder import causal_attend, split_decoder
from ip_jax.models.lora import LoraConfig
from ip_jax.models.run_rows import of_each_row, sum_of_each_run
from ip_jax.training.sharding import batch_sharding, make_mesh

# two blocks of three runs; the last run of the second has no row
RUNS = np.array([[0, 2, 2, 1], [1, 1, 1, 0]], np.int32)
OWN = np.array([0, 2, 2, 1, 4, 4, 4, 3])  # the same, counted through


@pytest.mark.parametrize(
    "axes", [None, dict(run=2, data=4), dict(run=2, data=2, tensor=2)], ids=str
)
def test_each_row_has_what_its_run_has_and_its_gradient_goes_back_there(axes):
    rng = np.random.default_rng(0)
    values, pull = (
        rng.standard_normal((6, 3, 5)).astype(np.float32),
        rng.standard_normal((8, 3, 5)).astype(np.float32),
    )

    def rows_and_gradient(values, runs):
        rows, back = jax.vjp(lambda values: of_each_row(values, runs), values)
        return rows, back(jnp.asarray(pull))[0], sum_of_each_run(pull.reshape(2, 4, 3, 5), runs, 6)

    if axes is None:
        found = jax.jit(rows_and_gradient)(values, RUNS)
    else:
        with jax.set_mesh(make_mesh(**axes)):
            found = jax.jit(rows_and_gradient)(values, RUNS)
    np.testing.assert_array_equal(found[0], values[OWN])
    expected = np.stack([pull[OWN == run].sum(0) for run in range(6)])
    assert not expected[5].any()
    for sums in found[1:]:
        np.testing.assert_allclose(sums, expected, atol=1e-6)


def test_what_is_not_finite_stays_in_its_run():
    rows = np.ones((2, 4), np.float32)
    rows[0, 1], rows[1, 3] = np.nan, np.inf
    np.testing.assert_array_equal(sum_of_each_run(rows, RUNS, 6), [1, 1, np.nan, np.inf, 3, 0])


def test_mixed_rows_give_the_hidden_states_and_gradients_of_runs_apart():
    """Six rows of three runs in an order of their own, against a decoder with a leading run
    axis.
    """
    lora, params = LoraConfig(rank=4, targets=("q", "v", "down")), tiny.random_params(tiny.CONFIG)
    adapters, order = tiny.random_lora(tiny.CONFIG, lora, runs=3), np.array([4, 0, 5, 2, 1, 3])
    tokens = np.random.default_rng(1).integers(0, 101, (3, 2, 9))
    graphdef, trained, base = split_decoder(tiny.CONFIG, params, adapters, lora)
    pull = jax.random.normal(jax.random.key(0), (3, 2, 9, tiny.CONFIG.d_model))

    @functools.partial(jax.jit, static_argnames="mixed")
    def run(trained, mixed):
        def hidden(trained):
            rows = tokens.reshape(1, 6, 9)[:, order] if mixed else tokens
            runs = jnp.asarray(order[None] // 2) if mixed else None
            out, _ = nnx.merge(graphdef, trained, base)(
                rows, jnp.broadcast_to(jnp.arange(9), rows.shape), causal_attend, runs=runs
            )
            return out[0][np.argsort(order)].reshape(pull.shape) if mixed else out

        return hidden(trained), jax.grad(lambda trained: (hidden(trained) * pull).sum())(trained)

    found, expected = (jax.device_get(run(trained, mixed)) for mixed in (True, False))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected
    )


@pytest.mark.parametrize("axes", [dict(run=2, data=4), dict(run=2, data=2, tensor=2)], ids=str)
def test_a_block_of_rows_lies_on_the_devices_of_its_runs(axes):
    """Nothing is sent to give rows what they need. What is cut over tensor stays so, and of
    gradients each run's sum is added up over data.
    """
    mesh = make_mesh(**axes)
    cut = NamedSharding(mesh, PartitionSpec("run", "tensor" if "tensor" in axes else None))
    values, runs = (
        jax.device_put(np.zeros((6, 64), np.float32), cut),
        jax.device_put(RUNS[None], batch_sharding(mesh)),
    )

    def sent(function):
        with jax.set_mesh(mesh):
            text = jax.jit(function).lower(values, runs).compile().as_text()
        return {
            kind
            for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
            if f" {kind}" in text
        }

    assert not sent(lambda values, runs: of_each_row(values, runs[0]).reshape(2, 4, 64))
    assert sent(jax.grad(lambda values, runs: (of_each_row(values, runs[0]) ** 2).sum())) == {
        "all-reduce"
    }
