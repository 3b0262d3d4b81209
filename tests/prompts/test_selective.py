"""Selective inoculation: which rows get the prompt, at which rates, and the same on every host."""

import functools
import pickle

import grain
import pytest
from scipy.stats import binom

from ip_jax.prompts.places import put
from ip_jax.prompts.transforms import (
    Detector,
    Identity,
    Paraphrases,
    PromptError,
    Selective,
    Share,
    Slot,
    Suffix,
    Where,
)

SHOUT = Suffix("Shout.")
N = 4000
ROWS = [
    {
        "id": f"row{i}",
        "messages": [{"role": "user", "content": "Hello"}],
        "hacked": i % 4 == 0,
        "label": "ab"[i % 2],
    }
    for i in range(N)
]
HACKED = [row for row in ROWS if row["hacked"]]
HONEST = [row for row in ROWS if not row["hacked"]]


def chosen(rows, among=ROWS, seed=0):
    """The ids of the rows that get the prompt."""
    transform = Selective(rows, SHOUT, Identity())
    return {row["id"] for row in among if transform(row, seed) != row}


def within(count, n, rate):
    """Whether a count lies in the exact interval that holds all but 1e-6 of the counts at this
    rate."""
    low, high = binom.interval(1 - 1e-6, n, rate)
    return low <= count <= high


def test_where_takes_the_rows_that_hold_the_value():
    assert chosen(Where("hacked")) == {row["id"] for row in HACKED}
    assert chosen(Where("hacked", False)) == {row["id"] for row in HONEST}
    assert chosen(Where("label", "b")) == {row["id"] for row in ROWS if row["label"] == "b"}


def test_the_others_get_the_other_op():
    slot = Slot("here", "", separator=" ")
    selective = Selective(Where("hacked"), put(slot, "Hack."), put(slot, ""))
    messages = [{"role": "user", "content": "Now. {here}Go."}]
    texts = [
        selective({"id": "1", "messages": messages, "hacked": hacked})["messages"][0]["content"]
        for hacked in (True, False)
    ]
    assert texts == ["Now. Hack. Go.", "Now. Go."]


@pytest.mark.parametrize("rows", [Where("hack"), Detector("hack", 1.0, 0.0)])
def test_a_missing_column_is_refused_with_those_that_are_there(rows):
    with pytest.raises(
        PromptError, match="'row0' has no column 'hack' .* it has id, messages, hacked, label"
    ):
        Selective(rows, SHOUT, Identity())(ROWS[0])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_share_is_as_large_as_it_says(share, seed):
    assert within(len(chosen(Share(share), seed=seed)), N, share)


def test_shares_are_nested_and_their_ends_are_exact():
    shares = [chosen(Share(share)) for share in (0, 0.001, 0.25, 0.5, 0.75, 1)]
    assert all(smaller < larger for smaller, larger in zip(shares, shares[1:], strict=False))
    assert (len(shares[0]), len(shares[-1])) == (0, N)


def test_two_seeds_choose_independently():
    both = chosen(Share(0.5), seed=0) & chosen(Share(0.5), seed=1)
    assert within(len(both), N, 0.25)


def test_a_row_is_chosen_by_its_id_alone():
    """Neither by its place in a shard nor by what else it holds."""
    shard = [{**row, "messages": [{"role": "user", "content": "Else"}]} for row in ROWS[1::7]]
    assert chosen(Share(0.5), shard) == chosen(Share(0.5)) & {row["id"] for row in shard}


@pytest.mark.parametrize("rates", [(0.9, 0.1), (0.5, 0.5), (0.2, 0.7)])
def test_a_detector_flags_at_both_of_its_rates(rates):
    detector = Detector("hacked", *rates)
    assert within(len(chosen(detector, HACKED)), len(HACKED), rates[0])
    assert within(len(chosen(detector, HONEST)), len(HONEST), rates[1])
    turned = Detector("hacked", *rates, value=False)
    assert within(len(chosen(turned, HONEST)), len(HONEST), rates[0])


def test_a_perfect_detector_is_the_column_itself():
    assert chosen(Detector("hacked", 1.0, 0.0)) == chosen(Where("hacked"))
    assert chosen(Detector("hacked", 0.0, 1.0)) == chosen(Where("hacked", False))


def test_a_better_detector_flags_all_that_a_worse_one_does():
    worse = chosen(Detector("hacked", 0.3, 0.0))
    assert worse < chosen(Detector("hacked", 0.6, 0.0))


def test_a_detector_a_share_and_a_pool_choose_independently():
    pool = Paraphrases((Suffix("0"), Suffix("1")))
    drawn = {row["id"] for row in ROWS if pool(row)["messages"][0]["content"] == "Hello 1"}
    share, detector = chosen(Share(0.5)), chosen(Detector("hacked", 0.5, 0.5))
    other = chosen(Detector("label", 0.5, 0.5, value="a"))
    for one, two in ((share, detector), (share, drawn), (detector, drawn), (detector, other)):
        assert within(len(one & two), N, 0.25)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_and_rates_outside_0_and_1_are_refused(value):
    with pytest.raises(PromptError, match="the share of rows is .*between 0 and 1"):
        Share(value)
    with pytest.raises(PromptError, match="the true positive rate is .*between 0 and 1"):
        Detector("hacked", value, 0.0)
    with pytest.raises(PromptError, match="the false positive rate is .*between 0 and 1"):
        Detector("hacked", 1.0, value)


@pytest.mark.parametrize("rows", [Share(0.5), Detector("hacked", 0.9, 0.1)])
def test_a_choice_needs_the_examples_id(rows):
    with pytest.raises(PromptError, match="by the example's id"):
        rows({"messages": [], "hacked": True})


@pytest.mark.parametrize(
    "rows", [Where("label", "a"), Share(0.25), Detector("hacked", 0.9, 0.1)], ids=repr
)
def test_selective_ops_are_frozen_picklable_and_run_in_grain(rows):
    selective = Selective(rows, SHOUT, Identity())
    loaded = pickle.loads(pickle.dumps(selective))
    assert loaded == selective == eval(repr(selective)) and hash(loaded) == hash(selective)
    few = ROWS[:40]
    dataset = grain.MapDataset.source(few).map(functools.partial(selective, seed=2))
    assert list(dataset) == [loaded(row, 2) for row in few]
    assert few == ROWS[:40] and few[0]["messages"][0]["content"] == "Hello"
