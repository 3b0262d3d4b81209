"""A figure on the toy: what a config in configs/ holds, and how it is run."""

import dataclasses
import difflib
from collections.abc import Mapping

from etils import epath
from rich.console import Console

from ip_jax.evals.rules import Reading
from ip_jax.lab.experiment import check_runs
from ip_jax.studies.toy.config import ToyConfig
from ip_jax.studies.toy.experiment import BASE, ToyExperiment, run_toy
from ip_jax.studies.toy.training import ToyArm, ToyRl

VERDICTS = (
    ("hack", "takes the loophole"),
    ("correct", "correct"),
    ("attempt", "begins the loophole"),
    ("trait", "upper case"),
)
"""What a `Reading` calls the toy's verdicts."""


@dataclasses.dataclass(frozen=True)
class ToyFigure:
    """One figure. `arms`: names of the config's ARMS. Raises ValueError as `check_runs`, and for
    programs of no run.
    """

    preset: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = tuple(range(20))
    rl: ToyRl = ToyRl()
    toy: ToyConfig = ToyConfig()
    runs_per_program: int = 120

    def __post_init__(self):
        check_runs(self.arms, self.seeds)
        if self.runs_per_program < 1:
            raise ValueError(f"runs_per_program is {self.runs_per_program}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a config states besides its presets: all arms, the rules by which they are read, the
    prompts of the leak grid.
    """

    name: str
    arms: Mapping[str, ToyArm]
    reading: Reading
    grid: tuple[str, ...]

    def shared_part(self, config: ToyFigure) -> dict:
        """The config as JSON without its arms: another one with more of them goes on in the same
        folder.
        """
        record = dataclasses.asdict(config)
        for growing in ("arms", "runs_per_program"):
            record.pop(growing)
        return record | {"experiment": self.name}

    def run(self, config: ToyFigure, folder: epath.Path, console: Console) -> None:
        """Trains what is missing in `folder`. Raises ValueError for an unknown arm, with the
        nearest names.
        """
        unknown = [name for name in config.arms if name not in self.arms]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.arms, n=3, cutoff=0.4)
            raise ValueError(
                f"the figure {self.name} has no arm {unknown[0]!r}:"
                f" {'did you mean ' + ', '.join(near) + '? ' if near else ''}there is"
                f" {', '.join(self.arms)}"
            )

        def there(arm):
            return arm if arm in config.arms else None

        reading = dataclasses.replace(
            self.reading,
            standard=there(self.reading.standard),
            oracle=there(self.reading.oracle),
            onset=dataclasses.replace(self.reading.onset, horizon=config.rl.iterations),
            rules=tuple(
                rule
                for rule in self.reading.rules
                if {arm for arm, _ in rule.contrast.weights} <= {*config.arms, BASE}
            ),
        )
        experiment = ToyExperiment(
            self.name,
            config.preset,
            self.shared_part(config),
            config.toy,
            config.rl,
            tuple(self.arms[name] for name in config.arms),
            config.seeds,
            reading,
            self.grid,
            config.runs_per_program,
        )
        run_toy(experiment, folder, console)
