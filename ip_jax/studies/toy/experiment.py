"""Runs a toy experiment: arms x seeds, one program for each kind of arm, looked at under x_0 while
they train and under a grid of prompts at the end.

An arm that is recorded in the folder is not run again; a program that was stopped goes on from its
last probe, to the same bits. Rollouts (`training.iterate` says what is kept of them) are one file
for each block of `probe_every` iterations, named after its first one: a block is one call of a
jitted program, so its iterations reach the disk together.
"""

import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Array, Float, Int
from rich.console import Console

from ip_jax.evals import rl_tables
from ip_jax.evals.rl_tables import NEUTRAL, ROLLOUT, TRAIN
from ip_jax.evals.rules import Reading
from ip_jax.lab.display import Display
from ip_jax.lab.live_table import ArmRow, live_arms, over_seeds
from ip_jax.models.decoder import split_decoder
from ip_jax.models.hub import cache_dir
from ip_jax.rl.algorithm import Algorithm, check_guidance
from ip_jax.rl.estimators import WARNINGS
from ip_jax.studies.toy import guards, training
from ip_jax.studies.toy.config import ToyConfig
from ip_jax.studies.toy.data import fixed_data
from ip_jax.studies.toy.evaluation import count_verdicts
from ip_jax.studies.toy.pretraining import base_params
from ip_jax.studies.toy.prompts import NEUTRAL as NEUTRAL_PROMPT
from ip_jax.studies.toy.prompts import family_of
from ip_jax.studies.toy.training import Program, ToyArm, ToyRl
from ip_jax.studies.toy.vocabulary import encode
from ip_jax.training.checkpoint import open_checkpoints
from ip_jax.training.results import claim_folder, digest, write_binary, write_json
from ip_jax.training.state import TrainState

BASE = "base"  # the arm of the untrained model
_COUNTED = ("hack", "attempt", "correct", "trait")
_GENERAL = {
    "neutral": NEUTRAL,
    "nonsense": "random",
    "jumble": "irrelevant",
    "encourage_irrelevant": "irrelevant",
    "encourage_benign": "length_matched",
}


@dataclasses.dataclass(frozen=True)
class ToyExperiment:
    """One figure. `reading` states its rules before it runs; `grid`: the prompts of the leak grid;
    `shared`: JSON of all but arms and seeds.
    """

    name: str
    preset: str
    shared: dict
    config: ToyConfig
    rl: ToyRl
    arms: tuple[ToyArm, ...]
    seeds: tuple[int, ...]
    reading: Reading
    grid: tuple[str, ...]
    runs_per_program: int = 120


@dataclasses.dataclass(frozen=True)
class Kind:
    """Arms that one program trains: they differ in data alone."""

    algorithm: Algorithm
    supervised: bool
    guided: bool
    arms: tuple[ToyArm, ...]

    @property
    def name(self) -> str:
        """Of its files of rollouts and timing."""
        return "+".join(arm.name for arm in self.arms)


