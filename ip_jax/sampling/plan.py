"""The host half of the sampler: requests, which rows share a prompt, sizes of the program, what
goes into which slot.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from ip_jax.sampling.slots import Refill, SlotShape

# ring sizes are multiples of this: nearby length limits share a program, and XLA:CPU is slow at
# products with 40 to 56 columns
RING_STEP = 32
PREFIX_STEP = 8  # likewise for the prefix that all prompts share


@dataclasses.dataclass(frozen=True)
class Request:
    """`n_samples` completions of one prompt. Sample i draws its bits from (seed, example_id,
    first_sample + i, token index).

    Beside a guide prompt tokens come from the logits (1 + guidance) z(prompt) - guidance z(guide),
    both before the same tokens.
    """

    prompt_ids: np.ndarray  # int32 [T]
    example_id: int
    n_samples: int = 1
    temperature: float = 0.0  # 0: the largest logit
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 48
    first_sample: int = 0
    guide_ids: np.ndarray | None = None  # int32 [T]
    guidance: float = 0.0

    def __post_init__(self):
        problems = {
            "prompt_ids must be one row of at least one token id": not _is_prompt(self.prompt_ids),
            "guide_ids must be one row of at least one token id": (
                self.guide_ids is not None and not _is_prompt(self.guide_ids)
            ),
            f"guidance is {self.guidance}: it must be a number of at least 0": (
                not 0 <= self.guidance < math.inf
            ),
            f"guidance is {self.guidance}, and there are no guide_ids": (
                self.guidance != 0 and self.guide_ids is None
            ),
            f"n_samples is {self.n_samples}: it must be at least 1": self.n_samples < 1,
            f"temperature is {self.temperature}: it must be 0 (greedy) or more": (
                not self.temperature >= 0
            ),
            f"top_p is {self.top_p}: it must lie in (0, 1]": not 0 < self.top_p <= 1,
            f"max_new_tokens is {self.max_new_tokens}: it must be at least 1": (
                self.max_new_tokens < 1
            ),
        }
        for problem, is_so in problems.items():
            if is_so:
                raise ValueError(f"Sampling request for example {self.example_id}: {problem}.")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was sampled, the stop token included where it was reached."""

    token_ids: np.ndarray  # int32 [N], N >= 1
    # float32 [N], of the (guided) distribution at the request's temperature (at 1 for temperature
    # 0), before top-p
    log_probs: np.ndarray
    ended: bool  # the last token is a stop token


BUCKETS = (
    *range(8, 128, 8),
    *range(128, 256, 16),
    *range(256, 512, 64),
    512,
    768,
    1024,
    1536,
    2048,
)
"""Lengths that prompts are padded to, ascending."""


def buckets_up_to(positions: int) -> tuple[int, ...]:
    """BUCKETS, and twice the last one again and again, until prompts of so many tokens fit."""
    found = list(BUCKETS)
    while found[-1] < positions:
        found.append(2 * found[-1])
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """What is code rather than data in a sampling program."""

    stop_ids: tuple[int, ...]
    slots: int = 64  # rows decoded at once in each run
    # prompts prefilled at once in each run, and the free groups that make a refill pay
    prefill_prompts: int = 16
    # ascending lengths
    prompt_buckets: tuple[int, ...] = BUCKETS
    # (prompt tokens, new tokens) that the program is made for at least: calls with less share it
    room: tuple[int, int] = (1, 1)
    dtype: str = "float32"  # of activations and caches; products run in the weights' dtype
    candidates: int = 256  # largest logits that top-p looks at before a full sort
    mesh: Mesh | None = None  # axes "run" and "data": runs and slot groups are spread over them
    # every device decodes with whole layers (a part by "tensor"), gathered once a call, not for
    # every token
    whole_layers: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of one prompt that share its prefill: (index of the request in its queue, sample) each;
    in a guided program with their guide prompt.
    """

    prompt: np.ndarray
    rows: tuple[tuple[int, int], ...]
    guide: np.ndarray | None = None

    @property
    def prompts(self) -> tuple[np.ndarray, ...]:
        """What is prefilled for it."""
        return (self.prompt,) if self.guide is None else (self.prompt, self.guide)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes, and each run's groups in the order in which they are to start."""

    shape: SlotShape
    prefix: np.ndarray  # int32 [X], the tokens with which all prompts begin (as far as it pays)
    prefill_prompts: int
    prefill_lengths: tuple[int, ...]  # ascending; each is a program
    queues: list[list[Group]]


