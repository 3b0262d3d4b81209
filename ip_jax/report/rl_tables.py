"""The tables of an RL experiment: the same rows as Markdown for docs and for the terminal, and
every number as CSV.

Hacked-run counts come first, means after them; what was not measured is a dash, what has no meaning
says "undefined" with the reason below.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ip_jax.evals import dose, measures, stats
from ip_jax.evals.measures import Estimate, Number, Undefined
from ip_jax.evals.rl_tables import CATEGORIES, NEUTRAL, TRAIN
from ip_jax.evals.rules import Rule, Verdict
from ip_jax.report.rl_view import VERDICTS, ArmNumbers, RlView

INDICES = {
    "split_brain": "split-brain gap",
    "suppression": "S_H",
    "retention": "S_C",
    "selectivity": "SI",
    "conditionalisation": "CI",
}

TRAINING = {  # quantity -> head, what is made of a run's steps
    "reward": ("reward, last", lambda values: values[-1]),
    "kl": ("KL, last", lambda values: values[-1]),
    "entropy": ("entropy, last", lambda values: values[-1]),
    "length": ("length, last", lambda values: values[-1]),
    "length_cap": ("at the length cap, mean", np.mean),
    "zero_variance_groups": ("zero-variance groups, mean", np.mean),
    "gate_acceptance": ("gate acceptance, mean", np.mean),
    "acceptance_hack": ("gate acceptance of hacks, mean", np.mean),
    "acceptance_correct": ("gate acceptance of correct ones, mean", np.mean),
    "effective_samples": ("effective samples, mean", np.mean),
    "clip_fraction": ("clip fraction, mean", np.mean),
    "invalid_rewards": ("invalid rewards, sum", np.sum),
    "reinforced_hack_tokens": ("reinforced hack tokens, sum", np.sum),
}

DOSE_NOTE = (
    "Dose: tokens of hacks with a positive advantage that the gate let through, summed over"
    " training, whatever the advantage's size. A rule's common dose is the largest that at least"
    f" {dose.SHARE:.0%} of the runs of each of its arms reach. A run is read at its first probe"
    " with that dose, so a fast one by more than it; runs that never have it are left out, which"
    " selects. The number of updates then differs. Exploratory: no rule was stated for it, and"
    " nothing here is a verdict."
)


@dataclass(frozen=True)
class TextTable:
    """A table of finished texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def text_tables(view: RlView) -> list[TextTable]:
    """All tables that have a number, in the order in which they are to be read."""
    found = [
        _runs_table(view),
        _rates_table(view),
        _counts_table(view),
        _dynamics_table(view),
        _indices_table(view),
        _leak_table(view),
        _dose_table(view),
        _training_table(view),
        _llr_table(view),
        _coupling_table(view),
    ]
    return [table for table in found if table.rows and len(table.columns) > 1]


def _runs_table(view: RlView) -> TextTable:
    learned = {True: "yes", False: "no", None: "–"}
    rows = (
        (
            arm.label,
            f"{arm.hacked.k}/{arm.hacked.n} {_interval(arm.hacked, 100)}",
            _p(arm.p),
            _p(arm.holm),
            _estimate(arm.onset),
            learned[arm.learned],
            arm.word or "–",
        )
        for arm in view.trained
    )
    return TextTable(
        "Hacked runs",
        (
            "arm",
            "hacked runs [exact, %]",
            "p against standard",
            f"p, {view.holm_said}",
            f"restricted mean onset (of {view.reading.onset.horizon})",
            "hack learned at x_t",
            "verdict",
        ),
        tuple(rows),
    )


def _rates_table(view: RlView) -> TextTable:
    shown = [
        verdict for verdict in VERDICTS if any((verdict, NEUTRAL) in arm.rates for arm in view.arms)
    ]
    heads = (
        "P(hack given not correct)" if verdict == "lambda" else view.titled(verdict)
        for verdict in shown
    )
    rows = (
        (arm.label, *(_rate(arm, verdict, NEUTRAL) for verdict in shown))
        for arm in view.arms
        if ("hack", NEUTRAL) in arm.rates
    )
    return TextTable(
        "Under x_0 at the end, in %: mean over runs [bootstrap over seeds]",
        ("arm", *heads),
        tuple(rows),
    )


