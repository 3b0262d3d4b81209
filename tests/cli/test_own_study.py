"""A stranger's study, from `ip-jax new` on: checked, trained, drawn and exported as users do."""

import json
import pathlib
import re

import pyarrow.parquet as pq
import pytest
from tiny_experiment import make_tokenizer, write_model

from ip_jax import cli
from ip_jax.cli import run as run_command

FIELDS = "--sft.steps 4 --evaluation.neutral-steps 2 --evaluation.max-new-tokens 4".split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a fresh study and a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_command, "_enable_compile_cache", lambda: "nowhere")
    write_model(tmp_path / "model", tokenizer=make_tokenizer())
    cli.main(["new", "mine"])
    return tmp_path


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def edit(folder, before, after):
    path = folder / "mine" / "study.py"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_a_new_study_is_short_and_holds_no_placeholder(here):
    assert sorted(path.name for path in (here / "mine").iterdir()) == [
        "README.md",
        "eval.jsonl",
        "study.py",
        "train.jsonl",
    ]
    study = (here / "mine" / "study.py").read_text()
    assert len(study.splitlines()) <= 60
    assert not re.search(r"\bNAME\b", study + (here / "mine" / "README.md").read_text())
    assert len((here / "mine" / "train.jsonl").read_text().splitlines()) == 20


def test_a_new_study_is_not_written_over_another(here, capsys):
    assert "mine is there already" in failure(capsys, "new", "mine")
    assert "cannot name a study" in failure(capsys, "new", "../up")


def test_a_study_is_checked_without_weights(here, capsys):
    (here / "model" / "model.safetensors").unlink()
    cli.main(["check", "mine", "--model.name", "model"])
    said = capsys.readouterr().out
    assert "«THE CAPITAL OF FRANCE IS PARIS.<|im_end|>" in said, "the response carries loss"
    assert "« Answer in capital letters.»" in " ".join(said.split()), "what the prompt adds"
    assert "{'shouts': False, 'answers': False}" in said
    assert "has 20 rows: with fewer than 50" in " ".join(said.split())
    assert "there is one seed" in said and "nothing is wrong" in said
    only = "asked to shout: random string"
    cli.main(["check", "mine", "--model.name", "model", "--arm", "shout.random_string"])
    assert [only in line for line in capsys.readouterr().out.split("\n") if "prompt " in line][0]


def test_what_is_wrong_is_said_and_the_exit_code_is_2(here, capsys):
    rows = (here / "mine" / "train.jsonl").read_text().splitlines()
    asked = json.loads(rows[0])["prompt"]
    rows[1] = json.dumps({"prompt": "What is above?", "completion": "\n\nGRASS."})
    (here / "mine" / "train.jsonl").write_text("\n".join(rows) + "\n")
    with (here / "mine" / "eval.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": asked.upper(), "answer": "x"}) + "\n")
    edit(here, "Answer in capital letters.", "Answer the question below in capital letters.")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", "mine", "--model.name", "model", "--sft.max-length", "40"])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 21 rows of the evaluation set eval ask what a training row asks" in said
    assert "training rows have more than sft.max_length = 40 tokens" in said
    assert "says 'below', but it stands behind the user's words" in said


def test_a_study_is_trained_drawn_and_exported_like_one_of_ours(here, capsys):
    cli.main(["run", "mine", "--model.name", "model", *FIELDS])
    (folder,) = (here / "results" / "mine").iterdir()
    assert folder.name.startswith("demo-") and (folder / "figure.png").stat().st_size > 10_000
    rows = pq.read_table(folder / "transcripts.parquet").to_pylist()
    arms = {"untrained", "neutral", "shout", "shout.random_string"}
    assert {row["arm"] for row in rows} == arms
    assert {row["answer"] for row in rows} >= {"Berlin", "blue"} and {
        type(row["shouts"]) for row in rows
    } == {bool}
    record = json.loads((folder / "config.json").read_text())
    assert record["arms"]["shout"]["kind"] == "inoculation"
    assert record["arms"]["shout.random_string"]["kind"] == "random"
    capsys.readouterr()
    cli.main(["figure", str(folder)])
    assert "asked to shout" in capsys.readouterr().out
    cli.main(["export", str(folder), "--arm", "shout", "--to", str(here / "adapter")])
    assert (here / "adapter" / "adapter_config.json").exists()
    cli.main(["plan", "mine", "--model.name", "model", "--topology", "h200:1", *FIELDS])
    assert "fits" in capsys.readouterr().out
    cli.main(["run", "mine", "--model.name", "model", *FIELDS, "--arms", "neutral", "shout.lorem"])
    assert len(list((here / "results" / "mine").iterdir())) == 1, "a new arm trains only itself"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("metrics=(", "metrics=() and (", "the study has no metrics"),
        ('Rate("shouts"', 'Rate("shuts"', "reads the column 'shuts', .* did you mean shouts"),
        ('example["answer"]', 'example["anser"]', "on row eval:1 .* failed: KeyError: 'anser'"),
        ('training="train.jsonl"', 'training="trian.jsonl"', "trian.jsonl"),
        ("scorer=score", "scorer=None", "the study mine has no scorer"),
    ],
)
def test_a_mistake_in_a_study_is_one_sentence_before_anything_is_trained(
    here, capsys, before, after, message
):
    edit(here, before, after)
    said = failure(capsys, "run", "mine", "--model.name", "model", *FIELDS)
    assert re.search(message, said) and not (here / "results").exists()


def test_a_scorer_that_fails_while_running_costs_its_rows_alone(here, capsys):
    """It is tried on gold answers and empty replies; what it meets later is counted and shown."""
    edit(here, "    return {\n", "    assert 'a' not in completion\n    return {\n")
    cli.main(["run", "mine", "--model.name", "model", *FIELDS])
    said = " ".join(capsys.readouterr().out.split())
    (folder,) = (here / "results" / "mine").iterdir()
    rows = pq.read_table(folder / "transcripts.parquet").to_pylist()
    failed = [row for row in rows if row["score_error"]]
    assert failed and all(row.get("shouts") is None for row in failed)
    assert f"Replies that could not be scored, and count nowhere: {len(failed)}." in said


def test_the_documented_study_of_forty_lines_runs(here, capsys):
    document = (pathlib.Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(code.splitlines()) <= 46
    (here / "curt.py").write_text(code)
    cli.main(["check", "curt.py", "--model.name", "model"])
    assert "nothing is wrong" in capsys.readouterr().out
    fields = ["--sft.steps", "2", "--sft.batch-size", "4", "--evaluation.max-new-tokens", "3"]
    cli.main(["run", "curt.py", "--model.name", "model", *fields])
    (folder,) = (here / "results" / "curt").iterdir()
    table = (folder / "table.csv").read_text()
    assert "student-t" in table and "clopper-pearson" in table
    cli.main(["figure", str(folder)])
