"""What the figures on the toy share: train what is missing, then draw."""

from etils import epath
from rich.console import Console

from ip_jax.lab.observer import UNWATCHED, Watch
from ip_jax.report.rl_report import write_rl_report
from ip_jax.studies.toy.figure import Figure, ToyFigure


def run(
    figure: Figure,
    config: ToyFigure,
    folder: epath.Path,
    console: Console,
    watch: Watch = UNWATCHED,
) -> None:
    """Trains what is missing in `folder`, then draws the figures and prints the tables."""
    if watch != UNWATCHED:
        raise ValueError(
            "--profile and --wandb do not watch the toy, whose iterations run inside one jitted"
            " loop: see curves.parquet and timing/ in the results folder"
        )
    figure.run(config, folder, console)
    draw(folder, console)


def redraw(_: ToyFigure, folder: epath.Path, console: Console) -> None:
    """As `run` draws."""
    draw(folder, console)


def draw(folder: epath.Path, console: Console, judge: str | None = None) -> None:
    """Figures and tables from the tables of `folder` alone. Raises ValueError where a judge is
    chosen: the toy has none.
    """
    if judge is not None:
        raise ValueError("figures on the toy have no judge: --judge is for gcd_sycophancy")
    write_rl_report(folder, console)
