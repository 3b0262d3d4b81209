"""Rollouts of text environments: which task is asked under which prompts, what the sampler is
given, and what came back as arrays.

One draw decides everything: tasks, prompts and random bits of a completion are functions of (run's
seed, iteration, group, sample). Completion token ids go from the sampler to the update as they are;
only prompts are rendered, once for sampling and once for training. Dims: R runs, Q groups (one task
each) of an iteration, G completions of a group, C completion slots, X prompt slots.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from ip_jax.data.sources import as_example
from ip_jax.prompts.chat import completion_text, render_prompt
from ip_jax.prompts.transforms import PromptError
from ip_jax.rl.environment import REWARD, Environment
from ip_jax.rl.prompting import Choice, PromptDistribution
from ip_jax.rl.rows import Prompts, Samples
from ip_jax.sampling.sampler import Completion, Request, SamplerOptions, sample

PROMPT_QUANTUM = 8  # prompt slots are multiples of this
Task = dict[str, Any]
Side = Literal["gen", "train", "guide"]
_SIDES: dict[Side, str] = {"gen": "generation", "train": "training", "guide": "guide"}


@dataclass(frozen=True)
class RolloutRun:
    """What the rollouts of one run are made of. `reward`: the environment's reward, or the name of
    one of its parts.

    Beside a `guide_prompt` completions are sampled from the logits (1 + guidance) z(gen_prompt) -
    guidance z(guide_prompt).
    """

    arm: str
    seed: int
    gen_prompt: PromptDistribution = PromptDistribution()
    train_prompt: PromptDistribution = PromptDistribution()
    temperature: float = 1.0
    reward: str = REWARD
    guide_prompt: PromptDistribution | None = None
    guidance: float = 0.0

    @property
    def name(self) -> str:
        """As in the results folder."""
        return f"{self.arm}-s{self.seed}"


@dataclass(frozen=True)
class RolloutOptions:
    """Shared by the runs of a program. `groups` tasks an iteration, `samples` completions of each.

    `max_length`: tokens of a prompt and `max_new_tokens` together. `top_p` truncates the sampler
    alone: log-probabilities stay untruncated.
    """

    groups: int
    samples: int
    max_new_tokens: int
    max_length: int
    top_p: float = 1.0

    def __post_init__(self):
        for field in ("groups", "samples", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{field} of the rollouts is {getattr(self, field)}: it must be at least 1"
                )


@dataclass(frozen=True, eq=False)
class Prompted:
    """A task's conversation under one prompt, as the model reads it; one object for all who are
    asked the same.
    """

    name: str
    token_ids: Int[np.ndarray, " T"]


@dataclass(frozen=True)
class Group:
    """One task and the prompts of its G completions; no `guide` where none guides the sampling."""

    task: Task
    gen: tuple[Prompted, ...]
    train: tuple[Prompted, ...]
    guide: tuple[Prompted, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What is asked in one iteration: groups[run][group]."""

    iteration: int
    groups: tuple[tuple[Group, ...], ...]

    @property
    def tasks(self) -> list[Task]:
        """The task of every completion, flat in the order run, group, sample."""
        return [group.task for run in self.groups for group in run for _ in group.gen]


@dataclass(frozen=True)
class Rollout:
    """What was sampled for `asked`. The arrays are numpy's; `texts` is flat in their order, special
    tokens left out.

    The samples' log-probabilities are those of the distribution that was sampled: with a guide
    prompt, of the guided one.
    """

    asked: Asked
    samples: Samples
    ended: Bool[np.ndarray, "R Q G"]  # the last token is a stop token
    texts: list[str]


@dataclass(frozen=True)
class RolloutPlan:
    """The rollouts of a program's runs, all known beforehand. Made by `plan_rollouts`, which checks
    them.

    `slots`: the prompt slots X of each side, which no iteration exceeds; 0 for guides where there
    are none.
    """

    runs: tuple[RolloutRun, ...]
    tasks: Sequence[Task]
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    options: RolloutOptions
    render: Callable[[int, Choice], Prompted]  # (index of the task, prompt)
    slots: dict[Side, int]

    def ask(self, iteration: int) -> Asked:
        """Tasks and prompts of one iteration."""
        options = self.options

        def group(run: RolloutRun, q: int, index: int) -> Group:
            draws = [(run.seed, iteration, q, i) for i in range(options.samples)]

            def of(distribution):
                return tuple(self.render(index, distribution.draw(*draw)) for draw in draws)

            return Group(
                self.tasks[index],
                of(run.gen_prompt),
                of(run.train_prompt),
                of(run.guide_prompt) if run.guide_prompt else (),
            )

        def groups(run: RolloutRun) -> tuple[Group, ...]:
            order = task_order(
                len(self.tasks), run.seed, iteration * options.groups, options.groups
            )
            return tuple(group(run, q, index) for q, index in enumerate(order))

        return Asked(iteration, tuple(groups(run) for run in self.runs))

    def prompts(self, asked: Asked, side: Literal["gen", "train"]) -> Prompts:
        """The prompts of one side as right-padded arrays: one a group [R, Q, X], or [R, Q * G, X]
        where a run draws one for each completion.
        """
        each = any(getattr(run, f"{side}_prompt").per == "example" for run in self.runs)
        chosen = [
            [
                prompted.token_ids
                for group in run
                for prompted in getattr(group, side)[: None if each else 1]
            ]
            for run in asked.groups
        ]
        return right_padded(chosen, self.slots[side])


