"""Weights from any file format into the params dict, one layer of one tensor in host memory at a
time.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ip_jax.models.families import DecoderConfig, ParamPath, param_shapes


class Tensor(Protocol):
    """What a reader returns: a numpy array, or anything that has its shape and reads a slice when
    indexed.
    """

    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


# read(path, layer) -> the array as it lies in params without the layer axis; layer is None outside
# "layers"
Reader = Callable[[ParamPath, int | None], Tensor]
ShardingOf = Callable[[ParamPath], NamedSharding]


def assemble(
    config: DecoderConfig, read: Reader, dtype, sharding: ShardingOf | None, origin: Path
) -> dict:
    """The params of `config`, filled from `read` and converted to `dtype`.

    A stacked array [L, ...] is made on its devices and filled in place (donated), layer by layer,
    so that beyond the target arrays the host holds at most one tensor. `sharding` names each
    array's place by its path; None is the default device. Each process of a multi-host run places
    only the part of every tensor that its own devices hold. Raises ValueError when `read` returns
    another shape than the config asks for; `origin` is the file or folder that it names.
    """

    def checked(path: ParamPath, layer: int | None, shape: tuple[int, ...]) -> Tensor:
        tensor = read(path, layer)
        check_shape(tensor, path, layer, shape, origin)
        return tensor

    params: dict = {}
    for path, shape in param_shapes(config).items():
        place = sharding(path) if sharding else None
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        if path[0] == "layers":
            branch[path[-1]] = _stack(
                lambda layer, path=path, shape=shape: checked(path, layer, shape[1:]),
                shape,
                dtype,
                place,
            )
        else:
            branch[path[-1]] = _put(checked(path, None, shape), dtype, place, {})
    return params


def check_shape(
    tensor: Tensor, path: ParamPath, layer: int | None, shape: tuple[int, ...], origin: Path
) -> None:
    """Raises ValueError, which names the tensor, if it has not this shape."""
    if tensor.shape != shape:
        where = path[-1] if layer is None else f"{path[-1]} of layer {layer}"
        raise ValueError(
            f"{origin}: the weights {where} have the shape {tensor.shape} where the model's config"
            f" asks for {shape}."
        )


def _stack(
    read_layer: Callable[[int], Tensor], shape: tuple[int, ...], dtype, place: NamedSharding | None
) -> jax.Array:
    if place is not None and place.spec and place.spec[0] is not None:
        raise ValueError(
            "The layer axis of a stacked array must not be sharded, but its sharding is"
            f" {place.spec}."
        )
    per_layer = place and NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    target = jnp.zeros(shape, dtype, device=place)
    buffers: dict[str, np.ndarray] = {}
    for layer in range(shape[0]):
        target = _fill(place)(target, layer, _put(read_layer(layer), dtype, per_layer, buffers))
        target.block_until_ready()  # the next layer is written into the same buffers
    return target


@functools.cache
def _fill(place: NamedSharding | None):
    """In place: the target is donated. One program for all arrays of a shape and sharding.

    A slice is updated, not scattered: of bfloat16 XLA:CPU scatters a tenth as fast.
    """

    def fill(target: jax.Array, layer: int, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(target, x, layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=place)


def _put(
    tensor: Tensor, dtype, place: Sharding | None, buffers: dict[str, np.ndarray]
) -> jax.Array:
    """The tensor on its devices, by way of one host buffer for each distinct piece, made here or by
    an earlier tensor of this shape.
    """
    written = set()  # devices that hold the same piece share one

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in written:
            source = tensor[index]
            if key not in buffers:
                buffers[key] = np.empty(source.shape, dtype)
            np.copyto(buffers[key], source, casting="unsafe")
            written.add(key)
        return buffers[key]

    everything = (slice(None),) * len(tensor.shape)
    return (
        jax.make_array_from_callback(tensor.shape, place, piece)
        if place
        else jnp.asarray(piece(everything))
    )
