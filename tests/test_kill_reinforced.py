"""A real process in reinforcement learning is killed in a rollout, a reward, an update and a write;
started again it ends bit for bit as if nothing had been.
"""

import contextlib
import random
import signal
import time
from pathlib import Path

import pytest
from tiny_experiment import write_model
from watched_process import Process, launch

pytestmark = pytest.mark.slow

ITERATIONS = 14
LAUNCHER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from etils import epath
from rich.console import Console
from ip_jax.lab.display import Display
from ip_jax.lab.reinforced.run import run_reinforced
from tiny_reinforced import Vowels, make

class Watched(Vowels):
    def grade(self, task, completion):
        print("graded", flush=True)
        return super().grade(task, completion)

print("ready", flush=True)
sys.stdin.readline()
experiment = make(sys.argv[1], environment=Watched(), iterations={ITERATIONS})
run_reinforced(experiment, epath.Path(sys.argv[2]), Display(Console()))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All that does not tell the time."""
    kept = ("runs/*/*", "rollouts/*/*", "transcripts/*.parquet", "*.parquet", "config.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in kept
        for path in folder.glob(pattern)
    }


def being_written(folder: Path) -> set[int]:
    """Inodes of the temporary folders of checkpoints, of killed processes too."""
    found = set()
    for path in folder.glob("checkpoints/*/*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            found.add(path.stat().st_ino)
    return found


def kill_at(place: str, folder: Path, process: Process, rng: random.Random) -> None:
    """Starts the run and kills it at a new moment of this kind."""

    def seen() -> dict[str, set]:
        rows = {
            (path, row)
            for path in folder.glob("runs/*/metrics.jsonl")
            for row in path.read_text().splitlines()
        }
        return {
            "rollout": rows,
            "update": set(folder.glob("rollouts/*/*.parquet")),
            "write": being_written(folder),
        }

    before, grades = seen(), 20 + rng.randint(0, 8)
    process.go()
    if place == "reward":  # among those of an iteration
        process.wait_for(lambda: process.said().count("graded") > grades)
    # after an iteration has ended, after its rollout is on the disk, while a checkpoint is written
    else:
        process.wait_for(lambda: seen()[place] - before[place])
    if place == "rollout":
        time.sleep(rng.uniform(0, 0.02))
    assert process.stop() == -signal.SIGKILL, process.said()


def test_killed_anywhere_it_ends_as_if_nothing_had_been(tmp_path):
    rng = random.Random(0)
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def start(folder):
        return launch([LAUNCHER, str(tmp_path / "model"), str(folder)], tmp_path)

    first, process = start(undisturbed), start(killed)
    first.go()
    assert first.popen.wait(timeout=600) == 0, first.said()
    went_on = 0
    for place in ("reward", "update", "write", "reward", "rollout", "update", "write"):
        following = start(killed)
        kill_at(place, killed, process, rng)
        went_on += "going on from the checkpoint" in process.said()
        process = following
    process.go()
    assert process.popen.wait(timeout=600) == 0, process.said()
    assert went_on >= 2, "some were killed behind a checkpoint"
    ours, wanted = contents(killed), contents(undisturbed)
    assert ours.keys() == wanted.keys() and len(wanted) > ITERATIONS
    assert [name for name in wanted if ours[name] != wanted[name]] == []
