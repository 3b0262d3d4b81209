"""Weights that were dequantised once, kept on disk in the dtype in use: later loads read them as
they are.

A copy is a safetensors file of the params by dotted path, with the stacked arrays of all layers. It
is named after the hash of the file that it was made from, the dtype and FORMAT.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy
import numpy as np

from ip_jax.models.assemble import Reader
from ip_jax.models.families import DecoderConfig, ParamPath, param_shapes

FORMAT = 1
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIGNMENT = 64


def copy_path(folder: Path, fingerprint: str, dtype: str) -> Path:
    """Where the copy lies of the file with this hash."""
    return folder / f"{fingerprint.removeprefix('sha256:')[:16]}-{dtype}-v{FORMAT}.safetensors"


def has_room(folder: Path, config: DecoderConfig, dtype: str) -> bool:
    """Whether a copy leaves at least as much free as it takes."""
    return shutil.disk_usage(folder).free > 2 * sum(_sizes(config, dtype).values())


def write_copy(path: Path, config: DecoderConfig, read: Reader, dtype: str) -> None:
    """Writes what `read` gives, one tensor of one layer at a time; the file is whole or absent."""
    sizes = _sizes(config, dtype)
    offsets, place = {}, 0
    for name, shape in _shapes(config).items():
        span = [place, place + sizes[name]]
        offsets[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": span}
        place = span[1]
    header = json.dumps(offsets).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in _arrays(config, read):
                file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _arrays(config: DecoderConfig, read: Reader) -> Iterator[np.ndarray]:
    """Every array in the order of the copy, stacked ones layer by layer."""
    for path, shape in param_shapes(config).items():
        layers = range(shape[0]) if path[0] == "layers" else [None]
        for layer in layers:
            tensor = read(path, layer)
            yield tensor[(slice(None),) * len(tensor.shape)]


def copy_reader(path: Path, config: DecoderConfig, dtype: str) -> Reader:
    """Reads one array (of one layer) of a copy at a time; each is mapped while it is in use, so
    that only what is being read counts as this process's memory.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    first = 8 + length

    def read(of: ParamPath, layer: int | None) -> np.ndarray:
        found = header[".".join(of)]
        shape, begin = tuple(found["shape"]), first + found["data_offsets"][0]
        if layer is not None:
            shape = shape[1:]
            begin += layer * math.prod(shape) * np.dtype(dtype).itemsize
        return np.memmap(path, dtype, "r", begin, shape)

    return read


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return {".".join(path): shape for path, shape in param_shapes(config).items()}


def _sizes(config: DecoderConfig, dtype: str) -> dict[str, int]:
    """Bytes of each array."""
    item = np.dtype(dtype).itemsize
    return {name: math.prod(shape) * item for name, shape in _shapes(config).items()}