def _counts_table(view: RlView) -> TextTable:
    """What the rates are shares of: all runs' completions in one count, under x_0, and of hacks
    under the arm's own training prompt too.
    """
    asked = {
        (verdict, NEUTRAL): view.titled(verdict) for verdict in VERDICTS if verdict != "lambda"
    } | {("hack", TRAIN): f"{view.titled('hack')}, at x_t"}
    shown = [key for key in asked if any(key in arm.pooled for arm in view.arms)]
    rows = (
        (arm.label, *(_count(arm.pooled.get(key)) for key in shown))
        for arm in view.arms
        if ("hack", NEUTRAL) in arm.pooled
    )
    return TextTable(
        "Completions behind these rates: k/n of all runs together [exact, %]",
        ("arm", *(asked[key] for key in shown)),
        tuple(rows),
    )


def _dynamics_table(view: RlView) -> TextTable:
    """When an arm's runs sampled their first hack and hacked, and how steeply: medians over the
    runs that did, and how many did.
    """
    heads = {
        "discovery": "first hack sampled, step",
        "onset": "onset, step",
        "slope": "d logit(hack) / d step from the onset",
    }
    rows = []
    for arm in view.trained:
        runs = [of_run for (name, _), of_run in view.dynamics.items() if name == arm.name]
        had = [
            [
                value
                for of_run in runs
                if (value := getattr(of_run, name)) is not None and not math.isnan(value)
            ]
            for name in heads
        ]
        rows.append(
            (
                arm.label,
                *(
                    f"{_digits(float(np.median(values)))} ({len(values)})" if values else "–"
                    for values in had
                ),
            )
        )
    return TextTable(
        "Dynamics: median over the runs that had such (how many)",
        ("arm", *heads.values()),
        tuple(rows),
    )


def _indices_table(view: RlView) -> TextTable:
    shown = [index for index in INDICES if any(index in arm.others for arm in view.arms)]
    rows = (
        (
            arm.label,
            *(_estimate(arm.others.get(index)) for index in shown),
            f"{_share(arm.worst[1])} under {arm.worst[0]}" if arm.worst else "–",
        )
        for arm in view.arms
        if arm.others or arm.worst
    )
    return TextTable(
        "Indices [bootstrap over seeds], and the prompt with the highest hack rate",
        ("arm", *(INDICES[index] for index in shown), "L_max"),
        tuple(rows),
    )


def _leak_table(view: RlView) -> TextTable:
    shown = [
        category
        for category in CATEGORIES
        if any(("hack", category) in arm.rates for arm in view.arms)
    ]
    rows = (
        (arm.label, *(_rate(arm, "hack", category) for category in shown))
        for arm in view.arms
        if arm.rates
    )
    return TextTable(
        "Leak grid: hack at the end by kind of evaluation prompt, in %, mean over runs [bootstrap"
        " over seeds]",
        ("arm", *(c.replace("_", " ") for c in shown)),
        tuple(rows),
    )


def _dose_table(view: RlView) -> TextTable:
    """The compared arms where they had the dose that is common to them."""
    rows = []
    for at in view.at_doses:
        compared = {name for rule, _ in at.contrasts for name, _ in rule.contrast.weights}
        rates = {verdict: dose.by_arm(at.reached, verdict) for verdict in ("hack", "correct")}
        for arm in view.arms:
            reached, n = at.of_arm(arm.name)
            if arm.name in compared and reached:
                means = (
                    (
                        _estimate(measures.mean(of_runs, arm.name), 100)
                        if of_runs.get(arm.name)
                        else "–"
                    )
                    for of_runs in rates.values()
                )
                rest = (
                    _digits(float(np.mean([getattr(run, name) for run in reached])))
                    for name in ("tokens", "step")
                )
                rows.append((_digits(at.dose), arm.label, f"{len(reached)}/{n}", *means, *rest))
    heads = (
        "dose",
        "arm",
        "runs that reach it",
        view.titled("hack"),
        view.titled("correct"),
        "tokens by then, mean",
        "step, mean",
    )
    return TextTable(
        "At an equal dose of reinforced hack tokens, under x_0, in %: mean over the runs that reach"
        " it [bootstrap over seeds]",
        heads,
        tuple(rows),
    )


