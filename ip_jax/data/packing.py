"""Packing within a step's batch: the N examples of a step go into as few rows as they need, alike for all runs of a program."""
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from ip_jax.prompts.chat import Rendered

ROW_QUANTUM = 8  # row lengths are multiples of this (128 where a TPU kernel asks for it)
RESPONSE_QUANTUM = 32
SEGMENT_QUANTUM = 8
SECOND_SHAPE = 0.03  # the part of all tokens that a second shape has to save
ATTENTION_COST = 3e-4  # attention's cost for a segment position and key, in tokens' worth of all other products (SmolLM2 on a CPU)


@dataclasses.dataclass(frozen=True)
class RowRules:
    """What devices ask of packed rows: `multiple`: the rows of a micro-batch are spread over so many; `quantum` divides their lengths.

    With `share_prefix`, what all examples of a run begin with (a system prompt) stands once in each row.
    """

    multiple: int = 1
    quantum: int = ROW_QUANTUM
    share_prefix: bool = True


CPU_ROWS = RowRules()


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """A static shape of a program's batches: M micro-batches of B rows (each run) of `length` tokens.

    A row holds at most `segments` examples of at most `segment_length` tokens, and `responses` counted positions (P). A step that
    needs fewer micro-batches leaves the last ones empty, and the training step skips those. The first `shared` tokens of all
    examples are the same: a row holds them once, at its beginning.
    """

    length: int
    segments: int
    segment_length: int
    responses: int
    micro_batches: int
    micro_rows: int
    shared: int = 0


def shared_prefix(examples: Sequence[Rendered]) -> int:
    """How many tokens all examples begin with, at most those before the last prompt token of any (all counted tokens come after them)."""
    limit = max(0, min(int(np.argmax(example.response_mask)) for example in examples) - 1)
    starts = np.array([example.token_ids[:limit] for example in examples])
    differing = np.flatnonzero((starts != starts[0]).any(axis=0))
    return int(differing[0]) if len(differing) else limit


def balanced_rows(lengths: Sequence[int], capacity: int, shared: int = 0) -> list[list[int]]:
    """Indices of `lengths` in the fewest rows of at most `capacity` that greedy balancing finds; a row holds `shared` tokens once.

    For k = fewest possible, k + 1, ...: the longest first, each into the emptiest of k rows (Graham's LPT rule), until all rows fit.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lengths[longest_first[0]] > capacity:
        raise ValueError(f"example {longest_first[0]} of the batch has {lengths[longest_first[0]]} tokens: a row holds {capacity}")
    own = [length - shared for length in lengths]
    for count in range(-(-sum(own) // (capacity - shared)), len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [shared] * count
        for i in longest_first:
            row = filled.index(min(filled))
            rows[row].append(i)
            filled[row] += own[i]
        if max(filled) <= capacity:
            break
    return rows


def plan_shapes(
    lengths: Int[np.ndarray, "steps R N"], responses: Int[np.ndarray, "steps R N"], tokens_per_micro_batch: int,
    rules: RowRules = CPU_ROWS, shared: int = 0,
) -> list[PackedShape]:
    """The shape of each step of a training run, whose token lengths are all known beforehand: the cheapest one for all steps, or,
    where that saves more than a second compilation is worth (SECOND_SHAPE), another for the steps with the fewest tokens.
    """

    @functools.cache
    def pack(step: int, length: int) -> tuple[int, int]:
        """(rows, most segments of a row) of one step."""
        packings = [balanced_rows(run, length, shared) for run in lengths[step].tolist()]
        return max(map(len, packings)), max(len(row) for packing in packings for row in packing)

    cheapest = functools.partial(_cheapest, lengths, responses, pack, tokens_per_micro_batch, rules, shared)
    by_size = np.argsort(lengths.sum(axis=-1).max(axis=-1), kind="stable").tolist()
    best, shape = cheapest(by_size)
    plan = [shape] * len(lengths)
    best *= 1 - SECOND_SHAPE
    for few in sorted({len(lengths) * quarters // 4 for quarters in (1, 2, 3)} - {0}):
        small, large = by_size[:few], by_size[few:]
        (cost, shape), (cost_of_large, shape_of_large) = cheapest(small), cheapest(large)
        if cost + cost_of_large < best:
            best = cost + cost_of_large
            plan = [shape if step in small else shape_of_large for step in range(len(lengths))]
    return plan


def _cheapest(
    lengths, responses, pack: Callable[[int, int], tuple[int, int]], tokens_per_micro_batch: int, rules: RowRules,
    shared: int, steps: list[int],
) -> tuple[float, PackedShape]:
    """(cost, shape) of the cheapest shape that serves these steps. `pack(step, length)`: (rows, most segments of a row).

    Tries row lengths from the longest example up and counts padded tokens and the attention of padded segments.
    `tokens_per_micro_batch` bounds R * B * T of one micro-batch (but for rows of the shortest length).
    """
    runs, longest_example = lengths.shape[1], int(lengths[steps].max())
    shortest = _round_up(longest_example, rules.quantum)
    segment_length = _round_up(longest_example, SEGMENT_QUANTUM)
    longest = max(shortest, min(8 * shortest, tokens_per_micro_batch // (runs * rules.multiple)))
    best: tuple[float, PackedShape] | None = None
    for length in range(shortest, longest + 1, rules.quantum):
        rows, segments = np.array([pack(step, length) for step in steps]).T  # each [steps]
        segments = int(segments.max())
        fitting = tokens_per_micro_batch // (runs * length) // rules.multiple * rules.multiple
        micro_rows = min(_round_up(int(rows.max()), rules.multiple), max(rules.multiple, fitting))
        used = -(-rows // micro_rows)
        cost = float(used.sum()) * micro_rows * (length + ATTENTION_COST * segments * segment_length**2)
        if best is None or cost < best[0]:
            best = cost, PackedShape(length, segments, segment_length, 0, int(used.max()), micro_rows, shared)
    cost, shape = best
    widest = max(
        int(responses[step, r, row].sum())
        for step in steps for r, run in enumerate(lengths[step].tolist()) for row in balanced_rows(run, shape.length, shared)
    )
    return cost, dataclasses.replace(shape, responses=_round_up(widest, RESPONSE_QUANTUM))


def _round_up(value: int, quantum: int) -> int:
    return -(-value // quantum) * quantum


def segment_index(
    segment_ids: Int[np.ndarray, "*rows T"], positions: Int[np.ndarray, "*rows T"], segments: int, length: int, shared: int = 0
) -> Int[np.ndarray, "*rows S L"]:
    """The row position of token l of segment s + 1, and T where there is none. All segments begin with the row's first `shared` tokens."""
    flat = segment_ids.reshape(-1, segment_ids.shape[-1])
    index = np.full((len(flat), segments, length), flat.shape[-1], np.int32)
    row, place = np.nonzero(flat)
    index[row, flat[row, place] - 1, positions.reshape(flat.shape)[row, place]] = place
    index[row, flat[row, place] - 1, :shared] = np.arange(shared)
    return index.reshape(*segment_ids.shape[:-1], segments, length)


