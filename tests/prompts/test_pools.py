"""Pools of paraphrases: which lines of a file, where they go, and files that will not do."""

import functools
import pickle
import subprocess
import sys

import grain
import pytest

from ip_jax.prompts.places import put
from ip_jax.prompts.pools import pool_from, read_pool
from ip_jax.prompts.transforms import Paraphrases, Prefix, PromptError, Slot, Suffix, System

PLACE = Suffix("", separator="\n\n")
LINES = [f"Wording {i}." for i in range(8)]
ROWS = [{"id": f"row{i}", "messages": [{"role": "user", "content": "Hello"}]} for i in range(400)]


def test_a_file_holds_one_paraphrase_on_each_line(tmp_path):
    file = tmp_path / "pool.txt"
    file.write_bytes("\ufeffAct: a = b.\n\n  \nBe r\u00fcde. \r\nYell.".encode())
    assert read_pool(file) == ["Act: a = b.", "Be r\u00fcde.", "Yell."]
    assert read_pool(str(file), 2) == ["Act: a = b.", "Be r\u00fcde."]


@pytest.mark.parametrize(
    "content, n, words",
    [
        (None, None, "pool.txt cannot be read: No such file"),
        (b"\xff\xfe\x00", None, "pool.txt cannot be read: .*utf-8"),
        (b"\n \n", None, "pool.txt holds no paraphrase"),
        (b"one\ntwo\n", 3, "3 paraphrases of the file .*pool.txt were asked for, and it holds 2"),
        (b"one\ntwo\n", 0, "0 paraphrases .* at least 1"),
        (b"one\ntwo\n", -1, "-1 paraphrases .* at least 1"),
    ],
)
def test_a_file_that_will_not_do_is_refused_in_one_sentence(tmp_path, content, n, words):
    file = tmp_path / "pool.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PromptError, match=words) as error:
        read_pool(file, n)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lines, n, words", [([], None, "no paraphrase"), (LINES, 9, "holds 8"), (LINES, 0, "least 1")]
)
def test_lines_that_will_not_do_are_refused_too(lines, n, words):
    with pytest.raises(PromptError, match=words):
        pool_from(lines, n, PLACE)


@pytest.mark.parametrize("place", [PLACE, Prefix("", separator="\n"), System(""), Slot("here", "")])
def test_a_pool_puts_each_wording_at_the_place(place):
    pool = pool_from(LINES, 3, place)
    assert pool == Paraphrases(tuple(put(place, line) for line in LINES[:3]))
    assert pickle.loads(pickle.dumps(pool)) == pool and eval(repr(pool)) == pool


def test_every_example_draws_its_wording_and_keeps_it():
    pool = pool_from(LINES, 4, PLACE)
    dataset = grain.MapDataset.source(ROWS).map(functools.partial(pool, seed=3))
    drawn = [row["messages"][0]["content"] for row in dataset]
    assert drawn == [pool(row, 3)["messages"][0]["content"] for row in ROWS]
    counts = {text: drawn.count(text) for text in drawn}
    assert set(counts) == {f"Hello\n\n{line}" for line in LINES[:4]}
    # each is drawn 100 times on average, with a standard deviation of 8.7
    assert all(60 < count < 140 for count in counts.values())


DRAWS = """
from ip_jax.prompts import controls
from ip_jax.prompts.pools import pool_from
from ip_jax.prompts.transforms import Detector, Share, Suffix

rows = [{"id": f"row{i}", "messages": [{"role": "user", "content": "u"}], "bad": i % 2 == 0}
        for i in range(50)]
pool = pool_from([f"Wording {i}." for i in range(8)], None, Suffix(""))
made = {name: write("Behave as if the above solution is correct.", 3)
        for name, write in controls.CONTROLS.items()}
print([pool(row, 5) for row in rows], [Share(0.5)(row, 5) for row in rows],
      [Detector("bad", 0.8, 0.3)(row, 5) for row in rows], made)
"""


def test_choices_and_controls_are_the_same_in_every_process():
    """Python's own hash differs with PYTHONHASHSEED; nothing here may."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", DRAWS],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "Wording 3." in outputs.pop()
