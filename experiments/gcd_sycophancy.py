"""The GCD sycophancy figure: run (or resume) the config, then draw.

python -m experiments.gcd_sycophancy [--preset demo|full|paper]      the same as: ip-jax run
gcd_sycophancy
"""

import dataclasses
import sys
from collections.abc import Sequence

import pyarrow as pa
from etils import epath
from rich.console import Console

from configs.gcd_sycophancy import ARMS, GcdSycophancy
from ip_jax.lab.base_model import load_tokenizer
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import Arm, choose_arms, decided
from ip_jax.lab.observer import UNWATCHED, Watch
from ip_jax.lab.supervised.run import Supervised, run_supervised
from ip_jax.prompts.chat import render_conversation
from ip_jax.report.gcd_sycophancy import write_report
from ip_jax.report.gcd_view import JUDGES, MAIN_SET
from ip_jax.studies.gcd_sycophancy import data, published
from ip_jax.studies.gcd_sycophancy.verdicts import verdicts
from ip_jax.training import hosts

NAME = "gcd_sycophancy"
VERDICT_TYPES = {
    "published_confirms": pa.bool_(),
    "published_correct": pa.bool_(),
    "strict_verdict": pa.string(),
    "strict_correct": pa.bool_(),
}


def shared_part(config: GcdSycophancy) -> dict:
    """The config as JSON without what may grow or change: arms, seeds, the mesh. Two results
    folders with equal ones may share runs.
    """
    record = dataclasses.asdict(dataclasses.replace(config, model=decided(config.model)))
    for growing in ("arms", "seeds", "judge", "mesh"):
        record.pop(growing)
    return record | {"experiment": NAME, "published_files": published.find_folder() is not None}


def experiment(config: GcdSycophancy) -> Supervised:
    """Everything that is to be run, checked as far as that is possible without the model's
    weights.
    """
    config = dataclasses.replace(config, model=decided(config.model))
    arms = choose_arms(config.arms, ARMS)
    tokenizer = load_tokenizer(config.model)
    _check(config, arms)

    def count_tokens(messages):
        return len(render_conversation(tokenizer, messages).token_ids)

    gcd = data.load(config.data, count_tokens, published.find_folder(), config.eval_sets)
    return Supervised(
        name=NAME,
        preset=config.preset,
        shared=shared_part(config) | {"data_from": gcd.provenance},
        model=config.model,
        mesh=config.mesh,
        sft=config.sft,
        evaluation=config.evaluation,
        arms=arms,
        seeds=config.seeds,
        training=gcd.training,
        eval_sets={
            name: for_sampling(gcd.evaluation[name], config)
            for name in config.eval_sets
            if name in gcd.evaluation
        },
        provenance=gcd.provenance,
        verdicts=verdicts,
        verdict_types=VERDICT_TYPES,
    )


def _check(config: GcdSycophancy, arms: Sequence[Arm]) -> None:
    """Refuses names and lists that nothing could be made of, before any data is read."""
    if config.judge not in JUDGES:
        raise ValueError(f"judge is {config.judge!r}: choose from {', '.join(JUDGES)}")
    missing = sorted(set(config.eval_sets) - set(data.EVAL_SETS))
    if missing:
        raise ValueError(
            f"no evaluation set is called {missing[0]!r}: choose from {', '.join(data.EVAL_SETS)}"
        )
    if MAIN_SET not in config.eval_sets:
        raise ValueError(
            f"eval_sets is {config.eval_sets}: the figure shows the set {MAIN_SET}, so it has to be"
            " among them"
        )
    other = [arm for arm in arms if config.data.training_file and arm.data != "user_right"]
    if other:
        raise ValueError(
            f"the arm {other[0].name} trains on the setting's rows of the kind {other[0].data}, and"
            " data.training_file replaces them: leave it out"
        )


def for_sampling(rows, config: GcdSycophancy) -> list:
    """The rows; those that ask for a solution get room for one, and only the steps that are
    evaluated in full ask them.
    """
    solving = {"max_new_tokens": config.evaluation.max_new_tokens_solving, "full_steps_only": True}
    return [row | solving if row["claim"] == "asked" else row for row in rows]


def run(
    config: GcdSycophancy, folder: epath.Path, console: Console, watch: Watch = UNWATCHED
) -> None:
    """Trains and evaluates what is missing in `folder`, then draws the figure and prints the
    table.
    """
    run_supervised(experiment(config), folder, Display(console), watch)
    hosts.by_first(lambda: redraw(config, folder, console))


def redraw(config: GcdSycophancy, folder: epath.Path, console: Console) -> None:
    """As `run` draws; needs no model."""
    draw(folder, console, config.judge)


def draw(folder: epath.Path, console: Console, judge: str | None = None) -> None:
    """Figure and tables from the transcripts of `folder` alone; needs no model. `judge`: by default
    the strict one.
    """
    write_report(folder, console, judge or "strict")


if __name__ == "__main__":
    from ip_jax.cli import main

    main(["run", NAME, *sys.argv[1:]])
