"""Where every array of a training program lies: a mesh with the axes run, data and tensor, and one
table of rules.

Base weights are cut over all axes, so that no device holds a whole one; a layer is gathered over
(run, data) when it is used. Weights that are trained in full, and their Adam state, lie as base
weights do. Adapters, theirs and per-run scalars follow their run. Rows of a batch lie on (run,
data).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ip_jax.models.families import DecoderConfig, ParamPath, param_shapes
from ip_jax.models.placement import EXPERTS_IN, EXPERTS_OUT, FSDP, VOCABULARY, constrain, fitting
from ip_jax.training.state import TrainState

AXES = ("run", "data", "tensor")

# (pattern of the parameter's path, mesh axes of each dimension); the first match counts, and L is
# never cut. An axis that does not divide its dimension is left to the next dimension that names it,
# or dropped.
RULES = (
    (r"^embed", (VOCABULARY, None)),  # [V, D]: the vocabulary product stays where its rows lie
    (r"^head", (None, VOCABULARY)),  # [D, V]
    (r"norm", ()),  # [D] or [L, D]: too small to be worth a message
    (r"layers/[qkv](_|/)bias", (None, "tensor")),  # [L, out]
    (r"layers/router\b", ()),  # [L, D, E]
    (r"layers/expert_(gate|up)\b", (None, *EXPERTS_IN)),  # [L, E, D, F]
    (r"layers/expert_down\b", (None, *EXPERTS_OUT)),  # [L, E, F, D]
    (r"layers/(q|k|v|gate|up)\b", (None, FSDP, "tensor")),  # [L, in, out]
    (r"layers/(o|down)\b", (None, "tensor", FSDP)),  # [L, in, out]
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; None, for at most one of them, is what the others
    leave.

    `platform` is what the devices must be (cpu, gpu, tpu), None for whatever is there.
    """

    run: int | None = 1
    data: int | None = None
    tensor: int | None = 1
    platform: str | None = None

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(None) > 1 or any(size is not None and size < 1 for size in sizes):
            raise ValueError(
                f"the mesh is {self._words()}: each axis needs at least 1 device, and one of them"
                " may be None, which takes what the others leave"
            )

    def _words(self) -> str:
        return ", ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)


def mesh_sizes(config: MeshConfig, devices: Sequence, n_heads: int) -> dict[str, int]:
    """{axis: devices} of the mesh that `config` asks for, over all of `devices`, for a model with
    `n_heads` heads.

    Raises ValueError where the devices are of another platform, or the axes do not divide their
    number or the heads.
    """
    found = sorted({device.platform for device in devices})
    if config.platform is not None and found != [config.platform]:
        raise ValueError(
            f"the config demands the platform {config.platform!r} (mesh.platform), and this"
            f" machine's devices are {', '.join(found)}"
        )
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = math.prod(size for size in sizes.values() if size)
    rest, over = divmod(len(devices), given)
    if over or (None not in sizes.values() and rest != 1):
        raise ValueError(
            f"a mesh of {config._words()} does not divide the {len(devices)} devices of this"
            " program: make one axis None to use them all"
        )
    sizes = {axis: size or rest for axis, size in sizes.items()}
    if n_heads % sizes["tensor"]:
        raise ValueError(
            f"a mesh of {config._words()} has tensor={sizes['tensor']}, which does not divide the"
            f" model's {n_heads} heads"
        )
    return sizes


