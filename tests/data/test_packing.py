"""Packing: every token once with its own positions and segment, every counted token at its place,
in a row of its own run.
"""

import dataclasses

import numpy as np
import pytest

from configs.gcd_sycophancy import PRESETS
from ip_jax.data.packing import (
    CPU_ROWS,
    PackedShape,
    RowRules,
    balanced_rows,
    micro_batches_in_use,
    pack_step,
    plan_shapes,
    positions_of,
    shared_prefix,
    usage,
)
from ip_jax.data.pipeline import RunSource, batch_reader, renderer
from ip_jax.models import hub
from ip_jax.prompts.chat import Rendered
from ip_jax.studies.gcd_sycophancy import data, published
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

RUNS, EXAMPLES = 3, 7


def random_batch(seed: int, longest: int = 40) -> list[list[Rendered]]:
    """Examples of random lengths whose token ids are all different, so that each can be found
    again.
    """
    rng = np.random.default_rng(seed)
    batch, next_id = [], 1
    for _ in range(RUNS):
        run = []
        for _ in range(EXAMPLES):
            length = int(rng.integers(2, longest + 1))
            mask = rng.random(length) < 0.4
            mask[0], mask[-1] = False, True
            run.append(Rendered(np.arange(next_id, next_id + length, dtype=np.int32), mask))
            next_id += length
        batch.append(run)
    return batch


def sizes(batch, of=lambda example: len(example.token_ids)):
    return np.array([[[of(example) for example in run] for run in batch]])


def packed(batch, tokens_per_micro_batch=200, rules=CPU_ROWS, shared=0):
    """(shapes, arrays of each) of one step packed by its own plan."""
    shapes = plan_shapes(
        sizes(batch),
        sizes(batch, lambda example: example.response_mask.sum()),
        tokens_per_micro_batch,
        rules,
        shared,
    )
    return shapes, pack_step(batch, shapes)[0]


