"""The figures on the toy: a preset of one, and the engine that runs it from a study."""

import dataclasses
import difflib

from etils import epath

from ip_jax.evals.rules import Reading
from ip_jax.lab.build import reading_of
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import check_runs
from ip_jax.lab.observer import UNWATCHED, Watch
from ip_jax.lab.study import Study
from ip_jax.studies.toy.config import ToyConfig
from ip_jax.studies.toy.experiment import ToyExperiment, run_toy
from ip_jax.studies.toy.training import ToyRl
from ip_jax.training.results import digest

VERDICTS = (
    ("hack", "takes the loophole"),
    ("correct", "correct"),
    ("attempt", "begins the loophole"),
    ("trait", "upper case"),
)
"""What a `Reading` calls the toy's verdicts."""


@dataclasses.dataclass(frozen=True)
class ToyPreset:
    """One figure at one size. `arms`: names of the study's arms, all of them where none is named.
    Raises ValueError for programs of no run.
    """

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = tuple(range(20))
    rl: ToyRl = ToyRl()
    toy: ToyConfig = ToyConfig()
    runs_per_program: int = 120
    preset: str = ""

    def __post_init__(self):
        if self.runs_per_program < 1:
            raise ValueError(f"runs_per_program is {self.runs_per_program}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class ToyEngine:
    """What a figure on the toy states besides its arms: the rules by which they are read, and the
    prompts of the leak grid.
    """

    reading: Reading
    grid: tuple[str, ...]

    def experiment(self, study: Study, preset: ToyPreset) -> ToyExperiment:
        """What is to be run. Raises ValueError as `check_runs`, and for an unknown arm, with the
        nearest names.
        """
        known = {arm.name: arm for arm in study.arms}
        names = preset.arms or tuple(known)
        check_runs(names, preset.seeds)
        unknown = [name for name in names if name not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
            raise ValueError(
                f"the study {study.name} has no arm {unknown[0]!r}:"
                f" {'did you mean ' + ', '.join(near) + '? ' if near else ''}there is"
                f" {', '.join(known)}"
            )
        record = dataclasses.asdict(preset)
        for growing in ("arms", "runs_per_program"):
            record.pop(growing)
        return ToyExperiment(
            study.name,
            preset.preset,
            record | {"experiment": study.name},
            preset.toy,
            preset.rl,
            tuple(known[name] for name in names),
            preset.seeds,
            reading_of(self.reading, names, preset.rl.iterations),
            self.grid,
            preset.runs_per_program,
        )

    def folder_name(self, experiment: ToyExperiment) -> str:
        """<preset>-<hash of all but arms>: another preset never meets old results."""
        return f"{experiment.preset}-{digest(experiment.shared)[:6]}"

    def run(
        self,
        experiment: ToyExperiment,
        folder: epath.Path,
        display: Display,
        watch: Watch = UNWATCHED,
    ) -> None:
        """Trains what is missing in `folder`. Raises ValueError for a profile or metrics that are
        watched.
        """
        if watch != UNWATCHED:
            raise ValueError(
                "--profile and --wandb do not watch the toy, whose iterations run inside one jitted"
                " loop: see curves.parquet and timing/ in the results folder"
            )
        run_toy(experiment, folder, display.console)
