"""What is recorded of a rollout can be read while the run goes on, and comes back bit for bit."""

import dataclasses
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from reward_environments import SlowAtFirst
from tiny_rollouts import OPTIONS, RUNS, Sums, make_plan, tokenizer

from ip_jax.lab.reinforced.grading import grade_all
from ip_jax.lab.reinforced.records import (
    Grader,
    Recorded,
    part_path,
    read_iteration,
    read_rollouts,
    roll_out,
    write_iteration,
)
from ip_jax.rl.environment import Graded
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.rl.rollout import gather
from ip_jax.sampling.sampler import Completion
from ip_jax.studies.gcd_sycophancy.prompts import BOOK


class Fails(Sums):
    """Grades its first completions only."""

    def __init__(self):
        self.calls = 0

    def grade(self, task, completion):
        self.calls += 1
        if self.calls > 20:
            raise TimeoutError("slow")
        return Graded(
            self.calls / 3,
            {"length": self.calls / 7, "odd": float(self.calls % 2)} if self.calls % 3 else {},
            {"hack": self.calls % 2 == 0, "kind": "long"},
        )


def recorded(plan, iteration=0, environment=None, seed=0):
    """Random completions of all lengths, with log-probabilities whose float32 bits are all in
    use.
    """
    rng = np.random.default_rng((seed, iteration))
    asked = plan.ask(iteration)

    def completion():
        length = int(rng.integers(1, OPTIONS.max_new_tokens + 1))
        return Completion(
            rng.integers(0, 300, length).astype(np.int32),
            -rng.exponential(size=length).astype(np.float32),
            bool(rng.integers(2)),
        )

    rollout = gather(plan, asked, [[completion() for _ in range(12)] for _ in plan.runs])
    grades = grade_all(
        environment or Sums(),
        asked.tasks,
        rollout.texts,
        (len(plan.runs), 3, 4),
        [run.reward for run in plan.runs],
    )
    return Recorded(rollout, grades)


def assert_same(found: Recorded, expected: Recorded):
    for name in ("tokens", "length", "log_probs"):
        a, b = (np.asarray(getattr(one.rollout.samples, name)) for one in (found, expected))
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
    np.testing.assert_array_equal(found.rollout.ended, expected.rollout.ended)
    assert (
        found.grades.reward.dtype == np.float32
        and found.grades.reward.tobytes() == expected.grades.reward.tobytes()
    )
    np.testing.assert_array_equal(found.grades.valid, expected.grades.valid)
    for name in ("parts", "verdicts", "failure"):
        assert getattr(found.grades, name) == getattr(expected.grades, name), name
    assert found.rollout.texts == expected.rollout.texts


def test_an_iteration_comes_back_bit_for_bit_failures_included(tmp_path):
    plan, folder = make_plan(), epath.Path(tmp_path)
    assert read_iteration(folder, plan, plan.ask(2)) is None
    expected = recorded(plan, 2, Fails())
    assert not expected.grades.valid.all() and expected.grades.valid.any()
    write_iteration(folder, plan, expected)
    found = read_iteration(folder, plan, plan.ask(2))
    assert_same(found, expected)
    assert found.advantage is None and found.gate_weight is None


def test_advantages_and_gate_weights_are_added_when_they_are_known(tmp_path):
    plan, folder = make_plan(), epath.Path(tmp_path)
    first = recorded(plan)
    write_iteration(folder, plan, first)
    rng = np.random.default_rng(5)
    known = dataclasses.replace(
        first,
        advantage=rng.normal(size=(2, 3, 4)).astype(np.float32),
        gate_weight=rng.random((2, 3, 4), np.float32),
    )
    write_iteration(folder, plan, known)
    found = read_iteration(folder, plan, plan.ask(0))
    assert_same(found, first)
    for name in ("advantage", "gate_weight"):
        assert getattr(found, name).tobytes() == getattr(known, name).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["step000000.parquet"]


