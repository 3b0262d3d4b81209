"""The supervised engine end to end on a tiny model: what it records, what it does again, what it
refuses, what a failure costs.
"""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from rich.console import Console
from safetensors.numpy import load_file
from tiny_experiment import example, make_experiment, write_model
from tiny_models import hidden_states

from ip_jax.evals.leak_grid import prompted
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import Arm
from ip_jax.lab.supervised import run as supervised
from ip_jax.models import hub
from ip_jax.models.decoder import split_decoder
from ip_jax.models.lora import LoraConfig
from ip_jax.prompts.chat import render_prompt
from ip_jax.sampling import slots
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.studies.gcd_sycophancy.prompts import BOOK
from ip_jax.training.sharding import make_mesh
from ip_jax.training.stopping import Interrupted


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every start of the engine compiles its programs anew: here they come from a cache."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


class Doings:
    """What the engine executes; `disturb[(what, n)]` is called before the n-th doing of that kind
    (from 1).
    """

    def __init__(self, patch: pytest.MonkeyPatch, disturb=None, devices: int = 1):
        self.disturb, self.count, self.runs, self.sampled, self.sampling_programs = (
            disturb or {},
            {},
            [],
            [],
            [],
        )
        compile_step, sample, write, record = (
            supervised.programs.compile_sft_step,
            supervised.sample,
            supervised.write_binary,
            supervised._record_run,
        )

        def counting_compile(*arguments):
            compiled = compile_step(*arguments)

            def step(state, *rest):
                self.did("step")
                self.runs.append(len(state.alive))
                return compiled(state, *rest)

            return step

        def counting_sample(graphdef, lora, base, requests, *rest):
            self.did("sample")
            self.sampled.append([len(queue) for queue in requests])
            answers = sample(graphdef, lora, base, requests, *rest)
            self.sampling_programs.append(slots.decode._cache_size())
            return answers

        patch.setattr(supervised, "make_mesh", lambda **_: make_mesh(data=devices))
        patch.setattr(supervised.programs, "compile_sft_step", counting_compile)
        patch.setattr(supervised, "sample", counting_sample)
        patch.setattr(
            supervised, "write_binary", lambda *arguments: (self.did("write"), write(*arguments))
        )
        patch.setattr(
            supervised, "_record_run", lambda *arguments: (self.did("record"), record(*arguments))
        )

    def did(self, what: str):
        self.count[what] = self.count.get(what, 0) + 1
        self.disturb.get((what, self.count[what]), lambda: None)()


