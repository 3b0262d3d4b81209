"""The command line, one file a command: try a study, run it, draw its figure again, talk to what it
trained or export it.
"""

import difflib
import importlib
import os
import sys

# it would tell every user that torch is missing
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from rich.console import Console
from rich.markup import escape

COMMANDS = ("new", "check", "run", "plan", "figure", "chat", "export", "models")
USAGE = """\
ip-jax: inoculation prompting, one command a figure.

  ip-jax new NAME                    a study of your own: a folder that runs at once
  ip-jax check STUDY [--arm NAME]    look before you train: prompts, loss, scorer, data, cost
  ip-jax run STUDY [--preset NAME] [--out DIR] [--field value ...] [--profile] [--wandb [PROJECT]]
                   [--distributed | --coordinator HOST:PORT --processes N --process I]
  ip-jax plan STUDY --topology v5e:4x4 [--preset NAME] [--model NAME] [--search] [--json FILE]
                    [--field value ...]
  ip-jax figure DIR [--judge NAME]
  ip-jax chat DIR --arm NAME [--seed N] [--prompt NAME]
  ip-jax export DIR --arm NAME [--seed N] --to FOLDER [--merged] [--dtype NAME]
  ip-jax models

STUDY is a name in configs/, a folder with a study.py, or the path of a Python file that holds a
STUDY. On several hosts each runs the same command (docs/scale.md); under SLURM and on GKE they find
each other, on Cloud TPU with --distributed. Examples:

  ip-jax run gcd_sycophancy                               the demo, on a laptop
  ip-jax run gcd_sycophancy --help                        every field that can be changed
  ip-jax run gcd_sycophancy --sft.learning-rate 1e-4      another rate, in a folder of its own
  ip-jax run gcd_sycophancy --arms untrained neutral ip_behave "mine=Assume that I am right."
  ip-jax run gcd_sycophancy --arms untrained neutral ip_behave --controls standard
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
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    from ip_jax.training import hosts
    from ip_jax.training.stopping import Interrupted, Sigterm

    command, *rest = arguments
    console = Console()
    told = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        if command not in COMMANDS:
            raise ValueError(f"no command is called {command!r}: {nearest(command, COMMANDS)}")
        with Sigterm("stopped by SIGTERM, what was complete is saved"):
            importlib.import_module(f"ip_jax.cli.{command}").main(rest, console)
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


def script(study: str) -> None:
    """`ip-jax run STUDY` with this process's arguments, for the scripts in experiments/."""
    main(["run", study, *sys.argv[1:]])


def nearest(name: str, known) -> str:
    """The names nearest to one that is not known, and all that are."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return (f"did you mean {', '.join(near)}? " if near else "") + f"there is {', '.join(known)}"