def right_padded(prompts: Sequence[Sequence[Int[np.ndarray, " T"]]], slots: int) -> Prompts:
    """Token ids, equally many prompts of each run, as arrays [R, N, slots]."""
    tokens = np.array(
        [[np.pad(ids, (0, slots - len(ids))) for ids in run] for run in prompts], np.int32
    )
    return Prompts(tokens, np.array([[len(ids) for ids in run] for run in prompts], np.int32))


def plan_rollouts(
    runs: Sequence[RolloutRun],
    tasks: Sequence[Task],
    environment: Environment,
    tokenizer,
    options: RolloutOptions,
    iterations: int,
) -> RolloutPlan:
    """Renders all prompts of all iterations, so that nothing can go wrong later.

    Raises ValueError for no tasks, a task without an "id", a temperature that is not positive, and
    a prompt that does not leave room for `max_new_tokens` within `max_length`, on any side: nothing
    is ever clipped. PromptError, with the task, for one that cannot be rendered.
    """
    if not tasks:
        raise ValueError("an environment needs at least one task")
    nameless = next((i for i, task in enumerate(tasks) if "id" not in task), None)
    if nameless is not None:
        raise ValueError(f'task {nameless} has no "id": each task is a dict with an id of its own')
    for run in runs:
        if not run.temperature > 0:
            raise ValueError(
                f"arm {run.arm}: the temperature is {run.temperature}, and on-policy sampling needs"
                " one above 0"
            )

    render = _renderer(tasks, environment, tokenizer)
    longest = dict.fromkeys(_SIDES, 0)
    plan = RolloutPlan(tuple(runs), tasks, tokenizer, options, render, longest)
    for iteration in range(iterations):
        for run, groups in zip(runs, plan.ask(iteration).groups, strict=True):
            for group in groups:
                for side in longest:
                    longest[side] = max(
                        [
                            longest[side],
                            *(
                                _fitting(run, group, side, prompted, options)
                                for prompted in set(getattr(group, side))
                            ),
                        ]
                    )
    return dataclasses.replace(
        plan,
        slots={
            side: -(-length // PROMPT_QUANTUM) * PROMPT_QUANTUM for side, length in longest.items()
        },
    )


def task_order(tasks: int, seed: int, start: int, count: int) -> list[int]:
    """Indices of the tasks at places `start` to `start + count` of an endless pass, shuffled anew
    each time: a pure function of its arguments.
    """
    epochs = range(start // tasks, (start + count - 1) // tasks + 1)
    # a bit generator's raw output is the same in every version of numpy, a Generator's permutation
    # need not be
    order = [
        np.argsort(
            np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(tasks), kind="stable"
        )
        for epoch in epochs
    ]
    begin = start - epochs[0] * tasks
    return np.concatenate(order)[begin : begin + count].tolist()


def requests_of(plan: RolloutPlan, asked: Asked) -> list[list[Request]]:
    """The sampler's queue of each run, one request a completion (it prefills what they share once).

    A completion's bits are drawn from (run's seed, iteration, group, task, sample): the arms of one
    seed draw alike.
    """
    options = plan.options
    return [
        [
            Request(
                prompted.token_ids,
                _example_id(asked.iteration, q, group.task),
                temperature=run.temperature,
                top_p=options.top_p,
                seed=run.seed,
                max_new_tokens=options.max_new_tokens,
                first_sample=i,
                guide_ids=group.guide[i].token_ids if group.guide else None,
                guidance=run.guidance,
            )
            for q, group in enumerate(groups)
            for i, prompted in enumerate(group.gen)
        ]
        for run, groups in zip(plan.runs, asked.groups, strict=True)
    ]


def sampler_options(
    plan: RolloutPlan,
    stop_ids: tuple[int, ...],
    dtype: str = "float32",
    slots: int | None = None,
    mesh=None,
    whole_layers: bool = False,
) -> SamplerOptions:
    """Sizes with which all iterations share one sampling program; `slots`: completions of a run
    decoded at once, None for all of them.
    """
    options, longest = plan.options, max(plan.slots["gen"], plan.slots["guide"])
    return SamplerOptions(
        stop_ids,
        slots or options.groups * options.samples,
        prefill_prompts=options.groups,
        prompt_buckets=(longest,),
        room=(longest, options.max_new_tokens),
        dtype=dtype,
        mesh=mesh,
        whole_layers=whole_layers,
    )


def generate(
    decoder: tuple,
    plan: RolloutPlan,
    asked: Asked,
    options: SamplerOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Samples one iteration. `decoder`: (graphdef, lora, base) of `split_decoder`, whose adapters
    lead with the plan's R runs.
    """
    completions = sample(*decoder, requests_of(plan, asked), options, on_progress)
    return gather(plan, asked, [[one for (one,) in run] for run in completions])


def gather(plan: RolloutPlan, asked: Asked, completions: Sequence[Sequence[Completion]]) -> Rollout:
    """completions[run][group * G + sample] as arrays, ids verbatim. Raises ValueError for a
    completion without tokens: it is all padding.
    """
    options = plan.options
    shape = len(completions), options.groups, options.samples
    tokens = np.zeros((*shape, options.max_new_tokens), np.int32)
    log_probs = np.zeros(tokens.shape, np.float32)
    length, ended = np.zeros(shape, np.int32), np.zeros(shape, bool)
    flat = [one for run in completions for one in run]
    for place, completion in zip(np.ndindex(shape), flat, strict=True):
        count = len(completion.token_ids)
        tokens[place][:count], log_probs[place][:count] = completion.token_ids, completion.log_probs
        length[place], ended[place] = count, completion.ended
    check_lengths(asked, length)
    texts = [completion_text(plan.tokenizer, one.token_ids, one.ended) for one in flat]
    return Rollout(asked, Samples(tokens, length, log_probs), ended, texts)


def check_lengths(asked: Asked, length: Int[np.ndarray, "R Q G"]) -> None:
    """Raises ValueError for the first completion that is all padding: it has no token to learn
    from, nor an end.
    """
    if (length < 1).any():
        run, group, index = np.argwhere(length < 1)[0].tolist()
        raise ValueError(
            f"iteration {asked.iteration}: completion {index} of task"
            f" {asked.groups[run][group].task['id']} in run {run} is all padding: a completion has"
            " at least one token, its end-of-turn token"
        )


def _renderer(
    tasks: Sequence[Task], environment: Environment, tokenizer
) -> Callable[[int, Choice], Prompted]:
    """Renders a task under a prompt, the same conversation once."""

    @functools.cache
    def render(name: str, turns: tuple[tuple[str, str], ...]) -> Prompted:
        return Prompted(
            name,
            render_prompt(
                tokenizer, [{"role": role, "content": content} for role, content in turns]
            ),
        )

    def render_task(index: int, choice: Choice) -> Prompted:
        where = f"task {tasks[index]['id']}"
        try:
            messages = choice.messages(
                as_example({"messages": environment.messages(tasks[index])}, where, where)[
                    "messages"
                ]
            )
            return render(
                choice.prompt.name,
                tuple((message["role"], message["content"]) for message in messages),
            )
        except PromptError as error:
            raise PromptError(f"{where} under the prompt {choice.prompt.name}: {error}") from error

    return render_task


def _fitting(
    run: RolloutRun, group: Group, side: Side, prompted: Prompted, options: RolloutOptions
) -> int:
    """The prompt's tokens."""
    length = len(prompted.token_ids)
    if length + options.max_new_tokens > options.max_length:
        raise ValueError(
            f"arm {run.arm}: task {group.task['id']} has {length} tokens under the {_SIDES[side]}"
            f" prompt {prompted.name}, and with {options.max_new_tokens} new tokens that is more"
            f" than max_length = {options.max_length}: raise max_length, or leave the task out"
        )
    return length


def _example_id(iteration: int, group: int, task: Task) -> int:
    """32 bits for the sampler's keys; a task that comes twice in one iteration draws twice."""
    return int.from_bytes(
        hashlib.blake2b(repr((iteration, group, str(task["id"]))).encode(), digest_size=4).digest(),
        "big",
    )
