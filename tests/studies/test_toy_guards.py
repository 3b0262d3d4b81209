"""What is said of the toy's runs that go nowhere: from metrics written by hand, and of a gate that
nothing passes.
"""

import io
import json

import numpy as np
from etils import epath
from rich.console import Console

from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.estimators import ESTIMATORS
from ip_jax.rl.gates import Gate
from ip_jax.studies.toy.guards import concerns, report

NAMES = [("a", 0), ("a", 1), ("b", 0)]
GATED, LATE = (
    Algorithm(gate=Gate("relative", threshold=0.0)),
    Algorithm(estimator=ESTIMATORS["late_token"]),
)


def found(algorithm, **metrics):
    """Of three runs in a block of two iterations."""
    quiet = {
        "gate_acceptance": np.ones((2, 3)),
        "surviving": np.zeros((2, 3)),
        "length_cap": np.zeros((2, 3)),
    }
    return concerns(
        NAMES, quiet | {name: np.array(values) for name, values in metrics.items()}, algorithm
    )


def test_a_gate_is_named_where_it_accepted_nothing_in_the_whole_block():
    shut = [[0, 0, 1], [0, 0.1, 0]]
    assert found(GATED, gate_acceptance=shut) == {
        ("a", 0): "the gate relative has accepted no sample of a-s0 in 2 iterations"
    }
    assert (
        found(Algorithm(), gate_acceptance=shut) == {}
        and found(GATED, gate_acceptance=[[np.nan] * 3] * 2) == {}
    )


def test_late_token_is_named_where_any_iteration_of_the_block_collapses():
    collapsed = found(
        LATE, surviving=[[0, -0.3, -0.25], [0, 0, 0]], length_cap=[[0, 0, 0.5], [0.6, 0, 0]]
    )
    assert collapsed.keys() == {("a", 0), ("a", 1)}
    assert (
        "60% of its completions do not end" in collapsed["a", 0]
        and "clipping leaves is -0.30" in collapsed["a", 1]
    )
    assert found(GATED, surviving=[[-1] * 3] * 2, length_cap=[[1] * 3] * 2) == {}


def test_what_was_found_is_kept_and_said_once(tmp_path):
    path, output = epath.Path(tmp_path / "warnings" / "kind.json"), io.StringIO()
    console = Console(file=output, width=40)
    report(path, {}, 2, console)
    assert json.loads(path.read_text()) == {} and not output.getvalue()
    report(
        path,
        {("a", 0): "a-s0 is shut", ("a", 1): "a-s1 is shut", ("b", 0): "b-s0 is shut"},
        4,
        console,
    )
    for done in (6, 6):  # a block that was done again after a kill
        report(path, {("a", 1): "a-s1 is still shut"}, done, console)
    said = ["a-s0 is shut; the same holds for 1 more of a", "b-s0 is shut"]
    assert output.getvalue().splitlines() == [
        f"warning: after 4 iterations {words}" for words in said
    ]

    def only(name, *after):
        return {"reason": f"{name} is shut", "after": list(after)}

    assert json.loads(path.read_text()) == {
        "a-s0": only("a-s0", 4),
        "a-s1": only("a-s1", 4, 6),
        "b-s0": only("b-s0", 4),
    }
