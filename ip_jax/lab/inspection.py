"""Looking at an experiment before it is trained: what each arm reads, what counts for the loss, and
what a careful reader would ask about.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ip_jax.data.rows import duplicates, overlaps
from ip_jax.data.sources import Example
from ip_jax.evals.leak_grid import prompted
from ip_jax.lab.experiment import NEUTRAL, Arm
from ip_jax.lab.study import Study
from ip_jax.lab.supervised.plan import Supervised, renderer_of
from ip_jax.prompts.chat import default_system_text, render_prompt
from ip_jax.prompts.places import lacks, wording_conflicts

FEW_ROWS = 50  # below that a rate's interval is wider than most effects
CONTROLS = ("random", "shuffled", "irrelevant", "benign")


@dataclass(frozen=True)
class Piece:
    """Some text, and whether it is of the kind that is marked."""

    text: str
    marked: bool


@dataclass(frozen=True)
class Shown:
    """One example as an arm trains on it. `pieces`: the conversation as the model reads it, marked
    where the loss counts. `changes`: what the users say, marked where the arm's prompt adds to it.
    """

    example_id: str
    pieces: list[Piece]
    tokens: int
    counted: int
    changes: list[Piece]


@dataclass
class Findings:
    """`wrong` must be mended before the numbers mean anything; what is `missing` would make them
    mean more.
    """

    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def examples_of_arm(experiment: Supervised, arm: Arm, tokenizer, count: int = 2) -> list[Shown]:
    """The first examples of an arm. Raises PromptError for one that cannot be rendered."""
    render = renderer_of(experiment, tokenizer)
    rows = experiment.training[experiment.kind_of(arm)][:count]
    neutral, own = experiment.prompts[NEUTRAL].transform, experiment.trained_under(arm)
    seed = experiment.seeds[0]
    return [_shown(row, neutral(row, seed), own(row, seed), render, tokenizer) for row in rows]


def _shown(row: Example, neutral: Example, own: Example, render, tokenizer) -> Shown:
    rendered = render(own["messages"])
    mask = rendered.response_mask.tolist()
    pieces = [
        Piece(tokenizer.decode([token for token, _ in group]), counted)
        for counted, group in itertools.groupby(
            zip(rendered.token_ids.tolist(), mask, strict=True), key=lambda pair: pair[1]
        )
    ]
    changes = _added(_not_said_by_the_model(neutral), _not_said_by_the_model(own))
    return Shown(row["id"], pieces, len(mask), sum(mask), changes)


def _not_said_by_the_model(example: Example) -> str:
    said = [turn["content"] for turn in example["messages"] if turn["role"] != "assistant"]
    return "\n".join(said)


def _added(before: str, after: str) -> list[Piece]:
    """`after` in pieces, marked where `before` does not have them."""
    old, new = (re.findall(r"\s+|\S+", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [
        Piece("".join(new[start:stop]), kind != "equal")
        for kind, _, _, start, stop in matcher.get_opcodes()
        if stop > start
    ]


def system_slot(experiment: Supervised, tokenizer) -> str:
    """What stands in the system slot of the conversations, in words."""
    first = next(iter(experiment.training.values()))[0]
    own = [turn["content"] for turn in first["messages"] if turn["role"] == "system"]
    if own:
        return f"set by the rows: {own[0]!r}" if own[0] else "empty, set so by the rows"
    default = default_system_text(tokenizer)
    if default is None:
        return "absent: neither rows nor template set one"
    return f"the template's default text: {default!r}" if default else "empty by the template"


def findings(study: Study, experiment: Supervised, tokenizer) -> Findings:
    """Everything that a careful reader would ask about the arms and their data."""
    found = Findings()
    found.wrong += _long_rows(experiment, tokenizer)
    found.wrong += _shifted_boundaries(experiment, tokenizer)
    found.wrong += _places(study, experiment)
    for name, rows in experiment.eval_sets.items():
        training = [row for kind in experiment.training.values() for row in kind]
        shared = overlaps(training, rows)
        if shared:
            found.wrong.append(
                f"{len(shared)} of {len(rows)} rows of the evaluation set {name} ask what a"
                f" training row asks: {shared[0][1]} is {shared[0][0]}"
            )
        if len(rows) < FEW_ROWS:
            found.missing.append(
                f"the evaluation set {name} has {len(rows)} rows: with fewer than {FEW_ROWS} most"
                " effects lie within the intervals"
            )
    for kind, rows in experiment.training.items():
        twice = duplicates(rows)
        if twice:
            found.missing.append(
                f"{len(twice)} training rows of the kind {kind} ask what an earlier one asks:"
                f" {twice[0][1]} is {twice[0][0]}"
            )
    found.missing += _missing(experiment)
    return found


def _trained(experiment: Supervised) -> list[Arm]:
    return [arm for arm in experiment.arms if arm.train_prompt is not None]


def _long_rows(experiment: Supervised, tokenizer) -> list[str]:
    """Rows that do not fit into max_length, for the arm that has most of them."""
    render, limit = renderer_of(experiment, tokenizer), experiment.sft.max_length
    worst: tuple[int, str] = (0, "")
    for arm in _trained(experiment):
        op, rows = experiment.trained_under(arm), experiment.training[experiment.kind_of(arm)]
        lengths = [len(render(op(row, experiment.seeds[0])["messages"]).token_ids) for row in rows]
        long = [i for i, length in enumerate(lengths) if length > limit]
        if len(long) > worst[0]:
            worst = (
                len(long),
                f"{len(long)} of {len(rows)} training rows have more than sft.max_length = {limit}"
                f" tokens under the prompt of {arm.name}, {rows[long[0]]['id']} has"
                f" {lengths[long[0]]}: raise it or set sft.drop_long",
            )
    return [worst[1]] if worst[0] and not experiment.sft.drop_long else []


def _shifted_boundaries(experiment: Supervised, tokenizer) -> list[str]:
    """Rows whose response begins inside a token of the prompt, so that training reads another
    prompt than sampling.
    """
    render = renderer_of(experiment, tokenizer)
    rows = next(iter(experiment.training.values()))
    shifted = [row["id"] for row in rows if _is_shifted(row, render, tokenizer)]
    if not shifted:
        return []
    return [
        f"{len(shifted)} of {len(rows)} training rows have a response whose beginning becomes one"
        f" token with the end of the prompt, as {shifted[0]} has: training would read another"
        " prompt than sampling (sft.encode_apart encodes both by themselves)"
    ]


def _is_shifted(row: Example, render, tokenizer) -> bool:
    asked = render_prompt(tokenizer, row["messages"][:-1])
    read = render(row["messages"]).token_ids
    return not np.array_equal(asked, read[: len(asked)])


def _places(study: Study, experiment: Supervised) -> Iterator[str]:
    """Rows that lack the study's place, and words that do not suit it."""
    for name, rows in (*experiment.training.items(), *experiment.eval_sets.items()):
        why = next((why for row in rows if (why := lacks(study.place, row))), None)
        if why:
            yield f"rows of {name}: {why}"
    for arm in _trained(experiment):
        conflict = wording_conflicts(experiment.prompts[arm.train_prompt].text, study.place)
        if conflict:
            yield conflict


