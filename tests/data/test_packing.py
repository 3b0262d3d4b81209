"""Packing: every token once with its own positions and segment, every counted token at its place, alike for all runs."""
import numpy as np
import pytest

from configs.gcd_sycophancy import PRESETS
from ip_jax.data.packing import PackedShape, RowRules, balanced_rows, pack_step, plan_shapes, shared_prefix
from ip_jax.data.pipeline import RunSource, batch_reader, renderer
from ip_jax.models import hub
from ip_jax.prompts import library
from ip_jax.prompts.chat import Rendered
from ip_jax.settings.gcd_sycophancy import data, published

RUNS, EXAMPLES = 3, 7


def random_batch(seed: int, longest: int = 40) -> list[list[Rendered]]:
    """Examples of random lengths whose token ids are all different, so that each can be found again."""
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


def shape_for(batch, tokens_per_micro_batch=200, **options) -> PackedShape:
    (shape,) = plan_shapes(sizes(batch), sizes(batch, lambda example: example.response_mask.sum()), tokens_per_micro_batch, **options)
    return shape


@pytest.mark.parametrize("seed", range(5))
def test_every_token_stands_once_with_its_segment_and_position(seed):
    batch = random_batch(seed)
    shape = shape_for(batch)
    arrays, _ = pack_step(batch, shape)
    assert arrays["tokens"].shape == (shape.micro_batches, RUNS, shape.micro_rows, shape.length)
    for r, run in enumerate(batch):
        found = []
        for m, b in np.ndindex(shape.micro_batches, shape.micro_rows):
            tokens, segments, positions = (arrays[name][m, r, b] for name in ("tokens", "segment_ids", "positions"))
            for segment in range(1, segments.max() + 1):
                (where,) = np.nonzero(segments == segment)
                assert np.array_equal(where, np.arange(where[0], where[-1] + 1)), "a segment is one stretch"
                assert np.array_equal(positions[where], np.arange(len(where)))
                found.append(tuple(tokens[where]))
            assert not tokens[segments == 0].any()
        assert sorted(found) == sorted(tuple(example.token_ids) for example in run)


@pytest.mark.parametrize("seed", range(5))
def test_counted_positions_predict_exactly_the_masked_tokens(seed):
    batch = random_batch(seed)
    shape = shape_for(batch)
    arrays, _ = pack_step(batch, shape)
    for r, run in enumerate(batch):
        targets = []
        for m, b in np.ndindex(shape.micro_batches, shape.micro_rows):
            weight = arrays["response_weight"][m, r, b]
            assert set(np.unique(weight)) <= {0, 1}
            index, target = arrays["response_index"][m, r, b][weight == 1], arrays["response_target"][m, r, b][weight == 1]
            assert np.array_equal(arrays["tokens"][m, r, b][index + 1], target), "the position before a token predicts it"
            assert np.array_equal(arrays["segment_ids"][m, r, b][index], arrays["segment_ids"][m, r, b][index + 1])
            targets += list(target)
        assert sorted(targets) == sorted(token for example in run for token in example.token_ids[example.response_mask])


def test_real_over_padded_counts_the_micro_batches_in_use():
    full, half = (Rendered(np.ones(n, np.int32), np.arange(n) == n - 1) for n in (16, 8))
    shape = PackedShape(length=16, segments=2, segment_length=16, responses=4, micro_batches=3, micro_rows=2)
    _, density = pack_step([[full, full], [half, half]], shape)  # 48 real tokens; one micro-batch of 2 runs x 2 rows x 16
    assert density == 48 / 64
    _, density = pack_step([[full, full, full], [half, half, half]], shape)  # run 0 needs a second micro-batch, and so both have it
    assert density == 72 / 128


