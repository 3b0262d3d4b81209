"""The training loop of one program: a plain `for` over steps, with evaluations, checkpoints, logs and exact resume."""
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
    """A step that a `RunStep` refuses to take, raised before it has touched the state; the loop saves, then lets it through."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When to stop, look and save.

    `eval_steps` are numbers of completed steps, 0 included if wanted. Those past `steps` are looked at when all are done: where a
    schedule ends with steps of rate 0, these are not executed.
    """

    steps: int
    eval_steps: tuple[int, ...]
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls. `evaluate(state, step)` is idempotent; `on_step(step, metrics {name: [R]}, facts)` is for display;
    `on_save()` follows the writing of the logs, in process 0 alone.
    """

    evaluate: Callable[[TrainState, int], None]
    on_step: Callable[[int, dict, dict], None]
    on_save: Callable[[], None] = lambda: None


def train(
    state: TrainState, run_step: RunStep, logs: Sequence[MetricsLog], checkpoints: Checkpoints, options: LoopOptions, hooks: Hooks
) -> TrainState:
    """Runs from `state.step` to the end and returns the last state, which is saved.

    Metrics of step n are fetched while step n + 1 computes, unless they are numpy's already. Every step stands once in the logs: `logs` (one a run, process 0's
    alone) were opened at `state.step`. Raises Interrupted after a SIGTERM to any process, in all of them after the same step, with
    everything saved, Halted where `run_step` does, and OSError where nothing can be saved.
    """
    pending: list = []

    def flush_pending():
        while pending:
            step, metrics, facts = pending.pop()
            host = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
            for r, log in enumerate(logs):
                log.add({"step": step, **{name: value[r].item() for name, value in host.items()}, **facts})
            hooks.on_step(step, host, facts)

    def flush_logs():
        for log in logs:
            log.flush()
        hooks.on_save()

    def save():
        flush_pending()
        hosts.by_first(flush_logs)
        checkpoints.save(state)

    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.wait)  # however the loop ends, what was being written gets written
        stop = stack.enter_context(Sigterm())
        for step in range(int(state.step), options.steps + 1):
            due = [s for s in options.eval_steps if min(s, options.steps) == step]
            if due:
                save()
            for eval_step in due:
                with stop.at_once(f"stopped by SIGTERM in the evaluation of step {eval_step}, step {step} is saved"):
                    hooks.evaluate(state, eval_step)
            if step == options.steps:
                break
            try:
                state, metrics, facts = run_step(state, step)
            except Halted:
                save()
                raise
            flush_pending()
            pending.append((step, metrics, facts))
            if not any(isinstance(value, jax.Array) for value in metrics.values()):
                flush_pending()
            stopping = stop.agreed(metrics)
            if (step + 1) % options.checkpoint_every == 0 or stopping:
                save()
            if stopping:
                raise Interrupted(f"stopped by SIGTERM, step {step + 1} is saved")
        save()
    return state
