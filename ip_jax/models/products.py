"""The matrix products of a layer, summed in float32, with their backward passes written out.

Products with base weights run in the weights' dtype and come out in it; attention takes it from
there. What belongs to a run (LoRA) is in the activations' dtype, on a single CPU in the weights'
too. A CPU with bfloat16 instructions makes products of bfloat16 twice as fast as float32 ones, as
long as the result is asked for in float32; XLA:CPU has no such product with batch dimensions in
every layout. The backward passes keep this form (autodiff would mix dtypes) and keep the narrow
LoRA matrix on the side that must be transposed: transposing wide activations costs more than the
products.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ip_jax.models.placement import on_one_cpu
from ip_jax.models.quantised import dense, is_quantised
from ip_jax.models.remat import KEPT

# from how many rows on, and below how many columns, a CPU's products are rearranged as below
MANY_ROWS, NARROW = 256, 512
# up to how many runs, or rows that lie side by side, a product is written out for each: more of
# them take minutes to compile
FEW_RUNS = 12


def product(spec: str, a: Array, b: Array, dtype) -> Array:
    """einsum of two arrays cast to `dtype`, summed and returned in float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def row_sum(x: Float[Array, "*rows N"]) -> Float[Array, "*rows 1"]:
    """Sum over the last axis; on a CPU a product with ones, because there XLA is 15 times slower at
    a sum of what it makes as it goes.
    """
    return on_one_cpu(
        lambda x: jnp.dot(x, jnp.ones((x.shape[-1], 1), x.dtype)),
        lambda x: x.sum(axis=-1, keepdims=True),
        x,
    )


def as_bits(tree):
    """bfloat16 leaves as integers, for loops that take slices of them: XLA:CPU slices bfloat16
    through a float32 copy of the whole.
    """
    return jax.tree.map(
        lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a,
        tree,
    )


def from_bits(tree):
    """The inverse of `as_bits`."""
    return jax.tree.map(
        lambda a: jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a,
        tree,
    )


