"""ip-jax new: a study of one's own, in a folder that runs at once."""

import argparse
import importlib.resources
import re
from pathlib import Path

from rich.console import Console

TEMPLATE = ("study.py", "train.jsonl", "eval.jsonl", "README.md")


def main(arguments: list[str], console: Console) -> None:
    """Raises ValueError for a name that cannot name a study, FileExistsError for a folder that is
    there.
    """
    parser = argparse.ArgumentParser(
        prog="ip-jax new",
        description="Writes a folder with a study that runs at once: a Python file, twenty rows to"
        " train on and twenty to ask, a scorer, a README.",
    )
    parser.add_argument("name", help="of the study, and of the folder that is made for it")
    name = parser.parse_args(arguments).name
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ValueError(f"{name!r} cannot name a study: take letters, digits and _")
    folder = Path(name)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another name")
    folder.mkdir()
    template = importlib.resources.files("ip_jax.cli") / "template"
    for file in TEMPLATE:
        text = (template / file).read_text(encoding="utf-8")
        (folder / file).write_text(text.replace("NAME", name), encoding="utf-8")
    console.print(f"wrote {folder}/{{{', '.join(TEMPLATE)}}}", highlight=False)
    console.print(f"look before you train:  ip-jax check {name}", highlight=False)
    console.print(f"then:                   ip-jax run {name}", highlight=False)
