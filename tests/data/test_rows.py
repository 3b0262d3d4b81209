"""Rows of a study: TRL's formats as its documentation writes them, files, the hub, and what is
refused.
"""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip_jax.data.rows import Files, FilesSpec, duplicates, overlaps, read_rows
from ip_jax.data.sources import SourceError

# https://huggingface.co/docs/trl/dataset_formats: language modelling and prompt-completion
PLAIN = {"prompt": "The sky is", "completion": " blue."}
CONVERSATIONAL = {
    "prompt": [{"role": "user", "content": "What color is the sky?"}],
    "completion": [{"role": "assistant", "content": "It is blue."}],
}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "Hello, how are you?"},
        {"role": "assistant", "content": "I'm doing great. How can I help you today?"},
    ]
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_format_of_trl_is_a_conversation(tmp_path):
    write(tmp_path / "a.jsonl", [PLAIN, CONVERSATIONAL, MESSAGES])
    rows = read_rows("a.jsonl", tmp_path)
    assert [row["messages"] for row in rows.examples] == [
        [{"role": "user", "content": "The sky is"}, {"role": "assistant", "content": " blue."}],
        [*CONVERSATIONAL["prompt"], *CONVERSATIONAL["completion"]],
        MESSAGES["messages"],
    ]
    assert [row["id"] for row in rows.examples] == ["a:1", "a:2", "a:3"]
    assert rows.sha256 == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert rows.describe() == f"3 rows of a.jsonl (sha256 {rows.sha256[:8]})"


def test_parquet_and_json_lines_give_the_same_rows_and_keep_further_columns(tmp_path):
    records = [PLAIN | {"id": "x", "answer": 3, "tags": ["a"]}, PLAIN | {"id": "y", "answer": 4}]
    write(tmp_path / "a.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    lines, table = (read_rows(f"a.{kind}", tmp_path).examples for kind in ("jsonl", "parquet"))
    assert lines[0] == table[0] and lines[0]["answer"] == 3 and lines[0]["tags"] == ["a"]
    assert [row["id"] for row in table] == ["x", "y"]


def test_an_evaluation_row_needs_no_answer(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "Why?", "answer": "42"}])
    (row,) = read_rows("a.jsonl", tmp_path).examples
    assert row["messages"] == [{"role": "user", "content": "Why?"}] and row["answer"] == "42"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([PLAIN, {"text": "x"}], "a.jsonl, line 2 has no messages"),
        ([PLAIN | {"id": "x"}, PLAIN | {"id": "x"}], "rows 1 and 2 have the same id 'x'"),
        ([], "holds no rows"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, records, message):
    write(tmp_path / "a.jsonl", records)
    with pytest.raises(SourceError, match=message) as caught:
        read_rows("a.jsonl", tmp_path)
    assert "\n" not in str(caught.value)


def test_other_files_and_names_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="must end in .jsonl or .parquet"):
        read_rows("a.csv", tmp_path)
    with pytest.raises(FileNotFoundError):
        read_rows("none.jsonl", tmp_path)
    with pytest.raises(ValueError, match="must read hf:owner/name"):
        read_rows("hf:nobody")


def test_a_dataset_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub

    def refuse(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(OSError, match="hf:a/b/train.jsonl cannot be fetched: no route") as caught:
        read_rows("hf:a/b/train.jsonl")
    assert "\n" not in str(caught.value)


def test_a_dataset_of_one_file_needs_no_file_name(monkeypatch, tmp_path):
    import huggingface_hub

    file = write(tmp_path / "train.jsonl", [PLAIN])
    asked = []

    def download(repo, name, revision, repo_type):
        asked.append((repo, name, revision, repo_type))
        return str(file)

    files = ["README.md", "data/train.jsonl", "data/test.jsonl"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    rows = read_rows("hf:me/set@v1")
    assert asked == [("me/set", "data/train.jsonl", "v1", "dataset")]
    assert rows.source == "hf:me/set@v1" and len(rows.examples) == 1
    files[:] = ["a.parquet", "b.parquet"]
    with pytest.raises(ValueError, match="has several files of rows, or none: name one as"):
        read_rows("hf:me/set")


def test_a_studys_files_lie_beside_it_and_a_preset_may_take_another(tmp_path):
    write(tmp_path / "train.jsonl", [PLAIN, PLAIN])
    write(tmp_path / "eval.jsonl", [PLAIN])
    files = Files("train.jsonl", "eval.jsonl", beside=str(tmp_path / "study.py"))
    data = files(None, None)
    assert {kind: len(rows) for kind, rows in data.training.items()} == {"train": 2}
    assert {name: len(rows) for name, rows in data.evaluation.items()} == {"eval": 1}
    assert data.provenance.startswith("2 rows of train.jsonl (sha256 ")
    other = write(tmp_path / "other.jsonl", [PLAIN] * 3)
    fewer = files(FilesSpec(training_file=str(other), rows=1), None)
    assert len(fewer.training["train"]) == 1 and "the first 1 of 3 rows of other" in (
        fewer.provenance
    )
    with pytest.raises(ValueError, match="9 training rows were asked for: there are 2"):
        files(FilesSpec(rows=9), None)
    kinds = Files({"a": "train.jsonl", "b": "eval.jsonl"}, "eval.jsonl", files.beside)
    with pytest.raises(ValueError, match="paired by their number, and these have {'a': 2, 'b': 1}"):
        kinds(None, None)


def test_overlaps_and_duplicates_are_found_whatever_their_spaces_and_case():
    def row(name, said):
        return {"id": name, "messages": [{"role": "user", "content": said}]}

    training = [row("a", "Why?"), row("b", "How  so?"), row("c", "how so?")]
    assert overlaps(training, [row("x", "HOW SO?"), row("y", "Who?")]) == [("c", "x")]
    assert duplicates(training) == [("b", "c")]


def test_half_a_character_is_refused_with_its_line_or_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps(PLAIN) + '\n{"prompt": "a\\ud83d", "completion": "b\\udc00c"}\n'
    )
    with pytest.raises(
        SourceError, match="a.jsonl, line 2, message 1 holds half of a character at"
    ):
        read_rows("a.jsonl", tmp_path)
    rows = read_rows("a.jsonl", tmp_path, mend=True)
    assert [turn["content"] for turn in rows.examples[1]["messages"]] == ["a\ufffd", "b\ufffdc"]
    assert rows.replaced == 2 and "2 broken characters replaced" in rows.describe()
    json.dumps(rows.examples).encode()
    whole = '{"prompt": "\\ud83d\\ude00", "completion": "x"}\n'
    (tmp_path / "b.jsonl").write_text(whole)
    assert read_rows("b.jsonl", tmp_path).examples[0]["messages"][0]["content"] == "😀"
