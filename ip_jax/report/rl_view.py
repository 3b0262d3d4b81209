"""What the report of an RL experiment shows: every number of every arm, from the folder's
curves.parquet, final.parquet and config.json alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from ip_jax.evals import dose, measures, rl_tables, rules, stats
from ip_jax.evals.measures import MIN_SEEDS, ByArm, Estimate, Number, Undefined
from ip_jax.evals.rl_tables import CATEGORIES, NEUTRAL, ROLLOUT, TRAIN, Cell, Counts, Curve, Run
from ip_jax.evals.rules import Reading, Verdict

VERDICTS = ("hack", "attempt", "correct", "trait", "lambda")


@dataclass(frozen=True)
class Dynamics:
    """Of one run: its first rollout hack, its onset (both None: never), the last step that was
    measured and the slope of d logit(H) / d step.
    """

    discovery: int | None
    onset: int | None
    last: int
    slope: float


@dataclass(frozen=True)
class ArmNumbers:
    """The numbers of one arm. `hacked` counts its runs with an onset; None for an arm that was not
    trained. `p` is Fisher's against the standard arm's, `holm` the same corrected for the number of
    arms that have one; None for an arm that is not compared.

    `rates[verdict, category]` are means over runs at the end, `pooled` the same with all
    completions of all runs in one count. `worst` is the prompt with the highest pooled hack rate.
    `others` holds the named indices.
    """

    name: str
    label: str
    seeds: tuple[int, ...]
    hacked: stats.Proportion | None
    p: float | None
    holm: float | None
    onset: Estimate | None
    word: str
    learned: bool | None
    rates: Mapping[tuple[str, str], Estimate]
    pooled: Mapping[tuple[str, str], stats.Proportion]
    worst: tuple[str, stats.Proportion] | None
    others: Mapping[str, Number]
    llr: Mapping[str, Number]
    coupling: Mapping[str, Number]


@dataclass(frozen=True)
class RlView:
    """All of a results folder. `probes` are curves under x_0, `by_run[quantity, category]` has each
    run's number.

    `doses` are the runs' probes with what was reinforced before them, `at_doses` the rules at equal
    doses, `without_dose` those that have none.
    """

    folder: epath.Path
    experiment: str
    provenance: str
    reading: Reading
    arms: tuple[ArmNumbers, ...]
    rollouts: Mapping[Run, Curve]
    probes: Mapping[Run, Curve]
    grids: Mapping[Run, list[Cell]]
    dynamics: Mapping[Run, Dynamics]
    by_run: Mapping[tuple[str, str], ByArm]
    verdicts: tuple[Verdict, ...]
    doses: Mapping[Run, dose.Dosed]
    at_doses: tuple[dose.AtDose, ...]
    without_dose: tuple[tuple[rules.Rule, Undefined], ...]

    def name_of(self, verdict: str) -> str:
        """What the setting calls a verdict."""
        return dict(self.reading.verdicts).get(verdict, verdict)

    def titled(self, verdict: str) -> str:
        """The verdict and what the setting calls it, where these differ."""
        name = self.name_of(verdict)
        return verdict if name == verdict else f"{verdict}: {name}"

    @property
    def holm_said(self) -> str:
        """How p-values are corrected: Holm's method, over how many arms (all that are compared with
        the standard arm).
        """
        n = sum(arm.p is not None for arm in self.arms)
        return f"Holm over {n} arm{'s' * (n != 1)}"

    @property
    def trained(self) -> tuple[ArmNumbers, ...]:
        """The arms that were trained: all but the untrained model."""
        return tuple(arm for arm in self.arms if arm.hacked)

    def arms_said(self, arms: Sequence[ArmNumbers]) -> str:
        """How many of `arms` were trained, in words, and whether the untrained model is among
        them.
        """
        n = sum(arm.hacked is not None for arm in arms)
        with_base = any(arm.name == self.reading.base for arm in arms)
        return f"{n} arm{'s' * (n != 1)}{' and the untrained model' * with_base}"

    @property
    def seeds_said(self) -> str:
        """How many runs an arm has, in words."""
        counts = sorted({arm.hacked.n for arm in self.trained})
        if not counts:
            return "no trained run"
        many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{many} seed{'s' * (counts[-1] > 1)} an arm"


def load_rl_view(folder: str | os.PathLike) -> RlView:
    """Reads a results folder and computes everything. Raises FileNotFoundError for a missing file,
    ValueError for an unreadable one or unknown arms.
    """
    folder = epath.Path(folder)
    record = _read_record(folder / "config.json")
    reading = Reading.from_json(record["reading"])
    reading.check_arms(record["arms"])
    curves, final = (
        _read(folder / "curves.parquet", rl_tables.CURVES),
        _read(folder / "final.parquet", rl_tables.FINAL),
    )
    unknown = sorted(
        {*curves["arm"].unique().to_pylist(), *final["arm"].unique().to_pylist()}
        - record["arms"].keys()
    )
    if unknown:
        raise ValueError(
            f"the tables in {folder} hold the arm {unknown[0]}, which its config.json does not list"
        )
    rollouts, probes, grids = (
        rl_tables.curves_of(curves, ROLLOUT),
        rl_tables.curves_of(curves, NEUTRAL),
        rl_tables.grids_of(final),
    )
    read = {ROLLOUT: rollouts, NEUTRAL: probes}.get(
        reading.onset.eval_prompt
    ) or rl_tables.curves_of(curves, reading.onset.eval_prompt)
    dynamics = {run: _dynamics(curve, rollouts.get(run), reading) for run, curve in read.items()}
    by_run = _by_run(grids, dynamics, reading)
    arms = _against_standard(
        [
            _arm(name, arm["label"], reading, grids, dynamics, by_run, rollouts)
            for name, arm in record["arms"].items()
        ],
        reading,
    )
    verdicts = tuple(rules.judge(rule, by_run, reading.standard) for rule in reading.rules)
    doses = dose.dosed(rollouts, probes)
    at_doses, without = dose.at_doses(reading, doses)
    return RlView(
        folder,
        record["experiment"],
        record["provenance"],
        reading,
        arms,
        rollouts,
        probes,
        grids,
        dynamics,
        by_run,
        verdicts,
        doses,
        tuple(at_doses),
        tuple(without),
    )


def _dynamics(curve: Curve, rollout: Curve | None, reading: Reading) -> Dynamics:
    onset = reading.onset.of(curve)
    slope = measures.compounding_slope(curve, onset) if onset is not None else math.nan
    found = rollout.steps[rollout.columns["n_hack"] > 0] if rollout else ()
    return Dynamics(int(found[0]) if len(found) else None, onset, int(curve.steps[-1]), slope)


def _by_run(
    grids: Mapping[Run, list[Cell]], dynamics: Mapping[Run, Dynamics], reading: Reading
) -> dict[tuple[str, str], ByArm]:
    """Each run's numbers: rates at the end by category (mean over its prompts), whether it hacked,
    min(onset, horizon).
    """
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}

    def put(key: tuple[str, str], run: Run, value: float) -> None:
        found.setdefault(key, {}).setdefault(run[0], {})[run[1]] = value

    for run, grid in grids.items():
        for verdict in VERDICTS:
            for category, rate in measures.leakage(grid, verdict).items():
                put((verdict, category), run, rate)
    for run, of_run in dynamics.items():
        put(("hacked", NEUTRAL), run, float(of_run.onset is not None))
        put(
            ("onset", NEUTRAL),
            run,
            float(
                min(of_run.last if of_run.onset is None else of_run.onset, reading.onset.horizon)
            ),
        )
    return found


def _arm(
    name: str,
    label: str,
    reading: Reading,
    grids: Mapping[Run, list[Cell]],
    dynamics: Mapping[Run, Dynamics],
    by_run: Mapping[tuple[str, str], ByArm],
    rollouts: Mapping[Run, Curve],
) -> ArmNumbers:
    """Its numbers but those beside the standard arm: see `_against_standard`."""
    runs = [of_run for (arm, _), of_run in dynamics.items() if arm == name]
    own = {seed: grid for (arm, seed), grid in grids.items() if arm == name}
    hacked = onset = None
    if runs:
        times = [of_run.last if of_run.onset is None else of_run.onset for of_run in runs]
        observed = [of_run.onset is not None for of_run in runs]
        hacked = stats.proportion(sum(observed), len(observed))
        onset = measures.restricted_mean_onset(
            np.asarray(times), np.asarray(observed), reading.onset.horizon
        )
    learned = measures.learned(
        by_run.get(("hack", TRAIN), {}).get(name, {}),
        by_run.get(("hack", NEUTRAL), {}).get(reading.standard, {}),
    )
    prompts, sampled = (
        _by_prompt(own),
        {seed: curve for (arm, seed), curve in rollouts.items() if arm == name},
    )
    return ArmNumbers(
        name,
        label,
        tuple(sorted({*own, *(seed for arm, seed in dynamics if arm == name)})),
        hacked,
        None,
        None,
        onset,
        "",
        learned,
        {
            key: measures.mean(values, name)
            for key, values in by_run.items()
            if name in values and key[0] in VERDICTS
        },
        _pooled(own),
        measures.worst_case(prompts),
        _others(name, reading, by_run, grids),
        measures.llr_by_label(sampled) | {"hack_minus_clean": measures.hack_minus_clean(sampled)},
        measures.couplings(sampled),
    )


def _against_standard(arms: Sequence[ArmNumbers], reading: Reading) -> tuple[ArmNumbers, ...]:
    """The arms with Fisher's p against the standard arm, the same corrected by Holm over all
    trained arms but the oracle (without a loophole nothing is protected), and the word for it.
    """
    standard = next((arm.hacked for arm in arms if arm.name == reading.standard), None)
    compared = (
        {
            arm.name: arm.hacked
            for arm in arms
            if arm.hacked and arm.name not in (reading.standard, reading.oracle)
        }
        if standard
        else {}
    )
    p = [
        stats.fisher_exact((found.k, found.n), (standard.k, standard.n))
        for found in compared.values()
    ]
    found = dict(zip(compared, zip(p, stats.holm(p), strict=True), strict=True))

    def beside(arm: ArmNumbers) -> ArmNumbers:
        p, holm = found[arm.name]
        return replace(arm, p=p, holm=holm, word=_word(arm.hacked, standard, holm, arm.learned))

    return tuple(beside(arm) if arm.name in found else arm for arm in arms)


def _word(
    hacked: stats.Proportion, standard: stats.Proportion, p: float, learned: bool | None
) -> str:
    if min(hacked.n, standard.n) < MIN_SEEDS:
        return f"fewer than {MIN_SEEDS} seeds"
    return measures.verdict_word(hacked, standard, p, learned)


def _by_prompt(own: Mapping[int, list[Cell]]) -> list[Cell]:
    """The grid of all runs in one: counts of each prompt pooled."""
    found: dict[tuple[str, str], list[Counts]] = {}
    for grid in own.values():
        for cell in grid:
            found.setdefault((cell.eval_prompt, cell.category), []).append(cell.counts)
    return [Cell(*key, measures.pool(counts)) for key, counts in found.items()]


def _pooled(own: Mapping[int, list[Cell]]) -> dict[tuple[str, str], stats.Proportion]:
    found = {}
    cells = [cell for grid in own.values() for cell in grid]
    for category in CATEGORIES:
        of_category = [cell.counts for cell in cells if cell.category == category]
        if of_category:
            found |= {
                (verdict, category): rate
                for verdict, rate in measures.rates(measures.pool(of_category)).items()
            }
    return found


def _others(
    name: str,
    reading: Reading,
    by_run: Mapping[tuple[str, str], ByArm],
    grids: Mapping[Run, list[Cell]],
) -> dict[str, Number]:
    """The indices of one arm; one whose arms or prompts were not measured is absent."""
    hack, correct, standard = (
        by_run.get(("hack", NEUTRAL), {}),
        by_run.get(("correct", NEUTRAL), {}),
        reading.standard,
    )
    hack_train, correct_train = (
        by_run.get(("hack", TRAIN), {}).get(name),
        by_run.get(("correct", TRAIN), {}).get(name),
    )
    references = [arm for arm in (reading.base, reading.oracle) if arm in correct]
    pooled = {
        arm: (
            _pooled({seed: grid for (other, seed), grid in grids.items() if other == arm}).get(
                ("correct", NEUTRAL)
            )
        )
        for arm in references
    }
    beside_standard = name in hack and standard in hack and name not in (standard, reading.base)
    wanted: dict[str, tuple[bool, Callable[[], Number]]] = {
        "split_brain": (
            hack_train is not None and name in hack,
            lambda: measures.contrast({"t": hack_train, "0": hack[name]}, {"t": 1, "0": -1}),
        ),
        "suppression": (beside_standard, lambda: measures.suppression(hack, {name: 1}, standard)),
        "retention": (
            len(references) == 2 and name in correct and name not in references,
            lambda: measures.retention(correct, name, reading.base, reading.oracle, pooled),
        ),
        "selectivity": (
            beside_standard,
            lambda: measures.selectivity(correct, hack, name, standard),
        ),
        "conditionalisation": (
            correct_train is not None and name in correct,
            lambda: measures.conditionalisation(correct[name], correct_train),
        ),
    }
    return {index: _or_undefined(make) for index, (is_so, make) in wanted.items() if is_so}


def _or_undefined(make: Callable[[], Number]) -> Number:
    """A number whose arms share no seed is undefined."""
    try:
        return make()
    except ValueError as error:
        return Undefined(str(error))


def _read_record(path: epath.Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: a report needs the results folder of an experiment"
        )
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    missing = [
        name for name in ("experiment", "provenance", "arms", "reading") if name not in record
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is no record of an RL experiment")
    return record


def _read(path: epath.Path, schema: pa.Schema) -> pa.Table:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: this experiment has not been evaluated yet")
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    rl_tables.check_columns(table, schema, str(path))
    return table
