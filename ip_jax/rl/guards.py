"""What says, from a run's metrics, that it goes nowhere: a gate that accepts nothing, a late swap
at token level that collapses.
"""

from collections.abc import Mapping, Sequence

from ip_jax.rl.algorithm import Algorithm

_LOWEST_SURVIVING_MASS = -0.25  # of a late swap at token level, below which a run collapses
_MOST_AT_CAP = 0.5


def accepts_nothing(
    name: str, rows: Sequence[Mapping[str, float]], algorithm: Algorithm, patience: int
) -> str | None:
    """What there is to say of a gate that accepted no sample in the last `patience` iterations, or
    None. `rows`: metrics of the run's iterations.
    """
    recent = rows[-patience:]
    if (
        algorithm.gate.kind == "off"
        or len(recent) < patience
        or any(row["gate_acceptance"] != 0 for row in recent)
    ):
        return None
    return (
        f"the gate {algorithm.gate.kind} has accepted no sample of {name} in {patience} iterations"
    )


def collapses(name: str, row: Mapping[str, float], algorithm: Algorithm) -> str | None:
    """What there is to say of a run of late_token whose iteration with the metrics `row` shows its
    collapse, or None.
    """
    if algorithm.estimator.name != "late_token":
        return None
    left = row["surviving"]
    if left < _LOWEST_SURVIVING_MASS:
        return (
            f"{name} collapses: the advantage that clipping leaves is {left:.2f} a token, below"
            f" {_LOWEST_SURVIVING_MASS}; late_token does this"
        )
    if row["length_cap"] > _MOST_AT_CAP:
        return (
            f"{name} collapses: {row['length_cap']:.0%} of its completions do not end, more than"
            f" {_MOST_AT_CAP:.0%}; late_token does this"
        )
    return None
