"""Checkpoints of a program's state through Orbax, written by all processes, restored into the
shardings of the present mesh by any number of them.
"""

import contextlib
import dataclasses
import json
import os
import re

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ip_jax.training import hosts
from ip_jax.training.results import write_json
from ip_jax.training.state import TrainState

# Orbax logs a failed write as a dozen tracebacks, from its own threads, before it raises it; the
# error alone says it all.
logging.get_absl_logger().addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

_WRITE = (
    "cannot write a checkpoint in {}: REASON; the last complete one is kept, and the same command"
    " goes on from it"
)
_READ = (
    "cannot read the checkpoint {}: REASON; without this folder, the same command goes on from the"
    " one before it"
)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one program; made by `open_checkpoints`. Raises OSError, one sentence, for
    what cannot be written or read.
    """

    manager: ocp.CheckpointManager

    def save(self, state: TrainState) -> None:
        """Starts writing the state as its step's checkpoint, in the background. A step already
        there is left alone.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        # Orbax holds the values when `save` returns: the next step may be given the buffers
        with _one_sentence(_WRITE.format(self.manager.directory)):
            self.manager.save(step, args=ocp.args.StandardSave(_named(state)))

    def wait(self) -> None:
        """Returns when everything that was begun is on the disk."""
        with _one_sentence(_WRITE.format(self.manager.directory)):
            self.manager.wait_until_finished()

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest complete checkpoint in the shapes, dtypes and shardings of `like`, or None
        when there is none.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(like)
        )
        with _one_sentence(_READ.format(self.manager.directory / str(step))):
            arrays = self.manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _named(like)])


def open_checkpoints(folder: epath.PathLike, origin: dict, keep: int = 2) -> Checkpoints:
    """Checkpoints of which the newest `keep` complete ones are kept. `origin` (JSON) says what they
    belong to: model, runs.

    Raises ValueError if the folder holds those of another origin, OSError if it cannot be written.
    """
    folder = epath.Path(folder)
    if "://" not in os.fspath(folder):
        folder = folder.absolute()  # which would take an object store's name for a local folder
    hosts.by_first(lambda: _claim(folder / "origin.json", origin))
    with _one_sentence(_WRITE.format(folder)):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, single_host_load_and_broadcast=True
        )
        return Checkpoints(ocp.CheckpointManager(folder, options=options))


def _claim(path: epath.Path, origin: dict) -> None:
    if path.exists():
        found = json.loads(path.read_text())
        if found != origin:
            names = ", ".join(
                sorted(key for key in {*found, *origin} if found.get(key) != origin.get(key))
            )
            raise ValueError(
                f"the checkpoints in {path.parent} belong to another program: its {names} differ;"
                " choose another results folder"
            )
    else:
        write_json(path, origin)


def _named(state: TrainState) -> dict:
    """The leaves by their path, so that the file does not depend on the containers' classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


@contextlib.contextmanager
def _one_sentence(sentence: str):
    """What Orbax and TensorStore raise (ValueError, OSError, RuntimeError with a page of text) as
    one OSError, whose REASON is filled in.
    """
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", str(error))
        reason = (
            os.strerror(int(code[1] or code[2])) if code else str(error).partition("\n")[0][:200]
        )
        raise OSError(sentence.replace("REASON", reason)) from error
