"""ip-jax chat: talks to what a run trained."""

import argparse

from rich.console import Console

from ip_jax.cli.results import open_results
from ip_jax.cli.studies import recorded_study


def main(arguments: list[str], console: Console) -> None:
    """Raises ValueError for an arm, seed or prompt that is not there, before a model is loaded."""
    parser = argparse.ArgumentParser(
        prog="ip-jax chat",
        description="Talk to the model that an arm trained. An empty line ends.",
    )
    parser.add_argument("folder")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--prompt",
        default="neutral",
        help="a prompt of the study, or name=text, that is put into your first message",
    )
    parser.add_argument("--temperature", type=float, default=0.7)
    options = parser.parse_args(arguments)
    from ip_jax.lab.chat import ChatOptions, chat

    folder, record = open_results(options.folder)
    prompt = recorded_study(options.folder, record).book.find(options.prompt)
    chat(folder, ChatOptions(options.arm, options.seed, prompt, options.temperature), console)
