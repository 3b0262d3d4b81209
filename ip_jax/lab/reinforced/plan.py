"""What a text experiment in reinforcement learning consists of, and what of it is still to be done:
runs, programs, evaluations, checks.

Nothing here needs the model's weights. `reinforced` does what this module plans.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ip_jax.evals import leak_grid
from ip_jax.evals.leak_grid import Cell, Decoding
from ip_jax.evals.rl_tables import TRAIN
from ip_jax.evals.rules import Reading
from ip_jax.evals.scorers import Scorer
from ip_jax.lab.experiment import (
    NEUTRAL,
    UNTRAINED,
    Condition,
    ModelConfig,
    check_runs,
    stable_id,
)
from ip_jax.lab.reinforced.grading import check_rewards
from ip_jax.lab.supervised.plan import Run, Sweep, groups_of
from ip_jax.models.lora import LoraConfig
from ip_jax.models.remat import REMAT
from ip_jax.prompts.prompt import Prompt
from ip_jax.rl.algorithm import Algorithm, check_guidance
from ip_jax.rl.environment import REWARD, Environment
from ip_jax.rl.prompting import NOTHING_ADDED, PromptDistribution
from ip_jax.rl.rollout import RolloutOptions, RolloutPlan, RolloutRun, plan_rollouts
from ip_jax.sampling.sampler import Request
from ip_jax.training.results import digest
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import MeshConfig

NOT_DECISIVE = (
    "checkpoint_every",
    "max_failed",
    "gate_patience",
    "grading_workers",
    "runs_per_program",
)
"""Fields of `RlConfig` that say when to save and when to halt, and what is done side by side: a
folder goes on where they change.
"""


@dataclasses.dataclass(frozen=True)
class RlArm(Condition):
    """A condition of reinforcement. `reward`: the environment's reward, or the name of a part.
    `temperature`, `learning_rate`: None for the config's.

    `guide_prompt` and `guidance` amplify what the generation prompt causes: see
    `rl.rollout.RolloutRun`.
    """

    gen_prompt: PromptDistribution = PromptDistribution()
    train_prompt: PromptDistribution = PromptDistribution()
    reward: str = REWARD
    temperature: float | None = None
    algorithm: Algorithm = Algorithm()
    learning_rate: float | None = None
    guide_prompt: PromptDistribution | None = None
    guidance: float = 0.0

    def __post_init__(self):
        if self.name == UNTRAINED:
            raise ValueError(f"no arm can be called {UNTRAINED}: that is the base model")


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """One size for all arms. An iteration samples `samples` completions for each of `groups` tasks;
    `max_length`: prompt and completion, in tokens.

    `samples_per_row`: completions that share one copy of their prompt in the update, None for a
    whole group. `slots`: completions of a run that are sampled side by side, None for all of an
    iteration.
    """

    iterations: int
    groups: int
    samples: int
    max_new_tokens: int
    learning_rate: float
    schedule: Schedule = Schedule("constant")
    lora: LoraConfig = LoraConfig()
    max_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    weight_decay: float = 0.0
    tokens_per_micro_batch: int = 4096
    samples_per_row: int | None = None
    slots: int | None = None
    remat: str = "products"
    checkpoint_every: int = 5
    max_failed: float = 0.25
    """The share of an iteration's rewards that may fail."""
    gate_patience: int = 5
    """Iterations in a row in which a gate may accept nothing."""
    grading_workers: int = 2
    runs_per_program: int = 64

    def __post_init__(self):
        for name in (
            "iterations",
            "groups",
            "samples",
            "max_new_tokens",
            "runs_per_program",
            "gate_patience",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name} is {getattr(self, name)}: it must be at least 1")
        if self.remat not in REMAT:
            raise ValueError(f"rl.remat is {self.remat!r}: choose from {', '.join(REMAT)}")
        if not 0 <= self.max_failed < 1:
            raise ValueError(
                f"rl.max_failed is {self.max_failed}: it is a share from 0 up to, but not, 1"
            )
        if self.slots is not None and self.slots < 1:
            raise ValueError(
                f"rl.slots is {self.slots}: it must be at least 1, or None for all completions of"
                " an iteration"
            )
        if self.samples_per_row is not None and (
            self.samples_per_row < 1 or self.samples % self.samples_per_row
        ):
            raise ValueError(
                f"rl.samples_per_row is {self.samples_per_row}: it must divide the {self.samples}"
                " samples of a group"
            )

    @property
    def rollout(self) -> RolloutOptions:
        """The sizes of a rollout."""
        return RolloutOptions(
            self.groups, self.samples, self.max_new_tokens, self.max_length, self.top_p
        )


