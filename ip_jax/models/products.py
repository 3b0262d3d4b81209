"""The matrix products of a layer, summed in float32, with their backward passes written out.

Products with base weights run in the weights' dtype and come out in it; attention takes it from there. What belongs to a run (LoRA)
is in the activations' dtype, on a single CPU in the weights' too. A CPU with bfloat16 instructions makes products of bfloat16
twice as fast as float32 ones, as long as the result is asked for in float32; XLA:CPU has no such product with batch dimensions in every layout.
The backward passes keep this form (autodiff would mix dtypes) and keep the narrow LoRA
matrix on the side that must be transposed: transposing wide activations costs more than the products.
"""
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ip_jax.models.placement import on_one_cpu

KEPT = "product"  # what the backward pass keeps of a layer by default: results of products; all else is cheap to make again


def product(spec: str, a: Array, b: Array, dtype) -> Array:
    """einsum of two arrays cast to `dtype`, summed and returned in float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def as_bits(tree):
    """bfloat16 leaves as integers, for loops that take slices of them: XLA:CPU slices bfloat16 through a float32 copy of the whole."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a, tree)


def from_bits(tree):
    """The inverse of `as_bits`."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def kept(x: Array, dtype) -> Array:
    """x in `dtype`, kept for the backward pass."""
    return keep(x, dtype)


def keep(x: Array, dtype) -> Array:
    """`kept` for use within a written-out forward pass (it has no gradient)."""
    return from_bits(checkpoint_name(as_bits(x.astype(dtype)), KEPT))


kept.defvjp(lambda x, dtype: (keep(x, dtype), jnp.zeros((), x.dtype)), lambda dtype, like, dy: (dy.astype(like.dtype),))


@jax.custom_vjp
def base_product(x: Float[Array, "R B T I"], kernel: Float[Array, "I O"]) -> Float[Array, "R B T O"]:
    """x @ kernel as one product over R*B*T rows, in float32."""
    return product("rbti,io->rbto", x, kernel, kernel.dtype)


def _base_fwd(x, kernel):
    return base_product(x, kernel), (x, kernel)


def _base_bwd(residuals, dy):
    x, kernel = residuals
    dx = product("rbto,io->rbti", dy, kernel, kernel.dtype).astype(x.dtype)
    d_kernel = product("rbti,rbto->io", x, dy, kernel.dtype).astype(kernel.dtype)  # dead code while the base is frozen
    return dx, d_kernel


base_product.defvjp(_base_fwd, _base_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lora_product(x: Float[Array, "R B T I"], a: Float[Array, "R I r"], b: Float[Array, "R r O"], base_dtype) -> Float[Array, "R B T O"]:
    """(x @ a_r) @ b_r for each run, with the scale already in b, in float32 (see `run_product`)."""
    return _lora_fwd(x, a, b, base_dtype)[0]


def run_product(spec: str, a: Array, b: Array, base_dtype) -> Array:
    """`product` of arrays that both begin with the run axis: one batched product in a's dtype; on a CPU one for each run, in the
    base weights' dtype, because there the batched one is up to three times as slow and has no bfloat16 form.
    """

    def one_by_one(a, b):
        return jnp.stack([product(spec.replace("r", ""), *run, base_dtype) for run in zip(a, b, strict=True)])

    return on_one_cpu(one_by_one, lambda a, b: product(spec, a, b, a.dtype), a, b)


def _lora_fwd(x, a, b, base_dtype):
    low = checkpoint_name(run_product("rbti,rik->rbtk", x, a, base_dtype), KEPT)
    return run_product("rbtk,rko->rbto", low, b, base_dtype), (x, low, a, b)


def _lora_bwd(base_dtype, residuals, dy):
    x, low, a, b = residuals
    d_low = run_product("rbto,rko->rbtk", dy, b, base_dtype)
    dx = run_product("rbtk,rik->rbti", d_low, a, base_dtype)
    da = jnp.swapaxes(run_product("rbtk,rbti->rki", d_low, x, base_dtype), 1, 2).astype(a.dtype)
    db = run_product("rbtk,rbto->rko", low, dy, base_dtype).astype(b.dtype)
    return dx.astype(x.dtype), da, db


lora_product.defvjp(_lora_fwd, _lora_bwd)