def kinds_of(experiment: ToyExperiment, arms: Sequence[ToyArm]) -> list[Kind]:
    """`arms` by kind, cut so that a program holds at most `runs_per_program` runs."""
    by_kind: dict[tuple, list[ToyArm]] = {}
    for arm in arms:
        by_kind.setdefault((arm.algorithm, arm.source != "policy", arm.guidance > 0), []).append(
            arm
        )
    most = max(1, experiment.runs_per_program // len(experiment.seeds))
    return [
        Kind(*kind, tuple(arms[i : i + most]))
        for kind, arms in by_kind.items()
        for i in range(0, len(arms), most)
    ]


def run_toy(experiment: ToyExperiment, folder: epath.Path, console: Console) -> None:
    """Runs what is not recorded in `folder` yet and writes curves.parquet and final.parquet.

    Raises ValueError or OSError, each with one sentence, before anything is trained.
    """
    _prepare(experiment, folder)
    left = [arm for arm in experiment.arms if not _final(folder, arm.name).exists()]
    kinds = kinds_of(experiment, left)
    console.print(
        f"{len(left)} arms x {len(experiment.seeds)} seeds are {len(kinds)} programs: "
        + "; ".join(", ".join(arm.name for arm in kind.arms) for kind in kinds)
    )
    params = _base(experiment, Display(console))
    if not _final(folder, BASE).exists():
        _write(
            folder,
            [],
            _grid_rows(
                experiment,
                [(BASE, seed) for seed in experiment.seeds],
                split_decoder(experiment.config.decoder, params),
                {},
            ),
        )
    with live_arms(console, every=50) as show:
        for kind in kinds:
            if kind.algorithm.estimator.name in WARNINGS:
                console.print(f"warning: {WARNINGS[kind.algorithm.estimator.name]}")
            _run_kind(experiment, kind, params, folder, (console, show))
    for table in ("curves", "final"):
        parts = [
            folder / "parts" / f"{table}-{arm}.parquet"
            for arm in (BASE, *(arm.name for arm in experiment.arms))
        ]
        merged = pa.concat_tables([pq.read_table(io.BytesIO(part.read_bytes())) for part in parts])
        write_binary(
            folder / f"{table}.parquet", lambda file, merged=merged: pq.write_table(merged, file)
        )


def _prepare(experiment: ToyExperiment, folder: epath.Path) -> None:
    """Checks what can be checked, and claims the folder."""
    for arm in experiment.arms:
        for prompt in (*arm.gen_prompts, *arm.train_prompts, *arm.guide_prompts, *experiment.grid):
            encode(prompt)
            family_of(prompt)
        arm.algorithm.check_group(experiment.rl.samples)
        check_guidance(f"the arm {arm.name}", arm.guidance, bool(arm.guide_prompts), arm.algorithm)
        if arm.guidance > 0 and arm.source != "policy":
            raise ValueError(f"the arm {arm.name} copies fixed data: there is nothing to guide")
        if arm.source != "policy" and arm.algorithm.selection is None:
            raise ValueError(
                f"the arm {arm.name} copies fixed data, so its algorithm needs a selection"
            )
        if experiment.rl.groups % arm.algorithm.minibatches:
            raise ValueError(
                f"the arm {arm.name} has {arm.algorithm.minibatches} minibatches, which do not"
                f" divide the iteration's {experiment.rl.groups} groups"
            )
    arms = {arm.name: dataclasses.asdict(arm) for arm in experiment.arms} | {
        BASE: {"label": "untrained"}
    }
    experiment.reading.check_arms(arms)
    record = {
        "experiment": experiment.name,
        "preset": experiment.preset,
        "identity": digest(experiment.shared),
        "config": experiment.shared,
        "provenance": (
            f"a toy: {experiment.rl.iterations} iterations of {experiment.rl.groups} tasks x"
            f" {experiment.rl.samples} samples, base {experiment.config.digest}"
        ),
        "seeds": list(experiment.seeds),
        "arms": arms,
        "reading": experiment.reading.to_json(),
    }
    claim_folder(
        folder, record, {arm.name: digest(dataclasses.asdict(arm)) for arm in experiment.arms}
    )


def _base(experiment: ToyExperiment, display: Display) -> dict:
    folder, steps = cache_dir() / "toy", experiment.config.pretraining.steps
    with display.phase("pretraining the toy's base model", steps, "steps") as advance:
        return base_params(
            experiment.config,
            epath.Path(folder),
            lambda step, divergence: advance(to=step, note=f"divergence {divergence:.4f}"),
        )


@flax.struct.dataclass
class Progress:
    """What a program goes on from: its runs' state, and their moving means of rewards."""

    state: TrainState
    moving: Float[Array, " R"]

    @property
    def step(self) -> Int[Array, ""]:
        """Iterations done."""
        return self.state.step


def _run_kind(
    experiment: ToyExperiment,
    kind: Kind,
    params: dict,
    folder: epath.Path,
    views: tuple[Console, Callable],
) -> None:
    """Trains one program. `views`: the console, and what shows the arms of the block that is
    done.
    """
    (console, show), rl, config = views, experiment.rl, experiment.config
    runs = [(arm, seed) for arm in kind.arms for seed in experiment.seeds]
    arms, seeds, names = (
        [arm for arm, _ in runs],
        [seed for _, seed in runs],
        [(arm.name, seed) for arm, seed in runs],
    )
    program = Program(config, rl, kind.algorithm, kind.supervised, kind.guided)
    graphdef, state, base = training.start(
        program, params, np.array(seeds), [arm.learning_rate or rl.learning_rate for arm in arms]
    )
    reference, _, reference_base = split_decoder(config.decoder, params)
    of_runs = training.conditions(arms, seeds)
    data = (
        fixed_data(config, (reference, {}, reference_base), [arm.source for arm in arms], seeds)
        if kind.supervised
        else None
    )
    fixed = of_runs, data, jax.tree.map(jnp.copy, state)  # a copy: the state itself is donated
    unfinished = folder / "checkpoints" / digest(names)
    checkpoints = open_checkpoints(
        unfinished / "states", {"runs": [f"{arm}-s{seed}" for arm, seed in names]}
    )
    progress = Progress(state, jnp.zeros(len(runs)))
    progress = checkpoints.restore_latest(progress) or progress
    done, started = int(progress.step), time.monotonic()
    for first in range(done, rl.iterations, rl.probe_every):
        count = min(rl.probe_every, rl.iterations - first)
        rows = (
            []
            if first
            else _probe_rows(experiment, names, (graphdef, progress.state.trained, base), 0)
        )
        begun = time.monotonic()
        carried, (metrics, kept) = training.iterate(
            program,
            (graphdef, reference),
            (base, reference_base),
            fixed,
            (progress.state, progress.moving),
            count=count,
        )
        progress, (metrics, kept) = Progress(*carried), jax.device_get((metrics, kept))
        rate = kept["length"].sum() / (time.monotonic() - begun)
        rows += _rollout_rows(experiment, names, metrics, first) + _probe_rows(
            experiment, names, (graphdef, progress.state.trained, base), first + count
        )
        write_binary(
            folder / "rollouts" / kind.name / f"step{first:06d}.npz",
            lambda file, kept=kept: np.savez_compressed(file, **kept),
        )
        write_json(unfinished / f"rows{first:06d}.json", rows)
        guards.report(
            folder / "warnings" / f"{kind.name}.json",
            guards.concerns(names, metrics, kind.algorithm),
            first + count,
            console,
        )
        checkpoints.save(progress)
        left = (
            (time.monotonic() - started) / (first + count - done) * (rl.iterations - first - count)
        )
        show(_live_rows(experiment, kind, metrics, first + count, (rate, left)))
    own = {(arm.name, seed): arm for arm, seed in runs}
    rows = [
        row
        for first in range(0, rl.iterations, rl.probe_every)
        for row in json.loads((unfinished / f"rows{first:06d}.json").read_text())
    ]
    _write(
        folder, rows, _grid_rows(experiment, names, (graphdef, progress.state.trained, base), own)
    )
    seconds = round(time.monotonic() - started, 1)
    write_json(
        folder / "timing" / f"{kind.name}.json",
        {"runs": len(runs), "iterations": rl.iterations - done, "seconds": seconds},
    )
    checkpoints.wait()
    unfinished.rmtree()


def _rollout_rows(
    experiment: ToyExperiment,
    names: Sequence[tuple[str, int]],
    metrics: Mapping[str, np.ndarray],
    first: int,
) -> list[dict]:
    """Rows of the table of curves for what training sampled; `metrics` [iterations, R]."""
    n, rows = experiment.rl.groups * experiment.rl.samples, []
    metrics = {**metrics, "clip_fraction": metrics["clipped"]}
    quantities = [name for name in rl_tables.QUANTITIES if name in metrics]
    for i in range(len(metrics["reward"])):
        for r, (arm, seed) in enumerate(names):
            row = {"arm": arm, "seed": seed, "step": first + i, "eval_prompt": ROLLOUT, "n": n}
            row |= {f"n_{name}": int(metrics[f"n_{name}"][i, r]) for name in _COUNTED}
            row |= {
                name: float(metrics[name][i, r])
                for name in quantities
                if np.isfinite(metrics[name][i, r])
            }
            rows.append(row)
    return rows


def _probe_rows(
    experiment: ToyExperiment, names: Sequence[tuple[str, int]], model: tuple, step: int
) -> list[dict]:
    rl = experiment.rl
    counts = _count(
        experiment,
        model,
        NEUTRAL_PROMPT,
        [seed for _, seed in names],
        rl.probe_tasks,
        rl.probe_samples,
    )
    total = rl.probe_tasks * rl.probe_samples
    return [
        {"arm": arm, "seed": seed, "step": step, "eval_prompt": NEUTRAL, "n": total}
        | {f"n_{k}": int(counts[k][r]) for k in _COUNTED}
        for r, (arm, seed) in enumerate(names)
    ]


def _grid_rows(
    experiment: ToyExperiment,
    names: Sequence[tuple[str, int]],
    model: tuple,
    own: Mapping[tuple[str, int], ToyArm],
) -> list[dict]:
    """Rows of the leak grid: each prompt with the category that it has for the run's arm."""
    rl, rows = experiment.rl, []
    prompts = dict.fromkeys(
        (
            NEUTRAL_PROMPT,
            *experiment.grid,
            *(p for arm in own.values() for p in arm.train_prompts[:1]),
        )
    )
    for prompt in prompts:
        counts = _count(
            experiment, model, prompt, [seed for _, seed in names], rl.grid_tasks, rl.grid_samples
        )
        for r, (arm, seed) in enumerate(names):
            category = category_of(prompt, own.get((arm, seed)))
            if category:
                row = {
                    "arm": arm,
                    "seed": seed,
                    "eval_prompt": NEUTRAL if category == NEUTRAL else prompt,
                    "category": category,
                }
                rows.append(
                    row
                    | {"n": rl.grid_tasks * rl.grid_samples}
                    | {f"n_{k}": int(counts[k][r]) for k in _COUNTED}
                )
    return rows


def category_of(prompt: str, arm: ToyArm | None) -> str | None:
    """What a prompt of the grid is for an arm: its training prompt, a held-out paraphrase of it,
    its negation, ...; None: nothing that the arm is about.
    """
    if prompt == NEUTRAL_PROMPT:
        return NEUTRAL
    if arm and prompt in arm.train_prompts:
        return TRAIN
    if arm and prompt in arm.gen_prompts:
        return "generation"
    family = family_of(prompt)
    about = family_of(arm.train_prompts[0]) if arm else None
    if about and "_" in about:
        if family == about:
            return "paraphrase"
        valence, rung = about.split("_")
        if family == f"{'discourage' if valence == 'encourage' else 'encourage'}_{rung}":
            return "negated" if valence == "encourage" else "exchanged"
    return _GENERAL.get(family) or ("discouraging" if family.startswith("discourage_") else None)


def _count(
    experiment: ToyExperiment, model: tuple, prompt: str, seeds: list[int], tasks: int, samples: int
) -> dict[str, np.ndarray]:
    """{verdict: counts [R]} under one prompt. A model without adapters answers for each seed in
    turn.
    """
    graphdef, lora, base = model
    counts = _counts(
        experiment.config,
        graphdef,
        lora,
        base,
        jnp.array(encode(prompt))[None],
        jnp.array(seeds),
        tasks,
        samples,
    )
    return {name: np.asarray(count)[:, 0] for name, count in counts.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 6, 7))
