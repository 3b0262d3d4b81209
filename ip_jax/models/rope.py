"""Rotary positions: tables of the angles, and the rotation of heads with its own backward pass.

Dims: R runs, B rows, T positions, K kv heads, G query heads of one kv head, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ip_jax.models.families import LinearScaling, Rope, RopeScaling
from ip_jax.models.placement import on_one_cpu
from ip_jax.models.products import product

Tables = tuple[Float[Array, "*rows 1 1 H"], Float[Array, "*rows 1 1 H"]]  # cos, sin


def rope_tables(positions: Int[Array, "*rows"], rope: Rope, head_dim: int) -> Tables:
    """(cos, sin) of the rotary angles in float32."""
    half = head_dim // 2
    frequency = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    match rope.scaling:
        case LinearScaling(factor):
            frequency = frequency / factor
        case RopeScaling() as scaling:
            wavelength = 2 * jnp.pi / frequency
            turns = scaling.original_max_positions / wavelength
            blend = (turns - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            frequency = frequency * (
                jnp.clip(blend, 0, 1) * (1 - 1 / scaling.factor) + 1 / scaling.factor
            )
    angle = positions[..., None, None, None].astype(jnp.float32) * jnp.tile(frequency, 2)
    return jnp.cos(angle), jnp.sin(angle)


@jax.custom_vjp
def apply_rope(x: Float[Array, "R B T K G H"], tables: Tables) -> Float[Array, "R B T K G H"]:
    """Rotates the two halves of each head (the convention of HF checkpoints). The tables get no
    gradient.
    """
    cos, sin = tables
    return (x * cos + _quarter_turn(x) * sin).astype(x.dtype)


def _quarter_turn(x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
    """(first, second half) -> (-second, first), exactly.

    On a CPU a product with a signed permutation: XLA takes a concatenation into the loops around
    it, which makes training 10 % slower.
    """
    half = x.shape[-1] // 2
    turn = np.kron([[0, 1], [-1, 0]], np.eye(half))

    def by_product(x):
        return product("...i,ij->...j", x, jnp.asarray(turn), x.dtype)

    def by_halves(x):
        return jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1).astype(jnp.float32)

    return on_one_cpu(by_product, by_halves, x)


def _rope_fwd(x, tables):
    return apply_rope(x, tables), tables


def _rope_bwd(tables, dy):
    cos, sin = tables
    return apply_rope(dy, (cos, -sin)), None


apply_rope.defvjp(_rope_fwd, _rope_bwd)
