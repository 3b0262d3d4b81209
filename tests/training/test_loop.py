"""The loop: exact resume wherever it stops, each step once in the logs, SIGTERM and full disks
without loss.
"""

import contextlib
import errno
import json
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath
from tiny_program import RUNS, assert_same, fresh_state, run_step, state_at

from ip_jax.training.checkpoint import open_checkpoints
from ip_jax.training.loop import Hooks, LoopOptions, train
from ip_jax.training.results import MetricsLog
from ip_jax.training.stopping import Interrupted, Sigterm

OPTIONS = LoopOptions(steps=7, eval_steps=(0, 2, 7, 10), checkpoint_every=3)


class Recorder:
    """What a program did, and where it is to be disturbed: `disturb[(what, step)]` is called
    there.
    """

    def __init__(self, disturb=None):
        self.disturb = disturb or {}
        self.steps, self.evaluated, self.shown = [], [], []

    def step(self, state, step):
        self.steps.append(step)
        self.disturb.get(("step", step), lambda: None)()
        return run_step(state, step)

    def evaluate(self, state, step):
        self.evaluated.append((step, np.asarray(state.trained["w"]).sum().item()))
        self.disturb.get(("evaluation", step), lambda: None)()

    def show(self, step, metrics, facts):
        self.shown.append((step, metrics["loss"].shape, facts))


def run(folder, recorder: Recorder, options: LoopOptions = OPTIONS):
    """One start of the program on a folder: it goes on from the latest checkpoint."""
    checkpoints = open_checkpoints(epath.Path(folder) / "checkpoints", {"of": "test"})
    state = checkpoints.restore_latest(fresh_state()) or fresh_state()
    logs = [MetricsLog(epath.Path(folder) / f"run{r}.jsonl", int(state.step)) for r in range(RUNS)]
    with contextlib.closing(checkpoints.manager):
        return train(
            state,
            recorder.step,
            logs,
            checkpoints,
            options,
            Hooks(recorder.evaluate, recorder.show),
        )


def logged(folder) -> list[bytes]:
    return [(folder / f"run{r}.jsonl").read_bytes() for r in range(RUNS)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    recorder = Recorder()
    state = run(folder, recorder)
    return state, logged(folder), recorder


def test_an_undisturbed_run(undisturbed):
    state, logs, recorder = undisturbed
    assert_same(state, state_at(7))
    assert recorder.steps == list(range(7))
    assert [step for step, _ in recorder.evaluated] == [0, 2, 7, 10]
    weights = {
        step: np.asarray(state_at(min(step, 7)).trained["w"]).sum().item() for step in (0, 2, 7, 10)
    }
    assert dict(recorder.evaluated) == weights
    for r, log in enumerate(logs):
        rows = [json.loads(line) for line in log.splitlines()]
        assert [(row["step"], row["tokens"]) for row in rows] == [
            (step, 10 + step) for step in range(7)
        ]
        expected = [
            float(np.abs(np.asarray(state_at(step + 1).trained["w"][r])).sum()) for step in range(7)
        ]
        np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=1e-6)
    assert recorder.shown == [(step, (RUNS,), {"tokens": 10 + step}) for step in range(7)]


def test_metrics_that_are_on_the_host_are_shown_at_once(tmp_path, undisturbed):
    """And leave the logs as they are; those of a device wait for the step behind theirs."""
    for host in (True, False):
        recorder, before = Recorder(), []

        def step(state, step, host=host, recorder=recorder, before=before):
            before.append(len(recorder.shown))
            state, metrics, facts = run_step(state, step)
            return state, jax.device_get(metrics) if host else metrics, facts

        recorder.step = step
        run(
            tmp_path / str(host), recorder, LoopOptions(steps=7, eval_steps=(), checkpoint_every=10)
        )
        assert before == [step if host else max(step - 1, 0) for step in range(7)]
        assert logged(tmp_path / str(host)) == undisturbed[1]


def crash():
    raise RuntimeError("power cut")


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "where",
    [
        ("step", 0),
        ("step", 2),
        ("step", 3),
        ("step", 6),
        ("evaluation", 0),
        ("evaluation", 2),
        ("evaluation", 7),
        ("evaluation", 10),
    ],
    ids=str,
)
def test_after_a_crash_anywhere_the_same_command_ends_alike(tmp_path, undisturbed, where):
    state, logs, _ = undisturbed
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, Recorder({where: crash}))
    assert_same(run(tmp_path, Recorder()), state)
    assert logged(tmp_path) == logs