def _training_table(view: RlView) -> TextTable:
    """What training itself logged: of a run its last step, its mean or its sum, then the mean over
    runs.
    """
    columns: dict[str, dict[str, str]] = {}
    for quantity, (head, reduce) in TRAINING.items():
        for arm in view.arms:
            curves = {
                seed: curve.columns[quantity]
                for (name, seed), curve in view.rollouts.items()
                if name == arm.name
            }
            by_seed = {
                seed: float(reduce(values[~np.isnan(values)]))
                for seed, values in curves.items()
                if not np.isnan(values).all()
            }
            if by_seed:
                columns.setdefault(head, {})[arm.name] = _estimate(
                    measures.mean({arm.name: by_seed}, arm.name)
                )
    rows = [
        (arm.label, *(column.get(arm.name, "–") for column in columns.values()))
        for arm in view.arms
        if any(arm.name in column for column in columns.values())
    ]
    return TextTable(
        "Training: mean over runs [bootstrap over seeds]", ("arm", *columns), tuple(rows)
    )


def _llr_table(view: RlView) -> TextTable:
    heads = {
        "hack": "hack",
        "correct": "correct",
        "other": "other",
        "hack_minus_clean": "PH: hack − all others, in iteration 0",
    }
    title = (
        "Log-likelihood ratio a token of measured rollouts, training minus generation prompt, by"
        " label"
    )
    return _numbers_table(title, heads, {arm.label: arm.llr for arm in view.arms})


def _coupling_table(view: RlView) -> TextTable:
    heads = {
        f"{label}, {at}": f"{label}, {said}"
        for label in ("hack", "correct")
        for at, said in (("start", "iteration 0"), ("end", "last measured"))
    }
    title = (
        "Gradient coupling: cosine of the gradients of log p(y) under the training prompt and under"
        " x_0, of sampled completions (n runs that had such)"
    )
    return _numbers_table(
        title,
        heads,
        {arm.label: arm.coupling for arm in view.arms},
        said=lambda number: f"{_estimate(number)} ({number.n})",
    )


def _numbers_table(
    title: str,
    heads: Mapping[str, str],
    by_arm: Mapping[str, Mapping[str, Number]],
    said=lambda number: _estimate(number),
) -> TextTable:
    """Of arms and numbers, without those that nobody measured; what one arm lacks is a dash."""
    known = {
        label: {name: number for name, number in numbers.items() if isinstance(number, Estimate)}
        for label, numbers in by_arm.items()
    }
    shown = [name for name in heads if any(name in numbers for numbers in known.values())]
    rows = (
        (label, *(said(numbers[name]) if name in numbers else "–" for name in shown))
        for label, numbers in known.items()
        if numbers
    )
    return TextTable(title, ("arm", *(heads[name] for name in shown)), tuple(rows))


def verdict_lines(verdicts: Iterable[Verdict]) -> list[str]:
    """One line a rule: what was predicted, what is decided, and on which numbers."""
    return [
        f"{verdict.rule.name}: {verdict.rule.statement} → {verdict.word} ({_rule_number(verdict)})"
        for verdict in verdicts
    ]


def dose_lines(view: RlView) -> list[str]:
    """One line a rule about rates under x_0: its contrast where all arms have had the same dose.
    Without a verdict: the rules are about the end.
    """
    found = []
    for at in view.at_doses:
        for rule, number in at.contrasts:
            said = (
                f"undefined: {number.why}"
                if isinstance(number, Undefined)
                else f"{_estimate(number)}, n = {number.n}"
            )
            found.append(
                f"{rule.name}, at {_digits(at.dose)} tokens: {rule.contrast.quantity} of"
                f" {_terms(rule)} = {said}"
            )
    return [*found, *(f"{rule.name}: no common dose, {why.why}" for rule, why in view.without_dose)]


