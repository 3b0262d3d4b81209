"""Grades of all completions of an iteration: in the training process, or with a time limit in
worker processes that can be ended.

A grade that raises, hangs, takes its process down or is not a finite number marks that sample as
failed; the others go on.
"""

import collections
import contextlib
import multiprocessing
import numbers
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ip_jax.rl.environment import REWARD, Environment, Graded, Grades

START_SECONDS = 120.0  # a worker that cannot import its environment within this never will
_GRACE_SECONDS = 5.0
_LARGEST = float(np.finfo(np.float32).max)  # rewards become float32
_CONTEXT = multiprocessing.get_context("spawn")  # a fork of a process that runs jax may deadlock

Task = dict[str, Any]
Outcome = Graded | str  # a grade, or what failed


class TooManyFailures(ValueError):
    """More of an iteration's grades failed than the config allows."""


def grade_all(
    environment: Environment,
    tasks: Sequence[Task],
    completions: Sequence[str],
    shape: tuple[int, int, int],
    rewards: Sequence[str] = (),
    workers: int = 2,
) -> Grades:
    """Grades completion i of task i; both lists are flat in the order of `shape` = (R, Q, G).

    `rewards`: for each run the name of the part that it is trained on, or "reward" (all of them
    where nothing is given). `workers`: processes that grade side by side where the environment has
    a time limit. Raises ValueError for a part that the environment does not have, a time limit that
    is not positive, and workers that cannot start.
    """
    rewards = tuple(rewards) or (REWARD,) * shape[0]
    outcomes = _outcomes(environment, list(zip(tasks, completions, strict=True)), workers)
    of_run = [name for name in rewards for _ in range(shape[1] * shape[2])]
    checked = [_checked(outcome, name) for outcome, name in zip(outcomes, of_run, strict=True)]
    return Grades(
        reward=np.array([reward for reward, _ in checked], np.float32).reshape(shape),
        parts=[
            dict(outcome.parts) if failure is None else {}
            for outcome, (_, failure) in zip(outcomes, checked, strict=True)
        ],
        verdicts=[
            dict(outcome.verdicts) if failure is None else {}
            for outcome, (_, failure) in zip(outcomes, checked, strict=True)
        ],
        failure=[failure for _, failure in checked],
    )


def check_rewards(environment: Environment, task: Task, rewards: Sequence[str]) -> None:
    """Raises ValueError for a reward that the environment does not have, before anything is
    sampled: an empty reply is graded.

    An environment that cannot grade an empty reply is found out by `grade_all`.
    """
    (outcome,) = _outcomes(environment, [(task, "")], workers=1)
    for name in rewards:
        _checked(outcome, name)


def check_failures(grades: Grades, runs: Sequence[str], allowed: float) -> dict[str, int]:
    """Kind of failure -> count. To be called when the iteration has been saved.

    Raises TooManyFailures, one sentence, where more than the share `allowed` of a run's completions
    failed.
    """
    count = grades.reward[0].size
    for index, run in enumerate(runs):
        reasons = collections.Counter(
            failure for failure in grades.failure[index * count : (index + 1) * count] if failure
        )
        if reasons.total() > allowed * count:
            raise TooManyFailures(
                f"run {run}: the reward of {reasons.total()} of {count} completions failed, and at"
                f" most {allowed:.0%} may; the most frequent: {reasons.most_common(1)[0][0]}"
            )
    return dict(collections.Counter(failure.split(":")[0] for failure in grades.failure if failure))


def _outcomes(
    environment: Environment, jobs: list[tuple[Task, str]], workers: int
) -> list[Outcome]:
    if environment.timeout is None:
        return [_grade(environment, task, completion) for task, completion in jobs]
    if not environment.timeout > 0:
        raise ValueError(
            f"the environment's timeout is {environment.timeout}: it is a positive number of"
            " seconds, or None for no limit"
        )
    return _grade_in_workers(environment, jobs, min(workers, len(jobs)))


