"""From a study and one of its presets to what the two runners take."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ip_jax.data.rows import StudyData
from ip_jax.evals.judges import Judge
from ip_jax.evals.leak_grid import prompted, scored
from ip_jax.evals.rules import Onset, Reading
from ip_jax.evals.scorers import SCORE_ERROR
from ip_jax.lab.base_model import load_tokenizer
from ip_jax.lab.experiment import (
    NEUTRAL,
    UNTRAINED,
    Arm,
    ModelConfig,
    SupervisedPreset,
    choose_arms,
    decided,
)
from ip_jax.lab.reinforced.plan import Reinforced, ReinforcedPreset, RlArm, decisive
from ip_jax.lab.study import Preset, Study, StudyError
from ip_jax.lab.supervised.plan import Supervised
from ip_jax.prompts.transforms import Identity
from ip_jax.training.results import digest

PROBED = 20  # rows of each evaluation set on which a scorer is tried before anything is trained


def experiment_of(study: Study, preset: Preset) -> Supervised | Reinforced:
    """Everything that is to be run, checked as far as that is possible without the model's weights.
    Raises ValueError with one sentence.
    """
    preset = dataclasses.replace(preset, model=decided(preset.model))
    if isinstance(preset, SupervisedPreset):
        return supervised_of(study, preset)
    return reinforced_of(study, preset)


def supervised_of(study: Study, preset: SupervisedPreset) -> Supervised:
    """The supervised experiment of a preset. Raises ValueError as `experiment_of`."""
    study.choose_judge(preset.judge)
    known = study.arms_of(Arm)
    chosen = choose_arms(preset.arms or known, known, study.book, preset.controls)
    if study.scorer is None:
        raise StudyError(
            f"the study {study.name} has no scorer, and the preset {preset.preset} is supervised:"
            " give a function (example, completion) -> dict"
        )
    data = _load(study, preset.data, preset.model)
    study.check_scored(probe(study, data))
    return Supervised(
        name=study.name,
        preset=preset.preset,
        shared=shared_part(study, preset),
        model=preset.model,
        mesh=preset.mesh,
        sft=preset.sft,
        evaluation=preset.evaluation,
        arms=chosen.arms,
        prompts=chosen.prompts,
        seeds=preset.seeds,
        training=data.training,
        eval_sets=data.evaluation,
        provenance=data.provenance,
        scorer=study.scorer,
        columns=study.columns,
        study_file=study.file,
    )


def reinforced_of(study: Study, preset: ReinforcedPreset) -> Reinforced:
    """The experiment in reinforcement of a preset. Raises ValueError as `experiment_of`."""
    if study.environment is None:
        raise StudyError(
            f"the study {study.name} has no environment, and the preset {preset.preset} trains by"
            " reinforcement: give an rl.Environment"
        )
    arms = tuple(_rl_arm(study, preset, name) for name in preset.arms or study.arms_of(RlArm))
    data = _load(study, preset.data, preset.model)
    names = dict.fromkeys([NEUTRAL, *(prompt.name for prompt in study.grid)])
    return Reinforced(
        name=study.name,
        preset=preset.preset,
        shared=shared_part(study, preset),
        model=preset.model,
        mesh=preset.mesh,
        environment=study.environment,
        tasks=_first(data.training),
        eval_tasks=_first(data.evaluation),
        arms=arms,
        prompts={name: study.book.find(name) for name in names},
        seeds=preset.seeds,
        rl=preset.rl,
        evaluation=preset.evaluation,
        grid=study.grid,
        scorer=study.scorer,
        columns=study.columns,
        study_file=study.file,
        reading=reading_of(study.reading, [arm.name for arm in arms], preset.rl.iterations),
        # a local model's folder is nobody's business
        provenance=f"{epath.Path(preset.model.name).name}; {data.provenance}",
    )


def _rl_arm(study: Study, preset: ReinforcedPreset, name: str) -> RlArm:
    """An arm with its prompts, and the preset's algorithm where it names one."""
    arm = _named(study, "arm", study.arms_of(RlArm), name)
    if preset.algorithm is not None:
        algorithm = _named(study, "algorithm", study.algorithms, preset.algorithm)
        arm = dataclasses.replace(arm, algorithm=algorithm)
    sides = ("gen_prompt", "train_prompt", "guide_prompt")
    given = {side: getattr(arm, side) for side in sides if getattr(arm, side) is not None}
    return dataclasses.replace(
        arm, **{side: prompts.resolved(study.book) for side, prompts in given.items()}
    )


