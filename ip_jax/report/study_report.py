"""The report of a supervised experiment: table.csv, the figure and the terminal's tables, from its
results folder and its study alone.
"""

from __future__ import annotations

import os

from rich.console import Console

from ip_jax.lab.study import Study
from ip_jax.report import panels, tables, terminal
from ip_jax.report.figure import draw
from ip_jax.report.view import load_view
from ip_jax.training.results import write_whole


def write_report(
    study: Study,
    folder: str | os.PathLike,
    console: Console | None = None,
    judge: str | None = None,
) -> None:
    """Writes table.csv, figure.png and figure.svg of a results folder and prints the tables. Needs
    no model.

    Raises FileNotFoundError or ValueError for a folder without results, ValueError for an unknown
    judge, OSError where nothing can be written.
    """
    shown = load_view(folder, study, judge)
    by = study.by
    labels = tables.summarise_labels(shown.results.transcripts, by, study.judges) if by else {}
    tables.write_csv(shown.results.folder / "table.csv", shown.cells, labels)
    png, svg = panels.render(draw(shown))
    write_whole(shown.results.folder / "figure.png", png)
    write_whole(shown.results.folder / "figure.svg", svg)
    terminal.print_report(shown, console or Console())
