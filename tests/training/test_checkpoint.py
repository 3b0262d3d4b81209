"""Checkpoints: bit-exact, into any mesh's shardings, only for whom they belong to, whole or
absent.
"""

import shutil
import subprocess

import jax
import numpy as np
import pytest
from tiny_program import assert_same, fresh_state, run_step, state_at

from ip_jax.training.checkpoint import open_checkpoints
from ip_jax.training.sharding import make_mesh, state_shardings

# a failing Orbax leaves event loops behind
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ORIGIN = {"runs": {"a-s0": "k1", "b-s0": "k2"}, "model": "sha256:1"}


def test_restored_bit_for_bit(tmp_path):
    state = state_at(3)
    checkpoints = open_checkpoints(tmp_path / "c", ORIGIN)
    checkpoints.save(state)
    checkpoints.wait()
    restored = open_checkpoints(tmp_path / "c", ORIGIN).restore_latest(fresh_state())
    assert_same(restored, state_at(3))
    assert_same(run_step(restored, 3)[0], state_at(4))


def test_nothing_there_is_none(tmp_path):
    assert open_checkpoints(tmp_path / "c", ORIGIN).restore_latest(fresh_state()) is None


def test_a_write_in_the_background_keeps_the_state_that_was_given(tmp_path):
    """The next steps overwrite the donated buffers while the write is under way."""
    checkpoints = open_checkpoints(tmp_path / "c", ORIGIN)
    state = fresh_state()
    for step in range(6):
        state = run_step(state, step)[0]
        if step == 1:
            checkpoints.save(state)
    checkpoints.wait()
    assert_same(open_checkpoints(tmp_path / "c", ORIGIN).restore_latest(fresh_state()), state_at(2))


@pytest.mark.parametrize(
    "mesh", [dict(run=2), dict(data=8), dict(run=2, data=2, tensor=2)], ids=str
)
def test_restored_into_another_mesh(tmp_path, mesh):
    saved_on = make_mesh(data=4)
    state = state_at(2)
    checkpoints = open_checkpoints(tmp_path / "c", ORIGIN)
    checkpoints.save(jax.device_put(state, state_shardings(saved_on, state)))
    checkpoints.wait()
    shardings = state_shardings(make_mesh(**mesh), fresh_state())
    restored = open_checkpoints(tmp_path / "c", ORIGIN).restore_latest(
        jax.device_put(fresh_state(), shardings)
    )
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda x, sharding: x.sharding == sharding, restored, shardings)
        )
    )
    assert_same(restored, state_at(2))


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"model": "sha256:2"}, "model"),
        ({"runs": {"a-s0": "k1"}}, "runs"),
        ({"model": "x", "runs": {}}, "model, runs"),
    ],
)
def test_another_origin_is_refused_with_one_sentence(tmp_path, changes, names):
    open_checkpoints(tmp_path / "c", ORIGIN)
    with pytest.raises(
        ValueError,
        match=(
            f"^the checkpoints in .*/c belong to another program: its {names} differ; choose"
            " another results folder$"
        ),
    ):
        open_checkpoints(tmp_path / "c", ORIGIN | changes)


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    checkpoints = open_checkpoints(tmp_path / "c", ORIGIN, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step))
        checkpoints.save(state_at(step))
    checkpoints.wait()
    assert checkpoints.manager.all_steps() == [2, 3]


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    """What a kill inside a write leaves behind: a folder under its temporary name; the step can be
    saved again.
    """
    checkpoints = open_checkpoints(tmp_path / "c", ORIGIN)
    checkpoints.save(state_at(1))
    checkpoints.save(state_at(2))
    checkpoints.wait()
    checkpoints.manager.close()
    (tmp_path / "c" / "2").rename(tmp_path / "c" / "2.orbax-checkpoint-tmp")
    (tmp_path / "c" / "2.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    again = open_checkpoints(tmp_path / "c", ORIGIN)
    assert_same(again.restore_latest(fresh_state()), state_at(1))
    again.save(state_at(2))
    again.wait()
    assert_same(open_checkpoints(tmp_path / "c", ORIGIN).restore_latest(fresh_state()), state_at(2))


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 200 KB; skips where mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(full_disk, caplog):
    checkpoints = open_checkpoints(full_disk / "c", ORIGIN)
    checkpoints.save(state_at(1))
    checkpoints.wait()
    rest = full_disk / "rest"
    with pytest.raises(OSError), open(rest, "wb", buffering=0) as file:
        while True:
            file.write(np.random.default_rng(0).bytes(4096))
    with pytest.raises(
        OSError,
        match=(
            "^cannot write a checkpoint in .*/c: No space left on device; the last complete one is"
            " kept, and the same command goes on from it$"
        ),
    ):
        checkpoints.save(state_at(2))
        checkpoints.wait()
    assert not caplog.records, "Orbax's tracebacks are not shown"
    # whichever of Orbax's writers met it first
    with pytest.raises((ValueError, OSError), match="RESOURCE_EXHAUSTED|No space left"):
        checkpoints.manager.close()  # a new process has no writer of the old one beside it
    rest.unlink()
    again = open_checkpoints(full_disk / "c", ORIGIN)
    assert_same(again.restore_latest(fresh_state()), state_at(1))
    again.save(state_at(2))
    again.wait()
    assert_same(
        open_checkpoints(full_disk / "c", ORIGIN).restore_latest(fresh_state()), state_at(2)
    )


def test_a_damaged_checkpoint_is_one_sentence_that_helps(tmp_path):
    checkpoints = open_checkpoints(tmp_path / "c", ORIGIN)
    checkpoints.save(state_at(1))
    checkpoints.save(state_at(2))
    checkpoints.wait()
    for file in (tmp_path / "c" / "2").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(
        OSError,
        match=(
            "^cannot read the checkpoint .*/c/2: .*; without this folder, the same command goes on"
            " from the one before it$"
        ),
    ):
        open_checkpoints(tmp_path / "c", ORIGIN).restore_latest(fresh_state())
    shutil.rmtree(tmp_path / "c" / "2")
    assert_same(open_checkpoints(tmp_path / "c", ORIGIN).restore_latest(fresh_state()), state_at(1))