def _counts(config, graphdef, lora, base, prompts, seeds, tasks, samples):
    return count_verdicts(
        config, (graphdef, lora, base), prompts, seeds, tasks=tasks, samples=samples
    )


def _live_rows(
    experiment: ToyExperiment,
    kind: Kind,
    metrics: Mapping[str, np.ndarray],
    step: int,
    pace: tuple[float, float],
) -> list[ArmRow]:
    """`pace`: completion tokens a second of the block, its compilation included where there was
    one, and the seconds left.
    """
    n, seeds = experiment.rl.groups * experiment.rl.samples, len(experiment.seeds)
    rows = []
    for i, arm in enumerate(kind.arms):
        last = {
            name: np.asarray(values[-1], np.float64)[i * seeds : (i + 1) * seeds]
            for name, values in metrics.items()
        }
        last |= {
            "hack": last["n_hack"] / n,
            "correct": last["n_correct"] / n,
            "clip_fraction": last["clipped"],
        }
        rows.append(
            ArmRow(
                arm.label,
                seeds,
                step,
                experiment.rl.iterations,
                over_seeds(last),
                rate=pace[0],
                seconds_left=pace[1],
            )
        )
    return rows


def _final(folder: epath.Path, arm: str) -> epath.Path:
    """Where this file stands, the arm is complete."""
    return folder / "parts" / f"final-{arm}.parquet"


def _write(folder: epath.Path, curves: list[dict], final: list[dict]) -> None:
    """The part files of every arm in the rows, its grid last."""
    for arm in dict.fromkeys(row["arm"] for row in final):
        own = [[row for row in rows if row["arm"] == arm] for rows in (curves, final)]
        for path, made in (
            (folder / "parts" / f"curves-{arm}.parquet", rl_tables.curves_table(own[0])),
            (_final(folder, arm), rl_tables.final_table(own[1])),
        ):
            write_binary(path, lambda file, made=made: pq.write_table(made, file))
