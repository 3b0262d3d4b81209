"""The results folder: whole files, one owner, every step once in the logs, one sentence for what
cannot be written.
"""

import errno
import json
import math
import os

import pytest
from etils import epath

from ip_jax.training.results import (
    MetricsLog,
    claim_folder,
    differences,
    digest,
    write_binary,
    write_json,
    write_whole,
)


def record(**config) -> dict:
    return {"identity": digest(config), "config": config}


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "out"


def test_a_write_is_whole_and_leaves_nothing_else(folder):
    write_whole(folder / "deep" / "a.bin", b"1")
    write_whole(folder / "deep" / "a.bin", b"23")
    write_json(folder / "b.json", {"x": [1, None]})
    write_binary(folder / "c.bin", lambda file: file.write(b"45"))
    assert (folder / "deep" / "a.bin").read_bytes() == b"23" and (
        folder / "c.bin"
    ).read_bytes() == b"45"
    assert json.loads((folder / "b.json").read_text()) == {"x": [1, None]}
    assert sorted(path.name for path in [*folder.iterdir(), *(folder / "deep").iterdir()]) == [
        "a.bin",
        "b.json",
        "c.bin",
        "deep",
    ]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_failed_write_keeps_the_old_file(folder, monkeypatch, call, code):
    write_whole(folder / "a.bin", b"old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        OSError,
        match=(
            f"^cannot write .*/a.bin: {os.strerror(code)}; what was finished is kept, and the same"
            " command goes on from it$"
        ),
    ):
        write_whole(folder / "a.bin", b"new")
    assert (folder / "a.bin").read_bytes() == b"old"
    assert [path.name for path in folder.iterdir()] == ["a.bin"]


def test_a_file_in_the_way_of_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="^cannot write .*out/sub/config.json: Not a directory; "):
        claim_folder(epath.Path(tmp_path) / "out" / "sub", record(rate=1), {})


def test_a_folder_belongs_to_one_config(folder):
    claim_folder(folder, record(rate=1, model={"name": "a", "revision": None}), {})
    claim_folder(folder, record(rate=1, model={"name": "a", "revision": None}), {})
    with pytest.raises(
        ValueError,
        match=(
            r"^the results folder .*/out belongs to another config \(it differs in model.name,"
            r" rate\): choose another one with --out$"
        ),
    ):
        claim_folder(folder, record(rate=2, model={"name": "b", "revision": None}), {})
    with pytest.raises(ValueError, match=r"it differs in the model or the data\)"):
        claim_folder(
            folder,
            record(rate=1, model={"name": "a", "revision": None}) | {"identity": "another"},
            {},
        )
    assert json.loads((folder / "config.json").read_text())["config"]["rate"] == 1


def test_the_record_follows_the_list_of_arms(folder):
    claim_folder(folder, record(rate=1) | {"arms": ["a"]}, {})
    claim_folder(folder, record(rate=1) | {"arms": ["a", "b"]}, {})
    assert json.loads((folder / "config.json").read_text())["arms"] == ["a", "b"]


def test_a_run_belongs_to_one_definition_of_its_arm(folder):
    claim_folder(folder, record(rate=1) | {"arms": ["a"]}, {"a-s0": "k1"})
    claim_folder(folder, record(rate=1) | {"arms": ["a", "b"]}, {"a-s0": "k1", "b-s0": "k2"})
    before = (folder / "config.json").read_text()
    with pytest.raises(
        ValueError,
        match=(
            r"^run b-s0 in .*/out was made with another definition of its arm \(prompts, data or"
            r" starting point\): give the arm another name, or choose another folder with --out$"
        ),
    ):
        claim_folder(
            folder, record(rate=1) | {"arms": ["b", "c"]}, {"c-s0": "k3", "b-s0": "changed"}
        )
    assert (folder / "config.json").read_text() == before and not (
        folder / "runs" / "c-s0"
    ).exists()


def test_a_folder_with_other_things_is_refused(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(
        ValueError,
        match="is not empty and holds no results of this program: choose another one with --out$",
    ):
        claim_folder(folder, record(rate=1), {})


@pytest.mark.parametrize("text", ["", "no JSON", "[1]"])
def test_a_foreign_config_json_is_refused(folder, text):
    folder.mkdir()
    (folder / "config.json").write_text(text)
    with pytest.raises(
        ValueError,
        match="config.json is not a record of this program: choose another results folder$",
    ):
        claim_folder(folder, record(rate=1), {})
    assert (folder / "config.json").read_text() == text


def test_a_kill_inside_the_first_write_is_no_obstacle(folder, monkeypatch):
    """The temporary file of config.json is all there is."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os._exit)  # the rename never happens
        patch.setattr(epath.Path(folder).__class__, "unlink", lambda *_, **__: None)
        write_json(folder / "config.json", record(rate=1))
    assert [path.name for path in folder.iterdir()] != []
    assert not (folder / "config.json").exists()
    claim_folder(folder, record(rate=1), {})
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_differences_names_nested_fields():
    assert differences(
        {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}, "e": 6}
    ) == ["b.c", "e"]
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differences({"a": [0, 20]}, {"a": (0, 20)}) == []  # as read back from config.json


def test_digest_depends_on_values_not_on_their_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_rows_reach_the_disk_with_a_flush_and_later_ones_are_cut(folder):
    log = MetricsLog(folder / "metrics.jsonl", 0)
    for step in range(4):
        log.add({"step": step, "loss": step / 2})
    assert not log.path.exists()
    log.flush()
    resumed = MetricsLog(folder / "metrics.jsonl", 2)
    resumed.add({"step": 2, "loss": 9.0})
    resumed.flush()
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 9.0},
    ]


def test_what_is_not_finite_is_null(folder):
    log = MetricsLog(folder / "metrics.jsonl", 0)
    log.add({"step": 0, "loss": math.nan, "grad_norm": math.inf, "alive": False})
    log.flush()
    assert log.path.read_text() == '{"step": 0, "loss": null, "grad_norm": null, "alive": false}\n'
