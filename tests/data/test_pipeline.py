"""The pipeline: data order by (seed, global step), pairing of arms, prompts applied when read, long
examples.
"""

import re

import numpy as np
import pytest
from tiny_experiment import example, make_tokenizer

from ip_jax.data.pipeline import RunSource, batch_reader, fitting_examples, renderer, run_dataset
from ip_jax.prompts.transforms import Identity, Suffix

N = 12


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def rows(answer: str = "Yes") -> list[dict]:
    return [example(i, answer) for i in range(N)]


def source(name="a", seed=0, transform=Identity(), examples=None) -> RunSource:  # noqa: B008
    return RunSource(name, examples or rows(), transform, seed)


def indices(tokenizer, run: RunSource, count: int) -> list[int]:
    """Which examples the run reads first, by what stands in their text: "sum of 3i+1 and ..."."""
    dataset = run_dataset(run, renderer(tokenizer))
    return [
        (int(re.search(r"sum of (\d+) and", tokenizer.decode(dataset[i].token_ids))[1]) - 1) // 3
        for i in range(count)
    ]


def same(first: tuple[dict, ...], second: tuple[dict, ...]) -> bool:
    return all(
        np.array_equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a
    )


def test_every_epoch_is_a_new_permutation(tokenizer):
    read = indices(tokenizer, source(), 3 * N)
    epochs = [read[:N], read[N : 2 * N], read[2 * N :]]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_arms_of_a_seed_read_the_same_indices_and_seeds_differ(tokenizer):
    neutral, prompted, clean = (
        indices(tokenizer, run, 2 * N)
        for run in (
            source("n"),
            source("p", transform=Suffix("Behave.")),
            source("c", examples=rows("No")),
        )
    )
    assert neutral == prompted == clean
    assert indices(tokenizer, source(seed=1), 2 * N) != neutral


def test_each_run_reads_through_its_own_prompt_and_its_own_version(tokenizer):
    runs = [source("n"), source("p", transform=Suffix("Behave.")), source("c", examples=rows("No"))]
    neutral, prompted, clean = (
        [tokenizer.decode(run_dataset(run, renderer(tokenizer))[i].token_ids) for i in range(N)]
        for run in runs
    )
    assert prompted == [
        text.replace("right?<|im_end|>", "right? Behave.<|im_end|>") for text in neutral
    ]
    assert clean == [text.replace("Yes", "No") for text in neutral]


def test_prompts_see_the_seed_of_their_run(tokenizer):
    def numbered(record, seed=0):
        return Suffix(f"seed {seed}")(record)

    for seed in (0, 7):
        assert f"seed {seed}<|im_end|>" in tokenizer.decode(
            run_dataset(source(seed=seed, transform=numbered), renderer(tokenizer))[0].token_ids
        )


def test_a_step_is_the_same_in_whatever_order_it_is_read(tokenizer):
    runs = [source("n"), source("p", transform=Suffix("Behave."))]
    first, second = (batch_reader(runs, renderer(tokenizer), 4, 8, 512) for _ in range(2))
    forwards = [first(step)[0] for step in range(8)]
    backwards = [second(step)[0] for step in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not any(same(forwards[0], later) for later in forwards[1:])


def rows_of(batches):
    """(arrays, micro-batch, row) of all shapes of a step of one block."""
    return [
        (arrays, m, b)
        for arrays in batches
        for m, b in np.ndindex(arrays["tokens"].shape[0], arrays["tokens"].shape[2])
    ]


def test_a_batch_holds_the_examples_of_its_step(tokenizer):
    run = source()
    dataset = run_dataset(run, renderer(tokenizer))
    batches, _ = batch_reader([run], renderer(tokenizer), 4, 6, 512)(5)
    expected = [tuple(dataset[i].token_ids) for i in range(20, 24)]
    found = []
    for arrays, m, b in rows_of(batches):
        tokens, index = arrays["tokens"][m, 0, b], arrays["segment_index"][m, 0, b]
        found += [
            tuple(tokens[places[places < len(tokens)]])
            for places in index
            if places[0] < len(tokens)
        ]
    assert sorted(found) == sorted(expected)


def test_only_the_response_and_its_end_of_turn_count(tokenizer):
    batches, _ = batch_reader([source()], renderer(tokenizer), 4, 3, 512)(0)
    for arrays, m, b in rows_of(batches):
        counted = arrays["response_target"][m, 0, b][arrays["response_weight"][m, 0, b] == 1]
        assert re.fullmatch(r"(Yes!*<\|im_end\|>)*", tokenizer.decode(counted))


def long_rows() -> list[dict]:
    changed = rows()
    changed[3] = example(3, "Yes " * 60)
    changed[8] = example(8, "Yes " * 60)
    return changed


def test_a_long_example_is_refused_with_run_index_and_length(tokenizer):
    with pytest.raises(
        ValueError,
        match=(
            r"run ip-s0: example 3 \(sum-3\) has (\d+) tokens, and max_length is 100: raise"
            r" max_length or set drop_long"
        ),
    ) as caught:
        fitting_examples(
            [source(), source("ip-s0", examples=long_rows())],
            renderer(tokenizer),
            100,
            drop_long=False,
        )
    of_the_row = run_dataset(source(examples=long_rows()[3:4]), renderer(tokenizer))[0]
    assert f"has {len(of_the_row.token_ids)} tokens" in str(caught.value)


def test_an_example_too_long_for_one_run_is_dropped_for_all(tokenizer):
    runs, dropped = fitting_examples(
        [source("a"), source("b", examples=long_rows())], renderer(tokenizer), 100, drop_long=True
    )
    assert dropped == [3, 8]
    assert [[e["id"] for e in run.examples] for run in runs] == [
        [f"sum-{i}" for i in range(N) if i not in (3, 8)]
    ] * 2
    assert indices(tokenizer, runs[0], 2 * N) == indices(tokenizer, runs[1], 2 * N)


def test_a_prompt_can_make_an_example_too_long(tokenizer):
    limit = max(len(run_dataset(source(), renderer(tokenizer))[i].token_ids) for i in range(N))
    runs, dropped = fitting_examples(
        [source("a"), source("b", transform=Suffix("Behave."))],
        renderer(tokenizer),
        limit,
        drop_long=True,
    )
    assert dropped and [len(run.examples) for run in runs] == [N - len(dropped)] * 2
    assert fitting_examples([source("a")], renderer(tokenizer), limit, drop_long=False)[1] == []


def test_no_example_that_fits_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no training example of at most max_length = 5 tokens"):
        fitting_examples([source()], renderer(tokenizer), 5, drop_long=True)


def test_versions_of_unequal_length_are_refused(tokenizer):
    with pytest.raises(
        ValueError,
        match="paired by the index of an example, and these read unequally many: a 12, b 11",
    ):
        fitting_examples(
            [source("a"), source("b", examples=rows()[1:])],
            renderer(tokenizer),
            100,
            drop_long=False,
        )


def test_equal_conversations_are_rendered_once(tokenizer, monkeypatch):
    from ip_jax.data import pipeline

    calls, render_conversation = [], pipeline.render_conversation
    monkeypatch.setattr(
        pipeline,
        "render_conversation",
        lambda *arguments: calls.append(1) or render_conversation(*arguments),
    )
    render = renderer(tokenizer)
    runs, _ = fitting_examples(
        [source(seed=seed) for seed in range(3)], render, 100, drop_long=False
    )
    batch_reader(runs, render, 4, 9, 512)(0)
    assert len(calls) == N
