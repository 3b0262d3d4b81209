"""Packing within a step's batch: each run's N examples of a step go into as few rows as they need,
and the rows of all runs side by side.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from ip_jax.prompts.chat import Rendered

ROW_QUANTUM = 8  # row lengths are multiples of this (128 where a TPU kernel asks for it)
RESPONSE_QUANTUM = 32
SEGMENT_QUANTUM = 8
MOST_SHAPES = 3
# the part of the cost that one more shape, which takes longer to compile, has to save
ANOTHER_SHAPE = 0.02
# of one more micro-batch, as a part of the largest: many small ones have little padding, and keep a
# device less busy
MICRO_BATCH_COST = 0.02
# so many steps of a training, and that with the longest example, decide on its shapes
PLANNED_STEPS = 64
QUANTILES = (*np.arange(1, 12) / 12, 0.97, 0.995)  # of all rows' lengths: which shapes are tried
LONGER_BY = 1.06  # from one row length that is tried to the next
# attention's cost for a segment position and key, in tokens' worth of all other products (SmolLM2
# on a CPU)
ATTENTION_COST = 3e-4


@dataclasses.dataclass(frozen=True)
class RowRules:
    """What devices ask of packed rows. `blocks`: the runs are cut into so many, each with rows of
    its own; `multiple`: a block's rows of a micro-batch are spread over so many; `quantum` divides
    their lengths.

    With `share_prefix`, what all examples of a run begin with (a system prompt) stands once in each
    row.
    """

    multiple: int = 1
    quantum: int = ROW_QUANTUM
    share_prefix: bool = True
    blocks: int = 1


CPU_ROWS = RowRules()


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """One of the static shapes of a program's micro-batches: at most M in a step, of B rows (for
    each of `blocks` of runs) of `length` tokens.

    A row holds at most `segments` examples of at most `segment_length` tokens, and `responses`
    counted positions (P). A step that needs fewer micro-batches leaves the last ones empty, and the
    training step skips those. The first `shared` tokens of all examples are the same: a row holds
    them once, at its beginning.
    """

    length: int
    segments: int
    segment_length: int
    responses: int
    micro_batches: int
    micro_rows: int
    shared: int = 0
    blocks: int = 1

    @property
    def rows(self) -> int:
        """Those of a micro-batch."""
        return self.blocks * self.micro_rows

    @property
    def positions(self) -> int:
        """Those of a micro-batch, padding included."""
        return self.rows * self.length


def shared_prefix(examples: Sequence[Rendered]) -> int:
    """How many tokens all examples begin with, at most those before the last prompt token of any
    (all counted tokens come after them).
    """
    limit = max(0, min(int(np.argmax(example.response_mask)) for example in examples) - 1)
    starts = np.array([example.token_ids[:limit] for example in examples])
    differing = np.flatnonzero((starts != starts[0]).any(axis=0))
    return int(differing[0]) if len(differing) else limit


def balanced_rows(lengths: Sequence[int], capacity: int, shared: int = 0) -> list[list[int]]:
    """Indices of `lengths` in the fewest rows of at most `capacity` that greedy balancing finds; a
    row holds `shared` tokens once.

    For k = fewest possible, k + 1, ...: the longest first, each into the emptiest of k rows
    (Graham's LPT rule), until all rows fit.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lengths[longest_first[0]] > capacity:
        raise ValueError(
            f"example {longest_first[0]} of the batch has {lengths[longest_first[0]]} tokens: a row"
            f" holds {capacity}"
        )
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


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a step: run `run` of its block, its number among that run's rows, which of the
    run's examples it holds and how many tokens.
    """

    run: int
    number: int
    examples: tuple[int, ...]
    tokens: int


def rows_of_step(
    lengths: Int[np.ndarray, "R N"], capacity: int, shared: int, blocks: int
) -> list[list[Row]]:
    """Each block's rows of at most `capacity` tokens, the longest first."""
    found: list[list[Row]] = [[] for _ in range(blocks)]
    for r, run in enumerate(lengths.tolist()):
        block, of_block = divmod(r, len(lengths) // blocks)
        for number, row in enumerate(balanced_rows(run, capacity, shared)):
            found[block].append(
                Row(of_block, number, tuple(row), shared + sum(run[i] - shared for i in row))
            )
    return [sorted(rows, key=lambda row: -row.tokens) for rows in found]


def micro_batches_in_use(
    rows: Int[np.ndarray, "steps blocks rows"], sizes: Sequence[tuple[int, int]]
) -> Int[np.ndarray, "steps K"]:
    """How many micro-batches of each shape the steps take. `rows` are the tokens of the rows, 0 for
    none; `sizes` are (length, rows of a block in a micro-batch) of the K shapes, the shortest
    first.

    Rows that no shorter shape holds fill micro-batches of the longest; what is left empty there the
    next longest rows take, and so on.
    """
    used = np.zeros((len(rows), len(sizes)), int)
    taken = np.zeros(len(rows), int)
    for k in reversed(range(len(sizes))):
        longer = (rows > (sizes[k - 1][0] if k else 0)).sum(axis=-1).max(axis=-1) - taken
        used[:, k] = -(-np.maximum(longer, 0) // sizes[k][1])
        taken += used[:, k] * sizes[k][1]
    return used


def plan_shapes(
    lengths: Int[np.ndarray, "steps R N"],
    responses: Int[np.ndarray, "steps R N"],
    tokens_per_micro_batch: int,
    rules: RowRules = CPU_ROWS,
    shared: int = 0,
) -> tuple[PackedShape, ...]:
    """The shapes of a training's micro-batches, the shortest rows first; the lengths of all its
    examples are known beforehand.

    Of row lengths from the longest example up those that cost least: one shape, and one more, up to
    MOST_SHAPES, where that saves more than its compilation is worth. `tokens_per_micro_batch`
    bounds blocks * B * T of one micro-batch (but for rows of the shortest length).
    """
    shortest = _round_up(int(lengths.max()), rules.quantum)
    longest = max(
        shortest, min(8 * shortest, tokens_per_micro_batch // (rules.blocks * rules.multiple))
    )
    tried = {
        _round_up(int(shortest * LONGER_BY**i), rules.quantum)
        for i in range(1 + int(math.log(8, LONGER_BY)))
    } | {longest - longest % rules.quantum}
    evenly = np.linspace(0, len(lengths) - 1, min(len(lengths), PLANNED_STEPS)).astype(int)
    planned = lengths[np.union1d(evenly, lengths.max(axis=(1, 2)).argmax())]
    _, capacity, sizes = min(
        _cheapest(planned, capacity, tokens_per_micro_batch, rules, shared)
        for capacity in tried
        if capacity <= longest
    )
    steps = [rows_of_step(step, capacity, shared, rules.blocks) for step in lengths]
    # perhaps of a step that had no part in the plan
    length = _round_up(int(_row_lengths(steps).max()), rules.quantum)
    sizes = [
        *sizes[:-1],
        (length, min(sizes[-1][1], _most_rows(length, tokens_per_micro_batch, rules))),
    ]
    return _exact(lengths, responses, steps, sizes, rules, shared)


def _cheapest(
    lengths: Int[np.ndarray, "steps R N"],
    capacity: int,
    tokens_per_micro_batch: int,
    rules: RowRules,
    shared: int,
) -> tuple[float, int, list[tuple[int, int]]]:
    """(cost, capacity, sizes) of the cheapest shapes for rows of at most `capacity` tokens: padded
    tokens, the attention of padded segments, and something for each micro-batch.
    """
    steps = [rows_of_step(step, capacity, shared, rules.blocks) for step in lengths]
    rows = _row_lengths(steps)
    segments = max(len(row.examples) for step in steps for block in step for row in block)
    attention = ATTENTION_COST * segments * _round_up(int(lengths.max()), SEGMENT_QUANTUM) ** 2

    def cost(sizes: list[tuple[int, int]]) -> float:
        each = [
            rules.blocks * micro_rows * (length + attention)
            + MICRO_BATCH_COST * tokens_per_micro_batch
            for length, micro_rows in sizes
        ]
        return float(micro_batches_in_use(rows, sizes).sum(axis=0) @ each)

    best = math.inf, []
    for count in range(1, MOST_SHAPES + 1):
        found = min(
            (cost(sizes), sizes)
            for sizes in _candidates(rows, count, tokens_per_micro_batch, rules)
        )
        if found[0] < best[0] * (1 - ANOTHER_SHAPE if best[1] else 1):
            best = found
    return best[0], capacity, best[1]


def _candidates(
    rows: Int[np.ndarray, "steps blocks rows"],
    count: int,
    tokens_per_micro_batch: int,
    rules: RowRules,
) -> Iterator[list[tuple[int, int]]]:
    """`sizes` of `count` shapes to choose from: lengths at QUANTILES, and as many rows in a
    micro-batch as fit or, as evenly as the largest step allows, in no more micro-batches or in
    twice as many.
    """
    longest = _round_up(int(rows.max()), rules.quantum)
    shorter = sorted(
        {_round_up(int(length), rules.quantum) for length in np.quantile(rows[rows > 0], QUANTILES)}
        - {longest}
    )
    for lengths in itertools.combinations(shorter, min(count - 1, len(shorter))):
        lengths = (*lengths, longest)
        options = []
        for below, length in zip((0, *lengths), lengths):  # noqa: B905  one more
            most = max(1, int(((rows > below) & (rows <= length)).sum(axis=-1).max()))
            fitting = _most_rows(length, tokens_per_micro_batch, rules)
            fewest = -(-most // fitting)
            evenly = [_round_up(-(-most // (n * fewest)), rules.multiple) for n in (1, 2)]
            options.append([min(fitting, _round_up(most, rules.multiple)), *evenly])
        for of_each in zip(*options, strict=True):
            yield list(zip(lengths, of_each, strict=True))


def _most_rows(length: int, tokens_per_micro_batch: int, rules: RowRules) -> int:
    """Rows of a block that a micro-batch may have."""
    return max(
        rules.multiple,
        tokens_per_micro_batch // (rules.blocks * length) // rules.multiple * rules.multiple,
    )


def _exact(
    lengths,
    responses,
    steps: list[list[list[Row]]],
    sizes: list[tuple[int, int]],
    rules: RowRules,
    shared: int,
) -> tuple[PackedShape, ...]:
    """The shapes of these sizes with room for what all steps hold."""
    used = micro_batches_in_use(_row_lengths(steps), sizes)
    per_block = lengths.shape[1] // rules.blocks
    segments, longest, counted = (np.zeros(len(sizes), int) for _ in range(3))
    for step, blocks in enumerate(steps):
        for block, of_block in enumerate(blocks):
            for k, part in enumerate(_dealt(of_block, used[step], sizes)):
                for row in part:
                    own = step, block * per_block + row.run, list(row.examples)
                    for most, value in (
                        (segments, len(row.examples)),
                        (longest, lengths[own].max()),
                        (counted, responses[own].sum()),
                    ):
                        most[k] = max(most[k], value)
    return tuple(
        PackedShape(
            length,
            int(segments[k]),
            _round_up(int(longest[k]), SEGMENT_QUANTUM),
            _round_up(int(counted[k]), RESPONSE_QUANTUM),
            int(used[:, k].max()),
            micro_rows,
            shared,
            rules.blocks,
        )
        for k, (length, micro_rows) in enumerate(sizes)
        if used[:, k].any()
    )


def _row_lengths(steps: list[list[list[Row]]]) -> Int[np.ndarray, "steps blocks rows"]:
    """Tokens of the rows, 0 where a block has fewer than another."""
    most = max(len(block) for step in steps for block in step)
    return np.array(
        [
            [[row.tokens for row in block] + [0] * (most - len(block)) for block in step]
            for step in steps
        ]
    )


def _dealt(
    rows: list[Row], used: Int[np.ndarray, " K"], sizes: Sequence[tuple[int, int]]
) -> list[list[Row]]:
    """A block's rows (the longest first) by the shape whose micro-batches they lie in."""
    parts, start = [], 0
    for count, (_, micro_rows) in reversed(list(zip(used.tolist(), sizes, strict=True))):
        parts.append(rows[start : start + count * micro_rows])
        start += count * micro_rows
    return parts[::-1]


def _round_up(value: int, quantum: int) -> int:
    return -(-value // quantum) * quantum


def segment_index(
    segment_ids: Int[np.ndarray, "*rows T"],
    positions: Int[np.ndarray, "*rows T"],
    segments: int,
    length: int,
    shared: int = 0,
) -> Int[np.ndarray, "*rows S L"]:
    """The row position of token l of segment s + 1, and T where there is none. All segments begin
    with the row's first `shared` tokens.
    """
    flat = segment_ids.reshape(-1, segment_ids.shape[-1])
    index = np.full((len(flat), segments, length), flat.shape[-1], np.int32)
    row, place = np.nonzero(flat)
    index[row, flat[row, place] - 1, positions.reshape(flat.shape)[row, place]] = place
    index[row, flat[row, place] - 1, :shared] = np.arange(shared)
    return index.reshape(*segment_ids.shape[:-1], segments, length)


def pack_step(
    batch: Sequence[Sequence[Rendered]], shapes: Sequence[PackedShape]
) -> tuple[tuple[dict[str, np.ndarray], ...], float]:
    """The arrays of one step for each shape (see training.state.Batch: [M, blocks, B, T] and [M,
    blocks, B, P]) and real / padded tokens, as far as computed: micro-batches that no block needs
    are not.

    `batch` holds each run's N rendered examples. Segments count from 1, positions restart in each;
    padding is segment 0.
    """
    used, parts = _placed(
        np.array([[len(example.token_ids) for example in run] for run in batch]), shapes
    )
    arrays = tuple(
        _pack_rows(batch, part, shape) for part, shape in zip(parts, shapes, strict=True)
    )
    real = sum(np.count_nonzero(of_shape["segment_ids"]) for of_shape in arrays)
    return arrays, real / positions_of(used, shapes)


def positions_of(micro_batches: Sequence[float], shapes: Sequence[PackedShape]) -> float:
    """Positions of so many micro-batches of each shape, padding included."""
    return sum(count * shape.positions for count, shape in zip(micro_batches, shapes, strict=True))


def usage(
    lengths: Int[np.ndarray, "R N"], shapes: Sequence[PackedShape]
) -> tuple[list[int], list[int]]:
    """(micro-batches that are computed, rows of all runs in them that hold something) of one step,
    for each shape.
    """
    used, parts = _placed(lengths, shapes)
    return used, [sum(map(len, part)) for part in parts]


def _placed(
    lengths: Int[np.ndarray, "R N"], shapes: Sequence[PackedShape]
) -> tuple[list[int], list[list[list[Row]]]]:
    """(micro-batches in use, the rows of each block in them) of one step, for each shape."""
    sizes = [(shape.length, shape.micro_rows) for shape in shapes]
    rows = rows_of_step(lengths, shapes[-1].length, shapes[-1].shared, shapes[-1].blocks)
    (used,) = micro_batches_in_use(_row_lengths([rows]), sizes)
    by_block = [_dealt(of_block, used, sizes) for of_block in rows]
    return used.tolist(), [[parts[k] for parts in by_block] for k in range(len(shapes))]


def _pack_rows(
    batch: Sequence[Sequence[Rendered]], rows: Sequence[Sequence[Row]], shape: PackedShape
) -> dict[str, np.ndarray]:
    """The arrays of one shape's micro-batches, which hold these rows of each block."""
    blocks, count = shape.blocks, shape.micro_batches * shape.micro_rows
    tokens = np.zeros((3, blocks, count, shape.length), np.int32)  # ids, segments, positions
    response = np.zeros((2, blocks, count, shape.responses), np.int32)  # index, target
    weight: Float[np.ndarray, "blocks B P"] = np.zeros((blocks, count, shape.responses), np.float32)
    owner = np.zeros((2, blocks, count), np.int32)  # run of the block, number among its rows
    for block, b, row in (
        (block, b, row) for block, of_block in enumerate(rows) for b, row in enumerate(of_block)
    ):
        run = batch[block * (len(batch) // blocks) + row.run]
        owner[:, block, b] = row.run, row.number
        start = counted = 0
        for segment, i in enumerate(row.examples, start=1):
            first = shape.shared if segment > 1 else 0  # what the row holds already
            ids, mask = run[i].token_ids[first:], run[i].response_mask[first:]
            span = slice(start, start + len(ids))
            tokens[0, block, b, span], tokens[1, block, b, span], tokens[2, block, b, span] = (
                ids,
                segment,
                np.arange(first, first + len(ids)),
            )
            where = np.flatnonzero(mask)
            place = slice(counted, counted + len(where))
            response[0, block, b, place], response[1, block, b, place], weight[block, b, place] = (
                start + where - 1,
                ids[where],
                1,
            )
            start, counted = start + len(ids), counted + len(where)

    def fold(a):
        return np.moveaxis(
            a.reshape(blocks, shape.micro_batches, shape.micro_rows, *a.shape[2:]), 1, 0
        )

    return dict(
        runs=fold(owner[0]),
        row_numbers=fold(owner[1]),
        tokens=fold(tokens[0]),
        segment_ids=fold(tokens[1]),
        positions=fold(tokens[2]),
        segment_index=segment_index(
            fold(tokens[1]), fold(tokens[2]), shape.segments, shape.segment_length, shape.shared
        ),
        response_index=fold(response[0]),
        response_target=fold(response[1]),
        response_weight=fold(weight),
    )
