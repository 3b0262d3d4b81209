"""ip-jax export: writes what a run trained for other programs."""

import argparse

from rich.console import Console

from ip_jax.cli.results import open_results


def main(arguments: list[str], console: Console) -> None:
    """Raises ValueError or OSError, each with one sentence."""
    parser = argparse.ArgumentParser(
        prog="ip-jax export",
        description="Writes what an arm trained: as a PEFT folder, or merged into its model.",
    )
    parser.add_argument("folder")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--to", required=True, help="the folder to write, which must not exist yet")
    parser.add_argument(
        "--merged", action="store_true", help="a Hugging Face model folder instead of an adapter"
    )
    parser.add_argument(
        "--dtype",
        help="of merged weights: float32, bfloat16 or float16; by default as the run held its base",
    )
    options = parser.parse_args(arguments)
    from ip_jax.lab.trained import export_run, read_run

    folder, _ = open_results(options.folder)
    run = read_run(folder, options.arm, options.seed)
    export_run(run, options.to, options.merged, options.dtype)
    console.print(f"{options.arm}, seed {run.seed}: {options.to}", highlight=False)
