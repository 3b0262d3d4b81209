"""The training loop of one program: a plain `for` over steps, with evaluations, checkpoints, logs
and exact resume.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ip_jax.training import hosts
from ip_jax.training.checkpoint import Checkpoints
from ip_jax.training.results import MetricsLog
from ip_jax.training.state import TrainState
from ip_jax.training.stopping import Interrupted, Sigterm

# (state, step) -> (state, metrics {name: [R]}, facts {name: number} that the host knew beforehand)
RunStep = Callable[[TrainState, int], tuple[TrainState, dict, dict]]


class Halted(ValueError):
    """A step that a `RunStep` refuses to take, raised before it has touched the state; the loop
    saves, then lets it through.
    """


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When to stop, look and save.

    `eval_steps` are numbers of completed steps, 0 included if wanted. Those past `steps` are looked
    at when all are done: where a schedule ends with steps of rate 0, these are not executed.
    """

    steps: int
    eval_steps: tuple[int, ...]
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls. `evaluate(state, step)` is idempotent; `on_step(step, metrics {name:
    [R]}, facts)` is for display; `on_save()` follows the writing of the logs, in process 0 alone.
    """

    evaluate: Callable[[TrainState, int], None]
    on_step: Callable[[int, dict, dict], None]
    on_save: Callable[[], None] = lambda: None


class _Record:
    """What is written while the loop runs: metrics one step late, then logs, then checkpoints."""

    def __init__(self, logs: Sequence[MetricsLog], checkpoints: Checkpoints, hooks: Hooks):
        self.logs, self.checkpoints, self.hooks = logs, checkpoints, hooks
        self.pending: tuple[int, dict, dict] | None = None

    def add(self, step: int, metrics: dict, facts: dict) -> None:
        """Writes the step before, and keeps this one until its metrics have been computed."""
        self.flush_pending()
        self.pending = (step, metrics, facts)
        if not any(isinstance(value, jax.Array) for value in metrics.values()):
            self.flush_pending()

    def flush_pending(self) -> None:
        if self.pending is None:
            return
        step, metrics, facts = self.pending
        self.pending = None
        host = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        for r, log in enumerate(self.logs):
            of_run = {name: value[r].item() for name, value in host.items()}
            log.add({"step": step, **of_run, **facts})
        self.hooks.on_step(step, host, facts)

    def _flush_logs(self) -> None:
        for log in self.logs:
            log.flush()
        self.hooks.on_save()

    def save(self, state: TrainState) -> None:
        self.flush_pending()
        hosts.by_first(self._flush_logs)
        self.checkpoints.save(state)


def train(
    state: TrainState,
    run_step: RunStep,
    logs: Sequence[MetricsLog],
    checkpoints: Checkpoints,
    options: LoopOptions,
    hooks: Hooks,
) -> TrainState:
    """Runs from `state.step` to the end and returns the last state, which is saved.

    Metrics of step n are fetched while step n + 1 computes, unless they are numpy's already. Every
    step stands once in the logs: `logs` (one a run, process 0's alone) were opened at `state.step`.
    Raises Interrupted after a SIGTERM to any process, in all of them after the same step, with
    everything saved, Halted where `run_step` does, and OSError where nothing can be saved.
    """
    record = _Record(logs, checkpoints, hooks)
    with contextlib.ExitStack() as stack:
        # however the loop ends, what was being written gets written
        stack.callback(checkpoints.wait)
        stop = stack.enter_context(Sigterm())
        for step in range(int(state.step), options.steps + 1):
            due = [s for s in options.eval_steps if min(s, options.steps) == step]
            if due:
                record.save(state)
            for eval_step in due:
                reached = f"in the evaluation of step {eval_step}, step {step} is saved"
                with stop.at_once(f"stopped by SIGTERM {reached}"):
                    hooks.evaluate(state, eval_step)
            if step == options.steps:
                break
            try:
                state, metrics, facts = run_step(state, step)
            except Halted:
                record.save(state)
                raise
            record.add(step, metrics, facts)
            stopping = stop.agreed(metrics)
            if (step + 1) % options.checkpoint_every == 0 or stopping:
                record.save(state)
            if stopping:
                raise Interrupted(f"stopped by SIGTERM, step {step + 1} is saved")
        record.save(state)
    return state
