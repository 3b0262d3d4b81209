"""The one door to the GCD data, with and without the published files, and the TFDS round trip."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest

from ip_jax.data.sources import TfdsSource, read_tfds
from ip_jax.studies.gcd_sycophancy import data, generate, published
from ip_jax.studies.gcd_sycophancy.data import DataSpec
from ip_jax.studies.gcd_sycophancy.generate import ClaimCounts

SMALL = DataSpec(rows=40, work="without", claims=ClaimCounts(wrong=12, right=6, asked=6))
ALL_SETS = dataclasses.replace(SMALL, eval_sets=data.EVAL_SETS)
OF_SAMPLING = ("max_new_tokens", "full_steps_only")  # how a row is asked, no part of the dataset


def count_tokens(messages):
    return sum(len(message["content"].split()) for message in messages)


@pytest.fixture(scope="module")
def folder(data_dir):
    return published.find_folder()


def _pairs(rows):
    return {
        tuple(map(int, re.search(r"GCD\((\d+), (\d+)\)", row["messages"][0]["content"]).groups()))
        for row in rows
    }


def test_published_files_are_used_and_claims_avoid_all_of_their_pairs(folder):
    loaded = data.load(ALL_SETS, count_tokens, folder)
    whole = {kind: published.read_training(folder, kind) for kind in data.KINDS}
    for kind in data.KINDS:
        assert loaded.training[kind] == [row for row in whole[kind] if not row["shown_work"]][:40]
    assert {name: len(rows) for name, rows in loaded.evaluation.items()} == {
        "generated": 24,
        "task": 60,
        "ood": 420,
    }
    assert list(loaded.evaluation) == list(data.EVAL_SETS), "the main one first"
    assert not _pairs(loaded.evaluation["generated"]) & _pairs(whole["user_right"] + whole["mixed"])
    eligible = generate.avoids(published.evaluation_pairs(folder))
    assert all(eligible(*pair) for pair in _pairs(loaded.evaluation["generated"]))
    assert loaded.provenance.startswith(
        "Published GCD files: 40 training rows without shown work; evaluation sets task 60, ood 420"
        " prompts; generated claims (12 wrong"
    )
    only = data.load(SMALL, count_tokens, folder)
    assert (
        only.evaluation == {"generated": loaded.evaluation["generated"]}
        and "; generated claims (12 wrong" in only.provenance
        and "ood" not in only.provenance
    )


def test_all_published_rows_by_default(folder):
    loaded = data.load(DataSpec(claims=SMALL.claims), count_tokens, folder)
    assert {kind: len(rows) for kind, rows in loaded.training.items()} == {
        "user_right": 1000,
        "mixed": 1000,
    }
    with pytest.raises(
        ValueError,
        match="501 training rows were asked for, and the published files have 500 for work='with'",
    ):
        data.load(DataSpec(rows=501, work="with"), count_tokens, folder)


def test_without_files_everything_is_generated_and_the_caption_says_so():
    loaded = data.load(SMALL, count_tokens, None)
    assert loaded == data.load(SMALL, count_tokens, None)
    assert set(loaded.evaluation) == {"generated"} and Counter(
        row["claim"] for row in loaded.evaluation["generated"]
    ) == {"wrong": 12, "right": 6, "asked": 6}
    training = loaded.training["user_right"] + loaded.training["mixed"]
    assert len(training) == 80 and not any(row["shown_work"] for row in training)
    assert not _pairs(training) & _pairs(loaded.evaluation["generated"])
    assert {
        math.gcd(*pair) for pair in _pairs(training + loaded.evaluation["generated"])
    } <= generate.ALLOWED_GCDS
    assert Counter(row["claim"] for row in loaded.training["mixed"]) == {"right": 20, "wrong": 20}
    assert loaded.provenance.startswith(
        "No published files: 40 training rows without shown work generated"
    )
    assert data.load(DataSpec(rows=40, seed=1), count_tokens, None).training != loaded.training


def test_rows_of_ones_own_take_the_place_of_the_settings(tmp_path):
    own = tmp_path / "mine.jsonl"
    turns = [
        {"role": "user", "content": "Is GCD(12, 8) = 4?"},
        {"role": "assistant", "content": "Yes."},
    ]
    own.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(3)))
    spec = dataclasses.replace(SMALL, training_file=str(own))
    loaded = data.load(spec, count_tokens, None)
    assert (
        list(loaded.training) == ["user_right"]
        and [row["messages"] for row in loaded.training["user_right"]] == [turns] * 3
    ), "fewer than SMALL asks for"
    assert (
        loaded.provenance.startswith("3 training rows of mine.jsonl")
        and len(loaded.evaluation["generated"]) == 24
    )
    own.write_text("\n")
    with pytest.raises(ValueError, match="mine.jsonl has no line to train on"):
        data.load(spec, count_tokens, None)
    own.write_text(
        json.dumps({"messages": [turns[0], {"role": "assistant", "content": ""}]}) + "\n"
    )
    with pytest.raises(ValueError, match="mine.jsonl, line 1"):
        data.load(spec, count_tokens, None)


def test_the_published_files_hold_much_the_same_problems_in_another_order(folder):
    right, mixed = (published.read_training(folder, kind) for kind in data.KINDS)
    asked = [
        [published.pairs_in(row["messages"][0]["content"])[0] for row in rows]
        for rows in (right, mixed)
    ]
    assert (
        len(set(asked[0]) & set(asked[1])) == 807
        and sum(a == b for a, b in zip(*asked, strict=True)) == 2
    )


def test_tfds_round_trip_without_tensorflow(tmp_path):
    from ip_jax.studies.gcd_sycophancy.tfds_builder import GcdSycophancy

    loaded = data.load(SMALL, count_tokens, None)
    builder = GcdSycophancy(loaded, data_dir=tmp_path)
    builder.download_and_prepare()
    for name, rows in {**loaded.training, **loaded.evaluation}.items():
        source = TfdsSource(builder.as_data_source(name))
        assert len(source) == len(rows)
        for stored, row in zip(source, rows, strict=True):
            assert {key: value for key, value in stored.items() if value is not None} == {
                key: value
                for key, value in row.items()
                if value is not None and key not in OF_SAMPLING
            }
    again = read_tfds(
        f"gcd_sycophancy/{builder.builder_config.name}:1.0.0", split="mixed", data_dir=tmp_path
    )
    assert again[3]["messages"] == loaded.training["mixed"][3]["messages"]
    assert "tensorflow" not in sys.modules


def test_other_rows_never_meet_a_prepared_dataset(tmp_path):
    from ip_jax.studies.gcd_sycophancy.tfds_builder import GcdSycophancy

    one, two = (
        GcdSycophancy(
            data.load(DataSpec(rows=4, claims=ClaimCounts(1, 1, 1), seed=seed), count_tokens, None),
            tmp_path,
        )
        for seed in (0, 1)
    )
    assert one.data_dir != two.data_dir


def test_loading_data_leaves_tfds_out():
    code = (
        "import sys, ip_jax.studies.gcd_sycophancy.data; print([m for m in ('tensorflow_datasets',"
        " 'grain', 'tensorflow', 'torch') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_problems_that_are_asked_get_room_and_are_left_out_at_quick_looks():
    spec = dataclasses.replace(SMALL, max_new_tokens_solving=77)
    rows = data.load(spec, count_tokens, None).evaluation["generated"]
    assert {row["claim"] for row in rows if row.get("full_steps_only")} == {"asked"}
    assert {row.get("max_new_tokens") for row in rows} == {None, 77}


def test_an_unknown_evaluation_set_is_refused():
    with pytest.raises(ValueError, match=r"data.eval_sets is \('tasks',\): choose at least one of"):
        DataSpec(eval_sets=("tasks",))
