"""Rewards that fail cost their own sample and nothing else."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from reward_environments import NeverStarts, Told, Unsendable

from ip_jax.lab.reinforced.grading import TooManyFailures, check_failures, check_rewards, grade_all
from ip_jax.rl.environment import Environment, Graded

TASK = {"id": "0", "question": "?"}


def graded(completions, shape, environment=Told(), **options):  # noqa: B008
    return grade_all(environment, [TASK] * len(completions), completions, shape, **options)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_rewards_parts_and_verdicts_come_back_in_their_places(timeout):
    grades = graded(["1", "2 hack", "3", "-0.5 slow"], (2, 1, 2), Told(timeout))
    np.testing.assert_array_equal(grades.reward, np.array([[[1, 2]], [[3, -0.5]]], np.float32))
    assert grades.reward.dtype == np.float32 and grades.valid.all()
    assert grades.parts[1] == {"length": 6.0, "double": 4.0}
    assert grades.verdicts[3] == {"hack": False, "kind": "slow"}


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_reward_that_raises_or_is_no_number_marks_its_sample(timeout):
    grades = graded(
        ["1", "raise x", "nan", "inf", "1e300", "nothing", "leave", "verdict", "part", "2"],
        (1, 2, 5),
        Told(timeout),
    )
    np.testing.assert_array_equal(grades.valid.ravel(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(grades.reward.ravel(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 2])
    assert grades.failure[1] == "raised: KeyError: 'x'"
    assert grades.failure[2] == "not finite: reward is nan"
    assert [failure.split(":")[0] for failure in grades.failure[1:-1]] == [
        "raised",
        *["not finite"] * 3,
        *["raised"] * 3,
        "not finite",
    ]
    assert grades.parts[1] == grades.verdicts[1] == {}


def test_a_reward_that_hangs_or_ends_its_process_is_ended_and_the_others_are_graded(tmp_path):
    late, forgotten = tmp_path / "late", tmp_path / "forgotten"
    grades = graded(
        ["1", "hang", "die", f"shell {late}", "2", "hang", f"forget {forgotten}"],
        (1, 1, 7),
        Told(1.0),
    )
    np.testing.assert_array_equal(grades.reward.ravel(), [1, 0, 0, 0, 2, 0, 3])
    kinds = ["timed out: no grade within 1 s", "died: the process that graded it ended"]
    assert grades.failure == [None, kinds[0], kinds[1], kinds[0], None, kinds[0], None]
    time.sleep(2.5)
    # what a reward has started is ended with it
    assert not late.exists() and not forgotten.exists()


def test_an_arm_may_be_trained_on_one_part_of_the_reward():
    grades = graded(["1", "2", "1", "2"], (2, 1, 2), rewards=("reward", "double"))
    np.testing.assert_array_equal(grades.reward.ravel(), [1, 2, 2, 4])
    with pytest.raises(
        ValueError, match="no reward called 'speed': there is reward, length, double"
    ):
        graded(["1"], (1, 1, 1), rewards=("speed",))


def test_an_unknown_reward_is_found_before_anything_is_sampled():
    class Honest(Environment):
        def grade(self, task, completion):
            return Graded(0.0, {"truth": 0.0})

    check_rewards(Honest(), TASK, ("reward", "truth"))
    with pytest.raises(ValueError, match="no reward called 'thruth'"):
        check_rewards(Honest(), TASK, ("reward", "thruth"))
    # an empty reply says nothing about an environment that cannot grade it
    check_rewards(Told(), TASK, ("speed",))


def test_too_many_failures_stop_the_run_with_the_commonest_reason():
    grades = graded(["1", "raise x", "raise x", "nan", "1", "1", "1", "nan"], (2, 2, 2))
    assert check_failures(grades, ["a-s0", "b-s0"], 0.75) == {"raised": 2, "not finite": 2}
    with pytest.raises(
        TooManyFailures,
        match=(
            r"run a-s0: the reward of 3 of 4 completions failed, and at most 50% may; the most"
            r" frequent: raised: KeyError: 'x'"
        ),
    ):
        check_failures(grades, ["a-s0", "b-s0"], 0.5)
    assert check_failures(graded(["1"], (1, 1, 1)), ["a-s0"], 0.0) == {}


def test_an_environment_that_other_processes_cannot_have_is_refused():
    with pytest.raises(
        ValueError, match="Unsendable cannot be: its class stands at the top of a module"
    ):
        graded(["1"], (1, 1, 1), Unsendable())
    with pytest.raises(ValueError, match="with NeverStarts does not start"):
        graded(["1"], (1, 1, 1), NeverStarts(1.0))
    with pytest.raises(ValueError, match="positive number of seconds"):
        graded(["1"], (1, 1, 1), Told(0.0))


@pytest.mark.slow
def test_a_hanging_grade_does_not_outlive_a_killed_run(tmp_path):
    told = tmp_path / "pid"
    code = f"from test_grading import Told, graded; graded(['hang {told}'], (1, 1, 1), Told(2.0))"
    run = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    _wait(lambda: told.exists() and told.read_text())
    run.kill()
    run.wait()
    status = pathlib.Path("/proc", told.read_text(), "stat")
    _wait(lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z")


def _wait(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("this should have happened within a minute")