def check_lengths(
    requests: Sequence[Sequence[Request]], options: SamplerOptions, max_positions: int
) -> None:
    """Raises ValueError for the first request that is longer than the largest bucket or than the
    model's positions allow.
    """
    for run, queue in enumerate(requests):
        for index, request in enumerate(queue):
            guide = 0 if request.guide_ids is None else len(request.guide_ids)
            length, limit = (
                max(len(request.prompt_ids), guide),
                min(options.prompt_buckets[-1], max_positions - request.max_new_tokens),
            )
            if length > limit:
                raise ValueError(
                    f"Request {index} of run {run} (example {request.example_id}) has a"
                    f" {'guide ' * (guide == length)}prompt of {length} tokens: with"
                    f" {request.max_new_tokens} new tokens at most {limit} are allowed (buckets up"
                    f" to {options.prompt_buckets[-1]}, {max_positions} positions in the model)."
                )


def make_plan(requests: Sequence[Sequence[Request]], options: SamplerOptions) -> Plan:
    """Groups rows by prompt. The number of rows in a group is the one that costs the fewest tokens,
    padding rows included.

    The program is guided if any request is; the others are then guided by their own prompt, with
    weight 0.
    """
    guided = any(request.guide_ids is not None for queue in requests for request in queue)
    by_prompt = [_rows_by_prompt(queue, guided) for queue in requests]
    sizes = [
        (sum(map(len, prompts)) // 4, len(rows), len(prompts))
        for rows_of in by_prompt
        for prompts, rows in rows_of.items()
    ]
    longest_answer = max(request.max_new_tokens for queue in requests for request in queue)

    def cost(rows):
        return sum(
            -(-count // rows) * (length + prompts * rows * longest_answer)
            for length, count, prompts in sizes
        )

    rows = min(range(1, min(options.slots, max(count for _, count, _ in sizes)) + 1), key=cost)
    queues = [
        _cut(rows_of, rows, queue) for rows_of, queue in zip(by_prompt, requests, strict=True)
    ]
    spread = options.mesh.shape["data"] if options.mesh else 1
    prefill_prompts = _round_up(options.prefill_prompts, spread)
    longest, groups = max(map(len, queues)), max(1, options.slots // rows)
    if longest <= groups:  # all begin together: in refills that are equally full
        prefill_prompts = _round_up(-(-longest // -(-longest // prefill_prompts)), spread)
        groups = longest
    else:
        groups = _round_up(groups, min(prefill_prompts, groups))  # whole refills
    groups = _round_up(groups, spread)
    prompts = [prompt for queue in queues for group in queue for prompt in group.prompts]
    prefix = _shared_prefix(prompts) if longest > prefill_prompts else np.zeros(0, np.int32)
    prefill_lengths = _lengths(
        [len(prompt) - 1 - len(prefix) for prompt in prompts], options.prompt_buckets
    )
    shape = SlotShape(
        runs=len(requests),
        groups=groups,
        rows=rows,
        prompt=len(prefix)
        + _bucket(
            max(*map(len, prompts), options.room[0]) - 1 - len(prefix), options.prompt_buckets
        ),
        ring=_round_up(max(longest_answer, options.room[1]), RING_STEP),
        guided=guided,
    )
    return Plan(shape, prefix, min(prefill_prompts, groups), prefill_lengths, queues)


def refill_pays(waiting: list[list[Group]], held: list[dict[int, Group]], plan: Plan) -> bool:
    """Prompts wait, and every run can fill its part of one prefill as far as its queue goes (the
    device stops decoding by the same rule).
    """
    wanted = [min(len(queue), plan.prefill_prompts) for queue in waiting]
    return any(wanted) and all(
        plan.shape.groups - len(run_held) >= count
        for count, run_held in zip(wanted, held, strict=True)
    )


def take_entries(
    waiting: list[list[Group]], held: list[dict[int, Group]], plan: Plan
) -> list[list[tuple[int, Group]]]:
    """Moves the next groups from the queues into free slot groups: (slot group, group) for each
    run, one prefill at most.
    """
    entries = []
    for queue, run_held in zip(waiting, held, strict=True):
        free = [slot for slot in range(plan.shape.groups) if slot not in run_held][
            : plan.prefill_prompts
        ]
        taken = [(slot, queue.pop(0)) for slot in free[: len(queue)]]
        run_held.update(taken)
        entries.append(taken)
    return entries


def make_refill(
    plan: Plan, entries: list[list[tuple[int, Group]]], requests: Sequence[Sequence[Request]]
) -> Refill:
    """The device's view of `entries`: for each run, (slot group, what goes there). Places without
    an entry are dropped.
    """
    runs, copies, rows = plan.shape.runs, plan.shape.copies, plan.shape.rows
    prompts, skip = plan.prefill_prompts * copies, len(plan.prefix)
    length = _bucket(
        max(len(prompt) for run in entries for _, group in run for prompt in group.prompts)
        - 1
        - skip,
        plan.prefill_lengths,
    )

    def row_values(value, dtype):
        return np.full((runs, prompts, rows), value, dtype)

    refill = Refill(
        group=np.full((runs, prompts), plan.shape.groups * copies, np.int32),
        prompt=np.zeros((runs, prompts, length), np.int32),
        token=np.zeros((runs, prompts), np.int32),
        length=np.ones((runs, prompts), np.int32),
        limit=row_values(0, np.int32),
        temperature=row_values(0, np.float32),
        top_p=row_values(1, np.float32),
        seed=row_values(0, np.uint32),
        example_id=row_values(0, np.uint32),
        sample_id=row_values(0, np.uint32),
        guidance=row_values(0, np.float32) if plan.shape.guided else None,
    )
    for run, run_entries in enumerate(entries):
        for entry, (slot, group) in enumerate(run_entries):
            for copy, prompt in enumerate(group.prompts):
                place = entry * copies + copy
                refill.group[run, place] = slot * copies + copy
                refill.prompt[run, place, : len(prompt) - 1 - skip] = prompt[skip:-1]
                refill.token[run, place] = prompt[-1]
                refill.length[run, place] = len(prompt)
            places = slice(entry * copies, (entry + 1) * copies)
            for row, (index, sample) in enumerate(group.rows):
                request = requests[run][index]
                at = (run, places, row)
                refill.limit[at], refill.temperature[at], refill.top_p[at] = (
                    request.max_new_tokens,
                    request.temperature,
                    request.top_p,
                )
                refill.seed[at], refill.example_id[at] = (
                    request.seed % 2**32,
                    request.example_id % 2**32,
                )
                refill.sample_id[at] = request.first_sample + sample
                if plan.shape.guided:
                    refill.guidance[at] = request.guidance
    return refill


def _bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`."""
    return next(size for size in buckets if size >= length)


def _lengths(prompts: list[int], buckets: tuple[int, ...]) -> tuple[int, ...]:
    """The bucket of the longest prompt, and such shorter ones as save a third of the tokens: a
    finer choice costs more to compile.
    """
    sizes = {_bucket(length, buckets) for length in set(prompts)}
    lengths = [max(sizes)]
    while shorter := [size for size in sizes if 3 * size <= 2 * lengths[0]]:
        lengths.insert(0, max(shorter))
    return tuple(lengths)


def _is_prompt(ids) -> bool:
    return np.ndim(ids) == 1 and len(ids) > 0


def _rows_by_prompt(
    queue: Sequence[Request], guided: bool
) -> dict[tuple[bytes, ...], list[tuple[int, int]]]:
    """The rows of each (prompt,), in a guided program of each (prompt, guide prompt)."""
    rows = defaultdict(list)
    for index, request in enumerate(queue):
        prompts = (
            (
                request.prompt_ids,
                request.prompt_ids if request.guide_ids is None else request.guide_ids,
            )
            if guided
            else (request.prompt_ids,)
        )
        rows[tuple(np.asarray(prompt, np.int32).tobytes() for prompt in prompts)] += [
            (index, sample) for sample in range(request.n_samples)
        ]
    return rows


def _cut(
    rows_of: dict[tuple[bytes, ...], list[tuple[int, int]]], size: int, queue: Sequence[Request]
) -> list[Group]:
    """Groups of at most `size` rows: the longest answers first, so that none is left alone at the
    end, then by prompt length.
    """
    groups = [
        Group(
            np.frombuffer(prompt, np.int32),
            tuple(rows[start : start + size]),
            *(np.frombuffer(ids, np.int32) for ids in guide),
        )
        for (prompt, *guide), rows in rows_of.items()
        for start in range(0, len(rows), size)
    ]

    def longest(group):
        return max(queue[index].max_new_tokens for index, _ in group.rows)

    return sorted(groups, key=lambda group: (-longest(group), len(group.prompt)))


def _shared_prefix(prompts: list[np.ndarray]) -> np.ndarray:
    """What all prompts begin with, without any prompt's last token, a multiple of PREFIX_STEP
    tokens.
    """
    shortest = min(map(len, prompts)) - 1
    same = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    length = shortest if same.all() else int(np.argmin(same))
    return prompts[0][: length - length % PREFIX_STEP]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
