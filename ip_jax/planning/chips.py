"""The devices that a topology's name stands for."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ip_jax.models.chips import CHIPS, Chip, chip_of
from ip_jax.training.sharding import AXES, make_mesh

TPUS = ("v5e", "v5p", "v6e")
EXAMPLES = (
    "v5e:4x4, v5p:2x2x1, v5p:4x4x4, v6e:2x4 (compiled), h200:1, h100:8, a100:8 (by formula alone),"
    " local (this machine's devices)"
)
LIBTPU = (
    'compiling for a TPU needs libtpu, which is not installed here: pip install "jax[tpu]" (no TPU'
    " is needed)"
)
# libtpu, asked for a compiler alone: no questions to the network about this machine (any type will
# do), no lock against other processes
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Accelerators to plan for. `devices` is None where this machine has no compiler for them;
    `chip` is None where nothing is published.
    """

    name: str
    count: int
    chip: Chip | None
    devices: Sequence | None

    @property
    def platform(self) -> str:
        """jax's name of the devices' kind. Where this machine has no compiler for them, they are
        GPUs.
        """
        return self.devices[0].platform if self.devices is not None else "gpu"

    def mesh(self, run: int, data: int, tensor: int):
        """The mesh over all devices (`sharding.mesh_sizes`): a real one to compile for, or an
        abstract one whose shardings tell the sizes of pieces.
        """
        if self.devices is not None:
            return make_mesh(run, data, tensor, self.devices)
        kind = AbstractDevice(self.chip.name, None, "gpu")
        return AbstractMesh(
            (run, data, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=kind
        )


def read_topology(name: str) -> Topology:
    """The topology of a name like v5e:4x4, h200:1 or local. Raises ValueError with what is known,
    and without libtpu with how to install it.
    """
    if name == "local":
        devices = jax.devices()
        return Topology(name, len(devices), chip_of(devices[0].device_kind), devices)
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", name)
    if not found or found.group(1) not in CHIPS:
        near = difflib.get_close_matches(name.partition(":")[0], CHIPS, n=1)
        raise ValueError(
            f"no topology is called {name!r}:"
            f" {f'did you mean {near[0]}:...? ' if near else ''}known are {EXAMPLES}"
        )
    chip, dims = CHIPS[found.group(1)], [int(n) for n in found.group(2).split("x")]
    if chip.name not in TPUS:
        if len(dims) > 1 or not dims[0]:
            raise ValueError(
                f"the topology {name!r} must give the number of GPUs, like {chip.name}:8"
            )
        return Topology(name, dims[0], chip, None)
    return Topology(name, math.prod(dims), chip, _tpu_devices(name, dims))


def _tpu_devices(name: str, dims: list[int]) -> Sequence:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(LIBTPU)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(dims) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **one_chip).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu knows no topology {name!r} ({str(error).splitlines()[0]}); known are"
            f" {EXAMPLES}"
        ) from error
