"""Products of rows that are laid out by expert, as one Pallas kernel for GPUs, in place of the loop
over experts of `moe.py`.

Every chunk of rows has one expert (`moe.py` lays them out so). One program of the kernel multiplies
a tile of one chunk's rows with a tile of that expert's matrix; chunks of no expert cost nothing,
and their results have no meaning. On a CPU the kernel is interpreted (tests). Dims: P rows laid out
by expert, C rows of a chunk, E experts, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.families import DecoderConfig

# the largest tile of a result, and what is multiplied at once for it; by no measurement
ROWS, COLUMNS, DEPTH = 128, 128, 64
SMALLEST = 16  # of a tile in each direction: what tensor cores multiply
DTYPES = ("bfloat16", "float16")


def choose_experts(
    wanted: str, device: jax.Device, config: DecoderConfig, dtype: str, tensor: int = 1
) -> str:
    """How a mixture of experts is multiplied on the devices of a mesh, of which `device` is one:
    "auto" (XLA's products, see `moe.py`) or "pallas".

    `dtype`: of the weights; `tensor`: devices that a hidden dimension is cut over. Raises
    ValueError, saying why, where the kernel that is named cannot do it.
    """
    if wanted not in ("auto", "pallas"):
        raise ValueError(f"experts {wanted!r} is unknown: it is one of auto, pallas")
    if wanted == "auto":
        return wanted
    if not config.n_experts:
        raise ValueError(
            f"experts 'pallas' is for a mixture of experts, and {config.family} has none"
        )
    if device.platform != "gpu":
        raise ValueError(
            f"experts 'pallas' runs on a GPU, and the mesh is made of {device.platform.upper()}"
            " devices"
        )
    if dtype not in DTYPES:
        raise ValueError(f"experts 'pallas' works in {' or '.join(DTYPES)}, not in {dtype}")
    # what does not divide is not cut
    hidden = config.d_ff if config.d_ff % tensor else config.d_ff // tensor
    for name, size in (("width", config.d_model), ("hidden dimension of a device", hidden)):
        if size % SMALLEST:
            raise ValueError(
                f"experts 'pallas' needs a {name} that is a multiple of {SMALLEST}, not {size}"
            )
    return wanted


def product(
    x: Float[Array, "P I"], kernels: Float[Array, "E I O"], expert: Int[Array, " P//C"]
) -> Float[Array, "P O"]:
    """x @ the kernel of its chunk's expert, in float32. `expert`: of each chunk, E for a chunk of
    none.
    """
    return _multiplied(x, kernels, expert, transposed=False)


def transposed(
    d: Float[Array, "P O"], kernels: Float[Array, "E I O"], expert: Int[Array, " P//C"]
) -> Float[Array, "P I"]:
    """d @ the transposed kernel of its chunk's expert, in float32."""
    return _multiplied(d, kernels, expert, transposed=True)


def outer(
    x: Float[Array, "P I"],
    d: Float[Array, "P O"],
    start: Int[Array, " E"],
    end: Int[Array, " E"],
    chunk: int,
) -> Float[Array, "E I O"]:
    """x^T d over the rows of each expert, which are those from `start` to `end`, whole chunks; in
    float32.
    """
    from jax.experimental import pallas as pl

    (rows, inputs), outputs, n_experts = x.shape, d.shape[1], len(start)
    depth, tile = _tile(chunk, DEPTH), (_tile(inputs, ROWS), _tile(outputs, COLUMNS))

    def kernel(start_ref, end_ref, x_ref, d_ref, out_ref):
        first, last = start_ref[0], end_ref[0]

        def add(k, total):
            some = pl.ds(first + k * depth, depth)
            return total + jnp.dot(
                x_ref[some, :].T, d_ref[some, :], preferred_element_type=jnp.float32
            )

        out_ref[0] = jax.lax.fori_loop(
            0, (last - first) // depth, add, jnp.zeros(tile, jnp.float32)
        )

    of_expert = pl.BlockSpec((1,), lambda i, o, e: (e,))
    specs = [
        of_expert,
        of_expert,
        pl.BlockSpec((rows, tile[0]), lambda i, o, e: (0, i)),
        pl.BlockSpec((rows, tile[1]), lambda i, o, e: (0, o)),
    ]
    out = (
        jax.ShapeDtypeStruct((n_experts, inputs, outputs), jnp.float32),
        pl.BlockSpec((1, *tile), lambda i, o, e: (e, i, o)),
    )
    return _call(
        kernel, (inputs // tile[0], outputs // tile[1], n_experts), specs, *out, start, end, x, d
    )


def _multiplied(x, kernels, expert, *, transposed: bool):
    from jax.experimental import pallas as pl

    (rows, inner), n_experts = x.shape, len(kernels)
    columns, chunk = kernels.shape[1 if transposed else 2], rows // len(expert)
    tile, depth = (_tile(chunk, ROWS), _tile(columns, COLUMNS)), _tile(inner, DEPTH)
    of_chunk = chunk // tile[0]  # tiles

    def kernel(expert_ref, x_ref, kernels_ref, out_ref):
        number = expert_ref[0]

        @pl.when(number < n_experts)
        def _():
            def add(k, total):
                some = pl.ds(k * depth, depth)
                part = (
                    kernels_ref[number, :, some].T if transposed else kernels_ref[number, some, :]
                )
                return total + jnp.dot(x_ref[:, some], part, preferred_element_type=jnp.float32)

            out_ref[...] = jax.lax.fori_loop(0, inner // depth, add, jnp.zeros(tile, jnp.float32))

    if transposed:
        of_kernels = pl.BlockSpec((n_experts, tile[1], inner), lambda i, o: (0, o, 0))
    else:
        of_kernels = pl.BlockSpec((n_experts, inner, tile[1]), lambda i, o: (0, 0, o))
    specs = [
        pl.BlockSpec((1,), lambda i, o: (i // of_chunk,)),
        pl.BlockSpec((tile[0], inner), lambda i, o: (i, 0)),
        of_kernels,
    ]
    out = (
        jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        pl.BlockSpec(tile, lambda i, o: (i, o)),
    )
    return _call(kernel, (rows // tile[0], columns // tile[1]), specs, *out, expert, x, kernels)


def _tile(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(most, size & -size)


def _call(kernel, grid, in_specs, out_shape, out_specs, *arguments):
    # Imported here, so that nobody without such a model waits for Pallas.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def call(interpret: bool):
        params = triton.CompilerParams(num_warps=8, num_stages=3)
        return pl.pallas_call(
            kernel,
            out_shape,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            compiler_params=params,
            interpret=interpret,
        )

    return jax.lax.platform_dependent(*arguments, cpu=call(True), default=call(False))
