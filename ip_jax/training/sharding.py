"""Where every array of a training program lies: a mesh with the axes run, data and tensor, and one table of rules.

Base weights are cut over all axes, so that no device holds a whole one; a layer is gathered over (run, data) when it is used.
Adapters, their Adam state and per-run scalars follow their run. Rows of a batch lie on (run, data).
"""
import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ip_jax.models.families import DecoderConfig, ParamPath, param_shapes
from ip_jax.training.state import TrainState

AXES = ("run", "data", "tensor")
FSDP = ("run", "data")

# (pattern of the parameter's path, mesh axes of each dimension); the first match counts, and L is never cut.
RULES = (
    (r"^embed", (AXES, None)),  # [V, D]: the vocabulary product stays where its rows lie
    (r"^head", (None, AXES)),  # [D, V]
    (r"norm", ()),  # [D] or [L, D]: too small to be worth a message
    (r"layers/[qkv](_|/)bias", (None, "tensor")),  # [L, out]
    (r"layers/(q|k|v|gate|up)\b", (None, FSDP, "tensor")),  # [L, in, out]
    (r"layers/(o|down)\b", (None, "tensor", FSDP)),  # [L, in, out]
)


def make_mesh(run: int = 1, data: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
    """A mesh over the first run * data * tensor devices, of `devices` or of this program. Raises ValueError where there are fewer."""
    devices = jax.devices() if devices is None else devices
    needed = run * data * tensor
    if needed > len(devices) or min(run, data, tensor) < 1:
        raise ValueError(f"a mesh of run={run}, data={data}, tensor={tensor} needs {needed} devices, and this program has {len(devices)}")
    return jax.make_mesh((run, data, tensor), AXES, devices=devices[:needed], axis_types=(AxisType.Auto,) * len(AXES))


def base_shardings(mesh: Mesh, base_state):
    """`base_state` (the frozen state of `split_decoder`, or a params dict) with a NamedSharding in place of each array."""
    return jax.tree.map_with_path(
        lambda path, x: _by_rule(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), x.shape), base_state
    )


def param_shardings(mesh: Mesh, config: DecoderConfig) -> Callable[[ParamPath], NamedSharding]:
    """The same by the path of a parameter, before the weights are there: what `load_pretrained` takes."""
    shapes = param_shapes(config)
    return lambda path: _by_rule(mesh, "/".join(path), shapes[path])


def state_shardings(mesh: Mesh, train_state: TrainState) -> TrainState:
    """`train_state` with a NamedSharding in place of each array: all follow their run, but for the step count."""
    by_run = jax.tree.map(lambda x: _fitting(mesh, ("run",), x.shape), train_state.replace(step=None))
    return by_run.replace(step=NamedSharding(mesh, PartitionSpec()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For every array [M, R, B, ...] of a Batch: R and B must be multiples of the axes run and data."""
    return NamedSharding(mesh, PartitionSpec(None, "run", "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _by_rule(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    for pattern, axes in RULES:
        if re.search(pattern, path):
            return _fitting(mesh, axes, shape)
    raise ValueError(f"no sharding rule matches the parameter {path}: add one to RULES in {__name__}")


def _fitting(mesh: Mesh, axes: tuple, shape: tuple[int, ...]) -> NamedSharding:
    """The rule's axes less those that do not divide their dimension."""
    spec = []
    for wanted, size in zip(axes, shape):  # noqa: B905  trailing dimensions without a rule are whole
        kept = ()
        for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
            if size % mesh.shape[axis] == 0:
                kept, size = (*kept, axis), size // mesh.shape[axis]
        spec.append(kept or None)
    return NamedSharding(mesh, PartitionSpec(*spec))