def make_mesh(
    run: int = 1, data: int = 1, tensor: int = 1, devices: Sequence | None = None
) -> Mesh:
    """A mesh over the first run * data * tensor devices, of `devices` or of this program. Raises
    ValueError where there are fewer.
    """
    devices = jax.devices() if devices is None else devices
    needed = run * data * tensor
    if needed > len(devices) or min(run, data, tensor) < 1:
        raise ValueError(
            f"a mesh of run={run}, data={data}, tensor={tensor} needs {needed} devices, and this"
            f" program has {len(devices)}"
        )
    # not jax.make_mesh: on a TPU it refuses run=2 for a torus of 4x4x4, and other axes that are a
    # part of a physical one
    placed = mesh_utils.create_device_mesh(
        (run, data, tensor), devices[:needed], allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_for(mesh: Mesh | AbstractMesh, runs: int) -> Mesh | AbstractMesh:
    """The mesh of a program of so many runs: what of the axis run does not divide them joins data.
    Base weights lie as before.
    """
    run = math.gcd(mesh.shape["run"], runs)
    shape = run, mesh.shape["run"] // run * mesh.shape["data"], mesh.shape["tensor"]
    if isinstance(mesh, AbstractMesh):
        return mesh.update(axis_sizes=shape)
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def base_shardings(mesh: Mesh, base_state):
    """`base_state` (the frozen state of `split_decoder`, or a params dict) with a NamedSharding in
    place of each array.
    """
    return jax.tree.map_with_path(lambda path, x: _by_rule(mesh, _name(path), x.shape), base_state)


def whole_layer(layer):
    """`layer` (the state of one layer's weights) on the mesh in context, whole on every device but
    for the axis tensor, and for experts, which stay.
    """

    def placed(path, x: jax.Array) -> jax.Array:
        name = f"layers/{_name(path)}"
        # of the stack's, without L
        axes = next(axes for pattern, axes in RULES if re.search(pattern, name))[1:]
        return constrain(
            x,
            (
                axes
                if "/expert" in name
                else tuple(axis if axis == "tensor" else None for axis in axes)
            ),
        )

    return jax.tree.map_with_path(placed, layer)


def param_shardings(mesh: Mesh, config: DecoderConfig) -> Callable[[ParamPath], NamedSharding]:
    """The same by the path of a parameter, before the weights are there: what `load_pretrained`
    takes.
    """
    shapes = param_shapes(config)
    return lambda path: _by_rule(mesh, "/".join(path), shapes[path])


def state_shardings(mesh: Mesh, train_state: TrainState, train: str = "lora") -> TrainState:
    """`train_state` with a NamedSharding in place of each array: all follow their run, but for the
    step count and, with `train` = "full", the trained weights and their Adam state, which lie as
    base weights do.
    """

    def by_run(x):
        return _fitting(mesh, ("run",), x.shape)

    def of_run(path, x):
        return _by_rule(mesh, _name(path), x.shape[1:], leading=(None,))

    trained = (
        (lambda tree: jax.tree.map_with_path(of_run, tree))
        if train == "full"
        else (lambda tree: jax.tree.map(by_run, tree))
    )
    places = jax.tree.map(by_run, train_state.replace(step=None, trained=None, adam=None))
    adam = train_state.adam._replace(
        count=by_run(train_state.adam.count),
        mu=trained(train_state.adam.mu),
        nu=trained(train_state.adam.nu),
    )
    return places.replace(step=replicated(mesh), trained=trained(train_state.trained), adam=adam)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For every array [M, blocks, B, ...] of a Batch: there are as many blocks as the axis run has
    devices, and data divides B.
    """
    return NamedSharding(mesh, PartitionSpec(None, "run", "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_rule(mesh: Mesh, path: str, shape: tuple[int, ...], leading: tuple = ()) -> NamedSharding:
    for pattern, axes in RULES:
        if re.search(pattern, path):
            return _fitting(mesh, axes, shape, leading)
    raise ValueError(
        f"no sharding rule matches the parameter {path}: add one to RULES in {__name__}"
    )


def _fitting(mesh: Mesh, axes: tuple, shape: tuple[int, ...], leading: tuple = ()) -> NamedSharding:
    """The rule's axes, behind `leading` ones, as far as they fit."""
    return NamedSharding(mesh, PartitionSpec(*leading, *fitting(mesh.shape, axes, shape)))
