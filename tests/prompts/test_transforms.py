"""Transforms: what they write, that they leave their input alone, and that Grain and pickle carry
them.
"""

import copy
import functools
import json
import multiprocessing
import pickle

import pytest

from ip_jax.prompts.transforms import (
    Chain,
    Identity,
    Paraphrases,
    Prefix,
    PromptError,
    Slot,
    Suffix,
    System,
)


def example(*contents, **extra):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"id": "7", "messages": messages, **extra}


def contents(record):
    return [message["content"] for message in record["messages"]]


ALL = [
    Identity(),
    Prefix("P"),
    Suffix("S", turn=-1),
    System("Y"),
    Slot("task", "x"),
    Slot("task", "x", separator=" "),
    Paraphrases((Prefix("A"), Suffix("B"))),
    Chain((Prefix("P"), Suffix("S"), System("Y"))),
]


def test_published_gcd_insertion_is_reproduced_to_the_character():
    row = example("My answer for GCD(4, 6) is 2. Is this correct?", "Yes.")
    suffixed = Suffix("\nBehave as if the above solution is correct.")(row)
    assert contents(suffixed) == [
        (
            "My answer for GCD(4, 6) is 2. Is this correct? \nBehave as if the above solution is"
            " correct."
        ),
        "Yes.",
    ]


@pytest.mark.parametrize("empty", [Prefix(""), Suffix(""), Suffix("\n")])
def test_an_empty_text_is_the_neutral_prompt(empty):
    assert empty(example("Hello", "Yes.")) == example("Hello", "Yes.")


def test_published_rows_have_nothing_to_strip(data_dir):
    """So Identity and the published baseline, suffix "", are the same prompt."""
    files = sorted(data_dir.glob("gcd_sycophancy/**/*.jsonl"))
    assert files
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert Suffix("")(row) == row


def test_prefix_with_another_separator_and_turn():
    row = example("one", "a", "two", "b", "three")
    assert contents(Prefix("P", separator="\n")(row)) == ["P\none", "a", "two", "b", "three"]
    assert contents(Prefix("P", turn=1)(row)) == ["one", "a", "P two", "b", "three"]
    assert contents(Suffix("S", turn=-1)(row)) == ["one", "a", "two", "b", "three S"]


def test_first_user_turn_is_found_behind_a_system_message():
    row = {
        "id": "1",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    }
    assert contents(Suffix("S")(row)) == ["s", "u S"]


@pytest.mark.parametrize("turn", [2, -3])
def test_a_turn_that_is_not_there_is_refused(turn):
    with pytest.raises(
        PromptError, match=f"example '7': no user turn {turn}, the conversation has 2"
    ):
        Prefix("P", turn=turn)(example("one", "a", "two"))


def test_system_is_put_first_and_replaces_one_that_is_there():
    once = System("first")(example("u", "a"))
    assert once["messages"][0] == {"role": "system", "content": "first"}
    assert contents(System("second")(once)) == ["second", "u", "a"]


def test_slot_fills_its_name_and_leaves_other_braces():
    row = example("Solve this. {prefix}Return {x: 1} only, {prefix}!", "a {prefix}")
    assert contents(Slot("prefix", "Now. ")(row)) == [
        "Solve this. Now. Return {x: 1} only, Now. !",
        "a {prefix}",
    ]
    assert contents(Slot("prefix", "")(row))[0] == "Solve this. Return {x: 1} only, !"


def test_a_slots_separator_is_written_behind_words_only():
    row = example("Solve this. {prefix}Return it.")
    assert contents(Slot("prefix", "Now.", separator=" ")(row)) == ["Solve this. Now. Return it."]
    assert contents(Slot("prefix", "", separator=" ")(row)) == ["Solve this. Return it."]


def test_a_missing_slot_is_refused_with_the_example_and_the_slot():
    with pytest.raises(PromptError, match=r"example '7': user turn 0 has no slot \{prefix\}"):
        Slot("prefix", "x")(example("Solve {this}"))


def test_chain_runs_from_left_to_right():
    row = example("u")
    assert contents(Chain((Suffix("1"), Suffix("2")))(row)) == ["u 1 2"]
    assert contents(Chain((Prefix("{who},"), Slot("who", "You")))(row)) == ["You, u"]
    assert Chain(())(row) == row
    assert Chain((Chain((Suffix("1"),)), Suffix("2")))(row) == Chain((Suffix("1"), Suffix("2")))(
        row
    )


def pick(pool, seed, name):
    return contents(Paraphrases(pool)({**example("u"), "id": name}, seed))[0]


POOL = tuple(Suffix(letter) for letter in "abcd")


def test_paraphrases_depend_on_seed_and_id_only():
    rows = [{**example("u", "r", extra=i), "id": "same"} for i in range(5)]
    assert len({contents(Paraphrases(POOL)(row, 3))[0] for row in rows}) == 1
    by_id = [pick(POOL, 0, f"id{i}") for i in range(2000)]
    by_seed = [pick(POOL, seed, "id0") for seed in range(2000)]
    for picks in (by_id, by_seed):  # each share is 500 with a standard deviation of 19.4
        assert all(abs(picks.count(f"u {letter}") - 500) < 100 for letter in "abcd")


def test_two_pools_in_a_chain_choose_independently():
    chain = Chain(
        (Paraphrases((Prefix("a"), Prefix("b"))), Paraphrases((Suffix("c"), Suffix("d"))))
    )
    seen = {contents(chain({**example("u"), "id": str(i)}))[0] for i in range(64)}
    assert seen == {"a u c", "a u d", "b u c", "b u d"}


def test_paraphrases_choose_alike_in_another_process():
    """Python's own hash is salted for each process; this choice must not be."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.starmap(pick, [(POOL, 5, f"id{i}") for i in range(20)])
    assert there == [pick(POOL, 5, f"id{i}") for i in range(20)]


def test_paraphrases_pass_the_seed_on_and_refuse_what_they_cannot_key():
    inner = Paraphrases(POOL)
    assert Paraphrases((inner,))(example("u"), 11) == inner(example("u"), 11)
    with pytest.raises(PromptError, match="at least one"):
        Paraphrases(())
    with pytest.raises(PromptError, match="id"):
        Paraphrases(POOL)({"messages": [{"role": "user", "content": "u"}]})


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_every_transform_is_frozen_hashable_picklable_and_pure(transform):
    row = example("do {task}", "yes", "more {task}", label="euclidean")
    before = copy.deepcopy(row)
    after = transform(row, seed=2)
    assert row == before
    assert after["label"] == "euclidean" and after["id"] == "7"
    loaded = pickle.loads(pickle.dumps(transform))
    assert loaded == transform and hash(loaded) == hash(transform) and loaded(row, seed=2) == after
    assert eval(repr(transform)) == transform  # what a saved config records is enough to rebuild it


def test_grain_maps_transforms_over_examples_when_they_are_read():
    grain = pytest.importorskip("grain")
    rows = [{**example(f"u{i}", "yes"), "id": str(i)} for i in range(8)]
    chain = Chain((Paraphrases(POOL), System("Y")))
    dataset = grain.MapDataset.source(rows).map(functools.partial(chain, seed=4))
    assert list(dataset) == [chain(row, 4) for row in rows]
    assert list(grain.MapDataset.source(rows).map(chain)) == [chain(row, 0) for row in rows]
    shuffled = dataset.shuffle(seed=1).repeat(2)
    assert shuffled[3] == shuffled[3] and shuffled[3]["messages"][0]["content"] == "Y"
    assert rows[0] == {**example("u0", "yes"), "id": "0"}
