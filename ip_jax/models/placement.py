"""Where arrays lie on a mesh: a constraint for the partitioner, and nothing where there is no mesh.
What the processor under it can do.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

# mesh axes of the first two dimensions of a batch: runs, or blocks of them, and rows
BY_ROW = ("run", "data")
EVERYWHERE = ()
# of the rows of embeddings and heads, and of logits where each device makes its part of them
VOCABULARY = ("run", "data", "tensor")
FSDP = ("run", "data")
# of gate and up maps [E, D, F]: experts over the axes that divide E, the width over the others
EXPERTS_IN = (FSDP, FSDP, "tensor")
EXPERTS_OUT = (FSDP, "tensor", FSDP)  # of down maps [E, F, D]


def fitting(sizes: Mapping[str, int], axes: tuple, shape: tuple[int, ...]) -> PartitionSpec:
    """The wanted mesh axes of each dimension less those that do not divide it; an axis wanted twice
    goes to the first that it divides.
    """
    spec, taken = [], set()
    for wanted, size in zip(axes, shape):  # noqa: B905  trailing dimensions without a rule are whole
        kept = ()
        for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
            if axis not in taken and size % sizes[axis] == 0:
                kept, size = (*kept, axis), size // sizes[axis]
        taken |= set(kept)
        spec.append(kept or None)
    return PartitionSpec(*spec)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, which keeps a single one without its tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def constrain(x: Array, axes: tuple, others=None) -> Array:
    """`x` with its leading dimensions cut over these axes of the mesh in context (a name, several,
    or None), where they divide them, and the others whole (or PartitionSpec.UNCONSTRAINED); without
    a mesh, `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(*fitting(mesh.shape, axes, x.shape), *(others,) * (x.ndim - len(axes)))
    )


def each_its_rows(function: Callable, *arrays: Array):
    """function(*arrays) of arrays [R, B, ...] to arrays [R, B, ...], which treats rows apart: on a
    mesh each device computes its own (the same ones along an axis that does not cut them), and the
    function sends nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays)
    rows = fitting(mesh.shape, BY_ROW, arrays[0].shape)
    # branches of cond may vary or not
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)


def on_one_cpu(there, elsewhere, *arguments):
    """there(*arguments) where a single CPU runs the program, elsewhere(*arguments) on accelerators
    and on meshes of several devices.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return elsewhere(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=there, default=elsewhere)


@functools.cache
def cpu_multiplies_bfloat16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether Linux lists bfloat16 instructions among the flags of an x86 processor. Of others it
    is not known: False.
    """
    listed = (
        re.search(r"^flags\s*:(.*)$", Path(cpuinfo).read_text(), re.MULTILINE)
        if Path(cpuinfo).exists()
        else None
    )
    return listed is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(listed[1].split())
