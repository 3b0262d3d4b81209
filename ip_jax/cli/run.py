"""ip-jax run: trains and evaluates what is missing of a study, then draws its figure."""

import argparse
import os

from etils import epath
from rich.console import Console

from ip_jax.cli import studies


def main(arguments: list[str], console: Console) -> None:
    """Raises ValueError or OSError, each with one sentence, before anything is trained."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--out")
    own.add_argument("--profile", action="store_true")
    own.add_argument("--wandb", nargs="?", const="ip_jax")
    own.add_argument("--distributed", action="store_true")
    own.add_argument("--coordinator")
    own.add_argument("--processes", type=int)
    own.add_argument("--process", type=int)
    asked = studies.read("run", arguments, own)
    from ip_jax.lab.display import Display
    from ip_jax.lab.observer import Watch
    from ip_jax.lab.run import experiment_of, folder_name, run
    from ip_jax.report.draw import draw
    from ip_jax.training import hosts

    study, options = asked.study, asked.options
    if study is None:
        raise ValueError(
            f"{arguments[0]} holds sizes and no data, so it can only be planned: ip-jax plan"
            f" {arguments[0]} --topology v5e:4x4"
        )
    watch = Watch(options.profile, options.wandb)
    _join(options, console)  # before jax is asked for its devices: processes join before they are
    experiment = experiment_of(study, asked.preset)
    default = epath.Path("results") / study.name / folder_name(study, experiment)
    folder = epath.Path(options.out) if options.out else default
    console.print(f"results: {folder}", highlight=False)
    console.print(f"compiled programs: {_enable_compile_cache()}", highlight=False)
    run(study, experiment, folder, Display(console), watch)
    judge = getattr(asked.preset, "judge", None)
    hosts.by_first(lambda: draw(study, folder, console, judge))


def _join(options: argparse.Namespace, console: Console) -> None:
    """Joins the other processes of this run, if there are any; all but the first are then silent
    but for errors.
    """
    from ip_jax.training import hosts

    given = hosts.Cluster(options.coordinator, options.processes, options.process)
    cluster = hosts.find_cluster(given, options.distributed, os.environ)
    if cluster:
        at = f" at {cluster.coordinator}" if cluster.coordinator else ""
        with console.status(f"looking for the other processes{at}"):
            hosts.start(cluster)
        console.quiet = not hosts.is_first()


def _enable_compile_cache() -> str:
    """Compiled programs are kept between runs of the command: in JAX_COMPILATION_CACHE_DIR if that
    is set, else beside the embedded models.

    Returns the place. Of several processes the first one alone writes it: jax sees to that.
    """
    import jax

    from ip_jax.models.hub import cache_dir

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return jax.config.jax_compilation_cache_dir
