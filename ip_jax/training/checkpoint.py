"""Checkpoints of a program's state through Orbax, restored into the shardings of the present mesh."""
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from ip_jax.training.state import TrainState


def open_checkpoints(folder: epath.PathLike, keep: int = 2) -> ocp.CheckpointManager:
    """A manager that writes in the background and keeps the newest `keep` complete checkpoints."""
    return ocp.CheckpointManager(epath.Path(folder).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))


def save(manager: ocp.CheckpointManager, state: TrainState, origin: dict) -> None:
    """Starts writing the state as its step's checkpoint; `origin` (JSON) says what it belongs to. A step already there is left alone."""
    step = int(state.step)
    if step in manager.all_steps():
        return
    # A copy: the next training step is given the state's own buffers while the write is still under way.
    arrays = _named(jax.tree.map(jnp.copy, state))
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), origin=ocp.args.JsonSave(origin)))


def restore_latest(manager: ocp.CheckpointManager, like: TrainState, origin: dict) -> TrainState | None:
    """The newest complete checkpoint in the shapes and shardings of `like`, or None when there is none.

    Raises ValueError if the checkpoint belongs to something else than `origin`.
    """
    step = manager.latest_step()
    if step is None:
        return None
    found = manager.restore(step, args=ocp.args.Composite(origin=ocp.args.JsonRestore())).origin
    if found != origin:
        names = ", ".join(sorted(key for key in {*found, *origin} if found.get(key) != origin.get(key)))
        raise ValueError(f"the checkpoint in {manager.directory} belongs to another run: its {names} differ; choose another results folder")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(like))
    arrays = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _named(like)])


def _named(state: TrainState) -> dict:
    """The leaves by their path, so that the file does not depend on the containers' classes."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