def rows_of_run(all_arrays, run: int, runs: int = RUNS):
    """{name: [T] or [P]} of each row that says it is the run's and holds something."""
    for arrays in all_arrays:
        blocks = arrays["tokens"].shape[1]
        block, of_block = divmod(run, runs // blocks)
        for m, b in np.argwhere(
            (arrays["runs"][:, block] == of_block) & arrays["segment_ids"][:, block].any(-1)
        ):
            yield {name: array[m, block, b] for name, array in arrays.items()}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_stands_once_with_its_segment_and_position(seed, blocks):
    batch = random_batch(seed)
    shapes, all_arrays = packed(batch, rules=RowRules(blocks=blocks))
    for shape, arrays in zip(shapes, all_arrays, strict=True):
        assert arrays["tokens"].shape == (
            shape.micro_batches,
            blocks,
            shape.micro_rows,
            shape.length,
        )
    for r, run in enumerate(batch):
        found = []
        for row in rows_of_run(all_arrays, r):
            tokens, segments, positions = (
                row[name] for name in ("tokens", "segment_ids", "positions")
            )
            for segment in range(1, segments.max() + 1):
                (where,) = np.nonzero(segments == segment)
                assert np.array_equal(where, np.arange(where[0], where[-1] + 1)), (
                    "a segment is one stretch"
                )
                assert np.array_equal(positions[where], np.arange(len(where)))
                found.append(tuple(tokens[where]))
            assert not tokens[segments == 0].any()
        assert sorted(found) == sorted(tuple(example.token_ids) for example in run)


@pytest.mark.parametrize("seed", range(5))
def test_counted_positions_predict_exactly_the_masked_tokens(seed):
    batch = random_batch(seed)
    _, all_arrays = packed(batch)
    for r, run in enumerate(batch):
        targets = []
        for row in rows_of_run(all_arrays, r):
            weight = row["response_weight"]
            assert set(np.unique(weight)) <= {0, 1}
            index, target = row["response_index"][weight == 1], row["response_target"][weight == 1]
            assert np.array_equal(row["tokens"][index + 1], target), (
                "the position before a token predicts it"
            )
            assert np.array_equal(row["segment_ids"][index], row["segment_ids"][index + 1])
            targets += list(target)
        assert sorted(targets) == sorted(
            token for example in run for token in example.token_ids[example.response_mask]
        )


def test_real_over_padded_counts_the_micro_batches_in_use():
    full, half = (Rendered(np.ones(n, np.int32), np.arange(n) == n - 1) for n in (16, 8))
    shape = PackedShape(
        length=16, segments=2, segment_length=16, responses=4, micro_batches=3, micro_rows=2
    )
    # 48 real tokens in 2 + 1 rows of 16: two micro-batches of two rows
    _, density = pack_step([[full, full], [half, half]], [shape])
    assert density == 48 / 64
    # 3 + 2 rows: three micro-batches
    _, density = pack_step([[full, full, full], [half, half, half]], [shape])
    assert density == 72 / 96
    blocks = dataclasses.replace(shape, micro_rows=1, blocks=2)
    # the first block needs a second micro-batch, and so both have it
    _, density = pack_step([[full, full], [half, half]], [blocks])
    assert density == 48 / 64


def test_runs_lie_side_by_side_and_each_row_is_numbered_within_its_run():
    """The rows of a micro-batch may be of several runs; what is empty comes last."""
    batch = random_batch(0)
    shapes, all_arrays = packed(batch, tokens_per_micro_batch=100)
    rows = [
        balanced_rows([len(example.token_ids) for example in run], shapes[-1].length)
        for run in batch
    ]
    for r, of_run in enumerate(rows):
        numbers = [int(row["row_numbers"]) for row in rows_of_run(all_arrays, r)]
        assert sorted(numbers) == list(range(len(of_run)))
        for row in rows_of_run(all_arrays, r):
            assert set(row["tokens"]) - {0} == {
                int(t) for i in of_run[row["row_numbers"]] for t in batch[r][i].token_ids
            }
    for arrays in all_arrays:
        used = arrays["segment_ids"].any(axis=(1, 2, 3))
        assert not np.diff(used.astype(int)).max(initial=0) > 0


def test_longer_shapes_are_filled_before_shorter_ones_are_used():
    """By hand: of rows of 9, 9, 7, 5 and 4 tokens two need the long shape, whose second micro-batch
    also takes 7; then one of the short shape.
    """
    rows = np.array([[[9, 9, 9, 7, 5, 4]]])
    assert micro_batches_in_use(rows, [(8, 3), (16, 2)]).tolist() == [[1, 2]]
    assert micro_batches_in_use(rows, [(8, 1), (16, 4)]).tolist() == [[2, 1]]
    assert micro_batches_in_use(rows, [(16, 4)]).tolist() == [[2]]
    assert micro_batches_in_use(np.array([[[9, 7, 0], [9, 9, 4]]]), [(8, 1), (16, 2)]).tolist() == [
        [1, 1]
    ], "the most of any block"


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_example_once_and_never_overflow(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 50, size=rng.integers(1, 12)).tolist()
    capacity = int(rng.integers(max(lengths), 120))
    rows = balanced_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)
    assert len(rows) >= -(-sum(lengths) // capacity)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 1 of the batch has 9 tokens: a row holds 8"):
        balanced_rows([3, 9], 8)


@pytest.mark.parametrize("tokens_per_micro_batch", (1, 300, 10_000))
@pytest.mark.parametrize("row_multiple", (1, 4))
def test_the_shapes_hold_every_step(tokens_per_micro_batch, row_multiple):
    batches = [random_batch(seed) for seed in range(6)]
    lengths, responses = (
        np.concatenate([sizes(batch, of) for batch in batches])
        for of in (lambda e: len(e.token_ids), lambda e: e.response_mask.sum())
    )
    shapes = plan_shapes(lengths, responses, tokens_per_micro_batch, RowRules(row_multiple))
    for shape in shapes:
        assert shape.length % 8 == 0 and shape.micro_rows % row_multiple == 0
        assert (
            shape.micro_rows == row_multiple
            or shape.micro_rows * shape.length <= tokens_per_micro_batch
        )
    for batch in batches:
        all_arrays, _ = pack_step(batch, shapes)
        assert sum((arrays["segment_ids"] > 0).sum() for arrays in all_arrays) == sizes(batch).sum()
        counted = sum(arrays["response_weight"].sum() for arrays in all_arrays)
        assert counted == sizes(batch, lambda example: example.response_mask.sum()).sum()
        used, held = usage(sizes(batch)[0], shapes)
        assert used == [arrays["segment_ids"].any(axis=(1, 2, 3)).sum() for arrays in all_arrays]
        assert held == [arrays["segment_ids"].any(axis=-1).sum() for arrays in all_arrays]


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_a_shared_prefix_once(seed):
    """From a row's own tokens and the first ones, `segment_index` gives every example back
    whole.
    """
    batch = [
        [
            Rendered(
                np.concatenate([[7, 8, 9], e.token_ids]),
                np.concatenate([[False] * 3, e.response_mask]),
            )
            for e in run
        ]
        for run in random_batch(seed)
    ]
    lengths = sizes(batch)
    _, all_arrays = packed(batch, shared=3)
    used = sum((arrays["segment_ids"] > 0).any(axis=-1).sum() for arrays in all_arrays)
    assert (
        sum((arrays["segment_ids"] > 0).sum() for arrays in all_arrays)
        == lengths.sum() - 3 * lengths.size + 3 * used
        < lengths.sum()
    )
    for r, run in enumerate(batch):
        found = []
        for row in rows_of_run(all_arrays, r):
            tokens = row["tokens"]
            found += [
                tuple(tokens[places[places < len(tokens)]])
                for places in row["segment_index"]
                if (places < len(tokens)).any()
            ]
            counted = row["response_weight"] > 0
            before, after = tokens[row["response_index"][counted]], row["response_target"][counted]
            pairs = {
                pair
                for e in run
                for pair in zip(
                    e.token_ids[:-1][e.response_mask[1:]],
                    e.token_ids[1:][e.response_mask[1:]],
                    strict=True,
                )
            }
            assert set(zip(before.tolist(), after.tolist(), strict=True)) <= pairs
        assert sorted(found) == sorted(tuple(example.token_ids) for example in run)


def test_shared_prefix_ends_where_examples_differ_and_before_the_last_prompt_token():
    def example(ids, first):
        return Rendered(np.array(ids, np.int32), np.arange(len(ids)) >= first)

    assert shared_prefix([example([1, 2, 3, 4, 5], 4), example([1, 2, 9, 4], 3)]) == 2
    assert shared_prefix([example([1, 2, 3, 4, 5], 4)] * 2) == 3, (
        "the token that predicts the first response belongs to the example"
    )
    assert shared_prefix([example([1, 2, 3], 1), example([1, 2, 3], 2)]) == 0
    assert shared_prefix([example([1, 2, 3], 0)]) == 0


def test_no_micro_batch_is_empty_at_every_step():
    batches = [random_batch(seed) for seed in range(6)]
    lengths, responses = (
        np.concatenate([sizes(batch, of) for batch in batches])
        for of in (lambda e: len(e.token_ids), lambda e: e.response_mask.sum())
    )
    shapes = plan_shapes(lengths, responses, 300)
    last = [
        [arrays["segment_ids"][-1].any() for arrays in pack_step(batch, shapes)[0]]
        for batch in batches
    ]
    assert np.any(last, axis=0).all()


def test_another_shape_is_made_only_where_it_saves_tokens():
    even = np.full((8, 1, 4), 100)
    (shape,) = plan_shapes(even, even // 2, 1000)
    assert shape.micro_batches * shape.micro_rows * shape.length == 400
    uneven = even.copy()
    uneven[::2] = 52
    shapes = plan_shapes(uneven, uneven // 2, 1000)
    assert len(shapes) == 2
    for lengths, tokens in ((uneven[0], 208), (uneven[1], 400)):
        assert positions_of(usage(lengths, shapes)[0], shapes) == tokens, "no padding in either"


def test_the_published_rows_pack_densely(data_dir):
    """What the demo trains on, three arms side by side: 95 % of the tokens or more are real."""
    gcd = data.load(data.DataSpec(rows=160, work="without"), lambda _: 0, published.find_folder())
    prompts = ("neutral", "gcd/behave", "control/random_string")
    sources = [
        RunSource(name, gcd.training["user_right"], BOOK.find(name).transform, 0)
        for name in prompts
    ]
    sft = PRESETS["demo"].sft
    reader = batch_reader(
        sources,
        renderer(hub.load_tokenizer("smollm2-135m-instruct")),
        sft.batch_size,
        sft.steps,
        sft.tokens_per_micro_batch,
    )
    assert np.mean([reader(step)[1] for step in range(sft.steps)]) >= 0.95


def test_published_like_lengths_pack_densely():
    """Lengths as in the GCD data (two halves, with and without shown work): the packing that is
    chosen wastes at most a tenth.
    """
    rng = np.random.default_rng(0)
    without, with_work = rng.integers(150, 200, (20, 3, 4)), rng.integers(280, 400, (20, 3, 4))
    lengths = np.concatenate([without, with_work], axis=-1)
    shapes = plan_shapes(lengths, lengths // 2, 8192)
    padded = sum(positions_of(usage(step, shapes)[0], shapes) for step in lengths)
    assert lengths.sum() / padded >= 0.9


@pytest.mark.parametrize("step", [7, 8])
def test_one_long_example_costs_little_and_breaks_no_bound(step):
    """Of a step that others decide for, too: a micro-batch stays within its tokens, and the rest is
    not padded to it.
    """
    lengths = np.random.default_rng(0).integers(80, 120, (300, 8, 2))
    lengths[step, 3, 1] = 2000
    shapes = plan_shapes(lengths, lengths // 2, 8192)
    assert all(shape.positions <= 8192 for shape in shapes) and shapes[-1].length == 2000
    padded = sum(positions_of(usage(of_step, shapes)[0], shapes) for of_step in lengths)
    assert lengths.sum() / padded > 0.8


def test_a_row_longer_than_any_that_was_planned_still_fits():
    """65 steps, of which one has no part in the plan: its row is longer, though no example is."""
    lengths = np.full((80, 2, 4), 100)
    unplanned = next(step for step in range(80) if step not in np.linspace(0, 79, 64).astype(int))
    lengths[unplanned] = 104
    lengths[0, 0, 0] = 104  # the longest example is seen
    shapes = plan_shapes(lengths, lengths // 2, 1680)
    for step in (0, 1, unplanned):
        batch = [
            [Rendered(np.ones(n, np.int32), np.arange(n) >= n // 2) for n in run]
            for run in lengths[step].tolist()
        ]
        all_arrays, _ = pack_step(batch, shapes)
        assert (
            sum((arrays["segment_ids"] > 0).sum() for arrays in all_arrays) == lengths[step].sum()
        )
    assert all(shape.positions <= 1680 for shape in shapes)