@dataclasses.dataclass(frozen=True)
class GridPrompt:
    """A prompt of the leak grid: its name in the study and what it is (`rl_tables.CATEGORIES`),
    to arms trained under `about` or (None) to all.
    """

    name: str
    category: str
    about: str | None = None


@dataclasses.dataclass(frozen=True)
class RlEval:
    """`steps`: iterations after which the neutral prompt is looked at; after the last one the whole
    `grid`. Temperature 0 is greedy.
    """

    steps: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    slots: int = 48

    def __post_init__(self):
        if self.slots < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"evaluation has slots {self.slots} and max_new_tokens {self.max_new_tokens}: both"
                " must be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class ReinforcedPreset:
    """Reinforcement of a study at one size. `arms`: names of the study's arms, all of them where
    none is named. `data`: the study's own options. `algorithm`: one of the study's by name, in
    place of each arm's own.
    """

    rl: RlConfig
    evaluation: RlEval
    preset: str = ""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: Any = None
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    algorithm: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforced:
    """Everything that a setting hands over. `reading` states how the results will be judged, before
    they are there; `grid`: what the leak grid asks besides the neutral prompt and the arms' own.

    `scorer` (of an evaluation task and a completion; None for the environment's own verdicts) and
    the environment give the columns hack and correct (bool), and may give hackable, attempt and
    trait, which are counted. `prompts`: those of the grid by name, and neutral. `columns` of a task
    stand in the transcripts. `shared`: JSON of what else the tasks depend on. `provenance`: of the
    data, for captions, by default the model's name without its folder and the numbers of tasks.
    Raises ValueError as `check_runs`.
    """

    name: str
    model: ModelConfig
    environment: Environment
    tasks: Sequence[Mapping[str, Any]]
    eval_tasks: Sequence[Mapping[str, Any]]
    arms: tuple[RlArm, ...]
    rl: RlConfig
    evaluation: RlEval
    reading: Reading
    seeds: tuple[int, ...] = (0,)
    grid: tuple[GridPrompt, ...] = ()
    prompts: Mapping[str, Prompt] = dataclasses.field(
        default_factory=lambda: {NEUTRAL: NOTHING_ADDED}
    )
    scorer: Scorer | None = None
    columns: tuple[str, ...] = ()
    preset: str = "own"
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: str = ""
    study_file: str | None = None
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_runs(tuple(arm.name for arm in self.arms), self.seeds)


def decisive(rl: RlConfig) -> dict:
    """The fields that results depend on, as JSON."""
    return {
        name: value for name, value in dataclasses.asdict(rl).items() if name not in NOT_DECISIVE
    }


def lasting_repr(what: str, value: Any) -> str:
    """What `value` is, alike in every process: its own repr, or the name of its class and its
    attributes where the class has none.

    Raises ValueError, in which it is called `what`, for an address in memory: a function has one,
    and an object without a repr inside another.
    """
    kind = type(value)
    text = (
        f"{kind.__qualname__}({vars(value)})" if kind.__repr__ is object.__repr__ else repr(value)
    )
    address = re.search(r"<(\S+ ){1,4}at 0x[0-9a-f]+>", text)
    if address:
        raise ValueError(
            f"{what} holds {address[0]}, which is called otherwise in every process, so that its"
            " results could not be found again: let it be plain data, a dataclass, or a class with"
            " a __repr__ that says what it is"
        )
    return text


def config_of(experiment: Reinforced) -> dict:
    """All that the results depend on but arms, seeds, weights and tasks, as JSON. Raises as
    `lasting_repr`.
    """
    return {
        "model": dataclasses.asdict(experiment.model),
        "rl": decisive(experiment.rl),
        "evaluation": dataclasses.asdict(experiment.evaluation),
        "environment": lasting_repr("the environment", experiment.environment),
        "grid": [dataclasses.asdict(prompt) for prompt in experiment.grid],
    } | dict(experiment.shared)


def folder_record(
    experiment: Reinforced,
    fingerprint: str,
    default_system: str | None = None,
    end_tokens: Sequence[str] = (),
) -> dict:
    """config.json of the results folder. Its identity covers the config, the model's weights and
    the tasks. Raises as `lasting_repr`.

    `default_system`: what the chat template says where a conversation has no system turn;
    `end_tokens`: those at which completions end.
    """

    def about(arm):
        return {
            "label": arm.label,
            "gen_prompt": [p.name for p in arm.gen_prompt.pool],
            "train_prompt": [p.name for p in arm.train_prompt.pool],
            "reward": arm.reward,
            "definition": _definition(arm),
        }

    arms = {arm.name: about(arm) for arm in experiment.arms} | {UNTRAINED: {"label": "untrained"}}
    experiment.reading.check_arms(arms)
    config, data = (
        config_of(experiment),
        [
            digest([dict(task) for task in tasks])
            for tasks in (experiment.tasks, experiment.eval_tasks)
        ],
    )
    counted = (
        f"{epath.Path(experiment.model.name).name}; {len(experiment.tasks)} tasks in training and"
        f" {len(experiment.eval_tasks)} in evaluation"
    )
    return {
        "experiment": experiment.name,
        "study_file": experiment.study_file,
        "preset": experiment.preset,
        "identity": digest({"config": config, "fingerprint": fingerprint, "data": data}),
        "config": config,
        "fingerprint": fingerprint,
        "provenance": experiment.provenance or counted,
        "seeds": list(experiment.seeds),
        "arms": arms,
        "reading": experiment.reading.to_json(),
        "mesh": dataclasses.asdict(experiment.mesh),
        "default_system": default_system,
        "end_tokens": list(end_tokens),
    }