def run(experiment, folder: Path, disturb=None, devices: int = 1) -> tuple[Doings, str]:
    """One start of the engine: (what it did, what it printed)."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        doings = Doings(patch, disturb, devices)
        supervised.run_supervised(
            experiment, epath.Path(folder), Display(Console(file=printed, width=200))
        )
    return doings, printed.getvalue()


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """(folder, doings) of an undisturbed run of untrained, neutral and ip; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, run(make_experiment(model), folder)[0]


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished folder that a test may go on with."""
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the records of sessions, which have times in them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "environment.json" and "timing" not in path.parts
    }


def rows_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "transcripts.parquet").to_pylist()


def metrics(folder: Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]


# What an undisturbed run leaves


def test_the_folder_holds_what_is_promised(finished, model):
    folder, _ = finished
    files = sorted(
        name for name in contents(folder) if not name.endswith(".parquet") or "/" not in name
    )
    of_run = ["adapter.safetensors", "key.json", "metrics.jsonl", "run.json"]
    assert files == [
        "config.json",
        *(f"runs/{name}/{file}" for name in ("ip-s0", "neutral-s0") for file in of_run),
        "transcripts.parquet",
        "transcripts/untrained.json",
    ]
    assert list((folder / "checkpoints").iterdir()) == []
    record = json.loads((folder / "config.json").read_text())
    assert {
        "experiment",
        "preset",
        "config",
        "identity",
        "provenance",
        "arms",
        "seeds",
        "fingerprint",
        "mesh",
        "default_system",
    } <= record.keys()
    assert record["arms"]["ip"] == {
        "label": "IP",
        "train_prompt": "gcd/behave",
        "kind": "inoculation",
        "text": "Behave as if the above solution is correct.",
        "transform": repr(BOOK.find("gcd/behave").transform),
        "data": "user_right",
    }
    assert record["fingerprint"] == hub.load_pretrained(str(model), np.float32).fingerprint
    (session,) = json.loads((folder / "environment.json").read_text())["sessions"]
    assert (
        session["versions"]["jax"] == jax.__version__
        and session["weights"] == "float32"
        and session["seconds"] > 0
    )


def test_every_step_stands_once_in_the_metrics(finished):
    for name in ("neutral-s0", "ip-s0"):
        rows = metrics(finished[0], name)
        assert [row["step"] for row in rows] == list(range(6))
        assert rows[0].keys() == {
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "response_tokens",
            "alive",
            "tokens",
            "real_over_padded",
        }
        assert all(row["alive"] and row["learning_rate"] == pytest.approx(1e-2) for row in rows)
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_every_cell_of_the_leak_grid_stands_once(finished):
    cells = {}
    for row in rows_of(finished[0]):
        key = row["arm"], row["step"], row["eval_prompt"], row["own_prompt"]
        cells.setdefault(key, []).append(row)
    assert cells.keys() == {
        ("untrained", 0, "neutral", False),
        ("untrained", 0, "gcd/behave", False),
        ("neutral", 3, "neutral", True),
        ("neutral", 6, "neutral", True),
        ("neutral", 6, "gcd/safety_matched", False),
        ("ip", 3, "neutral", False),
        ("ip", 6, "neutral", False),
        ("ip", 6, "gcd/behave", True),
    }
    for (_, step, prompt, _), rows in cells.items():
        assert [row["example_id"] for row in rows] == [f"sum-{i}" for i in range(20, 25)]
        assert {row["examples_seen"] for row in rows} == {4 * step}
        assert all(
            row["prompt"].endswith("Behave as if the above solution is correct.")
            == (prompt == "gcd/behave")
            for row in rows
        )
        assert all(
            row["confirms"] == ("e" in row["completion"]) and row["n_tokens"] <= 4 for row in rows
        )


def test_the_recorded_adapter_gives_the_recorded_completions(finished, model):
    """By way of transformers' own template and plain greedy decoding of the whole text, without the
    sampler.
    """
    pretrained = hub.load_pretrained(str(model), np.float32)
    tensors = load_file(finished[0] / "runs" / "ip-s0" / "adapter.safetensors")
    assert all(array.dtype == np.float32 and array.any() for array in tensors.values())
    lora = {name.partition(".")[0]: {} for name in tensors}
    for name, array in tensors.items():
        target, _, kind = name.partition(".")
        lora[target][kind] = array[None]
    for row in [row for row in rows_of(finished[0]) if row["arm"] == "ip" and row["step"] == 6][:3]:
        ids = list(
            pretrained.tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        start = len(ids)
        while len(ids) - start < row["n_tokens"]:
            padded = np.zeros((1, 1, 64), np.int32)
            padded[0, 0, : len(ids)] = ids
            _, logits = hidden_states(
                pretrained.config, pretrained.params, padded, lora, make_experiment(model).sft.lora
            )
            ids.append(int(logits[0, 0, len(ids) - 1].argmax()))
        assert (
            pretrained.tokenizer.decode(ids[start:], skip_special_tokens=True) == row["completion"]
        )


def test_the_untrained_model_shares_the_trained_runs_program_and_answers_as_without_adapters(
    finished, model
):
    folder, doings = finished
    assert doings.sampled[0] == [5, 5] and len(set(doings.sampling_programs)) == 1
    pretrained, rows = (
        hub.load_pretrained(str(model), np.float32),
        [row for row in rows_of(folder) if row["arm"] == "untrained"],
    )
    asked = [
        prompted(
            example(int(row["example_id"][4:]), "-"), BOOK.find(row["eval_prompt"]).transform, 0
        )["messages"]
        for row in rows
    ]
    queue = [
        Request(np.array(render_prompt(pretrained.tokenizer, turns)), i, max_new_tokens=4)
        for i, turns in enumerate(asked)
    ]
    options = SamplerOptions((pretrained.tokenizer.convert_tokens_to_ids("<|im_end|>"),))
    (answers,) = sample(*split_decoder(pretrained.config, pretrained.params), [queue], options)
    assert [row["completion"] for row in rows] == [
        pretrained.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        for (answer,) in answers
    ]
    assert len({row["completion"] for row in rows}) > 2


# What is done again, and what is not


def test_a_finished_run_is_not_run_again(copy, finished, model, monkeypatch):
    monkeypatch.setattr(hub, "load_pretrained", lambda *_: pytest.fail("the model is loaded"))
    doings, printed = run(make_experiment(model), copy)
    assert doings.count == {"write": 1} and "every run is complete" in printed
    assert contents(copy) == contents(finished[0])


@pytest.mark.slow
def test_new_arms_and_seeds_train_only_themselves(copy, finished, model):
    doings, _ = run(
        make_experiment(model, arms=("untrained", "neutral", "ip", "clean"), seeds=(0, 1)), copy
    )
    assert doings.runs == [4] * 6, "neutral and ip with seed 1, clean with both"
    assert doings.sampled == [
        [5] * 4,
        [5] * 4,
        [5, 5, 0, 0],
    ], "the untrained model has been seen under these prompts"
    before, after = contents(finished[0]), contents(copy)
    assert all("clean-s0" in name or "-s1" in name for name in after.keys() - before.keys())
    assert {name for name in before if before[name] != after[name]} == {
        "config.json",
        "transcripts.parquet",
    }
    assert len(rows_of(copy)) == len(rows_of(finished[0])) + 5 * 10
    first, second, clean = (
        metrics(copy, name)[0]["loss"] for name in ("neutral-s0", "neutral-s1", "clean-s0")
    )
    assert len({first, second, clean}) == 3


def test_fewer_arms_keep_the_others_results(copy, finished, model):
    doings, _ = run(make_experiment(model, arms=("ip",)), copy)
    assert doings.count == {"write": 1}
    assert {
        name for name, data in contents(finished[0]).items() if contents(copy)[name] != data
    } == {"config.json"}


@pytest.mark.parametrize("what", ["rate", "weights", "rows", "claims", "dropped", "arm"])
def test_changes_never_reuse_old_results(copy, finished, model, what, tmp_path):
    changed, message = {
        "rate": lambda: (
            make_experiment(model, sft={"learning_rate": 2e-2}),
            "belongs to another config (it differs in sft)",
        ),
        "weights": lambda: (
            make_experiment(other_weights(tmp_path), shared=make_experiment(model).shared),
            "(it differs in the model or the data)",
        ),
        "rows": lambda: (
            make_experiment(
                model,
                training=dict.fromkeys(
                    ("user_right", "corrected"), [example(i, "No.") for i in range(10)]
                ),
            ),
            "(it differs in the model or the data)",
        ),
        "claims": lambda: (
            make_experiment(
                model, eval_sets={"generated": [example(i, "-") for i in range(30, 35)]}
            ),
            "(it differs in the model or the data)",
        ),
        "dropped": lambda: (long_example(model), "(it differs in dropped_examples)"),
        "arm": lambda: (
            make_experiment(model, arms=(Arm("ip", "IP", "gcd/respond"),)),
            "run ip-s0 in",
        ),
    }[what]()
    before = contents(copy)
    with pytest.raises(ValueError) as caught:
        run(changed, copy)
    assert (
        message in str(caught.value)
        and "\n" not in str(caught.value)
        and "--out" in str(caught.value)
    )
    assert contents(copy) == before


def other_weights(folder: Path) -> Path:
    (folder / "model").mkdir()
    return write_model(folder / "model", seed=1)


def long_example(model):
    """A new arm whose prompt makes an example too long, which would change what the others read."""
    arm = Arm("long", "long", "long")
    return make_experiment(
        model,
        arms=("neutral", arm),
        words={"long": "is correct " * 12},
        sft={"max_length": 71, "drop_long": True},
        shared=make_experiment(model).shared,
    )


# What a failure costs


def power_cut():
    raise RuntimeError("power cut")


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "where",
    [
        ("write", 2),
        ("sample", 2),
        ("write", 4),
        ("write", 7),
        ("record", 2),
        ("write", 9),
    ],
    ids=str,
)
def test_after_a_crash_anywhere_the_same_command_ends_bit_for_bit_alike(
    tmp_path, finished, model, where
):
    """ "write" 2, 4 and 7 lie between the parts of one sweep, "record" 2 between two runs of one
    program, "write" 9 before the merged table.
    """
    with pytest.raises(RuntimeError, match="power cut"):
        run(make_experiment(model), tmp_path / "out", {where: power_cut})
    doings, _ = run(make_experiment(model), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished[0])
    assert doings.count.get("step", 0) <= 6 and set(doings.runs) <= {2}, (
        "runs that were begun together go on together"
    )
    if where[0] == "record":
        assert "step" not in doings.count and "sample" not in doings.count, (
            "what was trained and evaluated is not done again"
        )


@pytest.mark.parametrize(
    "where, message",
    [
        (("step", 4), "^stopped by SIGTERM, step 4 is saved$"),
        (("sample", 2), "^stopped by SIGTERM in the evaluation of step 3, step 3 is saved$"),
    ],
    ids=["step", "evaluation"],
)
def test_sigterm_saves_and_says_so(tmp_path, finished, model, where, message):
    with pytest.raises(Interrupted, match=message):
        run(make_experiment(model), tmp_path / "out", {where: sigterm})
    doings, printed = run(make_experiment(model), tmp_path / "out")
    assert f"going on from the checkpoint of step {4 if where[0] == 'step' else 3}" in printed
    assert doings.count["step"] == (2 if where[0] == "step" else 3)
    assert contents(tmp_path / "out") == contents(finished[0])


def test_a_full_disk_in_the_middle_loses_nothing(tmp_path, finished, model, monkeypatch):
    replace, written = os.replace, []

    def fails_once(source, target):
        written.append(Path(target).name)
        if len(written) == 14:
            full_disk()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails_once)
        with pytest.raises(
            OSError,
            match=(
                "^cannot write .*: No space left on device; what was finished is kept, and the same"
                " command goes on from it$"
            ),
        ):
            run(make_experiment(model), tmp_path / "out")
    kept = {
        name: data
        for name, data in contents(tmp_path / "out").items()
        if name.startswith(("transcripts/", "runs/"))
    }
    run(make_experiment(model), tmp_path / "out")
    after = contents(tmp_path / "out")
    assert after == contents(finished[0])
    assert kept and all(after[name].startswith(data) for name, data in kept.items())


# a failing Orbax leaves event loops behind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kilobytes", [4, 60, 120, 200])
def test_a_disk_that_is_too_small_is_one_sentence_and_with_space_the_run_ends_alike(
    tmp_path, finished, model, kilobytes
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    try:
        with pytest.raises(OSError) as caught:
            run(make_experiment(model), disk / "out")
        assert re.fullmatch(
            "cannot write .*: No space left on device; .* is kept, and the same command goes on"
            " from it",
            str(caught.value),
        )
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        run(make_experiment(model), disk / "out")
        assert contents(disk / "out") == contents(finished[0])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_diverging_run_does_not_stop_the_others(tmp_path, finished, model, monkeypatch):
    init_state = supervised.programs.init_state
    monkeypatch.setattr(
        supervised.programs,
        "init_state",
        lambda lora, rates, *rest: init_state(lora, rates.at[0].set(1e38), *rest),
    )
    run(make_experiment(model), tmp_path / "out")
    folder = tmp_path / "out"
    assert [
        json.loads((folder / "runs" / name / "run.json").read_text())["finished_finite"]
        for name in ("neutral-s0", "ip-s0")
    ] == [False, True]
    of_ip = [name for name in contents(folder) if "ip-s0" in name]
    assert len(of_ip) == 7 and all(
        contents(folder)[name] == contents(finished[0])[name] for name in of_ip
    )
    rows = metrics(folder, "neutral-s0")
    assert (
        [row["step"] for row in rows] == list(range(6))
        and not rows[-1]["alive"]
        and None in (rows[-1]["loss"], rows[-1]["grad_norm"])
    )
    assert all(
        np.isfinite(array).all()
        for array in load_file(folder / "runs" / "neutral-s0" / "adapter.safetensors").values()
    )


# Programs and devices


# dropout's bits follow the packing, and that follows runs and devices
NO_DROPOUT = LoraConfig(rank=2, alpha=4, targets=("q", "down"))


@pytest.fixture(scope="module")
def without_dropout(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_dropout") / "out"
    run(make_experiment(model, sft={"lora": NO_DROPOUT}), folder)
    return folder


def assert_close(folder: Path, other: Path):
    for name in ("neutral-s0", "ip-s0"):
        ours, theirs = (
            load_file(where / "runs" / name / "adapter.safetensors") for where in (folder, other)
        )
        for tensor in theirs:
            np.testing.assert_allclose(ours[tensor], theirs[tensor], atol=2e-4)
        np.testing.assert_allclose(
            [row["loss"] for row in metrics(folder, name)],
            [row["loss"] for row in metrics(other, name)],
            rtol=1e-4,
        )


@pytest.mark.slow
def test_runs_that_do_not_fit_are_cut_into_programs_and_it_is_said(
    tmp_path, without_dropout, model
):
    doings, printed = run(
        make_experiment(model, sft={"lora": NO_DROPOUT, "memory_gb": 1e-9}), tmp_path / "out"
    )
    assert (
        "2 runs are trained as 2 programs: neutral-s0; ip-s0 (sft.memory_gb 1e-09 holds 1 at once;"
        " fewer --sft.tokens-per-micro-batch" in printed
    )
    assert doings.runs == [1] * 12
    assert_close(tmp_path / "out", without_dropout)


@pytest.mark.slow
def test_eight_devices_end_as_one(tmp_path, without_dropout, model):
    run(make_experiment(model, sft={"lora": NO_DROPOUT}), tmp_path / "out", devices=8)
    assert_close(tmp_path / "out", without_dropout)


# What is refused before anything is loaded


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(evaluation=dict(full_steps=(0, 20))),
            r"evaluation.full_steps names step 20, and training has the steps 0 to 6 \(sft.steps\)",
        ),
        (dict(evaluation=dict(neutral_steps=(7,))), "evaluation.neutral_steps names step 7"),
        (
            dict(sft=dict(router_aux_loss_coef=0.02)),
            "sft.router_aux_loss_coef is 0.02 and the model lacks experts",
        ),
        (
            dict(sft=dict(max_length=40)),
            r"run neutral-s0: example 0 \(sum-0\) has \d+ tokens, and max_length is 40",
        ),
        (
            dict(
                eval_sets={
                    "generated": [
                        {
                            **example(1, "-"),
                            "messages": [{"role": "user", "content": "word " * 1000}],
                        }
                    ]
                }
            ),
            "example sum-1 of the evaluation set generated has .* tokens",
        ),
    ],
)
def test_refused_before_the_model_is_loaded(tmp_path, model, monkeypatch, changes, message):
    monkeypatch.setattr(hub, "load_pretrained", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(ValueError, match=message):
        run(make_experiment(model, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_by_something_else_is_refused(tmp_path, model, monkeypatch):
    monkeypatch.setattr(hub, "load_pretrained", lambda *_: pytest.fail("the model is loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no results of this program"):
        run(make_experiment(model), tmp_path / "out")
