"""ip-jax plan: what an experiment needs and costs on chips that are not here."""

import argparse

from rich.console import Console

from ip_jax.cli import studies


def main(arguments: list[str], console: Console) -> None:
    """Raises ValueError, one sentence, for what cannot be planned."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--topology")
    own.add_argument("--model")
    own.add_argument("--search", action="store_true")
    own.add_argument("--json")
    asked = studies.read("plan", arguments, own)
    import jax

    if asked.options.topology != "local":
        # before its first use: an accelerator here has no part in planning for others
        jax.config.update("jax_platforms", "cpu")
    from ip_jax.lab.run import experiment_of
    from ip_jax.planning import chips, command

    if asked.options.topology is None:
        raise ValueError(f"plan needs --topology: known are {chips.EXAMPLES}")
    topology = chips.read_topology(asked.options.topology)
    subject = command.subject_of(
        asked.preset,
        asked.options.model,
        topology.platform,
        lambda preset: experiment_of(asked.study, preset),
    )
    command.run_plan(subject, topology, asked.options, console)
