"""An XProf trace of a few steps that compile nothing, for `ip-jax run ... --profile`."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from ip_jax.training.results import write_whole

STEPS = 3


def traced_steps(shapes: Sequence, first: int, last: int, breaks: Sequence[int] = ()) -> range:
    """The earliest of the steps [first, last) to trace: at most STEPS in a row, as many as there
    are, whose shapes, and that of the step behind them, which begins before they end, were all seen
    since `first`, so that nothing is compiled; and without an evaluation (`breaks`: numbers of
    completed steps) between them. May be empty.
    """
    for count in range(STEPS, 0, -1):
        for start in range(first + 1, last - count + 1):
            window = range(start, start + count)
            if set(shapes[start : min(window.stop + 1, last)]) <= set(
                shapes[first:start]
            ) and not any(start < at < window.stop for at in breaks):
                return window
    return range(0)


class Trace:
    """Traces `steps` on this process's devices and host into `folder`, which may be on an object
    store.
    """

    def __init__(self, folder: epath.Path, steps: range):
        self.folder, self.steps = folder, steps
        self._here: tempfile.TemporaryDirectory | None = None

    def begin(self, step: int) -> None:
        """To be called before each step; starts the profiler before the first one."""
        if self.steps and step == self.steps[0]:
            options = jax.profiler.ProfileOptions()
            # each call of each Python function would be a hundred times the rest
            options.python_tracer_level = 0
            self._here = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._here.name, profiler_options=options)

    def end(self, step: int) -> str | None:
        """To be called when a step is done; after the last one writes the trace and returns a line
        that says where it is.
        """
        if self._here is None or step != self.steps[-1]:
            return None
        self._stop()
        name = os.fspath(self.folder)
        return (
            f"profile of steps {self.steps[0]} to {self.steps[-1]}: {name}; to open it: pip install"
            f" xprof, then xprof --logdir {name}"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._here is not None:  # stopped before its time: what there is
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        with self._here as here:
            for file in sorted(Path(here).rglob("*")):
                if file.is_file():
                    write_whole(self.folder / file.relative_to(here).as_posix(), file.read_bytes())
        self._here = None
