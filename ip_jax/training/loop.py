"""The training loop of one program: a plain `for` over steps, with evaluations, checkpoints, logs and exact resume."""
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from ip_jax.training import checkpoint
from ip_jax.training.results import MetricsLog
from ip_jax.training.state import Batch, TrainState


class Interrupted(RuntimeError):
    """SIGTERM arrived: the state is saved and the same command goes on from there."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When to stop, look and save. `eval_steps` are numbers of completed steps, 0 and `steps` included if wanted."""

    steps: int
    active_steps: int  # steps after these have rate 0 and are not executed
    eval_steps: tuple[int, ...]
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls. `evaluate(state, step)` is idempotent; `on_step` gets host metrics for display."""

    evaluate: Callable[[TrainState, int], None]
    on_step: Callable[[int, dict, float, int], None]  # step, metrics {name: [R]}, real / padded, real tokens


def train(
    state: TrainState, base, step_fn, read_batch, logs: Sequence[MetricsLog], checkpoints: ocp.CheckpointManager, origin: dict,
    options: LoopOptions, hooks: Hooks, batch_sharding=None,
) -> TrainState:
    """Runs from `state.step` to the end and returns the last state.

    Metrics of step n are fetched while step n + 1 computes. Every step stands once in the logs: `logs` (one a run) were opened
    at `state.step`. Raises Interrupted after a SIGTERM, with everything saved.
    """
    def save():
        flush_pending()
        for log in logs:
            log.flush()
        checkpoint.save(checkpoints, state, origin)

    pending: list = []

    def flush_pending():
        while pending:
            step, metrics, density, tokens = pending.pop()
            host = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
            for r, log in enumerate(logs):
                log.add({"step": step, **{name: value[r].item() for name, value in host.items()}})
            hooks.on_step(step, host, density, tokens)

    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.wait_until_finished)  # however the loop ends, what was being written gets written
        stop = stack.enter_context(_Sigterm())
        for step in range(int(state.step), options.active_steps + 1):
            due = [s for s in options.eval_steps if min(s, options.active_steps) == step]
            if due:
                save()
            for eval_step in due:
                with stop.at_once(f"stopped by SIGTERM in the evaluation of step {eval_step}, step {step} is saved"):
                    hooks.evaluate(state, eval_step)
            if step == options.active_steps:
                break
            arrays, density = read_batch(step)
            batch = jax.device_put(Batch(**arrays), batch_sharding)
            state, metrics = step_fn(state, base, batch)
            flush_pending()
            pending.append((step, metrics, density, int((arrays["segment_ids"] > 0).sum())))
            if (step + 1) % options.checkpoint_every == 0 or stop.asked:
                save()
            if stop.asked:
                raise Interrupted(f"stopped by SIGTERM, step {step + 1} is saved")
        save()
    return state


class _Sigterm:
    """While open, SIGTERM asks the loop to stop after the present step instead of killing the process (in the main thread only)."""

    def __init__(self):
        self.asked, self.message = False, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.previous)

    def _handle(self, *_):
        self.asked = True
        if self.message is not None:
            raise Interrupted(self.message)

    @contextlib.contextmanager
    def at_once(self, message: str):
        """Inside, where nothing is left to save, SIGTERM raises at once."""
        if self.asked:
            raise Interrupted(message)
        self.message = message
        try:
            yield
        finally:
            self.message = None