def _named(study: Study, what: str, known: Mapping[str, Any], name: str) -> Any:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise StudyError(
            f"{study.name} has no {what} {name!r}: {hint}there is {', '.join(known) or 'none'}"
        )
    return known[name]


def reading_of(reading: Reading | None, arms: Sequence[str], iterations: int) -> Reading:
    """A study's reading, as far as it is about the arms that are there; where it states none, only
    what is seen.
    """
    if reading is None:
        return Reading(Onset(iterations), standard=None, base=UNTRAINED)

    def there(arm: str | None) -> str | None:
        return arm if arm in arms else None

    present = {*arms, reading.base}
    return dataclasses.replace(
        reading,
        standard=there(reading.standard),
        oracle=there(reading.oracle),
        onset=dataclasses.replace(reading.onset, horizon=iterations),
        rules=tuple(
            rule for rule in reading.rules if {arm for arm, _ in rule.contrast.weights} <= present
        ),
    )


def shared_part(study: Study, preset: Preset) -> dict:
    """The preset as JSON without what may grow or change: arms, seeds, the judge that is shown, the
    mesh. Two results folders with equal ones may share runs.
    """
    record = dataclasses.asdict(preset)
    for growing in ("arms", "controls", "seeds", "judge", "mesh"):
        record.pop(growing, None)
    if isinstance(preset, ReinforcedPreset):
        record["rl"] = decisive(preset.rl)
    return record | {"experiment": study.name}


def folder_name(experiment: Supervised | Reinforced) -> str:
    """<preset>-<hash of all but arms and seeds>: another config, or other data, never meets old
    results.
    """
    if isinstance(experiment, Supervised):
        data = [experiment.training, experiment.eval_sets]
    else:
        data = [{"tasks": experiment.tasks}, {"tasks": experiment.eval_tasks}]
    rows = [{name: [dict(row) for row in of_set] for name, of_set in sets.items()} for sets in data]
    return f"{experiment.preset}-{digest([dict(experiment.shared), rows])[:6]}"


def probe(study: Study, data: StudyData) -> dict[str, Any]:
    """The columns that the scorer gives of the first rows of each evaluation set, with a value of
    each: the gold answer is scored where a row has one, else an empty reply.

    Raises StudyError, which names the row, where the scorer raises or gives other columns than on
    the row before.
    """
    found: dict[str, Any] = {}
    if isinstance(study.scorer, Judge):  # it costs: one call says whether it can be used
        study.scorer.check(next(iter(data.evaluation.values()))[0])
        return dict.fromkeys((study.scorer.name, f"{study.scorer.name}_said"))
    for name, rows in data.evaluation.items():
        for row in rows[:PROBED]:
            of_row = scored(study.scorer, prompted(row, Identity(), 0), _gold(row))
            where = f"the scorer of {study.name}, on row {row['id']} of the evaluation set {name},"
            if SCORE_ERROR in of_row:
                raise StudyError(f"{where} failed: {of_row[SCORE_ERROR]}")
            if found and of_row.keys() != found.keys():
                raise StudyError(
                    f"{where} returned the columns {', '.join(of_row)}, and on another row"
                    f" {', '.join(found)}: give every row the same ones, None where there is no"
                    " value"
                )
            found |= of_row
    return found


def _gold(row: Mapping[str, Any]) -> str:
    last = row["messages"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def _load(study: Study, spec: Any, model: ModelConfig) -> StudyData:
    """The study's data. Raises StudyError where there is none, or none of a kind."""
    if study.load is None:
        raise StudyError(f"the study {study.name} has no data: give it `load`")
    data = study.load(spec, load_tokenizer(model))
    for what, sets in (("training", data.training), ("evaluation", data.evaluation)):
        empty = next((name for name, rows in sets.items() if not rows), None)
        if not sets or empty is not None:
            raise StudyError(
                f"the study {study.name} has no {what} rows{f' {empty}' * bool(empty)}"
            )
    return data


def _first(sets: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    return next(iter(sets.values()))
