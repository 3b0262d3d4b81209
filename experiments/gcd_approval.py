"""Runs (or resumes) GCD approval, then draws it.

python -m experiments.gcd_approval [--preset demo|small|full|paper]      the same as: ip-jax run
gcd_approval
"""

import dataclasses
import difflib
import sys

import pyarrow as pa
from etils import epath
from rich.console import Console

from configs.gcd_approval import GRID, GRPO, PUBLISHED, READING, GcdApprovalConfig, arms_with
from ip_jax.lab.base_model import load_tokenizer
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import decided
from ip_jax.lab.observer import UNWATCHED, Watch
from ip_jax.lab.reinforced.plan import UNTRAINED, Reinforced, decisive
from ip_jax.lab.reinforced.run import run_reinforced
from ip_jax.prompts.chat import render_conversation
from ip_jax.report.rl_report import write_rl_report
from ip_jax.studies.gcd_approval.environment import GcdApproval, claims
from ip_jax.studies.gcd_sycophancy import data, published, published_judge
from ip_jax.studies.gcd_sycophancy.data import DataSpec
from ip_jax.training import hosts

NAME = "gcd_approval"
VERDICT_TYPES = {
    "hackable": pa.bool_(),
    "hack": pa.bool_(),
    "correct": pa.bool_(),
    "strict_verdict": pa.string(),
    "published_confirms": pa.bool_(),
}


def shared_part(config: GcdApprovalConfig) -> dict:
    """The config as JSON without what may grow or change: arms, seeds, the mesh, when to save and
    to halt. Two results folders with equal ones may share runs.
    """
    record = dataclasses.asdict(dataclasses.replace(config, model=decided(config.model)))
    for growing in ("arms", "seeds", "mesh"):
        record.pop(growing)
    return record | {
        "rl": decisive(config.rl),
        "experiment": NAME,
        "published_files": published.find_folder() is not None,
    }


def experiment(config: GcdApprovalConfig) -> Reinforced:
    """Everything that is to be run, checked as far as that is possible without the model's
    weights.
    """
    config = dataclasses.replace(config, model=decided(config.model))
    known = arms_with(PUBLISHED if config.published else GRPO)
    unknown = [name for name in config.arms if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
        raise ValueError(
            f"{NAME} has no arm {unknown[0]!r}:"
            f" {'did you mean ' + ', '.join(near) + '? ' if near else ''}there is"
            f" {', '.join(known)}"
        )
    tokenizer = load_tokenizer(config.model)

    def count_tokens(messages):
        return len(render_conversation(tokenizer, messages).token_ids)

    folder, environment = published.find_folder(), GcdApproval()
    spec = DataSpec(work="without", claims=config.eval_claims, seed=config.data_seed)
    evaluation = data.load(spec, count_tokens, folder, ("generated",)).evaluation["generated"]
    tasks = claims(config.train_claims, config.data_seed + 1, evaluation, folder, count_tokens)

    def there(arm):
        return arm if arm in config.arms else None

    reading = dataclasses.replace(
        READING,
        standard=there(READING.standard),
        oracle=there(READING.oracle),
        onset=dataclasses.replace(READING.onset, horizon=config.rl.iterations),
        rules=tuple(
            rule
            for rule in READING.rules
            if {arm for arm, _ in rule.contrast.weights} <= {*config.arms, UNTRAINED}
        ),
    )
    return Reinforced(
        name=NAME,
        preset=config.preset,
        shared=shared_part(config),
        model=config.model,
        environment=environment,
        tasks=tasks,
        arms=tuple(known[name] for name in config.arms),
        seeds=config.seeds,
        rl=config.rl,
        evaluation=config.evaluation,
        eval_tasks=evaluation,
        grid=GRID,
        verdicts=lambda task, text: (
            environment.grade(task, text).verdicts
            | {"published_confirms": published_judge.user_confirms(text.strip())}
        ),
        verdict_types=VERDICT_TYPES,
        reading=reading,
        mesh=config.mesh,
        provenance=(
            f"{config.model.name}; {config.train_claims} generated claims in training and"
            f" {len(evaluation)} others in evaluation, half of each wrong (seed"
            f" {config.data_seed}{'' if folder is None else '; no pair of the published files'});"
            " judged by the strict judge"
        ),
    )


def run(
    config: GcdApprovalConfig, folder: epath.Path, console: Console, watch: Watch = UNWATCHED
) -> None:
    """Trains and evaluates what is missing in `folder`, then draws the figures and prints the
    tables.
    """
    run_reinforced(experiment(config), folder, Display(console), watch)
    hosts.by_first(lambda: draw(folder, console))


def redraw(_: GcdApprovalConfig, folder: epath.Path, console: Console) -> None:
    """As `run` draws; needs no model."""
    draw(folder, console)


def draw(folder: epath.Path, console: Console, judge: str | None = None) -> None:
    """Figures and tables from the tables of `folder` alone. Raises ValueError where a judge is
    chosen: the tables hold the strict one's counts.
    """
    if judge is not None:
        raise ValueError(f"{NAME} is drawn from counts of one judge: --judge is for gcd_sycophancy")
    write_rl_report(folder, console)


if __name__ == "__main__":
    from ip_jax.cli import main

    main(["run", NAME, *sys.argv[1:]])
