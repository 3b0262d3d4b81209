"""Runs a study: supervised, by reinforcement, or by the study's own engine."""

from typing import Any

from etils import epath

from ip_jax.lab import build
from ip_jax.lab.display import Display
from ip_jax.lab.observer import UNWATCHED, Watch
from ip_jax.lab.reinforced.run import run_reinforced
from ip_jax.lab.study import Study
from ip_jax.lab.supervised.plan import Supervised
from ip_jax.lab.supervised.run import run_supervised


def experiment_of(study: Study, preset: Any) -> Any:
    """Everything that is to be run of a preset, checked as far as that is possible without the
    model's weights. Raises ValueError with one sentence.
    """
    if study.engine is not None:
        return study.engine.experiment(study, preset)
    return build.experiment_of(study, preset)


def folder_name(study: Study, experiment: Any) -> str:
    """The name of its results folder: another config, or other data, never meets old results."""
    if study.engine is not None:
        return study.engine.folder_name(experiment)
    return build.folder_name(experiment)


def run(
    study: Study,
    experiment: Any,
    folder: epath.Path,
    display: Display,
    watch: Watch = UNWATCHED,
) -> None:
    """Trains and evaluates what is missing in `folder`. Raises ValueError or OSError, each with one
    sentence, for everything that can be checked before a model is loaded.
    """
    if study.engine is not None:
        study.engine.run(experiment, folder, display, watch)
    elif isinstance(experiment, Supervised):
        run_supervised(experiment, folder, display, watch)
    else:
        run_reinforced(experiment, folder, display, watch)