def _grade(environment: Environment, task: Task, completion: str) -> Outcome:
    try:
        return environment.grade(task, completion)
    # whatever a user's reward raises is told, and costs one sample
    except (Exception, SystemExit) as error:
        return f"raised: {type(error).__name__}: {error}"


def _checked(outcome: Outcome, reward: str) -> tuple[float, str | None]:
    """(reward, None), or (0, what failed)."""
    if isinstance(outcome, str):
        return 0.0, outcome
    if not isinstance(outcome, Graded):
        return 0.0, f"raised: grade returned {type(outcome).__name__} and not Graded"
    values = {REWARD: outcome.reward, **outcome.parts}
    if reward not in values:
        raise ValueError(
            f"the environment has no reward called {reward!r}: there is {', '.join(values)}"
        )
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            return 0.0, f"not finite: {name} is {type(value).__name__} and no number"
        if not abs(value) <= _LARGEST:
            return 0.0, f"not finite: {name} is {value}"
    for name, value in outcome.verdicts.items():
        if not isinstance(value, bool | str):
            return (
                0.0,
                f"raised: the verdict {name} is {type(value).__name__}, allowed are bool and str",
            )
    return float(values[reward]), None


def _grade_in_workers(
    environment: Environment, jobs: list[tuple[Task, str]], count: int
) -> list[Outcome]:
    """Each of `count` threads has a worker process and gives it one job after the other; every job
    is given out once.
    """
    outcomes: dict[int, Outcome] = {}
    waiting = iter(range(len(jobs)))  # taken from under the interpreter's lock
    stopped = threading.Event()

    def work(_):
        worker = None
        try:
            for index in waiting:
                if stopped.is_set():
                    return
                if worker is None or not worker.process.is_alive():
                    worker = _Worker(environment)
                outcomes[index] = worker.grade(jobs[index])
        finally:
            if worker is not None:
                worker.end()

    with ThreadPoolExecutor(count) as threads:
        try:
            list(threads.map(work, range(count)))
        except BaseException:
            stopped.set()  # the other threads end after the grade that they are at
            raise
    return [outcomes[index] for index in range(len(jobs))]


class _Worker:
    """A process that grades one completion at a time, in a session of its own: what a reward has
    started ends with it.
    """

    def __init__(self, environment: Environment):
        self.environment = environment
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(environment, theirs), daemon=True)
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                "an environment with a timeout is sent to other processes, and"
                f" {type(environment).__name__} cannot be: its class stands at the top of a module,"
                f" and it holds plain data ({error})"
            ) from error
        theirs.close()
        if self._answer(START_SECONDS) != "ready":
            raise ValueError(
                f"a process that grades with {type(environment).__name__} does not start: what it"
                " printed says why"
            )

    def grade(self, job: tuple[Task, str]) -> Outcome:
        """The grade, or what failed; after a time-out or a death this worker is ended."""
        return self._answer(self.environment.timeout, job)

    def _answer(self, seconds: float, job: tuple[Task, str] | None = None) -> Any:
        try:
            if job:
                self.pipe.send(job)
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            failure = f"timed out: no grade within {seconds:g} s"
        except (EOFError, ConnectionError):
            failure = "died: the process that graded it ended"
        self.end()
        return failure

    def end(self) -> None:
        """Ends the process and all that it has started."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its children, even where it is gone
        self.process.join()
        self.pipe.close()


def _serve(environment: Environment, pipe) -> None:
    """A worker's life: one grade after the other, until the training process ends it or is gone."""
    os.setsid()
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            task, completion = pipe.recv()
            # also where nobody is left to end this process
            signal.setitimer(signal.ITIMER_REAL, environment.timeout + _GRACE_SECONDS)
            outcome = _grade(environment, task, completion)
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                pipe.send(outcome)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                pipe.send(f"raised: {type(error).__name__}: {error}")
