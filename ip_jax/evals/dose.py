"""Arms compared at an equal dose of reinforced hack tokens, not at an equal number of steps.

A method that hardly samples a hack reinforces few and ends with few, whatever its prompts do; at
one dose that is no advantage. What is said of an arm at a dose stands on a probe that was taken:
each run's first one by which it had reinforced that many. Nothing is interpolated, and a run that
never gets there is counted, not replaced by a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ip_jax.evals import measures, rules, stats
from ip_jax.evals.measures import Number, Undefined
from ip_jax.evals.rl_tables import NEUTRAL, Curve, Run
from ip_jax.evals.rules import Reading, Rule

SHARE = 0.8
"""Of every compared arm's runs: so many must reach the common dose."""
RATES = ("hack", "attempt", "correct", "trait")


@dataclass(frozen=True)
class Dosed:
    """Of one run: its probes under x_0, and the hack tokens that had been reinforced before each,
    NaN where they were not recorded.
    """

    probe: Curve
    tokens: Float[np.ndarray, " probes"]

    def reaches(self, dose: float) -> int | None:
        """The index of the first probe at which at least `dose` tokens had been reinforced, None
        where there is none.
        """
        found = np.flatnonzero(self.tokens >= dose)
        return int(found[0]) if len(found) else None


class Reached(NamedTuple):
    """What was measured of a run where it had the dose: completed steps, tokens by then (at least
    the dose), rates under x_0 by verdict.
    """

    step: int
    tokens: float
    rates: Mapping[str, stats.Proportion]


@dataclass(frozen=True)
class AtDose:
    """What an experiment shows at one dose. `reached` has the runs that get there, `runs` all that
    were trained; `contrasts` the rules for which it is the common dose.

    No contrast carries a verdict: rules are stated for the end of training.
    """

    dose: float
    reached: Mapping[Run, Reached]
    runs: tuple[Run, ...]
    contrasts: tuple[tuple[Rule, Number], ...]

    def of_arm(self, arm: str) -> tuple[list[Reached], int]:
        """(what its runs that reach the dose show, how many runs it has)."""
        return [found for (name, _), found in self.reached.items() if name == arm], sum(
            name == arm for name, _ in self.runs
        )


def dosed(rollouts: Mapping[Run, Curve], probes: Mapping[Run, Curve]) -> dict[Run, Dosed]:
    """The doses of all runs that have both curves. A probe of step s stands behind the iterations 0
    to s - 1.
    """
    found = {}
    for run, probe in probes.items():
        if run in rollouts:
            steps, tokens = rollouts[run].steps, rollouts[run].columns["reinforced_hack_tokens"]
            found[run] = Dosed(
                probe,
                np.concatenate([[0.0], np.cumsum(tokens)])[np.searchsorted(steps, probe.steps)],
            )
    return found


def common_dose(runs: Mapping[Run, Dosed], arms: Sequence[str]) -> float | Undefined:
    """The largest dose that at least SHARE of the runs of each of `arms` reach; undefined where an
    arm has no run, or reinforces too little.
    """
    smallest = math.inf
    for arm in arms:
        totals = sorted(
            (
                float(np.nan_to_num(of_run.tokens[-1]))
                for (name, _), of_run in runs.items()
                if name == arm
            ),
            reverse=True,
        )
        if not totals:
            return Undefined(f"the arm {arm} was not trained")
        reached = totals[math.ceil(SHARE * len(totals)) - 1]
        if not reached > 0:
            return Undefined(
                f"fewer than {SHARE:.0%} of the runs of {arm} reinforced a hack token, as far as is"
                " recorded"
            )
        smallest = min(smallest, float(reached))
    return smallest


def at_doses(
    reading: Reading, runs: Mapping[Run, Dosed]
) -> tuple[list[AtDose], list[tuple[Rule, Undefined]]]:
    """(what is seen at each rule's common dose, doses ascending; the rules that have none, and
    why).

    The common dose of a rule is that of the arms that it compares. Rules that do not look at rates
    under x_0 are left out.
    """
    by_dose: dict[float, list[Rule]] = {}
    without = []
    for rule in reading.rules:
        asked = rule.contrast
        if asked.at != NEUTRAL or asked.quantity not in (*RATES, "suppression"):
            continue
        arms = [arm for arm, _ in asked.weights] + [reading.standard] * (
            asked.quantity == "suppression"
        )
        dose = common_dose(runs, arms)
        if isinstance(dose, Undefined):
            without.append((rule, dose))
        else:
            by_dose.setdefault(dose, []).append(rule)
    return [_at(dose, of_dose, runs, reading) for dose, of_dose in sorted(by_dose.items())], without


def _at(
    dose: float, of_dose: Sequence[Rule], runs: Mapping[Run, Dosed], reading: Reading
) -> AtDose:
    reached = {
        run: Reached(
            int(of_run.probe.steps[at]),
            float(of_run.tokens[at]),
            measures.rates(of_run.probe.counts(at)),
        )
        for run, of_run in runs.items()
        if (at := of_run.reaches(dose)) is not None
    }
    by_run = {(name, NEUTRAL): by_arm(reached, name) for name in RATES}
    return AtDose(
        dose,
        reached,
        tuple(runs),
        tuple((rule, rules.judge(rule, by_run, reading.standard).number) for rule in of_dose),
    )


def by_arm(reached: Mapping[Run, Reached], verdict: str) -> dict[str, dict[int, float]]:
    """{arm: {seed: the verdict's rate under x_0}}, as `measures` takes it; without the runs of
    which it was not counted.
    """
    found: dict[str, dict[int, float]] = {}
    for (arm, seed), at in reached.items():
        if verdict in at.rates:
            found.setdefault(arm, {})[seed] = at.rates[verdict].value
    return found