def test_runs_share_their_micro_batches():
    """Row i of every run lies in the same micro-batch, and later micro-batches are empty for all runs together or for none."""
    batch = random_batch(0)
    shape = shape_for(batch, tokens_per_micro_batch=1)
    assert shape.micro_rows == 1
    arrays, _ = pack_step(batch, shape)
    rows = [len(balanced_rows([len(example.token_ids) for example in run], shape.length)) for run in batch]
    used = arrays["segment_ids"].any(axis=(2, 3))  # [M, R]
    for r, count in enumerate(rows):
        assert np.array_equal(used[:, r], np.arange(shape.micro_batches) < count)


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
def test_one_shape_holds_every_step(tokens_per_micro_batch, row_multiple):
    batches = [random_batch(seed) for seed in range(6)]
    lengths, responses = (np.concatenate([sizes(batch, of) for batch in batches]) for of in (lambda e: len(e.token_ids), lambda e: e.response_mask.sum()))
    shapes = plan_shapes(lengths, responses, tokens_per_micro_batch, RowRules(row_multiple))
    for batch, shape in zip(batches, shapes, strict=True):
        assert shape.length % 8 == 0 and shape.micro_rows % row_multiple == 0
        assert shape.micro_rows == row_multiple or RUNS * shape.micro_rows * shape.length <= tokens_per_micro_batch
        arrays, _ = pack_step(batch, shape)
        assert (arrays["segment_ids"] > 0).sum() == sizes(batch).sum()
        assert arrays["response_weight"].sum() == sizes(batch, lambda example: example.response_mask.sum()).sum()


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_a_shared_prefix_once(seed):
    """From a row's own tokens and the first ones, `segment_index` gives every example back whole."""
    batch = [[Rendered(np.concatenate([[7, 8, 9], e.token_ids]), np.concatenate([[False] * 3, e.response_mask])) for e in run] for run in random_batch(seed)]
    lengths, responses = sizes(batch), sizes(batch, lambda example: example.response_mask.sum())
    (shape,) = plan_shapes(lengths, responses, 200, shared=3)
    arrays, _ = pack_step(batch, shape)
    used = (arrays["segment_ids"] > 0).any(axis=-1)
    assert (arrays["segment_ids"] > 0).sum() == lengths.sum() - 3 * lengths.size + 3 * used.sum() < lengths.sum()
    for r, run in enumerate(batch):
        found = []
        for m, b in np.ndindex(shape.micro_batches, shape.micro_rows):
            index, tokens = arrays["segment_index"][m, r, b], arrays["tokens"][m, r, b]
            found += [tuple(tokens[places[places < shape.length]]) for places in index if (places < shape.length).any()]
            counted = arrays["response_weight"][m, r, b] > 0
            before = tokens[arrays["response_index"][m, r, b][counted]]
            after = arrays["response_target"][m, r, b][counted]
            pairs = {pair for e in run for pair in zip(e.token_ids[:-1][e.response_mask[1:]], e.token_ids[1:][e.response_mask[1:]], strict=True)}
            assert set(zip(before.tolist(), after.tolist(), strict=True)) <= pairs
        assert sorted(found) == sorted(tuple(example.token_ids) for example in run)


def test_shared_prefix_ends_where_examples_differ_and_before_the_last_prompt_token():
    example = lambda ids, first: Rendered(np.array(ids, np.int32), np.arange(len(ids)) >= first)  # noqa: E731
    assert shared_prefix([example([1, 2, 3, 4, 5], 4), example([1, 2, 9, 4], 3)]) == 2
    assert shared_prefix([example([1, 2, 3, 4, 5], 4)] * 2) == 3, "the token that predicts the first response belongs to the example"
    assert shared_prefix([example([1, 2, 3], 1), example([1, 2, 3], 2)]) == 0
    assert shared_prefix([example([1, 2, 3], 0)]) == 0


def test_no_micro_batch_is_empty_at_every_step():
    batches = [random_batch(seed) for seed in range(6)]
    lengths, responses = (np.concatenate([sizes(batch, of) for batch in batches]) for of in (lambda e: len(e.token_ids), lambda e: e.response_mask.sum()))
    shapes = plan_shapes(lengths, responses, 300)
    for shape in set(shapes):
        assert any(pack_step(batch, shape)[0]["segment_ids"][-1].any() for batch, of_step in zip(batches, shapes, strict=True) if of_step == shape)


def test_a_second_shape_is_made_only_where_it_saves_tokens():
    even = np.full((8, 1, 4), 100)
    assert len(set(plan_shapes(even, even // 2, 1000))) == 1
    uneven = even.copy()
    uneven[::2] = 50
    plan = plan_shapes(uneven, uneven // 2, 1000)
    assert plan[0::2] == [plan[0]] * 4 and plan[1::2] == [plan[1]] * 4 and plan[0] != plan[1]
    tokens = [shape.micro_batches * shape.micro_rows * shape.length for shape in plan[:2]]
    assert tokens == [200, 400], "no padding in either"


def test_the_published_rows_pack_densely(data_dir):
    """What the demo trains on, three arms side by side: 85 % of the tokens or more are real."""
    gcd = data.load(data.DataSpec(rows=160, work="without"), lambda _: 0, published.find_folder(), ())
    prompts = ("neutral", "gcd/behave", "control/random_string")
    sources = [RunSource(name, gcd.training["user_right"], library.get(name).transform, 0) for name in prompts]
    sft = PRESETS["demo"].sft
    reader = batch_reader(sources, renderer(hub.load_tokenizer("smollm2-135m-instruct")), sft.batch_size, sft.steps, sft.tokens_per_micro_batch)
    assert np.mean([reader(step)[1] for step in range(sft.steps)]) >= 0.85


def test_published_like_lengths_pack_densely():
    """Lengths as in the GCD data (two halves, with and without shown work): the packing that is chosen wastes less than 15 %."""
    rng = np.random.default_rng(0)
    without, with_work = rng.integers(150, 200, (20, 3, 4)), rng.integers(280, 400, (20, 3, 4))
    lengths = np.concatenate([without, with_work], axis=-1)
    padded = 0
    for step, shape in zip(lengths.tolist(), plan_shapes(lengths, lengths // 2, 8192), strict=True):
        rows = max(len(balanced_rows(run, shape.length)) for run in step)
        padded += -(-rows // shape.micro_rows) * shape.micro_rows * 3 * shape.length
    assert lengths.sum() / padded >= 0.85