def test_crashes_one_after_another(tmp_path, undisturbed):
    state, logs, _ = undisturbed
    for where in [
        ("step", 1),
        ("evaluation", 2),
        ("step", 2),
        ("step", 4),
        ("step", 3),
        ("step", 6),
        ("evaluation", 7),
    ]:
        with contextlib.suppress(RuntimeError):
            run(tmp_path, Recorder({where: crash}))
    assert_same(run(tmp_path, Recorder()), state)
    assert logged(tmp_path) == logs


def test_sigterm_in_a_step_finishes_and_saves_it(tmp_path, undisturbed):
    state, logs, _ = undisturbed
    recorder = Recorder({("step", 4): sigterm})
    with pytest.raises(Interrupted, match="^stopped by SIGTERM, step 5 is saved$") as stopped:
        run(tmp_path, recorder)
    assert stopped.value.code == 143
    assert recorder.steps == [0, 1, 2, 3, 4]
    again = Recorder()
    assert_same(run(tmp_path, again), state)
    assert again.steps == [5, 6]
    assert logged(tmp_path) == logs


def test_sigterm_in_an_evaluation_stops_at_once(tmp_path, undisturbed):
    state, logs, _ = undisturbed
    reached = []
    recorder = Recorder({("evaluation", 2): lambda: (sigterm(), reached.append("after"))})
    with pytest.raises(
        Interrupted, match="^stopped by SIGTERM in the evaluation of step 2, step 2 is saved$"
    ):
        run(tmp_path, recorder)
    assert not reached
    again = Recorder()
    assert_same(run(tmp_path, again), state)
    assert again.steps == [2, 3, 4, 5, 6] and [step for step, _ in again.evaluated] == [2, 7, 10]
    assert logged(tmp_path) == logs


def test_ctrl_c_goes_on_from_the_last_checkpoint(tmp_path, undisturbed):
    state, logs, _ = undisturbed
    # a shell's background jobs ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Recorder({("step", 5): lambda: os.kill(os.getpid(), signal.SIGINT)}))
    signal.signal(signal.SIGINT, before)
    again = Recorder()
    assert_same(run(tmp_path, again), state)
    assert again.steps == [3, 4, 5, 6]
    assert logged(tmp_path) == logs


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Sigterm("outer"):
        outer = signal.getsignal(signal.SIGTERM)
        run(tmp_path, Recorder())
        assert signal.getsignal(signal.SIGTERM) == outer
        with pytest.raises(Interrupted, match="^outer$"):
            sigterm()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_complete_run_executes_no_step(tmp_path, undisturbed):
    run(tmp_path, Recorder())
    again = Recorder()
    assert_same(run(tmp_path, again), undisturbed[0])
    assert again.steps == []
    assert logged(tmp_path) == undisturbed[1]


def test_a_full_disk_while_the_log_is_written(tmp_path, undisturbed, monkeypatch):
    """The third flush fails: what was saved before stays, and with space again the run ends
    alike.
    """
    state, logs, _ = undisturbed
    calls, replace = [], os.replace

    def fails_later(source, target):
        if str(target).endswith(".jsonl"):
            calls.append(target)
            if len(calls) > 3 * RUNS:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails_later)
        with pytest.raises(
            OSError,
            match="^cannot write .*run0.jsonl: No space left on device; what was finished is kept",
        ):
            run(tmp_path, Recorder())
    again = Recorder()
    assert_same(run(tmp_path, again), state)
    assert again.steps[0] > 0 and logged(tmp_path) == logs


def test_metrics_are_fetched_one_step_late(tmp_path):
    """Step n + 1 is already under way when the metrics of step n are shown."""
    recorder = Recorder()
    seen = []
    recorder.show = lambda step, *_: seen.append((step, recorder.steps[-1]))
    run(tmp_path, recorder, LoopOptions(4, (), 100))
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 3)]


def test_state_stays_on_its_devices(tmp_path):
    from ip_jax.training.sharding import make_mesh, state_shardings

    shardings = state_shardings(make_mesh(run=2, data=2), fresh_state())
    checkpoints = open_checkpoints(tmp_path / "c", {})
    on_mesh = jax.device_put(fresh_state(), shardings)
    state = train(
        on_mesh,
        run_step,
        [],
        checkpoints,
        LoopOptions(3, (1,), 1),
        Hooks(lambda *_: None, lambda *_: None),
    )
    assert all(
        jax.tree.leaves(
            jax.tree.map(
                lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), state, shardings
            )
        )
    )
    assert_same(state, state_at(3))