def pack_step(batch: Sequence[Sequence[Rendered]], shape: PackedShape) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of one step (see training.state.Batch: [M, R, B, T] and [M, R, B, P]) and real / padded tokens, as far as computed.

    Rows are spread so that row i of every run lies in the same micro-batch. Micro-batches that no run needs do not count as padding.
    `batch` holds each run's N rendered examples. Segments count from 1, positions restart in each; padding is segment 0.
    """
    packings = [balanced_rows([len(example.token_ids) for example in run], shape.length, shape.shared) for run in batch]
    runs, micro, rows = len(batch), shape.micro_batches, shape.micro_rows
    tokens = np.zeros((3, runs, micro * rows, shape.length), np.int32)  # ids, segments, positions
    response = np.zeros((2, runs, micro * rows, shape.responses), np.int32)  # index, target
    weight: Float[np.ndarray, "R B P"] = np.zeros((runs, micro * rows, shape.responses), np.float32)
    for r, packing in enumerate(packings):
        for b, row in enumerate(packing):
            start = counted = 0
            for segment, i in enumerate(row, start=1):
                first = shape.shared if segment > 1 else 0  # what the row holds already
                ids, mask = batch[r][i].token_ids[first:], batch[r][i].response_mask[first:]
                span = slice(start, start + len(ids))
                tokens[0, r, b, span], tokens[1, r, b, span], tokens[2, r, b, span] = ids, segment, np.arange(first, first + len(ids))
                where = np.flatnonzero(mask)
                place = slice(counted, counted + len(where))
                response[0, r, b, place], response[1, r, b, place], weight[r, b, place] = start + where - 1, ids[where], 1
                start, counted = start + len(ids), counted + len(where)
    fold = lambda a: np.moveaxis(a.reshape(runs, micro, rows, a.shape[-1]), 1, 0)  # noqa: E731
    used = -(-max(len(packing) for packing in packings) // rows)
    arrays = dict(
        tokens=fold(tokens[0]), segment_ids=fold(tokens[1]), positions=fold(tokens[2]),
        segment_index=segment_index(fold(tokens[1]), fold(tokens[2]), shape.segments, shape.segment_length, shape.shared),
        response_index=fold(response[0]), response_target=fold(response[1]), response_weight=fold(weight),
    )
    return arrays, np.count_nonzero(tokens[1]) / (used * runs * rows * shape.length)