def entry(stack, index: Int[Array, ""]):
    """Entry `index` of each leaf [L, ...] of a stack, for loops without a gradient. On a CPU as
    bits, and the bits behind a barrier: else XLA makes those of the whole stack before the loop.
    """

    def at(stack, index):
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)

    def as_bits_at(stack, index):
        stack, index = jax.lax.optimization_barrier((stack, index))
        return from_bits(at(as_bits(stack), index))

    return on_one_cpu(as_bits_at, at, stack, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def kept(x: Array, dtype) -> Array:
    """x in `dtype`, kept for the backward pass."""
    return keep(x, dtype)


def keep(x: Array, dtype, name: str = KEPT) -> Array:
    """`kept` for use within a written-out forward pass (it has no gradient)."""
    return from_bits(checkpoint_name(as_bits(x.astype(dtype)), name))


kept.defvjp(
    lambda x, dtype: (keep(x, dtype), jnp.zeros((), x.dtype)),
    lambda dtype, like, dy: (dy.astype(like.dtype),),
)


@jax.custom_vjp
def base_products(
    x: Float[Array, "R B T I"], kernels: tuple[Float[Array, "I O"], ...]
) -> tuple[Float[Array, "R B T O"], ...]:
    """x @ kernel for maps of one input, each a product over R*B*T rows, in float32. Quantised
    kernels are made dense here, and again in the backward pass.

    On a CPU one product over the columns of all where they are narrow: together they are wide
    enough for its full speed.
    """

    def together(x, kernels):
        ends = list(itertools.accumulate(kernel.shape[1] for kernel in kernels))
        return tuple(
            jnp.split(
                product("rbti,io->rbto", x, jnp.concatenate(kernels, axis=1), kernels[0].dtype),
                ends[:-1],
                axis=-1,
            )
        )

    def each(x, kernels):
        return tuple(product("rbti,io->rbto", x, kernel, kernel.dtype) for kernel in kernels)

    kernels = tuple(map(dense, kernels))
    return on_one_cpu(together, each, x, kernels) if _merging_pays(x, kernels) else each(x, kernels)


def _base_fwd(x, kernels):
    return base_products(x, kernels), (x, kernels)


def _base_bwd(residuals, dys):
    x, given = residuals
    kernels = tuple(map(dense, given))
    dtype = kernels[0].dtype

    def together(dys, kernels):
        side_by_side = from_bits(
            jnp.concatenate(as_bits([dy.astype(dtype) for dy in dys]), axis=-1)
        )
        return product("rbto,io->rbti", side_by_side, jnp.concatenate(kernels, axis=1), dtype)

    def each(dys, kernels):
        return sum(
            product("rbto,io->rbti", dy, kernel, dtype)
            for dy, kernel in zip(dys, kernels, strict=True)
        )

    dx = (
        on_one_cpu(together, each, dys, kernels)
        if _merging_pays(x, kernels)
        else each(dys, kernels)
    )
    # dead code while the base is frozen, as a quantised one always is
    d_kernels = tuple(
        None if is_quantised(kernel) else product("rbti,rbto->io", x, dy, dtype).astype(dtype)
        for kernel, dy in zip(given, dys, strict=True)
    )
    return dx.astype(x.dtype), d_kernels


def _merging_pays(x, kernels) -> bool:
    """Laying kernels side by side copies them, and their results in the backward pass: that pays
    for narrow ones and many rows.
    """
    return (
        len(kernels) > 1
        and x.size // x.shape[-1] >= MANY_ROWS
        and min(kernel.shape[1] for kernel in kernels) < NARROW
    )


base_products.defvjp(_base_fwd, _base_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lora_products(
    x: Float[Array, "N B T I"],
    downs: tuple[Float[Array, "N I r"], ...],
    ups: tuple[Float[Array, "N r O"], ...],
    base_dtype,
) -> tuple[Float[Array, "N B T O"], ...]:
    """(x @ a_n) @ b_n for each run (or row) and each adapter (a in `downs`, b in `ups`, the scale
    already in b), in float32 (see `run_product`).
    """
    return _lora_fwd(x, downs, ups, base_dtype)[0]


def run_product(spec: str, a: Array, b: Array, base_dtype) -> Array:
    """`product` of arrays that both begin with an axis of runs, or of rows with an adapter each:
    one batched product in a's dtype; on a CPU, for many positions of few of them, one for each, in
    the base weights' dtype, because there the batched one is up to three times as slow and has no
    bfloat16 form.
    """

    def one_by_one(a, b):
        return jnp.stack(
            [product(spec.replace("r", ""), *run, base_dtype) for run in zip(a, b, strict=True)]
        )

    def together(a, b):
        return product(spec, a, b, a.dtype)

    apart = a[0].size // a.shape[-1] >= MANY_ROWS and len(a) <= FEW_RUNS
    return on_one_cpu(one_by_one, together, a, b) if apart else together(a, b)


def _lora_fwd(x, downs, ups, base_dtype):
    low = checkpoint_name(
        run_product("rbti,rik->rbtk", x, jnp.concatenate(downs, axis=-1), base_dtype), KEPT
    )
    lows = jnp.split(low, len(ups), axis=-1)
    return tuple(
        run_product("rbtk,rko->rbto", low, up, base_dtype)
        for low, up in zip(lows, ups, strict=True)
    ), (x, low, downs, ups)


def _lora_bwd(base_dtype, residuals, dys):
    x, low, downs, ups = residuals
    d_low = jnp.concatenate(
        [
            run_product("rbto,rko->rbtk", dy, up, base_dtype)
            for dy, up in zip(dys, ups, strict=True)
        ],
        axis=-1,
    )
    dx = run_product("rbtk,rik->rbti", d_low, jnp.concatenate(downs, axis=-1), base_dtype)
    d_downs = jnp.swapaxes(run_product("rbtk,rbti->rki", d_low, x, base_dtype), 1, 2).astype(
        downs[0].dtype
    )
    lows = jnp.split(low, len(ups), axis=-1)
    d_ups = tuple(
        run_product("rbtk,rbto->rko", low, dy, base_dtype).astype(ups[0].dtype)
        for low, dy in zip(lows, dys, strict=True)
    )
    return dx.astype(x.dtype), tuple(jnp.split(d_downs, len(downs), axis=-1)), d_ups


lora_products.defvjp(_lora_fwd, _lora_bwd)
