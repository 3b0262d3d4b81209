"""The card, and random weights made on it: nothing is downloaded, and speed does not depend on
values.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.gpu.sizes import Sizes
from ip_jax.models.families import DecoderConfig, param_shapes
from ip_jax.training.sharding import make_mesh, param_shardings


def card(sizes: Sizes) -> dict:
    """{"device": its name, "memory_gib": what JAX may take of it, None where it does not say}.
    Raises ValueError where it is no GPU and has to be.
    """
    device = one_device(sizes).devices.flat[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {"device": device.device_kind, "memory_gib": limit and round(limit / 2**30, 1)}


def one_device(sizes: Sizes) -> Mesh:
    """The mesh of the first device."""
    mesh = make_mesh()
    found = mesh.devices.flat[0].platform
    if sizes.platform not in (None, found):
        raise ValueError(
            f"these benchmarks need a {sizes.platform.upper()}, and JAX sees a {found.upper()}:"
            " --tiny tries their code anywhere"
        )
    return mesh


def random_params(config: DecoderConfig, dtype: str, mesh: Mesh) -> dict:
    """The params of `config`: normal with deviation 0.02, norms 1. A layer at a time, so that
    making them takes no more memory than they do.
    """
    place, params = param_shardings(mesh, config), {}
    for i, (path, shape) in enumerate(param_shapes(config).items()):
        branch = functools.reduce(lambda tree, name: tree.setdefault(name, {}), path[:-1], params)
        make = functools.partial(
            _random, shape=shape, dtype=dtype, stacked=path[0] == "layers", norm="norm" in path[-1]
        )
        branch[path[-1]] = jax.jit(make, out_shardings=place(path))(jax.random.key(i))
    return jax.block_until_ready(params)


def _random(key, shape: tuple[int, ...], dtype: str, stacked: bool, norm: bool):
    if norm:
        return jnp.ones(shape, dtype)

    def draw(key, shape):
        return (0.02 * jax.random.normal(key, shape, jnp.dtype(dtype))).astype(dtype)

    return (
        jax.lax.map(lambda key: draw(key, shape[1:]), jax.random.split(key, shape[0]))
        if stacked
        else draw(key, shape)
    )
