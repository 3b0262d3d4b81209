"""A results folder in an object store: no folders, no renames; an object is whole or absent. The
store is a dict behind fsspec's "gcs".

Orbax's checkpoints go to a local folder here: TensorStore has a driver of its own for object
stores, which a fake cannot stand in for.
"""

import io
import json
import pathlib

import fsspec
import jax
import orbax.checkpoint as ocp
import pytest
import tiny_reinforced
from etils import epath
from fsspec.spec import AbstractFileSystem
from rich.console import Console
from tiny_experiment import make_experiment, write_model

from ip_jax.lab.display import Display
from ip_jax.lab.reinforced import run as reinforced
from ip_jax.lab.supervised import run as supervised
from ip_jax.lab.trained import trained_runs
from ip_jax.training import checkpoint
from ip_jax.training.results import write_whole
from ip_jax.training.sharding import make_mesh


class Bucket(AbstractFileSystem):
    """What an object store can do; its objects by name, and every write in the order of their
    arrival.
    """

    objects: dict[str, bytes] = {}
    written: list[str] = []

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://").rstrip("/")

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in self.objects:
            found = {path}
        else:
            found = {
                "/".join(name.split("/")[: path.count("/") + 2])
                for name in self.objects
                if name.startswith(f"{path}/")
            }
        if not found:
            raise FileNotFoundError(path)
        entries = [
            {
                "name": name,
                "size": len(self.objects.get(name, b"")),
                "type": "file" if name in self.objects else "directory",
            }
            for name in sorted(found)
        ]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path, mode="rb", **_):
        return io.BytesIO(self.objects[path]) if mode == "rb" else Upload(path)

    def _rm(self, path):
        self.objects.pop(path, None)  # fsspec asks for the folders too

    def mkdir(self, *_, **__):
        """There are no folders."""

    makedirs = mkdir

    def mv(self, *_, **__):
        raise AssertionError("an object store renames nothing")

    cp_file = mv


class Upload(io.BytesIO):
    """An object that is there when it is closed."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def close(self):
        if not self.closed:
            Bucket.objects[self.path] = self.getvalue()
            Bucket.written.append(self.path)
        super().close()


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: {"gcs": Bucket()}[name])
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.objects.clear()
    Bucket.written.clear()
    yield Bucket
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def local_checkpoints(monkeypatch, tmp_path):
    manager, asked = ocp.CheckpointManager, []

    def elsewhere(folder, options):
        asked.append(str(folder))
        return manager(tmp_path / "checkpoints" / str(len(asked)), options=options)

    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", elsewhere)
    monkeypatch.setattr(supervised, "make_mesh", lambda **_: make_mesh())
    return asked


@pytest.fixture
def compiled_once(tmp_path):
    """The second start of the engine takes the programs of the first from a cache."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def small(model, **sft):
    """Two steps of one arm and the untrained model: twice as fast to compile as a group of two
    runs.
    """
    return make_experiment(
        model,
        arms=("untrained", "neutral"),
        sft=dict(steps=2, checkpoint_every=1) | sft,
        evaluation=dict(full_steps=(0, 2), neutral_steps=()),
    )


def run(experiment, folder, engine=supervised.run_supervised) -> str:
    printed = io.StringIO()
    engine(experiment, folder, Display(Console(file=printed, width=200)))
    return printed.getvalue()


def files_of_both(
    remote: epath.Path, local: epath.Path
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What lies in the two folders, by name."""
    prefix = f"{remote}/".removeprefix("gs://")
    theirs = {
        str(path.relative_to(local)): path.read_bytes()
        for path in pathlib.Path(local).rglob("*")
        if path.is_file()
    }
    return {name.removeprefix(prefix): data for name, data in Bucket.objects.items()}, theirs


@pytest.mark.slow
def test_an_experiment_writes_there_what_it_writes_to_a_disk(
    bucket, local_checkpoints, compiled_once, tmp_path
):
    model = write_model(tmp_path / "model")
    remote, local = epath.Path("gs://bucket/results/out"), epath.Path(tmp_path / "out")
    run(small(model), remote)
    run(small(model), local)
    ours, theirs = files_of_both(remote, local)
    assert ours.keys() == theirs.keys() and len(theirs) == 12
    differing = {name.partition("/")[0] for name in theirs if ours[name] != theirs[name]}
    assert differing == {"environment.json", "timing"}, "which have times in them"
    assert local_checkpoints[0].startswith("gs://bucket/results/out/checkpoints/")
    assert bucket.written.index("bucket/results/out/config.json") == 0
    of_run = [name for name in bucket.written if "/runs/neutral-s0/" in name]
    assert (
        of_run[0].endswith("key.json")
        and of_run[-2].endswith("adapter.safetensors")
        and of_run[-1].endswith("run.json")
    )
    assert trained_runs(remote) == {"neutral": [0]}

    del bucket.written[:]
    assert "every run is complete: nothing to train or evaluate" in run(small(model), remote)
    assert bucket.written == [
        "bucket/results/out/config.json",
        "bucket/results/out/transcripts.parquet",
    ]
    with pytest.raises(
        ValueError, match="the results folder gs://bucket/results/out belongs to another config"
    ):
        run(small(model, learning_rate=1.0), remote)


@pytest.mark.slow
def test_reinforcement_learning_writes_there_what_it_writes_to_a_disk(
    bucket, local_checkpoints, compiled_once, monkeypatch, tmp_path
):
    """Every rollout, table and adapter."""
    monkeypatch.setattr(reinforced, "make_mesh", lambda **_: make_mesh())
    experiment = tiny_reinforced.make(
        write_model(tmp_path / "model"), tiny_reinforced.ARMS[:1], iterations=2, checkpoint_every=1
    )
    remote, local = epath.Path("gs://bucket/results/out"), epath.Path(tmp_path / "out")
    for folder in (remote, local):
        run(experiment, folder, reinforced.run_reinforced)
    ours, theirs = files_of_both(remote, local)
    assert ours.keys() == theirs.keys() and any(name.startswith("rollouts/") for name in ours)
    differing = {name.partition("/")[0] for name in theirs if ours[name] != theirs[name]}
    assert differing == {"timing"}
    del bucket.written[:]
    assert "every run is complete: nothing to train or evaluate" in run(
        experiment, remote, reinforced.run_reinforced
    )
    assert not any(name.startswith("bucket/results/out/rollouts/") for name in bucket.written)


def test_a_folder_with_other_things_is_refused(bucket, local_checkpoints, tmp_path):
    model = write_model(tmp_path / "model")
    write_whole(epath.Path("gs://bucket/thesis/chapter1.tex"), b"x")
    with pytest.raises(
        ValueError,
        match="^the folder gs://bucket/thesis is not empty and holds no results of this program",
    ):
        run(small(model), epath.Path("gs://bucket/thesis"))
    assert list(bucket.objects) == ["bucket/thesis/chapter1.tex"]


def test_checkpoints_of_a_begun_program_are_found(bucket):
    origin = epath.Path("gs://bucket/out/checkpoints/abc/origin.json")
    write_whole(origin, json.dumps({"runs": {"neutral-s0": "key"}}).encode())
    ((folder, runs),) = supervised.plan.begun_programs(epath.Path("gs://bucket/out"))
    assert folder == origin.parent and runs == {"neutral-s0": "key"}
    folder.rmtree()
    assert not bucket.objects