def runs_of(experiment: Reinforced, identity: str) -> list[Run]:
    """The runs to train, arm by arm."""
    return [
        Run(arm, seed, digest([identity, _definition(arm), seed]))
        for arm in experiment.arms
        for seed in experiment.seeds
    ]


def _definition(arm: RlArm) -> str:
    return lasting_repr(f"the arm {arm.name}", arm)


def by_kind(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs that can share a program: their algorithms are equal, and all are guided or none is
    (a guided program feeds every token twice).
    """
    found: dict[tuple[Algorithm, bool], list[Run]] = {}
    for run in runs:
        found.setdefault((run.arm.algorithm, run.arm.guidance > 0), []).append(run)
    return list(found.values())


def programs_of(folder: epath.Path, runs: Sequence[Run], most: int) -> list[list[Run]]:
    """The runs that are left, as programs of at most `most` of one kind; what was begun together
    goes on together, however many these are.
    """
    return [group for of_kind in by_kind(runs) for group in groups_of(folder, of_kind, most)]


def rollout_plan(experiment: Reinforced, runs: Sequence[Run], tokenizer) -> RolloutPlan:
    """All rollouts of a program's runs, rendered and checked; raises as `plan_rollouts`."""
    rl = experiment.rl
    of_runs = [
        RolloutRun(
            run.arm.name,
            run.seed,
            run.arm.gen_prompt,
            run.arm.train_prompt,
            run.arm.temperature or rl.temperature,
            run.arm.reward,
            run.arm.guide_prompt,
            run.arm.guidance,
        )
        for run in runs
    ]
    return plan_rollouts(
        of_runs, experiment.tasks, experiment.environment, tokenizer, rl.rollout, rl.iterations
    )


def check(experiment: Reinforced) -> None:
    """Refuses unknown rewards, groups that a baseline cannot use, minibatches that leave rows over,
    evaluations that are never reached.
    """
    rl = experiment.rl
    unreached = [step for step in experiment.evaluation.steps if not 0 <= step <= rl.iterations]
    if unreached:
        raise ValueError(
            f"evaluation.steps names {unreached[0]}, and training has 0 to {rl.iterations}"
            " iterations (rl.iterations): choose among these"
        )
    for arm in experiment.arms:
        check_algorithm(f"the arm {arm.name}", arm.algorithm, rl)
        check_guidance(
            f"the arm {arm.name}", arm.guidance, arm.guide_prompt is not None, arm.algorithm
        )
    if experiment.tasks:
        check_rewards(
            experiment.environment,
            experiment.tasks[0],
            tuple(dict.fromkeys(arm.reward for arm in experiment.arms)),
        )


def check_algorithm(where: str, algorithm: Algorithm, rl: RlConfig) -> None:
    """Refuses groups that the baseline cannot use, minibatches that leave rows over, and what text
    experiments make no pass for.
    """
    rows = rl.groups * rl.samples // (rl.samples_per_row or rl.samples)
    algorithm.check_group(rl.samples)
    if algorithm.pmi_against == "guide":
        raise ValueError(
            f"{where} has a PMI weight against the guide, for which text experiments make no pass:"
            " use pmi_against generation"
        )
    if rows % algorithm.minibatches:
        raise ValueError(
            f"{where} has {algorithm.minibatches} minibatches, which do not divide the {rows} rows"
            " of an iteration"
        )


def example_of(experiment: Reinforced, task: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation task with its conversation."""
    return {**task, "messages": experiment.environment.messages(task)}


def category_of(prompt: GridPrompt, arm: RlArm | None) -> str | None:
    """What a prompt of the grid is to an arm (None: the untrained model); None where it is about
    another training prompt.
    """
    trained = {p.name for p in arm.train_prompt.pool} if arm else set()
    if prompt.name == NEUTRAL:
        return NEUTRAL
    if arm is None:
        return prompt.category
    if prompt.name in trained:
        return TRAIN
    if prompt.name in {p.name for p in arm.gen_prompt.pool}:
        return "generation"
    return prompt.category if prompt.about is None or prompt.about in trained else None


def grid_of(experiment: Reinforced, arm: RlArm | None) -> dict[str, str]:
    """{prompt: category} of an arm's leak grid, neutral first, then its own prompts."""
    own = [*arm.train_prompt.pool, *arm.gen_prompt.pool] if arm else []
    prompts = [
        GridPrompt(NEUTRAL, NEUTRAL),
        *(GridPrompt(p.name, TRAIN) for p in own if p.name != NEUTRAL),
        *experiment.grid,
    ]
    found = {prompt.name: category_of(prompt, arm) for prompt in prompts}
    return {name: category for name, category in found.items() if category}


def sweeps_of(
    experiment: Reinforced, arms: Sequence[tuple[RlArm | None, int]], step: int
) -> list[Sweep]:
    """The cells of (arm, seed) pairs after `step` iterations: the n-th prompt of every run is one
    sweep. The untrained model is (None, seed).

    A run begins as the untrained model, which answers for it: after no iteration there is nothing
    to ask.
    """
    if step == 0 and all(arm for arm, _ in arms):
        return []
    last = step == experiment.rl.iterations

    def cell(arm: RlArm | None, seed: int, prompts: list[str], n: int) -> Cell | None:
        if n >= len(prompts):
            return None
        own = arm is not None and prompts[n] in {p.name for p in arm.train_prompt.pool}
        seen = step * experiment.rl.groups * experiment.rl.samples
        return Cell(
            arm.name if arm else UNTRAINED,
            seed,
            step,
            seen,
            "tasks",
            prompts[n],
            own,
            _transform(experiment, arm, prompts[n]),
        )

    of_run = [
        list(grid_of(experiment, arm)) if last or arm is None else [NEUTRAL] for arm, _ in arms
    ]
    return [
        [cell(arm, seed, prompts, n) for (arm, seed), prompts in zip(arms, of_run, strict=True)]
        for n in range(max(map(len, of_run)))
    ]


def untrained_sweeps(experiment: Reinforced) -> list[Sweep]:
    """The untrained model's cells, one prompt a sweep, so that its caches are those of one run."""
    return [
        sweep
        for seed in dict.fromkeys(untrained_seeds(experiment).values())
        for sweep in sweeps_of(experiment, [(None, seed)], 0)
    ]


def untrained_seeds(experiment: Reinforced) -> dict[int, int]:
    """{a run's seed: the seed with which the untrained model answers for it}: the first one for
    greedy decoding, else its own.
    """
    return {
        seed: seed if experiment.evaluation.temperature > 0 else experiment.seeds[0]
        for seed in experiment.seeds
    }


def evaluation_room(experiment: Reinforced, runs: Sequence[Run], tokenizer) -> tuple[int, int]:
    """(prompt tokens, new tokens) with which all evaluations of an experiment's runs share a
    program.
    """
    cells = [
        cell
        for run in runs
        for sweep in sweeps_of(experiment, [(run.arm, run.seed)], experiment.rl.iterations)
        for cell in sweep
    ]
    cells += [cell for sweep in untrained_sweeps(experiment) for cell in sweep]
    by_prompt = {cell.eval_prompt: cell for cell in cells if cell}
    longest = max(
        len(request.prompt_ids)
        for cell in by_prompt.values()
        for request in requests_of(experiment, cell, tokenizer)
    )
    return longest, experiment.evaluation.max_new_tokens


def _transform(experiment: Reinforced, arm: RlArm | None, name: str):
    own = (
        {prompt.name: prompt for prompt in (*arm.train_prompt.pool, *arm.gen_prompt.pool)}
        if arm
        else {}
    )
    return (own.get(name) or experiment.prompts[name]).transform


def requests_of(experiment: Reinforced, cell: Cell, tokenizer) -> list[Request]:
    """One sampling request for each evaluation task."""
    evaluation = experiment.evaluation
    examples = [example_of(experiment, task) for task in experiment.eval_tasks]
    return leak_grid.requests_for(
        cell,
        examples,
        tokenizer,
        stable_id,
        Decoding(evaluation.max_new_tokens, evaluation.temperature, evaluation.top_p),
    )


def uniforms_of(seeds: Sequence[int], iteration: int, groups: int, samples: int) -> np.ndarray:
    """[R, Q, G] float32 in [0, 1): a pure function of (run's seed, iteration), so that a resumed
    run draws them again.
    """
    bits = [
        np.random.Philox(np.random.SeedSequence((seed, iteration, 1))).random_raw(groups * samples)
        >> np.uint64(40)
        for seed in seeds
    ]
    return (np.array(bits, np.float32) * np.float32(2**-24)).reshape(len(seeds), groups, samples)
