"""What of a training program is watched besides its metrics.jsonl: timing.jsonl, a profile, and the
metrics on Weights & Biases.

Process 0 alone writes.
"""

import contextlib
import dataclasses
import importlib.util
import json
import secrets
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from ip_jax.training import hosts
from ip_jax.training.loop import RunStep
from ip_jax.training.profile import Trace
from ip_jax.training.results import MetricsLog, write_json
from ip_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Watch:
    """What to watch: `profile` traces a few steps of each program (training.profile), `wandb` names
    a project on Weights & Biases.
    """

    profile: bool = False
    wandb: str | None = None

    def __post_init__(self):
        if self.wandb is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "--wandb needs the package wandb, which is not installed here: pip install"
                ' "ip_jax[wandb]"'
            )


UNWATCHED = Watch()


class Wandb:
    """One W&B run for each of a program's runs, in a group for the results folder. While it is
    open, `log` sends a step's metrics there.

    The id of each is kept in the run's folder (wandb.json): the same command goes on in the same
    W&B run, and steps that are there already, because training went back to a checkpoint, are not
    sent again. Opening it raises OSError where W&B refuses (no key, no network).
    """

    def __init__(self, project: str, folder: epath.Path, runs: Mapping[str, Mapping]):
        """`runs`: the config of each by its name."""
        self.project, self.folder, self.runs = project, folder, runs

    def __enter__(self):
        import wandb

        with contextlib.ExitStack() as stack:
            try:
                self._open = [
                    stack.enter_context(
                        wandb.init(
                            project=self.project,
                            group=self.folder.name,
                            name=name,
                            id=self._id(name),
                            resume="allow",
                            reinit="create_new",
                            config=dict(config),
                        )
                    )
                    for name, config in self.runs.items()
                ]
            except wandb.Error as error:
                raise OSError(
                    f"--wandb: Weights & Biases says: {error}; with WANDB_MODE=offline in the"
                    " environment nothing is sent"
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def _id(self, name: str) -> str:
        path = self.folder / "runs" / name / "wandb.json"
        if not path.exists():
            write_json(path, {"project": self.project, "id": secrets.token_hex(6)})
        return json.loads(path.read_text())["id"]

    def log(self, step: int, rows: Sequence[Mapping]) -> None:
        """`rows`: what to send of each run."""
        for run, row in zip(self._open, rows, strict=True):
            if step >= run.starting_step:
                run.log(row, step=step)


class Observer:
    """Watches the steps of one program of `runs` runs while it is open. Timing goes into
    folder/timing/<program>.jsonl, where each session appends its steps.
    """

    def __init__(
        self, runs: int, timing: epath.Path, trace: Trace | None = None, wandb: Wandb | None = None
    ):
        self.trace, self.wandb = trace, wandb
        self.log = MetricsLog(timing, sys.maxsize) if hosts.is_first() else None
        self.session = (
            1 + max((row["session"] for row in self.log.rows), default=0) if self.log else 1
        )
        self._evaluated: tuple[int, list[dict]] = 0, [{} for _ in range(runs)]  # not sent yet

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for part in filter(None, (self.trace, self.wandb)):
                hosts.by_first(lambda part=part: stack.enter_context(part) and None)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, *error):
        step, rates = self._evaluated
        if kind is None and any(rates):  # of the last evaluation, behind the last step
            self.wandb.log(step, rates)
        return self._stack.__exit__(kind, *error)

    def around(self, run_step: RunStep) -> RunStep:
        """`run_step` as a trace of the profiler shows it: by its number."""

        def watched(state: TrainState, step: int):
            if self.trace and hosts.is_first():
                self.trace.begin(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                return run_step(state, step)

        return watched

    def end(self, step: int, metrics: Mapping[str, np.ndarray], row: Mapping, console) -> None:
        """When the metrics {name: [R]} of a step are there; `row`: what its time was spent on, the
        same for all runs.
        """
        if not hosts.is_first():
            return
        self.log.add({"session": self.session, "step": step, **row})
        if self.wandb:
            common = {
                name: value for name, value in row.items() if name != "step" and value is not None
            }
            rates = self._evaluated[1]
            self.wandb.log(
                step,
                [
                    {
                        **{name: values[r].item() for name, values in metrics.items()},
                        **common,
                        **of_run,
                    }
                    for r, of_run in enumerate(rates)
                ],
            )
            self._evaluated = step, [{} for _ in rates]
        if self.trace and (line := self.trace.end(step)):
            console.print(line, highlight=False, soft_wrap=True)

    def evaluated(self, step: int, rates: Sequence[Mapping[str, float]]) -> None:
        """What an evaluation after `step` steps gave of each run, in process 0; W&B gets it
        together with the next step, which has that number.
        """
        self._evaluated = step, [dict(of_run) for of_run in rates]

    def save(self) -> None:
        """Writes the timing of all steps so far."""
        if self.log.rows:
            self.log.flush()


def observer_of(
    watch: Watch,
    folder: epath.Path,
    program: str,
    configs: Mapping[str, Mapping],
    traced: range,
    console,
) -> Observer:
    """The observer of a program. `configs`: that of each of its runs by name, as W&B shows it;
    `traced`: the steps that a profile can hold.
    """
    if watch.profile and not traced:
        console.print(
            "profile: nothing to trace, there is no step left after the first one that compiles"
            " nothing"
        )
    return Observer(
        len(configs),
        folder / "timing" / f"{program}.jsonl",
        Trace(folder / "profile", traced) if watch.profile and traced else None,
        Wandb(watch.wandb, folder, configs) if watch.wandb else None,
    )
