"""The report of an RL experiment, from the two tables and config.json of its folder alone: figures,
tables, and what its rules decide.
"""

from __future__ import annotations

import dataclasses
import math
import os

from rich.console import Console

from ip_jax.report import panels, rl_figures, rl_tables
from ip_jax.report.rl_dose import draw_dose
from ip_jax.report.rl_view import load_rl_view
from ip_jax.training.results import write_json, write_whole

FIGURES = {
    "curves": rl_figures.draw_curves,
    "frontier": rl_figures.draw_frontier,
    "forest": rl_figures.draw_forest,
    "dose": draw_dose,
}
TABLES = {
    "arms.csv": rl_tables.arms_csv,
    "runs.csv": rl_tables.runs_csv,
    "leak_grid.csv": rl_tables.leak_csv,
    "dose.csv": rl_tables.dose_csv,
    "report.md": rl_tables.markdown,
}


def write_rl_report(folder: str | os.PathLike, console: Console | None = None) -> None:
    """Writes curves, frontier, forest and dose as PNG and SVG, arms.csv, runs.csv, leak_grid.csv,
    dose.csv, report.md and verdicts.json, and prints the tables.

    Needs no model. Raises FileNotFoundError or ValueError for a folder without results, OSError
    where nothing can be written.
    """
    view = load_rl_view(folder)
    for name, write in TABLES.items():
        write_whole(view.folder / name, write(view).encode())
    write_json(
        view.folder / "verdicts.json",
        [
            {
                "rule": dataclasses.asdict(found.rule),
                "number": _finite(dataclasses.asdict(found.number)),
                "verdict": found.word,
            }
            for found in view.verdicts
        ],
    )
    for name, draw in FIGURES.items():
        png, svg = panels.render(draw(view))
        write_whole(view.folder / f"{name}.png", png)
        write_whole(view.folder / f"{name}.svg", svg)
    rl_tables.print_tables(view, console or Console())


def _finite(number: dict) -> dict:
    """JSON has no NaN or infinity: they become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in number.items()
    }
