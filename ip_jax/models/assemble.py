"""Weights from any file format into the params dict, one layer of one tensor in host memory at a time."""
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ip_jax.models.families import DecoderConfig, Path, param_shapes


class Tensor(Protocol):
    """What a reader returns: a numpy array, or anything that has its shape and reads a slice when indexed."""

    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


# read(path, layer) -> the array as it lies in params without the layer axis; layer is None outside "layers"
Reader = Callable[[Path, int | None], Tensor]
ShardingOf = Callable[[Path], NamedSharding]


def assemble(config: DecoderConfig, read: Reader, dtype, sharding: ShardingOf | None = None) -> dict:
    """The params of `config`, filled from `read` and converted to `dtype`.

    A stacked array [L, ...] is made on its devices and filled in place (donated), layer by layer, so that beyond the target
    arrays the host holds at most one tensor. `sharding` names each array's place by its path; None is the default device.
    Each process of a multi-host run places only the part of every tensor that its own devices hold.
    Raises ValueError when `read` returns another shape than the config asks for.
    """
    params: dict = {}
    for path, shape in param_shapes(config).items():
        place = sharding(path) if sharding else None
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        if path[0] == "layers":
            branch[path[-1]] = _stack(lambda layer, path=path: read(path, layer), shape, dtype, place)
        else:
            branch[path[-1]] = _put(read(path, None), shape, dtype, place)
    return params


def _stack(read_layer: Callable[[int], Tensor], shape: tuple[int, ...], dtype, place: NamedSharding | None) -> jax.Array:
    if place is not None and place.spec and place.spec[0] is not None:
        raise ValueError(f"The layer axis of a stacked array must not be sharded, but its sharding is {place.spec}.")
    per_layer = place and NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    target = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()
    fill = jax.jit(lambda target, layer, x: target.at[layer].set(x), donate_argnums=0, out_shardings=place)
    for layer in range(shape[0]):
        target = fill(target, layer, _put(read_layer(layer), shape[1:], dtype, per_layer))
    return target


def _put(tensor: Tensor, shape: tuple[int, ...], dtype, place: Sharding | None) -> jax.Array:
    if tensor.shape != shape:
        raise ValueError(f"A tensor has the shape {tensor.shape} where the model's config asks for {shape}.")
    place = place or SingleDeviceSharding(jnp.zeros(()).device)
    return jax.make_array_from_callback(shape, place, lambda index: np.ascontiguousarray(tensor[index].astype(dtype, copy=False)))
