"""What a person sees while arms are trained by reinforcement: one line an arm, means over its
seeds, redrawn at every iteration.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

SHARES = ("hack", "correct", "zero_variance_groups", "gate_acceptance", "clip_fraction")
HEADS = {
    "reward": "reward",
    "hack": "hack\n%",
    "correct": "correct\n%",
    "kl": "KL",
    "entropy": "entropy",
    "length": "length",
    "zero_variance_groups": "0-var.\n%",
    "gate_acceptance": "gate\n%",
    "clip_fraction": "clip\n%",
}


@dataclass(frozen=True)
class ArmRow:
    """One arm at one iteration. `metrics`: means over its `seeds`, named as in HEADS, NaN where not
    measured; shares lie in [0, 1].

    `rollout_rate` and `update_rate` are tokens a second of the program that the arm is part of,
    `rate` those of whole iterations where rollout and update are one jitted program; `seconds_left`
    is that program's estimate. None where not known.
    """

    label: str
    seeds: int
    step: int
    steps: int
    metrics: Mapping[str, float]
    rollout_rate: float | None = None
    update_rate: float | None = None
    seconds_left: float | None = None
    rate: float | None = None


def over_seeds(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """{name: [seeds]} as means over the seeds; a run without a number (frozen, or a quantity that
    is off) is left out, NaN where all are.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in metrics.items()}
    return {
        name: float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan
        for name, values in arrays.items()
    }


def arms_table(rows: Sequence[ArmRow]) -> Table:
    """The arms as a table; what was not measured is a dash. Tokens/s are one column where any row
    has a `rate`, else two.
    """
    whole = any(row.rate is not None for row in rows)
    rates = (
        {"rate": "tokens/s\niteration"}
        if whole
        else {"rollout_rate": "tokens/s\nrollout", "update_rate": "tokens/s\nupdate"}
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm\n(seeds)", overflow="fold")
    for head in (*HEADS.values(), *rates.values(), "step", "left"):
        # a narrow terminal breaks numbers, but loses none
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            escape(f"{row.label} ({row.seeds})"),
            *(_metric(row, name) for name in HEADS),
            *(_rate(getattr(row, name)) for name in rates),
            f"{row.step}/{row.steps}",
            _time(row.seconds_left),
        )
    return table


def arm_line(row: ArmRow) -> str:
    """One arm as a plain line, without what was not measured."""
    shown = {
        name: _metric(row, name) + (" %" if name in SHARES else "")
        for name in HEADS
        if not math.isnan(row.metrics.get(name, math.nan))
    }
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items()]
    rates = {"rollout": row.rollout_rate, "update": row.update_rate, "rollout and update": row.rate}
    parts += [
        f"{_rate(rate)} tokens/s in {name}" for name, rate in rates.items() if rate is not None
    ]
    parts += [f"{_time(row.seconds_left)} left"] if row.seconds_left is not None else []
    return (
        f"{row.label} ({row.seeds} seed{'s' * (row.seeds != 1)}), step {row.step}/{row.steps}:"
        f" {', '.join(parts)}"
    )


@contextlib.contextmanager
def live_arms(console: Console, every: int = 10) -> Iterator[Callable[[Sequence[ArmRow]], None]]:
    """Yields `show(rows)` for the arms of the iteration that is done; arms shown earlier stay in
    the table as they were last.

    On a console that is no terminal, a line an arm at every `every` steps and at the last one.
    """
    latest: dict[str, ArmRow] = {}
    with (
        Live(console=console, refresh_per_second=4)
        if console.is_terminal
        else contextlib.nullcontext()
    ) as live:

        def show(rows: Sequence[ArmRow]) -> None:
            latest.update({row.label: row for row in rows})
            if live:
                live.update(arms_table(list(latest.values())))
                return
            for row in rows:
                if row.step % every == 0 or row.step == row.steps:
                    console.print(arm_line(row), highlight=False, markup=False, soft_wrap=True)

        yield show


def _metric(row: ArmRow, name: str) -> str:
    value = row.metrics.get(name, math.nan)
    if math.isnan(value):
        return "–"
    if name in SHARES:
        # a loophole is found at 0.1 to 1 %
        return f"{100 * value:.1f}" if 0 < value < 0.1 else f"{100 * value:.0f}"
    return f"{value:.3g}".replace("-", "−")


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate / 1000:.1f}k" if rate >= 10_000 else f"{rate:.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
