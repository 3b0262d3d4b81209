"""Rows of several runs side by side: from what each run has to what each row needs, and back to sums over each run's rows.

Runs lie in blocks, as many as the mesh axis `run` has devices (one without a mesh): a block's rows lie on its devices and belong to any of its
runs. Dims: R runs, B rows of a block. `runs`, int32 [blocks, B], says for each row which run of its block it belongs to.
"""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import BY_ROW, constrain


def of_each_row(values: Array, runs: Int[Array, "blocks B"]) -> Array:
    """[R, ...] to [blocks * B, ...]: for each row what its run has. Its gradient adds up the rows of each run, and only those: a run that
    has diverged leaves the others as they are.
    """
    blocks = values.reshape(len(runs), -1, *values.shape[1:])
    rows = jax.vmap(lambda block, own: block.at[own].get(mode="promise_in_bounds"))(blocks, runs)
    return constrain(rows, BY_ROW).reshape(-1, *values.shape[1:])


def sum_of_each_run(rows: Float[Array, "blocks B ..."], runs: Int[Array, "blocks B"], count: int) -> Float[Array, "R ..."]:
    """The sum over each run's rows, for `count` runs: 0 for a run that has none."""
    zeros = jnp.zeros((len(runs), count // len(runs), *rows.shape[2:]), rows.dtype)
    return jax.vmap(lambda zero, own, of_rows: zero.at[own].add(of_rows, mode="promise_in_bounds"))(zeros, runs, rows).reshape(count, *rows.shape[2:])
