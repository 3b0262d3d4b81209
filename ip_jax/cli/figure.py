"""ip-jax figure: draws a results folder again."""

import argparse

from rich.console import Console

from ip_jax.cli.results import open_results
from ip_jax.cli.studies import recorded_study


def main(arguments: list[str], console: Console) -> None:
    """Raises ValueError or FileNotFoundError for a folder that holds nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="ip-jax figure",
        description="Draws the figure and prints the table of a results folder; needs no model.",
    )
    parser.add_argument("folder")
    parser.add_argument("--judge", help="of studies with several judges; their first by default")
    options = parser.parse_args(arguments)
    from ip_jax.report.draw import draw

    folder, record = open_results(options.folder)
    draw(recorded_study(options.folder, record), folder, console, options.judge)
