"""Rows of several runs side by side: from what each run has to what each row needs, and back to
sums over each run's rows.

Runs lie in blocks, as many as the mesh axis `run` has devices (one without a mesh): a block's rows
lie on its devices and belong to any of its runs. Dims: R runs, B rows of a block. `runs`, int32
[blocks, B], says for each row which run of its block it belongs to.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import BY_ROW, constrain, on_one_cpu


def of_each_row(values: Array, runs: Int[Array, "blocks B"]) -> Array:
    """[R, ...] to [blocks * B, ...]: for each row what its run has. Its gradient adds up the rows
    of each run (`sum_of_each_run`).
    """
    return (
        _of_each_row(values, runs)
        if jnp.issubdtype(values.dtype, jnp.floating)
        else _taken(values, runs)
    )


def _taken(values, runs):
    blocks = values.reshape(len(runs), -1, *values.shape[1:])
    rows = jax.vmap(lambda block, own: block.at[own].get(mode="promise_in_bounds"))(blocks, runs)
    return constrain(rows, BY_ROW, PartitionSpec.UNCONSTRAINED).reshape(-1, *values.shape[1:])


@jax.custom_vjp
def _of_each_row(values, runs):
    return _taken(values, runs)


def _of_each_row_bwd(residuals, d_rows):
    runs, count = residuals
    rows = constrain(
        d_rows.reshape(*runs.shape, *d_rows.shape[1:]), BY_ROW, PartitionSpec.UNCONSTRAINED
    )
    return sum_of_each_run(rows, runs, count), None


_of_each_row.defvjp(
    lambda values, runs: (_taken(values, runs), (runs, len(values))), _of_each_row_bwd
)


def sum_of_each_run(
    rows: Float[Array, "blocks B ..."], runs: Int[Array, "blocks B"], count: int
) -> Float[Array, "R ..."]:
    """The sum over each run's rows, for `count` runs: 0 for a run that has none. What is not finite
    stays in its run.

    On a CPU each row is added in its place; elsewhere each run reads all rows of its block, because
    accelerators add in place in no fixed order.
    """
    per_block = count // len(runs)

    def in_place(rows, runs):
        zeros = jnp.zeros((len(runs), per_block, *rows.shape[2:]), rows.dtype)
        return jax.vmap(
            lambda zero, own, of_rows: zero.at[own].add(of_rows, mode="promise_in_bounds")
        )(zeros, runs, rows)

    def by_reading(rows, runs):
        own = runs[:, None] == jnp.arange(per_block)[:, None]  # [blocks, runs of a block, B]
        return jnp.where(own.reshape(*own.shape, *(1,) * (rows.ndim - 2)), rows[:, None], 0).sum(
            axis=2
        )

    return on_one_cpu(in_place, by_reading, rows, runs).reshape(count, *rows.shape[2:])
