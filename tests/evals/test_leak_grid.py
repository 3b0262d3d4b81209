"""The leak grid: what is asked in a cell, its rows, its part file, and all parts as one table."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from tiny_experiment import example, make_tokenizer

from ip_jax.evals import leak_grid
from ip_jax.evals.leak_grid import (
    Cell,
    Decoding,
    merge_parts,
    prompted,
    requests_for,
    rows_of,
    scored,
    table_of,
)
from ip_jax.prompts.transforms import Identity, Suffix
from ip_jax.sampling.sampler import Completion
from ip_jax.training.results import write_binary

CELL = Cell("ip", 3, 20, 160, "task", "gcd/behave", True, Suffix("Behave."))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_gold_answer_is_not_asked_and_the_prompt_is_put_in():
    record = example(1, "Yes, the solution is correct.")
    asked = prompted(record, CELL.transform, 0)["messages"]
    assert [message["role"] for message in asked] == ["user"]
    assert asked[0]["content"] == record["messages"][0]["content"] + " Behave."
    without_gold = {**record, "messages": record["messages"][:1]}
    assert prompted(without_gold, CELL.transform, 0)["messages"] == asked
    assert len(record["messages"]) == 2, "the example itself is left as it was"


def test_requests_are_what_the_template_writes(tokenizer):
    rows = [example(i, "-") for i in range(3)]
    requests = requests_for(
        CELL, rows, tokenizer, lambda name: int(name[4:]), Decoding(9, 0.7, 0.9)
    )
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
        turn = {"role": "user", "content": row["messages"][0]["content"] + " Behave."}
        assert np.array_equal(
            request.prompt_ids,
            tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False),
        )
        assert (request.example_id, request.seed, request.n_samples) == (i, 3, 1)
        assert (request.max_new_tokens, request.temperature, request.top_p) == (9, 0.7, 0.9)


def test_rows_hold_what_was_asked_answered_and_judged(tokenizer):
    records = [example(1, "-"), {**example(2, "-"), "claimed": None, "mod": 7}]
    ids = [
        np.array(tokenizer("Yes, is it<|im_end|>").input_ids),
        np.array(tokenizer("The").input_ids),
    ]
    completions = [
        Completion(ids[0], np.zeros(len(ids[0])), True),
        Completion(ids[1], np.zeros(len(ids[1])), False),
    ]
    rows = rows_of(
        "sums",
        CELL,
        records,
        completions,
        tokenizer,
        ("label", "claim", "answer", "claimed", "triplet", "mod"),
    )
    first, second = rows
    assert first == {
        "experiment": "sums",
        "arm": "ip",
        "seed": 3,
        "step": 20,
        "examples_seen": 160,
        "eval_set": "task",
        "eval_prompt": "gcd/behave",
        "own_prompt": True,
        "example_id": "sum-1",
        "triplet": "1",
        "label": "user_right",
        "claim": "right",
        "answer": "9",
        "claimed": "9",
        "mod": None,
        "prompt": records[0]["messages"][0]["content"] + " Behave.",
        "completion": "Yes, is it",
        "n_tokens": len(ids[0]),
        "ended": True,
    }
    assert (second["completion"], second["ended"], second["claimed"], second["mod"]) == (
        "The",
        False,
        None,
        7,
    )


def test_whatever_a_scorer_does_costs_its_own_row_alone():
    def broken(example, completion):
        return {"confirms": completion[3]}

    assert scored(broken, {}, "yes!") == {"confirms": "!"}
    assert scored(broken, {}, "no") == {"score_error": "IndexError: string index out of range"}
    assert scored(lambda *_: None, {}, "no") == {
        "score_error": "the scorer returned NoneType and no dict"
    }
    rows = [{"arm": "a"} | scored(broken, {}, text) for text in ("yes!", "no")]
    table = table_of(rows)
    assert table["confirms"].to_pylist() == ["!", None]
    assert table["score_error"].null_count == 1


def test_a_column_of_two_types_is_one_sentence():
    with pytest.raises(ValueError, match="the column 'x' of the transcripts holds bool and str"):
        table_of([{"x": True}, {"x": "yes"}])


def test_missing_values_keep_their_type(tmp_path, tokenizer):
    """A part whose every `mod` and `claimed` is missing can be read together with one that has
    them.
    """
    done = [Completion(np.array([5]), np.zeros(1), False)]
    folder = epath.Path(tmp_path)
    for step, changes in enumerate(({"mod": None, "claimed": None}, {"mod": 4, "claimed": "9"})):
        cell = Cell("ip", 0, step, 0, "task", "neutral", False, Identity())
        rows = rows_of(
            "sums",
            cell,
            [{**example(1, "-"), **changes}],
            done,
            tokenizer,
            ("claimed", "mod"),
        )
        rows = [row | {"confirms": None, "share": step / 2 if step else 0} for row in rows]
        write_binary(folder / cell.part, leak_grid.parquet_writer(leak_grid.table_of(rows)))
    (folder / f".{cell.part}.partial").write_bytes(b"PAR1")  # what a kill may leave
    table = merge_parts(folder)
    assert table["share"].to_pylist() == [0, 0.5] and table["claimed"].to_pylist() == [None, "9"]
    assert table["mod"].to_pylist() == [None, 4] and table["step"].to_pylist() == [0, 1]


def test_parts_come_in_the_order_of_their_names(tmp_path):
    for name in ("b", "c", "a"):
        pq.write_table(pa.table({"name": [name]}), tmp_path / f"{name}.parquet")
    assert merge_parts(epath.Path(tmp_path))["name"].to_pylist() == ["a", "b", "c"]


@pytest.mark.parametrize("made", [True, False])
def test_nothing_to_merge_is_one_sentence(tmp_path, made):
    folder = epath.Path(tmp_path) / "transcripts"
    if made:
        folder.mkdir()
    with pytest.raises(
        FileNotFoundError, match="transcripts holds no transcripts yet: run the experiment first"
    ):
        merge_parts(folder)


def test_every_cell_has_a_file_of_its_own():
    axes = [
        ("a", "b_s1"),
        (0, 1, 10),
        (0, 1, 10, 100_000),
        ("task", "ood"),
        ("neutral", "gcd/behave", "gcd/behave_believe"),
    ]
    parts = {
        Cell(arm, seed, step, 0, eval_set, prompt, False, Identity()).part
        for arm, seed, step, eval_set, prompt in itertools.product(*axes)
    }
    assert len(parts) == 2 * 3 * 4 * 2 * 3
    assert all("/" not in part for part in parts)