def test_a_row_says_all_of_its_completion_in_words(tmp_path):
    plan, folder = (
        make_plan((*RUNS, dataclasses.replace(RUNS[0], arm="part", reward="length"))),
        epath.Path(tmp_path),
    )
    expected = recorded(plan, 1)
    write_iteration(folder, plan, expected)
    rows = pq.read_table(part_path(folder, 1)).to_pylist()
    assert len(rows) == 3 * 3 * 4
    asked, samples = plan.ask(1), expected.rollout.samples
    for row, (run, group, index) in zip(rows, np.ndindex(3, 3, 4), strict=True):
        given = asked.groups[run][group]
        assert (row["arm"], row["seed"], row["iteration"], row["group"], row["sample"]) == (
            plan.runs[run].arm,
            plan.runs[run].seed,
            1,
            group,
            index,
        )
        assert (row["task"], row["reward_name"], row["temperature"]) == (
            given.task["id"],
            plan.runs[run].reward,
            plan.runs[run].temperature,
        )
        for side in ("gen", "train"):
            conversation = BOOK.find(row[f"{side}_prompt"]).transform(
                {"id": "x", "messages": Sums().messages(given.task)}
            )["messages"]
            assert row[f"{side}_text"] == tokenizer().apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        tokens = samples.tokens[run, group, index, : samples.length[run, group, index]].tolist()
        assert row["tokens"] == tokens and row["length"] == len(tokens) == len(row["log_probs"])
        told = tokens[:-1] if row["ended"] else tokens  # without the token that ended it
        assert row["text"] == tokenizer().decode(told, skip_special_tokens=True)
        graded = Sums().grade(given.task, row["text"])
        assert (
            row["part_length"] == graded.parts["length"]
            and row["verdict_hack"] == graded.verdicts["hack"]
        )
        assert row["reward"] == (graded.parts["length"] if run == 2 else graded.reward)
        assert row["valid"] and row["failure"] is None and row["advantage"] is None


def test_all_iterations_are_read_together_while_the_run_goes_on(tmp_path):
    plan, folder = make_plan(), epath.Path(tmp_path)
    with pytest.raises(FileNotFoundError, match="no rollouts"):
        read_rollouts(folder)
    never = Fails()
    never.calls = 99  # an iteration in which all rewards failed has no parts
    write_iteration(folder / "other", plan, recorded(plan, 0))
    write_iteration(folder, plan, recorded(plan, 1, never))
    (tmp_path / ".step000002.parquet.partial").write_bytes(b"half")
    table = read_rollouts(folder)
    assert table.num_rows == 48 and sorted(set(table["iteration"].to_pylist())) == [0, 1]
    assert table["verdict_hack"].null_count == 24
    assert (
        read_iteration(folder, plan, plan.ask(1)).grades.failure
        == ["raised: TimeoutError: slow"] * 24
    )


class Counts(Sums):
    """Grades otherwise at every call, as a reward that is timed may: what was recorded must not be
    graded again.
    """

    calls = 0

    def grade(self, task, completion):
        Counts.calls += 1
        if Counts.calls % 5 == 0:
            raise TimeoutError("slow")
        return Graded(float(Counts.calls))


def test_a_recorded_iteration_is_neither_sampled_nor_graded_again(tmp_path):
    plan, folder, asked_for = make_plan(), epath.Path(tmp_path), []

    def sampler(asked):
        asked_for.append(asked.iteration)
        return recorded(plan, asked.iteration).rollout

    first = [roll_out(folder, plan, iteration, Grader(Counts()), sampler) for iteration in (0, 1)]
    assert asked_for == [0, 1] and Counts.calls == 48 and not first[0].grades.valid.all()
    again = [
        roll_out(folder, make_plan(), iteration, Grader(Counts()), sampler) for iteration in (0, 1)
    ]
    assert asked_for == [0, 1] and Counts.calls == 48
    for found, expected in zip(again, first, strict=True):
        assert_same(found, expected)
    # as the other processes of a run get it
    assert_same(pickle.loads(pickle.dumps(again[0])), first[0])


