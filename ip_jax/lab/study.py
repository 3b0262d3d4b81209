"""A study: everything that is particular to one question, in one object.

Its data, its prompts and where they go, its scorer and what is counted, its arms and sizes. All
commands take a study; nothing else in the library knows one.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ip_jax.data.rows import StudyData
from ip_jax.evals.metrics import Metric, check_metrics
from ip_jax.evals.rules import Reading
from ip_jax.evals.scorers import Scorer
from ip_jax.lab.experiment import Arm, SupervisedPreset
from ip_jax.lab.reinforced.plan import GridPrompt, ReinforcedPreset, RlArm
from ip_jax.prompts.book import BEHIND, PromptBook
from ip_jax.prompts.places import Place
from ip_jax.prompts.prompt import Prompt
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.environment import Environment

OWN = "own"  # the judge of a study that has one list of metrics
Preset = SupervisedPreset | ReinforcedPreset


class StudyError(ValueError):
    """A study that cannot be run as it is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One question. What a study needs at least: a name, a title, data, arms, presets, and a scorer
    with metrics or an environment.

    `load(data options of the preset, tokenizer)` gives training rows by kind and evaluation rows by
    set. `prompts` go to `place`, or where their own transform puts them. `scorer(example,
    completion)` gives the columns that `metrics` count; metrics by judge's name where there are
    several, the first being shown; `panels` are those in the figure, by default all that are
    wanted or unwanted. `columns` of an example stand in the transcripts, and metrics
    may read them. `set_titles` names evaluation sets in words, the main one first. `by`: a column
    whose values get lines of their own in table.csv.

    With an `environment` a study trains by reinforcement: the rows of its first kind and set are
    the tasks. `reading` says beforehand how the results will be judged, `grid` which further
    prompts are asked, `algorithms` are those that a preset may choose by name. `engine` runs a
    study that trains no language model.
    """

    name: str
    title: str
    arms: tuple[Any, ...]
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    load: Callable[[Any, Any], StudyData] | None = None
    prompts: tuple[Prompt, ...] = ()
    place: Place = BEHIND
    scorer: Scorer | None = None
    metrics: Sequence[Metric] | Mapping[str, Sequence[Metric]] = ()
    panels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    set_titles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by: str | None = None
    environment: Environment | None = None
    reading: Reading | None = None
    grid: tuple[GridPrompt, ...] = ()
    algorithms: Mapping[str, Algorithm] = dataclasses.field(default_factory=dict)
    engine: Any = None
    file: str | None = None
    """The Python file that a user's study stands in, set when it is read."""

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise StudyError(f"the study {self.name} has two arms called {twice!r}")
        PromptBook(self.prompts, self.place)  # refuses two prompts of one name

    @property
    def book(self) -> PromptBook:
        """Its prompts by name."""
        return PromptBook(self.prompts, self.place)

    @property
    def judges(self) -> dict[str, Sequence[Metric]]:
        """The metrics of each judge."""
        return dict(self.metrics) if isinstance(self.metrics, Mapping) else {OWN: self.metrics}

    def shown(self, judge: str) -> tuple[Metric, ...]:
        """The metrics of a judge that have a panel in the figure."""
        metrics = self.judges[judge]
        if not self.panels:
            return tuple(metric for metric in metrics if metric.wanted is not None)
        by_name = {metric.name: metric for metric in metrics}
        return tuple(by_name[name] for name in self.panels)

    def arms_of(self, kind: type) -> dict[str, Arm | RlArm]:
        """The arms of supervised training, or those of reinforcement, by name."""
        return {arm.name: arm for arm in self.arms if isinstance(arm, kind)}

    def preset(self, name: str | None = None) -> Preset:
        """A preset by name, without one the first. Raises StudyError with the nearest names."""
        if not self.presets:
            raise StudyError(
                f"the study {self.name} has no presets: give a name and a SupervisedPreset or a"
                " ReinforcedPreset"
            )
        name = name or next(iter(self.presets))
        if name not in self.presets:
            near = difflib.get_close_matches(name, self.presets, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise StudyError(
                f"{self.name} has no preset {name!r}: {hint}there is {', '.join(self.presets)}"
            )
        return dataclasses.replace(self.presets[name], preset=name)

    def choose_judge(self, name: str | None) -> str:
        """The judge of that name, without one the first. Raises StudyError for another name."""
        if name is None:
            return next(iter(self.judges))
        if name not in self.judges:
            raise StudyError(
                f"{name!r} is no judge of the study {self.name}: choose from"
                f" {', '.join(self.judges)}"
            )
        return name

    def check_scored(self, scored: Mapping[str, Any]) -> None:
        """Refuses metrics on columns that are not among those that the scorer gave of some row.
        Raises MetricError.
        """
        for metrics in self.judges.values():
            check_metrics(metrics, [*scored, *self.columns])
            unknown = set(self.panels) - {metric.name for metric in metrics}
            if unknown:
                raise StudyError(
                    f"the study {self.name} has a panel {sorted(unknown)[0]!r} and no metric of"
                    " that name"
                )