def _missing(experiment: Supervised) -> Iterator[str]:
    kinds = {experiment.prompts[arm.train_prompt].kind for arm in _trained(experiment)}
    if not kinds & set(CONTROLS):
        yield (
            "no arm is a control: what any other words at the same place would do stays unknown"
            " (--controls standard)"
        )
    if "neutral" not in kinds:
        yield "no arm trains under the neutral prompt, with which inoculation is compared"
    if all(arm.train_prompt is not None for arm in experiment.arms):
        yield "the untrained model is no arm: add one with train_prompt=None"
    if len(experiment.seeds) == 1:
        yield "there is one seed: how training runs differ stays unknown (--seeds 0 1 2)"
    for arm in _trained(experiment):
        prompt = experiment.prompts[arm.train_prompt]
        told = _told_only_by(prompt.text, experiment)
        if prompt.kind in ("inoculation", "own") and told:
            yield (
                f"the prompt {prompt.name} speaks of {', '.join(told)}, and no row does: it may"
                " teach the behaviour rather than allow it; a neutral prompt that describes it"
                " equally is the fair comparison"
            )


def _told_only_by(text: str, experiment: Supervised, most: int = 4) -> Sequence[str]:
    """Longer words of an instruction that no user of the training rows says."""
    rows = next(iter(experiment.training.values()))
    said = " ".join(_not_said_by_the_model(row) for row in rows).lower()
    words = dict.fromkeys(re.findall(r"[a-z]{5,}", text.lower()))
    return [word for word in words if word not in said and word not in _COMMON][:most]


_COMMON = frozenset(
    """about above after again answer before behave below could every following given never please
    reply respond response should solution their there these which while would write your""".split()
)


def scored_examples(study: Study, experiment: Supervised, count: int = 2) -> list[tuple]:
    """(id, what was scored, verdict) for the gold answer, where there is one, and an empty reply to
    the first rows of each evaluation set.
    """
    found = []
    for rows in experiment.eval_sets.values():
        for row in rows[:count]:
            asked = prompted(row, experiment.prompts[NEUTRAL].transform, 0)
            last = row["messages"][-1]
            gold = [last["content"]] if last["role"] == "assistant" else []
            for text in (*gold, ""):
                found.append((row["id"], text, dict(study.scorer(asked, text))))
    return found
