"""The GGUF container: metadata and tensors of a file, read without a loop over the library's
objects, and tensors dequantised in blocks.

Layout: ggml's docs/gguf.md. Block sizes and the formulas of dequantisation are the gguf library's.
"""

import functools
import math
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_BLOCK = 1 << 19  # values dequantised at a time: their float32 temporaries stay in a core's cache


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it lies in the file. `data`: uint8 [..., bytes of a row]; `shape`: of its
    values.
    """

    data: np.ndarray
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]

    def values(self, dtype) -> np.ndarray:
        """Dequantised to float32 in blocks of rows, by all cores, and converted to `dtype`. Raises
        NotImplementedError for a quantisation that the gguf library cannot read.
        """
        from gguf import dequantize

        rows = self.data.reshape(-1, self.data.shape[-1])
        found = np.empty((len(rows), self.shape[-1]), dtype)
        step = max(1, _BLOCK // self.shape[-1])

        def fill(first: int) -> None:
            found[first : first + step] = dequantize(rows[first : first + step], self.kind)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(fill, range(0, len(rows), step)))
        return found.reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """An opened file: metadata values by key, and its tensors (memory-mapped, still quantised) by
    name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(path: Path | str) -> GgufFile:
    """Reads the metadata and maps the tensors; a file is read again only when it has changed.
    Raises ValueError where it is not a complete GGUF file.
    """
    path = Path(path)
    found = path.stat()
    return _read(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> GgufFile:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    try:
        return _parsed(path, mapped)
    except (struct.error, UnicodeDecodeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a complete GGUF file ({error}); fetch it again."
        ) from error


def _parsed(path: Path, mapped) -> GgufFile:
    if mapped[:4] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    cursor = _Cursor(mapped, 4)
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, and 2 and 3 are known")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.text(): cursor.value() for _ in range(key_count)}
    described = [_Described.read(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-cursor.place // alignment) * alignment
    return GgufFile(path, metadata, {d.name: d.tensor(mapped, start) for d in described})


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data, place: int):
        self.data, self.place = data, place

    def scalar(self, code: str):
        (value,) = struct.unpack_from(f"<{code}", self.data, self.place)
        self.place += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        return self._bytes(length).decode()

    def _bytes(self, length: int) -> bytes:
        end = self.place + length
        if end > len(self.data):
            raise ValueError("it ends in the middle of a text")
        found = self.data[self.place : end]
        self.place = end
        return found

    def value(self):
        """A value of the metadata, which begins with its kind."""
        kind = self.scalar("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return list(self._texts(count))
        found = np.frombuffer(self.data, np.dtype(f"<{_SCALARS[kind]}"), count, self.place)
        self.place += found.nbytes
        return found.tolist()

    def _texts(self, count: int) -> Iterator[str]:
        """Some hundred thousand of them: nothing is looked up in the loop."""
        data, place, unpack = self.data, self.place, struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = unpack(data, place)
            place += 8
            yield data[place : place + length].decode()
            place += length
        self.place = place


@dataclass(frozen=True)
class _Described:
    """What stands of a tensor before the data; `offset` from where the data begin."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor) -> "_Described":
        name, dims = cursor.text(), cursor.scalar("I")
        shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
        return cls(name, shape, cursor.scalar("I"), cursor.scalar("Q"))

    def tensor(self, mapped, start: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType(self.kind)
        values_of_block, bytes_of_block = GGML_QUANT_SIZES[kind]
        size = math.prod(self.shape) // values_of_block * bytes_of_block
        data = np.frombuffer(mapped, np.uint8, size, start + self.offset)
        return GgufTensor(data.reshape(*self.shape[:-1], -1), kind, self.shape)