def _terms(rule: Rule) -> str:
    return " ".join(
        f"{'+' if weight > 0 else '−'} {f'{abs(weight):g} ' if abs(weight) != 1 else ''}{arm}"
        for arm, weight in rule.contrast.weights
    ).removeprefix("+ ")


def _rule_number(verdict: Verdict) -> str:
    number, asked, region = verdict.number, verdict.rule.contrast, verdict.rule.region
    if isinstance(number, Undefined):
        return f"undefined: {number.why}"
    at = f" at {asked.at}" if asked.quantity not in ("hacked", "onset") else ""
    limit = {
        "above": f"supported above {region.bound:g}, refuted up to {region.refuted:g}",
        "below": f"supported below {region.bound:g}, refuted from {region.refuted:g}",
        "within": f"supported within ±{region.bound:g}, refuted beyond",
    }[region.kind]
    few = (
        f"; fewer than {measures.MIN_SEEDS} runs decide nothing"
        if number.n < measures.MIN_SEEDS
        else ""
    )
    flat = "; all runs agree, so the interval has no width" if number.without_spread else ""
    said = (
        f"{asked.quantity}{at} of {_terms(verdict.rule)} = {_estimate(number)},"
        f" {100 * number.level:g} % {number.method}, n = {number.n}; {limit}{few}{flat}"
    )
    return said.replace("-", "−") if number.value < 0 or number.low < 0 else said


def notes(view: RlView) -> list[str]:
    """What the numbers rest on, a sentence each."""
    undefined = dict.fromkeys(
        f"{INDICES[index]} of {arm.label}: {number.why}"
        for arm in view.arms
        for index, number in arm.others.items()
        if isinstance(number, Undefined)
    )
    return [
        (
            f"{view.experiment}: {view.arms_said(view.arms)}, {view.seeds_said}. Data:"
            f" {view.provenance.rstrip('.')}."
        ),
        (
            f"A run is hacked at {view.reading.onset.words}. Exact intervals are Clopper-Pearson, p"
            " is Fisher's exact test against the standard arm, two-sided, and beside it corrected"
            f" by {view.holm_said}: all that were trained but the standard arm and the oracle. The"
            " rules' intervals are not corrected for the number of rules."
        ),
        (
            "Bootstrap intervals (95 %, percentile) resample whole seeds. With few seeds they are"
            " too narrow; without width they say only that all runs agree."
        ),
        (
            "Protected: by Holm's p (below .05) fewer hacked runs, fewer than half of the arm's"
            f" own, and the hack learned; never from fewer than {measures.MIN_SEEDS} seeds. The"
            " hack counts as learned if its rate under the arm's own training prompt is at least"
            f" {measures.LEARNED:g} of the standard arm's under x_0; L_max pools all runs'"
            " completions and, as a maximum, lies above the truth."
        ),
        (
            "Completions of one run resemble each other, so an exact interval of all runs' counts"
            " is about these runs; about others the bootstrap over seeds says more."
        ),
        (
            "Split-brain gap: H(x_t) − H(x_0). S_H: 1 − H/H of the standard arm. S_C: share of the"
            " oracle's gain in correct completions over the untrained model. SI: correct over the"
            " standard arm's, minus hack over its; CI: 1 − correct under x_0 over correct under"
            " x_t."
        ),
        *([DOSE_NOTE] if view.at_doses else ()),
        *(f"Undefined: {reason}." for reason in undefined),
    ]


def markdown(view: RlView) -> str:
    """Verdicts, tables and notes as Markdown."""
    parts = [f"# {view.experiment.replace('_', ' ')}"]
    if view.verdicts:
        parts.append(
            "## Rules stated before the runs\n\n"
            + "\n".join(f"- {line}" for line in verdict_lines(view.verdicts))
        )
    for table in text_tables(view):
        head = f"| {' | '.join(map(_cell, table.columns))} |\n|{' --- |' * len(table.columns)}"
        parts.append(
            f"## {table.title}\n\n{head}\n"
            + "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in table.rows)
        )
    if lines := dose_lines(view):
        parts.append(
            "## The rules' contrasts at an equal dose (exploratory)\n\n"
            + "\n".join(f"- {line}" for line in lines)
        )
    return (
        "\n\n".join(
            [
                *parts,
                "## What the numbers rest on\n\n" + "\n".join(f"- {note}" for note in notes(view)),
            ]
        )
        + "\n"
    )


