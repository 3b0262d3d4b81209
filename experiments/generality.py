"""Runs (or resumes) the figure of general and specific prompts on the toy, then draws it: the same as `ip-jax run generality`."""
import sys

from etils import epath
from rich.console import Console

from configs.generality import FIGURE
from ip_jax.report.rl_report import write_rl_report
from ip_jax.settings.observer import UNWATCHED, Watch
from ip_jax.settings.toy.figure import ToyFigure

NAME = FIGURE.name
shared_part = FIGURE.shared_part


def run(config: ToyFigure, folder: epath.Path, console: Console, _: Watch = UNWATCHED) -> None:
    """Trains what is missing in `folder`, then draws the figures and prints the tables."""
    FIGURE.run(config, folder, console)


def draw(folder: epath.Path, console: Console, _: str = "") -> None:
    """Figures and tables from the tables of `folder` alone."""
    write_rl_report(folder, console)


if __name__ == "__main__":
    from ip_jax.cli import main

    main(["run", NAME, *sys.argv[1:]])
