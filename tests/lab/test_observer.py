"""What is watched of a run: timing beside logs that stay equal, a profile of numbered steps,
Weights & Biases through a stand-in for its package.
"""

import importlib.util
import io
import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from rich.console import Console
from tiny_experiment import example, make_experiment, write_model
from tiny_reinforced import make as make_reinforced

from ip_jax.lab.display import Display
from ip_jax.lab.observer import UNWATCHED, Watch
from ip_jax.lab.reinforced import run as reinforced
from ip_jax.lab.supervised import run as supervised

pytestmark = pytest.mark.usefixtures("compiled_once")

SFT = {"steps": 8, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def run(model, folder: Path, watch: Watch = UNWATCHED, sft: dict = SFT, **changes) -> str:
    printed = io.StringIO()
    experiment = make_experiment(
        model,
        arms=("neutral", "ip"),
        sft=sft,
        evaluation={"full_steps": (8,), "neutral_steps": ()},
        **changes,
    )
    supervised.run_supervised(
        experiment, epath.Path(folder), Display(Console(file=printed, width=200)), watch
    )
    return printed.getvalue()


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Training ends with a crash before step `steps`."""
    compile_step = supervised.programs.compile_sft_step

    def failing(*arguments):
        compiled, done = compile_step(*arguments), []

        def step(*of_step):
            if len(done) == steps:
                raise RuntimeError("power cut")
            done.append(None)
            return compiled(*of_step)

        return step

    patch.setattr(supervised.programs, "compile_sft_step", failing)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def profiled(model, tmp_path_factory):
    """(folder, what was printed) of an undisturbed run with a profile."""
    folder = tmp_path_factory.mktemp("profiled") / "out"
    return folder, run(model, folder, Watch(profile=True))


def test_each_step_has_its_timing_and_a_line_sums_them_up(profiled):
    folder, printed = profiled
    (path,) = (folder / "timing").iterdir()
    rows, metrics = lines(path), lines(folder / "runs" / "ip-s0" / "metrics.jsonl")
    assert [(row["session"], row["step"]) for row in rows] == [(1, step) for step in range(8)]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in metrics]
    assert [round(row["tokens"] / row["padded_tokens"], 4) for row in rows] == [
        row["real_over_padded"] for row in metrics
    ]
    assert (
        rows[0]["compiled_programs"] >= 1 and rows[0]["seconds"] >= rows[0]["compile_seconds"] > 0
    )
    assert not any(row["compiled_programs"] for row in rows[3:])
    assert all(
        row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]) for row in rows
    )
    assert all(row["mfu"] is None and row["peak_memory_bytes"] is None for row in rows), (
        "a CPU tells neither"
    )
    (said,) = [line for line in printed.splitlines() if line.startswith("trained: ")]
    assert (
        said.startswith("trained: 8 steps, ")
        and "tokens/s (" in said
        and "programs compiled in" in said
        and "MFU" not in said
    )
    (session,) = json.loads((folder / "environment.json").read_text())["sessions"]
    assert (
        session["compiled"]["programs"] > rows[0]["compiled_programs"]
        and session["peak_memory_bytes"] is None
    )


def test_the_profile_holds_the_steps_that_it_names(profiled):
    folder, printed = profiled
    (said,) = [line for line in printed.splitlines() if line.startswith("profile of steps ")]
    assert (
        f"{folder / 'profile'}; to open it: pip install xprof, then xprof --logdir"
        f" {folder / 'profile'}" in said
    )
    (trace,) = (folder / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    first, last = map(int, re.match(r"profile of steps (\d+) to (\d+): ", said).groups())
    assert first > 0 and 1 <= last - first + 1 <= 3
    assert steps in (
        list(range(first, last + 1)),
        list(range(first, last + 2)),
    ), "the next one begins before the last one ends"


def test_sessions_append_their_timing_and_the_metrics_stay_as_if_nothing_had_been(
    model, profiled, tmp_path
):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_after(patch, 5)
        run(model, tmp_path / "out")
    run(model, tmp_path / "out")
    (path,) = (tmp_path / "out" / "timing").iterdir()
    assert [(row["session"], row["step"]) for row in lines(path)] == [
        (1, 0),
        (1, 1),
        (1, 2),
        *((2, step) for step in range(3, 8)),
    ]
    for name in ("neutral-s0", "ip-s0"):
        metrics = Path("runs") / name / "metrics.jsonl"
        assert (tmp_path / "out" / metrics).read_bytes() == (profiled[0] / metrics).read_bytes()


@pytest.mark.parametrize(
    ("every", "left", "said"),
    [
        (3, 2, "profile of steps 7 to 7: "),
        (7, 1, "profile: nothing to trace, there is no step left after the first one"),
    ],
)
def test_what_is_left_of_a_program_is_profiled_or_it_is_said_why_not(
    model, tmp_path, every, left, said
):
    """Two steps of one shape or a single one: the first step of a session compiles."""
    changes = {
        "sft": SFT | {"checkpoint_every": every},
        "training": {"user_right": [example(5, "Yes.") | {"id": f"sum-{i}"} for i in range(10)]},
    }
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_after(patch, 7)
        run(model, tmp_path / "out", **changes)
    printed = run(model, tmp_path / "out", Watch(profile=True), **changes)
    (path,) = (tmp_path / "out" / "timing").iterdir()
    assert [row["step"] for row in lines(path) if row["session"] == 2] == list(range(8 - left, 8))
    assert [
        line.startswith(said) for line in printed.splitlines() if line.startswith("profile")
    ] == [True]
    assert (tmp_path / "out" / "profile").exists() == (left == 2)


# Weights & Biases


class FakeWandb(types.ModuleType):
    """A stand-in for the package: it keeps what each id was sent, over several sessions, and
    refuses steps that went back, as W&B ignores them.
    """

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.sent, self.inits, self.ended, self.refuses = {}, [], [], False

    def init(self, *, project, group, name, id, resume, reinit, config):
        if self.refuses:
            raise self.Error("api_key not configured")
        assert (resume, reinit) == ("allow", "create_new")
        self.inits.append((project, group, name, id, config))
        return FakeRun(self, name, self.sent.setdefault(id, {}))


class FakeRun:
    def __init__(self, owner, name, rows):
        self.owner, self.name, self.rows = owner, name, rows
        self.starting_step = max(rows, default=-1) + 1

    def log(self, row: dict, step: int):
        assert step not in self.rows and step >= self.starting_step
        self.rows[step] = row

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.owner.ended.append((self.name, kind))


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_each_run_has_a_wandb_run_that_a_second_session_goes_on_with(
    model, wandb, profiled, tmp_path
):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        stop_after(patch, 5)
        run(model, tmp_path / "out", Watch(wandb="sums"))
    assert sorted(wandb.ended) == [("ip-s0", RuntimeError), ("neutral-s0", RuntimeError)]
    run(model, tmp_path / "out", Watch(wandb="sums"))
    assert wandb.ended[2:] == [("ip-s0", None), ("neutral-s0", None)]
    assert [init[:3] for init in wandb.inits] == [
        ("sums", "out", "neutral-s0"),
        ("sums", "out", "ip-s0"),
    ] * 2
    ids = [init[3] for init in wandb.inits]
    assert ids[:2] == ids[2:] and len(set(ids)) == 2
    assert [(init[4]["arm"], init[4]["seed"], "sft" in init[4]) for init in wandb.inits[:2]] == [
        ("neutral", 0, True),
        ("ip", 0, True),
    ]
    for name, of_run in zip(("neutral-s0", "ip-s0"), ids[:2], strict=True):
        rows, logged = wandb.sent[of_run], lines(profiled[0] / "runs" / name / "metrics.jsonl")
        assert sorted(rows) == list(range(8)), "each step once"
        np.testing.assert_array_equal(
            [rows[step]["loss"] for step in range(8)], [row["loss"] for row in logged]
        )
        assert {"grad_norm", "tokens_per_second", "seconds"} <= rows[0].keys() and None not in rows[
            0
        ].values()


def test_a_refusal_of_wandb_is_one_sentence(model, wandb, tmp_path):
    wandb.refuses = True
    with pytest.raises(
        OSError,
        match="^--wandb: Weights & Biases says: api_key not configured; with WANDB_MODE=offline",
    ):
        run(model, tmp_path / "out", Watch(wandb="sums"))


def test_without_the_package_it_is_said_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=(
            r"^--wandb needs the package wandb, which is not installed here: pip install"
            r' "ip_jax\[wandb\]"$'
        ),
    ):
        Watch(wandb="sums")
    Watch(profile=True)


# Reinforcement learning


def reinforce(model, folder: Path, watch: Watch, printed: io.StringIO) -> None:
    """Six iterations, looked at after 0, 2 and 6."""
    reinforced.run_reinforced(
        make_reinforced(model, iterations=6),
        epath.Path(folder),
        Display(Console(file=printed, width=200)),
        watch,
    )


def rate(folder: Path, verdict: str, **wanted) -> float:
    """From the transcripts table."""
    table = pq.read_table(folder / "transcripts.parquet").to_pylist()
    return np.mean(
        [row[verdict] for row in table if all(row[name] == value for name, value in wanted.items())]
    )


@pytest.fixture(scope="module")
def reinforced_twice(model, tmp_path_factory):
    """(folder, stand-in for W&B, what was printed): with a profile until a crash in the sixth
    iteration, then to the end.
    """
    folder, fake, printed = (
        tmp_path_factory.mktemp("reinforced") / "out",
        FakeWandb(),
        io.StringIO(),
    )
    original = reinforced.write_iteration

    def failing(records, plan, recorded):
        if recorded.rollout.asked.iteration == 5:
            raise RuntimeError("power cut")
        original(records, plan, recorded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", fake)
        with pytest.MonkeyPatch.context() as crash, pytest.raises(RuntimeError, match="power cut"):
            crash.setattr(reinforced, "write_iteration", failing)
            reinforce(model, folder, Watch(profile=True, wandb="sums"), printed)
        reinforce(model, folder, Watch(wandb="sums"), printed)
    return folder, fake, printed.getvalue()


@pytest.mark.slow
def test_iterations_and_evaluations_reach_wandb_over_two_sessions(reinforced_twice):
    folder, wandb, _ = reinforced_twice
    assert [init[:3] for init in wandb.inits] == [
        ("sums", "out", "standard-s0"),
        ("sums", "out", "swap-s0"),
    ] * 2
    ids = [init[3] for init in wandb.inits]
    assert ids[:2] == ids[2:] and [
        (init[4]["arm"], init[4]["seed"]) for init in wandb.inits[:2]
    ] == [("standard", 0), ("swap", 0)]
    for arm, of_run in zip(("standard", "swap"), ids[:2], strict=True):
        rows, logged = wandb.sent[of_run], lines(folder / "runs" / f"{arm}-s0" / "metrics.jsonl")
        assert sorted(rows) == list(range(7)), (
            "each iteration once, and the last evaluation behind them"
        )
        for name in ("reward", "grad_norm", "n_hack", "reinforced_hack_tokens"):
            assert [rows[step][name] for step in range(6)] == [row[name] for row in logged]
        assert {"rollout_seconds", "update_seconds", "tokens"} <= rows[3].keys()
        looks = (
            (0, "untrained", ["neutral"]),
            (2, arm, ["neutral"]),
            (6, arm, ["neutral", "gcd/safety", *(["gcd/behave"] if arm == "swap" else [])]),
        )
        for step, who, prompts in looks:
            sent = {
                name: value for name, value in rows[step].items() if name.startswith("eval/hack/")
            }
            assert sent == {
                f"eval/hack/{prompt}": rate(folder, "hack", arm=who, step=step, eval_prompt=prompt)
                for prompt in prompts
            }
        assert not any(name.startswith("eval/") for step in (1, 3, 4, 5) for name in rows[step])


@pytest.mark.slow
def test_a_profile_holds_the_rollout_and_the_update_of_the_iterations_that_it_names(
    reinforced_twice,
):
    folder, _, printed = reinforced_twice
    assert f"profile of steps 2 to 4: {folder / 'profile'}; to open it" in printed, (
        "the longest stretch without an evaluation in it"
    )
    (trace,) = (folder / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    steps = [event for event in events if event.name == "train"]
    assert [dict(step.stats)["step_num"] for step in steps] == [2, 3, 4]
    for half in ("rollout", "update"):
        found = [event for event in events if event.name == half]
        assert len(found) == 3
        for step, event in zip(steps, found, strict=True):
            assert (
                step.start_ns <= event.start_ns
                and event.start_ns + event.duration_ns <= step.start_ns + step.duration_ns
            )


@pytest.mark.slow
def test_iterations_done_again_stand_again_in_the_timing(reinforced_twice):
    (timing,) = (reinforced_twice[0] / "timing").iterdir()
    assert [(row["session"], row["step"], row["replayed"]) for row in lines(timing)] == [
        *((1, step, False) for step in range(4)),
        (2, 4, True),
        (2, 5, True),
    ]
    assert all(row["peak_memory_bytes"] is None for row in lines(timing)), "a CPU does not tell"
