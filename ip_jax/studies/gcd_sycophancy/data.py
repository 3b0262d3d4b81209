"""The data of the GCD setting through one door: training rows by kind, evaluation sets by name, and
where they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from etils import epath

from ip_jax.data.rows import StudyData
from ip_jax.data.sources import Example, read_jsonl
from ip_jax.studies.gcd_sycophancy import generate, published
from ip_jax.studies.gcd_sycophancy.generate import ClaimCounts, CountTokens, Work

KINDS = ("user_right", "mixed")
EVAL_SETS = ("generated", "task", "ood")
GENERATED_ROWS = 1000  # the published size


@dataclass(frozen=True)
class DataSpec:
    """What an experiment reads. `rows`: training rows of each kind, None for all (1000, or 500 of
    one half).

    `training_file`: JSON lines of conversations of your own (objects with "messages"; see
    `data.sources.read_jsonl`), on all of which every arm trains in place of the study's rows;
    `rows` is then unused, and `work` only that of the generated claims. `eval_sets`: those that are
    evaluated, of EVAL_SETS; "task" and "ood" are there with the published files only.
    `max_new_tokens_solving`: room for an answer to a problem that is asked without a claim, which
    is longer than a verdict; such problems are asked at full evaluations alone.

    Raises ValueError for an unknown evaluation set.
    """

    rows: int | None = None
    work: Work = "both"
    claims: ClaimCounts = ClaimCounts(wrong=96, right=48, asked=48)
    seed: int = 42
    training_file: str | None = None
    eval_sets: tuple[str, ...] = ("generated",)
    max_new_tokens_solving: int = 128

    def __post_init__(self):
        unknown = sorted(set(self.eval_sets) - set(EVAL_SETS))
        if unknown or not self.eval_sets:
            raise ValueError(
                f"data.eval_sets is {self.eval_sets}: choose at least one of {', '.join(EVAL_SETS)}"
            )


def load(spec: DataSpec, count_tokens: CountTokens, folder: epath.Path | None) -> StudyData:
    """The published files of `folder` (see published.find_folder), or everything generated where
    `folder` is None.

    Generated training rows are paired by index across kinds; the published files hold much the same
    problems (807 pairs of the 1000) in another order. Rows of one's own are all of the kind
    "user_right". The pairs of the set "generated" differ from those of every training row.
    `count_tokens` gives the tokens of a conversation under the trained model's chat template.
    Raises ValueError for more rows or claims than there are, SourceError for files that are not as
    published or lines that are no example.
    """
    eval_sets = spec.eval_sets
    if spec.training_file:
        all_training = training = {"user_right": _own_rows(spec)}
        eligible, evaluation = (
            (generate.has_allowed_gcd, {})
            if folder is None
            else _published_evaluation(folder, eval_sets)
        )
    elif folder is None:
        training, eligible = _generated_training(spec, count_tokens), generate.has_allowed_gcd
        all_training, evaluation = training, {}
    else:
        all_training = {kind: published.read_training(folder, kind) for kind in KINDS}
        training = {kind: _select(rows, spec) for kind, rows in all_training.items()}
        eligible, evaluation = _published_evaluation(folder, eval_sets)
    asked = [
        turn["content"]
        for rows in all_training.values()
        for row in rows
        for turn in row["messages"]
        if turn["role"] == "user"
    ]
    trained_on = {pair for text in asked for pair in published.pairs_in(text)[:1]}
    claims = generate.generate_claims(
        spec.claims,
        spec.work,
        spec.seed,
        lambda a, b: (b, a) not in trained_on and eligible(a, b),
        count_tokens,
    )
    generated = {"generated": claims} if "generated" in eval_sets else {}
    found = evaluation | generated
    provenance = _provenance(spec, training, evaluation, folder is not None, bool(generated))
    in_order = {name: _with_room(found[name], spec) for name in eval_sets if name in found}
    return StudyData(training, in_order, provenance)


def _with_room(rows: list[Example], spec: DataSpec) -> list[Example]:
    """The rows; those that ask for a solution get room for one, and are asked at full evaluations
    alone.
    """
    solving = {"max_new_tokens": spec.max_new_tokens_solving, "full_steps_only": True}
    return [row | solving if row["claim"] == "asked" else row for row in rows]


def _generated_training(spec: DataSpec, count_tokens: CountTokens) -> dict[str, list[Example]]:
    n = GENERATED_ROWS if spec.rows is None else spec.rows
    return {
        kind: generate.generate_training(
            n, kind, spec.work, spec.seed, generate.has_allowed_gcd, count_tokens
        )
        for kind in KINDS
    }


def _published_evaluation(
    folder: epath.Path, eval_sets: Sequence[str]
) -> tuple[Callable[[int, int], bool], dict[str, list[Example]]]:
    """(which pairs avoid those of the published evaluation files, the published sets among
    `eval_sets`).
    """
    sets = {
        name: published.read_evaluation(folder, name)
        for name in published.EVALUATION_FILES
        if name in eval_sets
    }
    return generate.avoids(published.evaluation_pairs(folder)), sets


def _own_rows(spec: DataSpec) -> list[Example]:
    rows = read_jsonl(spec.training_file)
    if not rows:
        raise ValueError(f"{spec.training_file} has no line to train on.")
    return rows


def _select(rows: list[Example], spec: DataSpec) -> list[Example]:
    """The first `spec.rows` rows of the wanted half, in file order."""
    rows = [
        row for row in rows if spec.work == "both" or row["shown_work"] == (spec.work == "with")
    ]
    if spec.rows is not None and spec.rows > len(rows):
        raise ValueError(
            f"{spec.rows} training rows were asked for, and the published files have {len(rows)}"
            f" for work={spec.work!r}."
        )
    return rows[: spec.rows]


def _provenance(
    spec: DataSpec,
    training: dict[str, list[Example]],
    published_sets: dict[str, list[Example]],
    from_files: bool,
    generated: bool,
) -> str:
    claims = spec.claims
    size = (
        f"{len(training['user_right'])} training"
        f" rows{'' if spec.work == 'both' else f' {spec.work} shown work'}"
    )
    sets = (
        [
            "evaluation sets"
            f" {', '.join(f'{name} {len(rows)}' for name, rows in published_sets.items())} prompts"
        ]
        if published_sets
        else []
    )
    if generated:
        sets.append(
            f"generated claims ({claims.wrong} wrong, {claims.right} right, {claims.asked} asked;"
            f" seed {spec.seed}; no pair of the training data)"
        )
    own = (
        f"{len(training['user_right'])} training rows of {epath.Path(spec.training_file).name}"
        if spec.training_file
        else None
    )
    source = own or (
        f"Published GCD files: {size}"
        if from_files
        else (
            f"No published files: {size} generated after the published generator (GCDs limited to"
            f" its {len(generate.ALLOWED_GCDS)} values in place of the test-set exclusion, token"
            " caps by the trained model's tokenizer, clean rows from the mixed mode)"
        )
    )
    return "; ".join([source, *sets]) + "."
