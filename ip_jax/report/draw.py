"""The report of a results folder, whatever trained it."""

from etils import epath
from rich.console import Console

from ip_jax.lab.study import Study
from ip_jax.report.rl_report import write_rl_report
from ip_jax.report.study_report import write_report


def draw(study: Study, folder: epath.Path, console: Console, judge: str | None = None) -> None:
    """Figures and tables from the tables of `folder` alone; needs no model. Raises ValueError where
    a judge is chosen that the study does not have.
    """
    if not (folder / "curves.parquet").exists():
        write_report(study, folder, console, judge)
        return
    if judge is not None:
        raise ValueError(
            f"{study.name} is drawn from counts of one judge: --judge is for supervised studies"
            " with several"
        )
    write_rl_report(folder, console)
