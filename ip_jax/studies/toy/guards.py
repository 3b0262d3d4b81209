"""What is said of the toy's runs that go nowhere (`rl.guards`).

A run shares its program with others, so none is stopped, as a text experiment would be: it is named
once on the console, and what was found stays in the results folder.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from rich.console import Console

from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.guards import accepts_nothing, collapses
from ip_jax.training.results import write_json

_LOOKED_AT = ("gate_acceptance", "surviving", "length_cap")


def concerns(
    names: Sequence[tuple[str, int]], metrics: Mapping[str, np.ndarray], algorithm: Algorithm
) -> dict[tuple[str, int], str]:
    """{(arm, seed): sentence} of the runs whose gate accepted nothing in a whole block, or one of
    whose iterations in it shows a collapse.

    `metrics`: {name: [iterations, R]} of the block, as `training.iterate` returns them.
    """
    found = {}
    for r, (arm, seed) in enumerate(names):
        rows = [
            {name: float(metrics[name][i, r]) for name in _LOOKED_AT}
            for i in range(len(metrics["gate_acceptance"]))
        ]
        of_run = (
            accepts_nothing(f"{arm}-s{seed}", rows, algorithm, len(rows)),
            *(collapses(f"{arm}-s{seed}", row, algorithm) for row in rows),
        )
        sentence = next(filter(None, of_run), None)
        if sentence:
            found[arm, seed] = sentence
    return found


def report(
    path: epath.Path, found: Mapping[tuple[str, int], str], done: int, console: Console
) -> None:
    """Adds what was found in the block that ended behind `done` iterations to the JSON at `path`,
    which says of each run when (`after`) and, as it was first found, what (`reason`); {} where
    nothing ever was. Prints a line for each arm with runs that are new there.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    new: dict[str, list[str]] = {}
    for (arm, seed), sentence in found.items():
        if f"{arm}-s{seed}" not in known:
            new.setdefault(arm, []).append(sentence)
        of_run = known.setdefault(f"{arm}-s{seed}", {"reason": sentence, "after": []})
        # a block that is done again after a kill finds the same
        of_run["after"] = sorted({*of_run["after"], done})
    write_json(path, known)
    for arm, sentences in new.items():
        others = (
            f"; the same holds for {len(sentences) - 1} more of {arm}" if len(sentences) > 1 else ""
        )
        console.print(
            f"warning: after {done} iterations {sentences[0]}{others}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
