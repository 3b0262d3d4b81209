"""What a person sees while an experiment runs: one bar with rates and time left, and the losses of
every run.
"""

import contextlib
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Rich progress of one phase at a time; on a console that is no terminal, a plain line every
    few seconds.
    """

    def __init__(self, console: Console):
        self.console = console

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str):
        """Yields `advance(amount, note)` or `advance(to=done)`; shows how many of `total` units are
        done, their rate and the time left.
        """
        started = last_line = time.monotonic()
        done = 0
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("[cyan]{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.console, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task(name, total=total, note="")

            def advance(amount: int = 0, note: str = "", to: int | None = None):
                nonlocal done, last_line
                done = done + amount if to is None else to
                progress.update(task, completed=done, note=note)
                now = time.monotonic()
                if not self.console.is_terminal and (now - last_line > 10 or done >= total):
                    last_line = now
                    left = (now - started) / max(done, 1) * (total - done)
                    said = (
                        f"{name}: {done}/{total} {unit}",
                        note,
                        f"{now - started:.0f} s",
                        f"{left:.0f} s left",
                    )
                    self.console.print(", ".join(filter(None, said)), highlight=False)

            yield advance