def test_a_reward_that_hung_in_its_worker_has_timed_out_for_good(tmp_path):
    environment = SlowAtFirst(str(tmp_path / "told"))
    plan, folder, grader = (
        make_plan(environment=environment),
        epath.Path(tmp_path / "records"),
        Grader(environment, workers=1),
    )
    first = roll_out(folder, plan, 0, grader, lambda asked: recorded(plan, asked.iteration).rollout)
    assert (
        first.grades.failure[0] == "timed out: no grade within 2 s"
        and not first.grades.valid.ravel()[0]
        and first.grades.valid.any()
    )
    begun = (tmp_path / "told").read_text()
    # killed here: what is recorded is all that is left
    again = roll_out(folder, make_plan(environment=environment), 0, grader, None)
    assert_same(again, first)
    assert (tmp_path / "told").read_text() == begun and begun.count("\n") == 24


@pytest.mark.parametrize("killed_in", ["sampling", "grading", "writing"])
def test_an_iteration_that_was_killed_before_it_was_recorded_is_done_anew(
    tmp_path, monkeypatch, killed_in
):
    plan, folder = make_plan(), epath.Path(tmp_path)

    def sampler(asked):
        return recorded(plan, asked.iteration).rollout

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if killed_in != "sampling":
            patch.setattr(
                (
                    "ip_jax.lab.reinforced.records.grade_all"
                    if killed_in == "grading"
                    else "ip_jax.training.results.os.replace"
                ),
                killed,
            )
        roll_out(folder, plan, 0, Grader(Sums()), killed if killed_in == "sampling" else sampler)
    assert read_iteration(folder, plan, plan.ask(0)) is None
    assert_same(roll_out(folder, plan, 0, Grader(Sums()), sampler), recorded(plan))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runs": (RUNS[0], dataclasses.replace(RUNS[1], seed=2))}, "seed"),
        (
            {
                "runs": (
                    RUNS[0],
                    dataclasses.replace(
                        RUNS[1], train_prompt=PromptDistribution(("gcd/act",)).resolved(BOOK)
                    ),
                )
            },
            "train_prompt, train_text",
        ),
        ({"runs": (RUNS[0], dataclasses.replace(RUNS[1], temperature=0.8))}, "temperature"),
        ({"tasks": [{"id": f"sum-{i}", "a": i + 7} for i in range(5)]}, "gen_text, train_text"),
        ({"options": dataclasses.replace(OPTIONS, max_new_tokens=5)}, "max_new_tokens"),
        ({"options": dataclasses.replace(OPTIONS, samples=3)}, "arm, seed"),
    ],
)
def test_rollouts_of_another_config_are_not_replayed(tmp_path, change, words):
    plan, folder = make_plan(), epath.Path(tmp_path)
    write_iteration(folder, plan, recorded(plan))
    other = make_plan(**change)
    with pytest.raises(
        ValueError,
        match=(
            "step000000.parquet holds rollouts of other runs or another config: they differ in"
            f" .*{words}"
        ),
    ):
        read_iteration(folder, other, other.ask(0))


def test_a_file_that_is_no_record_is_refused(tmp_path):
    plan, folder = make_plan(), epath.Path(tmp_path)
    part_path(folder, 0).write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="step000000.parquet is not a Parquet file"):
        read_iteration(folder, plan, plan.ask(0))
    write_iteration(folder, plan, recorded(plan))
    pq.write_table(
        pq.read_table(part_path(folder, 0)).drop_columns("log_probs"),
        tmp_path / "step000000.parquet",
    )
    with pytest.raises(ValueError, match="lacks the column log_probs"):
        read_iteration(folder, plan, plan.ask(0))


def test_a_record_with_an_empty_completion_is_refused(tmp_path):
    plan, folder = make_plan(), epath.Path(tmp_path)
    one = recorded(plan)
    one.rollout.samples.length[1, 2, 3] = 0
    write_iteration(folder, plan, one)
    with pytest.raises(ValueError, match=r"completion 3 of task sum-\d in run 1 is all padding"):
        read_iteration(folder, plan, plan.ask(0))


def test_a_verdict_is_a_bool_or_a_text_and_not_both(tmp_path):
    plan, folder = make_plan(), epath.Path(tmp_path)
    one = recorded(plan)
    one.grades.verdicts[0]["hack"] = "yes"
    with pytest.raises(
        ValueError, match="the verdict hack is a text for some completions and a bool for others"
    ):
        write_iteration(folder, plan, one)
