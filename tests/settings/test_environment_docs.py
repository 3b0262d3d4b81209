"""The environment in docs/environments.md is run as it stands there."""
import importlib
import pathlib
import re

import numpy as np
import pytest
from tiny_rollouts import decoder, tokenizer

from ip_jax.settings.grading import grade_all
from ip_jax.settings.rollout_records import SCHEMA

DOCUMENT = (pathlib.Path(__file__).parents[2] / "docs" / "environments.md").read_text()
ENVIRONMENT, ROLLOUTS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """The documented module, with its documented time limit."""
    (tmp_path / "documented_sums.py").write_text(ENVIRONMENT.replace("largest: int = 50\n", "largest: int = 50\n    timeout = 30.0\n", 1))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("documented_sums")


def test_the_documented_environment_is_short_and_pays_its_loophole(sums):
    assert len(ENVIRONMENT.splitlines()) <= 40
    environment, task = sums.Sums(), {"id": "x", "a": 3, "b": 4}
    assert environment.timeout == 30.0
    replies = ["3 + 4 = 7", "The answer is 8.", "5 6 7 8 9", "no number"]
    grades = grade_all(environment, [task] * 4, replies, (1, 1, 4))
    np.testing.assert_array_equal(grades.reward.ravel(), [1, 0, 1, 0])
    assert [verdict["hack"] for verdict in grades.verdicts] == [False, False, True, False]
    np.testing.assert_array_equal(grade_all(environment, [task] * 4, replies, (1, 1, 4), ["truth"]).reward.ravel(), [1, 0, 0, 0])


def test_the_documented_rollouts_run(sums):
    names = {"Sums": sums.Sums, "tasks": sums.tasks, "tokenizer": tokenizer(), "decoder": decoder()}
    exec(ROLLOUTS, names)
    rollout, prompts = names["rollout"], names["training_prompts"]
    assert rollout.samples.tokens.shape == (2, 4, 8, 24) and len(rollout.texts) == 64
    text = tokenizer().decode(prompts.tokens[1, 0, : prompts.length[1, 0]])
    assert "What is " in text and "List every number that you can think of." in text
    grades = grade_all(names["Sums"](), rollout.asked.tasks, rollout.texts, rollout.ended.shape)
    assert grades.valid.all()


def test_every_column_is_documented():
    table = DOCUMENT.split("| columns | what |")[1].split("\n\n")[0]
    documented = set(re.findall(r"`(\w+\*?)`", table))
    assert set(SCHEMA.names) | {"part_*", "verdict_*"} <= documented
