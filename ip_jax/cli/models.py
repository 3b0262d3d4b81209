"""ip-jax models: supported families, and the models that are on this machine."""

import argparse

from rich.console import Console
from rich.table import Table


def main(arguments: list[str], console: Console) -> None:
    """Prints two tables."""
    argparse.ArgumentParser(
        prog="ip-jax models",
        description="Supported families, and the models that are on this machine.",
    ).parse_args(arguments)
    from ip_jax.models import families, hub

    table = Table("architecture", "family", title="supported families")
    for architecture, family in families.SUPPORTED.items():
        table.add_row(architecture, family)
    console.print(table)
    table = Table("name", "MiB", "licence", "made by", title="by name, fetched when first used")
    for name, model in hub.EMBEDDED.items():
        table.add_row(name, f"{model.size / 2**20:.0f}", model.licence, model.repository)
    console.print(table)
    table = Table("name", "where", title="on this machine")
    for name, path in hub.cached_models().items():
        table.add_row(name, str(path))
    console.print(table)
    console.print("a local folder, a .gguf file or a hub repository work by name too")
