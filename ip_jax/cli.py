"""The command line: run an experiment, draw its figure again, talk to what it trained or export it,
see which models there are.
"""

import argparse
import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from types import ModuleType

# it would tell every user that torch is missing
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.table import Table

USAGE = """\
ip-jax: inoculation prompting, one command a figure.

  ip-jax run CONFIG [--preset NAME] [--out DIR] [--redraw] [--field value ...] [--profile]
             [--wandb [PROJECT]] [--distributed | --coordinator HOST:PORT --processes N --process I]
  ip-jax plan CONFIG --topology v5e:4x4 [--preset NAME] [--model NAME] [--search] [--json FILE]
              [--field value ...]
  ip-jax figure DIR [--judge strict|published]
  ip-jax chat DIR --arm NAME [--seed N] [--prompt NAME]
  ip-jax export DIR --arm NAME [--seed N] --to FOLDER [--merged] [--dtype NAME]
  ip-jax models

CONFIG is a name in configs/ or the path of a Python file like them. On several hosts each runs the
same command (docs/scale.md); under SLURM and on GKE they find each other, on Cloud TPU with
--distributed. Examples:

  ip-jax run gcd_sycophancy                               the demo, on a laptop
  ip-jax run gcd_sycophancy --help                        every field that can be changed
  ip-jax run gcd_sycophancy --sft.learning-rate 1e-4      another rate, in a folder of its own
  ip-jax run gcd_sycophancy --arms untrained neutral ip_behave "mine=Assume that I am right."
  ip-jax run gcd_sycophancy --profile --wandb my_project  a trace of three steps; metrics to W&B
  ip-jax plan sft_shapes --preset qwen2-7b --topology v5e:4x4   what a pod slice would need and cost
  ip-jax plan rl_shapes --topology h200:1                 the same of reinforcement learning
  ip-jax figure results/gcd_sycophancy/demo-1a2b3c        draw again, without a model
  ip-jax chat results/gcd_sycophancy/demo-1a2b3c --arm ip_behave
  ip-jax export results/gcd_sycophancy/demo-1a2b3c --arm ip_behave --to my_adapter      for PEFT
  ip-jax export results/gcd_sycophancy/demo-1a2b3c --arm ip_behave --to my_model --merged
"""