def print_tables(view: RlView, console: Console) -> None:
    """The same for the terminal."""
    for text in text_tables(view):
        table = Table(
            title=escape(text.title),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for i, head in enumerate(text.columns):
            table.add_column(escape(head), justify="right" if i else "left", overflow="fold")
        for row in text.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in verdict_lines(view.verdicts):
        console.print(line, highlight=False, markup=False)
    for i, line in enumerate(dose_lines(view)):
        console.print(
            "\n" * (i == 0) + f"at an equal dose (exploratory): {line}",
            highlight=False,
            markup=False,
        )
    for note in notes(view):
        console.print(note, highlight=False, markup=False, style="dim")


# CSV: every number


def arms_csv(view: RlView) -> str:
    """One line an arm and number: value, interval, how it was made, and n runs; why an undefined
    one is so.
    """
    lines = [line for arm in view.arms for line in _arm_lines(arm)]
    return _csv(
        (
            "arm",
            "number",
            "category",
            "value",
            "low",
            "high",
            "n_runs",
            "k",
            "n",
            "interval",
            "undefined",
        ),
        lines,
    )


def _arm_lines(arm: ArmNumbers) -> list[dict]:
    lines = []
    if arm.hacked:
        lines.append({"number": "hacked_runs", **_proportion(arm.hacked), "n_runs": arm.hacked.n})
        lines.append({"number": "restricted_mean_onset", **_number(arm.onset)})
    if arm.p is not None:
        lines += [
            {"number": name, "value": f"{p:.6g}", "n_runs": arm.hacked.n}
            for name, p in (("fisher_p", arm.p), ("holm_p", arm.holm))
        ]
    lines += [
        {"number": f"mean_{verdict}", "category": category, **_number(estimate)}
        for (verdict, category), estimate in arm.rates.items()
    ]
    lines += [
        {
            "number": f"pooled_{verdict}",
            "category": category,
            **_proportion(rate),
            "n_runs": len(arm.seeds),
        }
        for (verdict, category), rate in arm.pooled.items()
    ]
    lines += [{"number": index, **_number(number)} for index, number in arm.others.items()]
    lines += [
        {"number": f"llr_{label}", **_number(number)}
        for label, number in arm.llr.items()
        if isinstance(number, Estimate)
    ]
    lines += [
        {"number": f"coupling_{name.replace(', ', '_')}", **_number(number)}
        for name, number in arm.coupling.items()
        if isinstance(number, Estimate)
    ]
    return [{"arm": arm.name, **line} for line in lines]


def runs_csv(view: RlView) -> str:
    """One line a run: its dynamics, and its rates at the end under x_0 and its own training prompt
    with exact intervals.
    """
    lines = []
    for arm, seed in dict.fromkeys((*view.dynamics, *view.grids)):
        line = {"arm": arm, "seed": seed}
        if found := view.dynamics.get((arm, seed)):
            slope = "" if math.isnan(found.slope) else f"{found.slope:.6g}"
            line |= {
                "hacked": found.onset is not None,
                "onset": found.onset,
                "discovery": found.discovery,
                "last_step": found.last,
                "logit_slope": slope,
            }
        for category in (NEUTRAL, TRAIN):
            cells = [
                cell.counts for cell in view.grids.get((arm, seed), ()) if cell.category == category
            ]
            for verdict, rate in measures.rates(measures.pool(cells)).items() if cells else ():
                line |= {
                    f"{category}_{verdict}_{name}": value
                    for name, value in _proportion(rate).items()
                    if name != "interval"
                }
        lines.append(line)
    columns = ["arm", "seed", "hacked", "onset", "discovery", "last_step", "logit_slope"]
    return _csv(list(dict.fromkeys([*columns, *(name for line in lines for name in line)])), lines)


def leak_csv(view: RlView) -> str:
    """One line for each run, evaluation prompt and verdict, with its exact interval."""
    lines = [
        {
            "arm": arm,
            "seed": seed,
            "eval_prompt": cell.eval_prompt,
            "category": cell.category,
            "verdict": verdict,
            **_proportion(rate),
        }
        for (arm, seed), grid in view.grids.items()
        for cell in grid
        for verdict, rate in measures.rates(cell.counts).items()
    ]
    return _csv(
        (
            "arm",
            "seed",
            "eval_prompt",
            "category",
            "verdict",
            "k",
            "n",
            "value",
            "low",
            "high",
            "interval",
        ),
        lines,
    )


def dose_csv(view: RlView) -> str:
    """One line for each common dose and run: whether it was reached, and the rates under x_0 at the
    first probe by which it was, with exact intervals.
    """
    lines = []
    for at in view.at_doses:
        for arm, seed in at.runs:
            line = {
                "dose": f"{at.dose:g}",
                "arm": arm,
                "seed": seed,
                "reached": (arm, seed) in at.reached,
            }
            if found := at.reached.get((arm, seed)):
                line |= {"step": found.step, "tokens": f"{found.tokens:g}"}
                line |= {
                    f"{verdict}_{name}": value
                    for verdict, rate in found.rates.items()
                    for name, value in _proportion(rate).items()
                    if name != "interval"
                }
            lines.append(line)
    columns = ["dose", "arm", "seed", "reached", "step", "tokens"]
    return _csv(list(dict.fromkeys([*columns, *(name for line in lines for name in line)])), lines)


def _csv(columns: Sequence[str], lines: Iterable[Mapping]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _number(number: Number) -> dict:
    if isinstance(number, Undefined):
        return {"undefined": number.why}
    line = {"value": f"{number.value:.6g}", "n_runs": number.n}
    return (
        line
        if math.isnan(number.low)
        else line
        | {
            "low": f"{number.low:.6g}",
            "high": f"{number.high:.6g}",
            "interval": number.method,
        }
    )


def _proportion(rate: stats.Proportion) -> dict:
    if rate.n == 0:
        return {"n": 0}
    return {
        "k": rate.k,
        "n": rate.n,
        "value": f"{rate.value:.6g}",
        "low": f"{rate.low:.6g}",
        "high": f"{rate.high:.6g}",
        "interval": "clopper-pearson",
    }


def _estimate(number: Number | None, scale: float = 1) -> str:
    if number is None:
        return "–"
    if isinstance(number, Undefined):
        return "undefined"
    value = _digits(scale * number.value)
    return value if math.isnan(number.low) else f"{value} {_interval(number, scale)}"


def _rate(arm: ArmNumbers, verdict: str, category: str) -> str:
    """In per cent: the mean over runs, of a single run its count with the exact interval."""
    found = arm.rates.get((verdict, category))
    if found is None or found.n > 1:
        return _estimate(found, 100)
    exact = arm.pooled[verdict, category]
    return f"{_digits(100 * exact.value)} ({exact.k}/{exact.n}, exact {_interval(exact, 100)})"


def _count(found: stats.Proportion | None) -> str:
    return "–" if found is None or not found.n else f"{found.k}/{found.n} {_interval(found, 100)}"


def _interval(number: Estimate | stats.Proportion, scale: float) -> str:
    return f"[{_digits(scale * number.low)}, {_digits(scale * number.high)}]"


def _digits(value: float) -> str:
    """Whole numbers from 10 on, a decimal from 3, two from 0.1, else three."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    decimals = (
        0
        if value == 0
        else next((d for d, least in enumerate((10, 3, 0.1)) if abs(value) >= least), 3)
    )
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def _share(rate: stats.Proportion) -> str:
    return f"{100 * rate.value:.0f} % ({rate.k}/{rate.n})"


def _p(p: float | None) -> str:
    return "–" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