def main(argv: list[str] | None = None) -> None:
    """Runs one command; an expected mistake ends with one sentence on stderr and exit code 2,
    SIGTERM with 143.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "run": _run,
        "plan": _plan,
        "figure": _figure,
        "chat": _chat,
        "export": _export,
        "models": _models,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    from ip_jax.training import hosts
    from ip_jax.training.stopping import Interrupted, Sigterm

    command, *rest = arguments
    console = Console()
    told = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        if command not in commands:
            raise ValueError(f"no command is called {command!r}: {_nearest(command, commands)}")
        with Sigterm("stopped by SIGTERM, what was complete is saved"):
            commands[command](rest, console)
    except (ValueError, OSError) as error:
        told.print(f"[red]ip-jax{hosts.label()}:[/red] {escape(str(error))}")
        raise SystemExit(2) from error
    except KeyboardInterrupt as stop:
        told.print("stopped: the same command goes on from the last checkpoint")
        raise SystemExit(130) from stop
    except Interrupted as stop:
        if hosts.is_first():
            told.print(f"{stop.message}: the same command goes on from there")
        raise


def _run(arguments: list[str], console: Console) -> None:
    from ip_jax.lab.observer import Watch

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--out")
    own.add_argument("--redraw", action="store_true")
    own.add_argument("--profile", action="store_true")
    own.add_argument("--wandb", nargs="?", const="ip_jax")
    own.add_argument("--distributed", action="store_true")
    own.add_argument("--coordinator")
    own.add_argument("--processes", type=int)
    own.add_argument("--process", type=int)
    name, module, config, options = _read_config("run", arguments, own)
    experiment = _experiment_of(module, name)
    watch = Watch(options.profile, options.wandb)
    if not options.redraw:
        # before the folder's name, which may ask jax for its devices: processes join before they do
        _join(options, console)
    folder = epath.Path(options.out) if options.out else default_folder(experiment, config)
    console.print(f"results: {folder}", highlight=False)
    if options.redraw:
        experiment.redraw(config, folder, console)
        return
    console.print(f"compiled programs: {_enable_compile_cache()}", highlight=False)
    experiment.run(config, folder, console, watch)


def _join(options: argparse.Namespace, console: Console) -> None:
    """Joins the other processes of this run, if there are any; all but the first are then silent
    but for errors.
    """
    from ip_jax.training import hosts

    given = hosts.Cluster(options.coordinator, options.processes, options.process)
    cluster = hosts.find_cluster(given, options.distributed, os.environ)
    if cluster:
        with console.status(
            "looking for the other"
            f" processes{f' at {cluster.coordinator}' if cluster.coordinator else ''}"
        ):
            hosts.start(cluster)
        console.quiet = not hosts.is_first()


def _plan(arguments: list[str], console: Console) -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--topology")
    own.add_argument("--model")
    own.add_argument("--search", action="store_true")
    own.add_argument("--json")
    name, module, config, options = _read_config("plan", arguments, own)
    import jax

    if options.topology != "local":
        # before its first use: an accelerator here has no part in planning for others
        jax.config.update("jax_platforms", "cpu")
    from ip_jax.planning import chips, command

    if options.topology is None:
        raise ValueError(f"plan needs --topology: known are {chips.EXAMPLES}")
    topology = chips.read_topology(options.topology)
    subject = command.subject_of(
        config,
        options.model,
        topology.platform,
        lambda config: _experiment_of(module, name).experiment(config),
    )
    command.run_plan(subject, topology, options, console)


def _read_config(command: str, arguments: list[str], own: argparse.ArgumentParser) -> tuple:
    """(name, module, config with the fields of the command line, the command's own options)."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None:
        raise ValueError(
            f"{command} needs a config: {', '.join(config_names())}, or the path of a Python file"
        )
    module = load_config_module(name)
    own.add_argument("--preset", default=next(iter(module.PRESETS)))
    options, fields = own.parse_known_args(arguments[1:])
    if options.preset not in module.PRESETS:
        raise ValueError(
            f"{name} has no preset {options.preset!r}: {_nearest(options.preset, module.PRESETS)}"
        )
    return (
        name,
        module,
        override(
            module.PRESETS[options.preset],
            fields,
            f"ip-jax {command} {name} --preset {options.preset}",
        ),
        options,
    )


def override(config, fields: list[str], program: str):
    """`config` with the fields of a command line (`--sft.learning-rate 1e-4`) replaced. Unknown
    ones end with the nearest names.
    """
    import tyro

    return tyro.cli(
        type(config),
        default=config,
        args=fields,
        prog=program,
        description=f"Fields of the preset {config.preset}, all of which can be changed.",
    )


def load_config_module(name: str) -> ModuleType:
    """The module of a config by its name in configs/ or its path. Raises ValueError with the
    nearest names.
    """
    if name.endswith(".py"):
        path = epath.Path(name)
        if not path.exists():
            raise ValueError(f"there is no config file {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    elif name in config_names():
        module = importlib.import_module(f"configs.{name}")
    else:
        raise ValueError(
            f"no config is called {name!r}: {_nearest(name, config_names())}, or the path of a .py"
            " file"
        )
    if not getattr(module, "PRESETS", None):
        raise ValueError(
            f"the config {name} has no PRESETS: a dict from a preset's name to its dataclass is"
            " needed"
        )
    return module


def config_names() -> list[str]:
    """Names in configs/."""
    import configs

    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def _experiment_of(config: ModuleType, name: str) -> ModuleType:
    """The module in experiments/ that runs a config: the one that it names, else its namesake."""
    known = _experiment_names()
    wanted = getattr(config, "EXPERIMENT", epath.Path(name).stem)
    if wanted is None:
        raise ValueError(
            f"the config {name} holds sizes and no data, so it can only be planned: ip-jax plan"
            f" {name} --topology v5e:4x4"
        )
    if wanted not in known:
        raise ValueError(
            f"the config {name} belongs to no experiment called {wanted!r}:"
            f" {_nearest(wanted, known)}; say EXPERIMENT = ... in it"
        )
    return importlib.import_module(f"experiments.{wanted}")


def _experiment_names() -> list[str]:
    import experiments

    return sorted(
        module.name
        for module in pkgutil.iter_modules(experiments.__path__)
        if not module.name.startswith("_")
    )


def default_folder(experiment: ModuleType, config) -> epath.Path:
    """results/<experiment>/<preset>-<hash of all but arms and seeds>: another config never meets
    old results.
    """
    from ip_jax.training.results import digest

    return (
        epath.Path("results")
        / experiment.NAME
        / f"{config.preset}-{digest(experiment.shared_part(config))[:6]}"
    )


def _figure(arguments: list[str], console: Console) -> None:
    parser = argparse.ArgumentParser(
        prog="ip-jax figure",
        description="Draws the figure and prints the table of a results folder; needs no model.",
    )
    parser.add_argument("folder")
    parser.add_argument(
        "--judge",
        choices=("strict", "published"),
        help="of experiments with two judges; strict by default",
    )
    options = parser.parse_args(arguments)
    folder, record = _results(options.folder)
    if record["experiment"] not in _experiment_names():
        raise ValueError(
            f"{options.folder} holds the experiment {record['experiment']!r}, whose figure is not"
            f" known here: {_nearest(record['experiment'], _experiment_names())}"
        )
    importlib.import_module(f"experiments.{record['experiment']}").draw(
        folder, console, options.judge
    )


def _chat(arguments: list[str], console: Console) -> None:
    parser = argparse.ArgumentParser(
        prog="ip-jax chat", description="Talk to the model that an arm trained. An empty line ends."
    )
    parser.add_argument("folder")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--prompt",
        default="neutral",
        help="a prompt of the library that is put into your first message",
    )
    parser.add_argument("--temperature", type=float, default=0.7)
    options = parser.parse_args(arguments)
    from ip_jax.lab.chat import ChatOptions, chat

    folder, _ = _results(options.folder)
    chat(
        folder, ChatOptions(options.arm, options.seed, options.prompt, options.temperature), console
    )


def _export(arguments: list[str], console: Console) -> None:
    parser = argparse.ArgumentParser(
        prog="ip-jax export",
        description=(
            "Writes what an arm trained for other programs: as a PEFT folder, or merged into its"
            " model."
        ),
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
        help=(
            "of the merged weights: float32, bfloat16 or float16; by default as the run held its"
            " base"
        ),
    )
    options = parser.parse_args(arguments)
    from ip_jax.lab.trained import export_run, read_run

    folder, _ = _results(options.folder)
    run = read_run(folder, options.arm, options.seed)
    export_run(run, options.to, options.merged, options.dtype)
    console.print(f"{options.arm}, seed {run.seed}: {options.to}", highlight=False)


def _models(arguments: list[str], console: Console) -> None:
    argparse.ArgumentParser(
        prog="ip-jax models",
        description="Supported families, and the models that are on this machine.",
    ).parse_args(arguments)
    from ip_jax.models import families, hub

    table = Table("architecture", "family", title="supported families")
    for architecture, family in families.SUPPORTED.items():
        table.add_row(architecture, family)
    console.print(table)
    table = Table("name", "where", title="on this machine")
    for name, path in hub.cached_models().items():
        table.add_row(name, str(path))
    console.print(table)
    console.print(
        f"embedded, fetched when first used: {', '.join(hub.EMBEDDED)}; a local folder, a .gguf"
        " file or a hub repository work by name too"
    )


def _results(name: str) -> tuple[epath.Path, dict]:
    """(folder, its record). Raises ValueError for a folder that `ip-jax run` did not make."""
    from ip_jax.training.results import read_record

    folder = epath.Path(name)
    if not (folder / "config.json").exists():
        raise ValueError(f"{name} is no results folder: it has no config.json")
    record = read_record(folder / "config.json")
    if not {"experiment", "config"} <= record.keys():
        raise ValueError(f"{name} is no results folder: its config.json names no experiment")
    return folder, record


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return (f"did you mean {', '.join(near)}? " if near else "") + f"there is {', '.join(known)}"


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


if __name__ == "__main__":
    main()
