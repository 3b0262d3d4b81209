"""The runner of text experiments in reinforcement learning, whole, on a tiny random model: what it
leaves, and that a killed run goes on to the bit.
"""

import dataclasses
import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from flax import nnx
from rich.console import Console
from safetensors.numpy import load
from tiny_experiment import write_model
from tiny_reinforced import ARMS, IP, Vowels, make

from ip_jax import cli
from ip_jax.evals import rl_tables
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import ModelConfig
from ip_jax.lab.reinforced import run as reinforced
from ip_jax.lab.reinforced.plan import (
    GridPrompt,
    RlArm,
    category_of,
    folder_record,
    lasting_repr,
    programs_of,
    uniforms_of,
)
from ip_jax.lab.reinforced.records import read_rollouts
from ip_jax.lab.supervised.plan import Run
from ip_jax.lab.trained import decoder_of, read_run
from ip_jax.models import hub
from ip_jax.models.decoder import causal_attend
from ip_jax.models.hub import load_pretrained
from ip_jax.prompts.prompt import Prompt
from ip_jax.report.rl_view import load_rl_view
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.estimators import ESTIMATORS, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.rl.selection import Selection
from ip_jax.studies.gcd_sycophancy.prompts import BOOK
from ip_jax.training.results import digest, write_json

pytestmark = pytest.mark.usefixtures("compiled_once")


class Killed(BaseException):
    """Stands for what ends a process: nothing catches it."""


def run(experiment, folder, said=None) -> epath.Path:
    """The folder; what a console that is no terminal shows goes into the file `said`."""
    folder, console = epath.Path(folder), Console(file=said, quiet=said is None)
    reinforced.run_reinforced(experiment, folder, Display(console))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    return run(make(model), tmp_path_factory.mktemp("runs") / "undisturbed")


def contents(folder) -> dict[str, bytes]:
    """All that does not tell the time."""
    kept = ("runs/*/*", "rollouts/*/*", "transcripts/*.parquet", "*.parquet", "config.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in kept
        for path in folder.glob(pattern)
    }


@pytest.mark.slow
def test_a_run_leaves_tables_that_a_report_reads_and_every_rollout(undisturbed, model):
    view = load_rl_view(undisturbed)
    assert {arm.name for arm in view.arms} == {"standard", "swap", "untrained"}
    curves, final = (
        pq.read_table(undisturbed / "curves.parquet"),
        pq.read_table(undisturbed / "final.parquet").to_pylist(),
    )
    rollouts = rl_tables.curves_of(curves, rl_tables.ROLLOUT)
    assert [list(curve.steps) for curve in rollouts.values()] == [[0, 1, 2, 3]] * 2
    (untrained,) = [
        row for row in final if (row["arm"], row["eval_prompt"]) == ("untrained", "neutral")
    ]
    for curve in rl_tables.curves_of(curves, rl_tables.NEUTRAL).values():
        assert list(curve.steps) == [0, 2, 4]
        assert all(
            curve.columns[name][0] == untrained[name] for name in ("n", "n_hack", "n_correct")
        ), "a run begins as the untrained model"
    assert {(row["arm"], row["category"]) for row in final} >= {
        ("swap", "train"),
        ("untrained", "train"),
        ("standard", "discouraging"),
    }
    assert ("standard", "train") not in {(row["arm"], row["category"]) for row in final}
    kept = read_rollouts(undisturbed / "rollouts")
    assert kept.num_rows == 4 * 2 * 2 * 4 and kept["advantage"].null_count == 0
    rewards = {
        arm: (
            np.array([row["reward"] for row in kept.to_pylist() if row["arm"] == arm]).reshape(
                4, -1
            )
        )
        for arm in ("standard", "swap")
    }
    for (arm, _), curve in rollouts.items():
        np.testing.assert_allclose(curve.columns["reward"], rewards[arm].mean(1), rtol=1e-6)
    prompts = {(row["arm"], row["gen_prompt"], row["train_prompt"]) for row in kept.to_pylist()}
    assert prompts == {("standard", "neutral", "neutral"), ("swap", "neutral", "gcd/behave")}
    # both are measured where an evaluation stands before the iteration
    for (arm, _), curve in rollouts.items():
        for label in ("hack", "correct"):
            for quantity in ("llr", "coupling"):
                known = ~np.isnan(curve.columns[f"{quantity}_{label}"])
                np.testing.assert_array_equal(
                    known,
                    (curve.columns[f"n_{label}"] > 0) & (curve.steps % 2 == 0),
                    (arm, label, quantity),
                )
            ratios, cosines = (
                curve.columns[f"{quantity}_{label}"][known] for quantity in ("llr", "coupling")
            )
            assert (
                known.any()
                and ((np.abs(ratios) < 1e-4) == (arm == "standard")).all()
                and ((cosines > 1 - 1e-4) == (arm == "standard")).all()
            )
    record = json.loads((undisturbed / "runs" / "swap-s0" / "run.json").read_text())
    assert record["finished_finite"] and not list(undisturbed.glob("checkpoints/*"))


@pytest.mark.slow
def test_what_a_run_learned_goes_out_to_peft_and_transformers(undisturbed, model, tmp_path):
    """Both folders that `ip-jax export` writes have the logits of the run as this program reads
    it.
    """
    torch, library, transformers = (
        pytest.importorskip(name) for name in ("torch", "peft", "transformers")
    )
    tokens = np.arange(20).reshape(1, 2, 10)
    for options in ([], ["--merged"]):
        cli.main(
            [
                "export",
                str(undisturbed),
                "--arm",
                "swap",
                "--to",
                str(tmp_path / f"out{len(options)}"),
                *options,
            ]
        )
    of_base = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        before = of_base(torch.tensor(tokens[0])).logits.numpy()
        adapted = library.PeftModel.from_pretrained(of_base, tmp_path / "out0")(
            torch.tensor(tokens[0])
        ).logits.numpy()
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out1")(
            torch.tensor(tokens[0])
        ).logits.numpy()
    decoder = nnx.merge(
        *decoder_of(read_run(undisturbed, "swap"), load_pretrained(str(model), np.float32))
    )
    expected = decoder.logits(
        decoder(tokens, np.broadcast_to(np.arange(10), tokens.shape), causal_attend)[0]
    )[0]
    for found in (adapted, merged):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(before - expected).max() > 0.01


def killed(experiment, folder, monkeypatch, place) -> None:
    """Runs until the given place is reached for the last time."""
    target, name, after = {
        "rollout": (reinforced, "generate", 2),
        # one grade checks the config, then in the fourth iteration: one behind the checkpoint
        "reward": (Vowels, "grade", 1 + 3 * 16 + 5),
        "update": (reinforced, "write_iteration", 3),
    }[place]
    original, calls = getattr(target, name), 0

    def dying(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(target, name, dying)
        run(experiment, folder)


def assert_equal_but_for_the_clock(folder, wanted):
    found, wanted = contents(folder), contents(wanted)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rollout", "reward", "update"])
def test_a_run_killed_anywhere_goes_on_to_the_same_bits(
    place, model, undisturbed, tmp_path, monkeypatch
):
    killed(make(model), tmp_path / "killed", monkeypatch, place)
    assert_equal_but_for_the_clock(run(make(model), tmp_path / "killed"), undisturbed)


PENALISED = (
    dataclasses.replace(
        ARMS[1], algorithm=Algorithm(kl=Kl("tt", "loss", "k3", 0.1), baseline="moving_mean")
    ),
)


@pytest.fixture(scope="module")
def penalised(model, tmp_path_factory):
    """(folder, what the console showed)."""
    said = io.StringIO()
    return (
        run(make(model, PENALISED), tmp_path_factory.mktemp("runs") / "penalised", said),
        said.getvalue(),
    )


@pytest.mark.slow
def test_a_penalty_begins_at_zero_and_a_moving_mean_survives_a_kill(
    penalised, model, tmp_path, monkeypatch
):
    kl = [
        json.loads(line)["kl"]
        for line in (penalised[0] / "runs" / "swap-s0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert abs(kl[0]) < 1e-6 and min(kl[1:]) > 1e-5  # the untrained policy is the reference
    killed(make(model, PENALISED), tmp_path / "killed", monkeypatch, "update")
    assert_equal_but_for_the_clock(run(make(model, PENALISED), tmp_path / "killed"), penalised[0])


@pytest.mark.slow
def test_a_person_sees_every_number_of_every_iteration(penalised):
    lines = [
        line
        for line in penalised[1].splitlines()
        if re.match(r"swap \(1 seed\), step \d/4: ", line)
    ]
    assert len(lines) == 4
    for name in (
        "reward",
        "hack",
        "correct",
        "kl",
        "entropy",
        "length",
        "zero variance groups",
        "gate acceptance",
        "clip fraction",
    ):
        assert all(re.search(rf"[:,] {name} −?\d", line) for line in lines), name
    for name in ("rollout", "update"):
        assert all(re.search(rf", [\d.]+k? tokens/s in {name}", line) for line in lines), name


@pytest.mark.slow
def test_a_guided_run_is_recorded_with_its_guide_and_survives_a_kill(model, tmp_path, monkeypatch):
    arms = (
        RlArm(
            "guided",
            "guided",
            IP,
            IP,
            guide_prompt=PromptDistribution(("neutral",)).resolved(BOOK),
            guidance=2.0,
        ),
    )
    undisturbed = run(make(model, arms), tmp_path / "undisturbed")
    rows = read_rollouts(undisturbed / "rollouts").to_pylist()
    assert {(row["gen_prompt"], row["guide_prompt"], row["guidance"]) for row in rows} == {
        ("gcd/behave", "neutral", 2.0)
    }
    assert all(row["guide_text"] != row["gen_text"] for row in rows)
    killed(make(model, arms), tmp_path / "killed", monkeypatch, "rollout")
    assert_equal_but_for_the_clock(run(make(model, arms), tmp_path / "killed"), undisturbed)


@pytest.mark.slow
def test_expert_iteration_that_restarts_from_the_base_ends_one_update_from_it(model, tmp_path):
    for restart in (False, True):
        arm = dataclasses.replace(
            ARMS[0],
            algorithm=Algorithm(selection=Selection("best_of_n", restart_from_base=restart)),
        )
        folder = run(make(model, (arm,)), tmp_path / str(restart))
        learned = load((folder / "runs" / "standard-s0" / "adapter.safetensors").read_bytes())
        furthest = max(
            np.abs(value).max() for name, value in learned.items() if name.endswith(".b")
        )
        # B begins at 0, and Adam's first step is at most the rate
        assert (furthest <= 1e-2 * 1.001) == restart


class Brittle(Vowels):
    """Raises where a completion has an odd number of characters."""

    def grade(self, task, completion):
        if len(completion) % 2:
            raise RuntimeError("odd")
        return super().grade(task, completion)


@pytest.mark.slow
def test_too_many_failures_stop_after_saving_and_are_left_out_where_the_limit_is_raised(
    model, tmp_path
):
    def brittle(most):
        return make(model, environment=Brittle(), max_failed=most, iterations=2)

    with pytest.raises(
        ValueError,
        match=(
            "raised: RuntimeError: odd; what was done so far is saved, and goes on where"
            " rl.max_failed is raised"
        ),
    ):
        run(brittle(0.01), tmp_path / "strict")
    assert list((tmp_path / "strict").glob("checkpoints/*/0")) and list(
        (tmp_path / "strict").glob("rollouts/*/step000000.parquet")
    )
    assert_equal_but_for_the_clock(
        run(brittle(0.99), tmp_path / "strict"), run(brittle(0.99), tmp_path / "undisturbed")
    )


@pytest.mark.slow
def test_an_absolute_gate_compares_with_samples_of_the_training_prompt_and_survives_a_kill(
    model, tmp_path, monkeypatch
):
    def gated(quantile: float, train_prompt=IP):
        return make(
            model,
            (
                dataclasses.replace(
                    ARMS[1],
                    train_prompt=train_prompt,
                    algorithm=Algorithm(gate=Gate("absolute", quantile=quantile)),
                ),
            ),
            samples=16,
        )

    def rows(folder):
        return [
            json.loads(line)
            for line in (folder / "runs" / "swap-s0" / "metrics.jsonl").read_text().splitlines()
        ]

    undisturbed = run(gated(0.5), tmp_path / "undisturbed")
    assert all(row["gate_reference"] < 0 for row in rows(undisturbed))
    killed(gated(0.5), tmp_path / "killed", monkeypatch, "update")
    assert_equal_but_for_the_clock(run(gated(0.5), tmp_path / "killed"), undisturbed)
    # one prompt: other samples of the same distribution
    low, high = (rows(run(gated(q, PromptDistribution()), tmp_path / str(q))) for q in (0.1, 0.9))
    first = [found[0]["gate_acceptance"] for found in (low, high)]
    assert first[0] > 0.7 and first[1] < 0.3, "32 samples, of which 0.9 and 0.1 are expected"


@pytest.mark.slow
def test_a_gate_that_accepts_nothing_stops_after_saving_and_goes_on_where_its_limit_is_raised(
    model, tmp_path
):
    arms = tuple(
        dataclasses.replace(arm, algorithm=Algorithm(gate=Gate("relative", threshold=1e3)))
        for arm in ARMS
    )
    folder = tmp_path / "gated"
    with pytest.raises(
        ValueError,
        match=(
            "the gate relative has accepted no sample of standard-s0 in 2 iterations: raise"
            " rl.gate_patience to go on"
        ),
    ):
        run(make(model, arms, gate_patience=2), folder)
    (state,) = folder.glob("checkpoints/*/2")
    assert state.exists()
    rows = [
        json.loads(line)
        for line in (folder / "runs" / "swap-s0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["gate_acceptance"] for row in rows] == [0, 0]
    said = io.StringIO()
    run(
        make(
            model, arms, gate_patience=9, checkpoint_every=3, grading_workers=1, runs_per_program=1
        ),
        folder,
        said,
    )
    assert (
        "what was begun as one program goes on as one" in said.getvalue()
        and "going on from the checkpoint of iteration 2" in said.getvalue()
    )
    assert_equal_but_for_the_clock(
        folder, run(make(model, arms, gate_patience=9), tmp_path / "undisturbed")
    )


def test_what_does_not_decide_results_is_no_part_of_a_folders_identity():
    def identity(environment=None, **rl):
        return folder_record(make("m", environment=environment, **rl), "weights")["identity"]

    for change in (
        {"gate_patience": 9},
        {"max_failed": 0.5},
        {"checkpoint_every": 1},
        {"grading_workers": 1},
        {"runs_per_program": 1},
    ):
        assert identity(**change) == identity(), change
    for change in (
        {"iterations": 5},
        {"temperature": 0.5},
        {"slots": 2},
        {"remat": "full"},
        {"environment": Brittle()},
    ):
        assert identity(**change) != identity(), change


def test_what_was_begun_together_goes_on_together_whatever_may_share_a_program(tmp_path):
    folder, runs = (
        epath.Path(tmp_path),
        [Run(arm, seed, f"{arm.name}{seed}") for arm in ARMS for seed in (0, 1)],
    )
    write_json(
        folder / "checkpoints" / "x" / "origin.json",
        {"runs": {run.name: run.key for run in runs[1:]}},
    )
    for most in (1, 2, 64):
        assert [[run.name for run in group] for group in programs_of(folder, runs, most)] == [
            ["standard-s1", "swap-s0", "swap-s1"],
            ["standard-s0"],
        ]


class Paid(Vowels):
    """Any attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@dataclasses.dataclass(frozen=True)
class Holds:
    """Any value."""

    value: object


def test_what_is_told_apart_by_its_fields_is_called_alike_in_every_process():
    def named(value):
        return lasting_repr("the environment", value)

    assert (
        named(Vowels()) == named(Vowels()) == "Vowels({})" and named(Holds(3)) == "Holds(value=3)"
    )
    assert (
        named(Paid(rate=1, words=("a",)))
        == named(Paid(rate=1, words=("a",)))
        != named(Paid(rate=2, words=("a",)))
    )
    for unnamed in (Paid(rate=lambda: 1), Paid(judge=Vowels()), Holds(Vowels()), Holds(named)):
        with pytest.raises(
            ValueError,
            match=(
                r"the environment holds <.* at 0x[0-9a-f]+>, which is called otherwise in every"
                r" process"
            ),
        ):
            named(unnamed)


def test_arms_of_another_algorithm_are_another_program(tmp_path):
    late = Algorithm(estimator=ESTIMATORS["late_token"])
    guided = RlArm("guided", "guided", guide_prompt=IP, guidance=1.0)
    arms = (
        *ARMS,
        RlArm("late", "late", algorithm=late),
        guided,
        dataclasses.replace(guided, name="more", guidance=2.0),
        RlArm("again", "again", reward="reward"),
    )
    runs = [Run(arm, seed, f"{arm.name}{seed}") for arm in arms for seed in (0, 1)]

    def names(most):
        return [
            [run.name for run in group] for group in programs_of(epath.Path(tmp_path), runs, most)
        ]

    assert names(64) == [
        ["standard-s0", "standard-s1", "swap-s0", "swap-s1", "again-s0", "again-s1"],
        ["late-s0", "late-s1"],
        ["guided-s0", "guided-s1", "more-s0", "more-s1"],
    ]
    assert [len(group) for group in names(4)] == [4, 2, 2, 4]


def test_a_prompt_of_the_grid_is_something_else_to_every_arm():
    grid = (
        GridPrompt("gcd/safety", "discouraging"),
        GridPrompt("gcd/behave", "train", about="gcd/behave"),
        GridPrompt("gcd/negated", "negated", about="gcd/behave"),
    )

    def found(arm):
        return {
            prompt.name: category_of(prompt, arm)
            for prompt in (GridPrompt("neutral", "neutral"), *grid)
        }

    assert found(ARMS[0]) == {
        "neutral": "neutral",
        "gcd/safety": "discouraging",
        "gcd/behave": None,
        "gcd/negated": None,
    }
    assert found(ARMS[1]) == {
        "neutral": "neutral",
        "gcd/safety": "discouraging",
        "gcd/behave": "train",
        "gcd/negated": "negated",
    }
    assert found(RlArm("safe", "safe", PromptDistribution(("gcd/safety",)).resolved(BOOK))) == {
        **found(ARMS[0]),
        "gcd/safety": "generation",
    }
    assert found(None)["gcd/negated"] == "negated"


def test_late_token_halts_where_it_collapses():
    late = Algorithm(estimator=ESTIMATORS["late_token"])

    def halts(algorithm, **row):
        return reinforced.halting_reason(
            ["a-s0"],
            [[{"surviving": 0.0, "length_cap": 0.0, "gate_acceptance": 1.0} | row]],
            algorithm,
            5,
        )

    assert halts(late) is None
    assert "advantage that clipping leaves is -0.30" in halts(late, surviving=-0.3)
    assert "60% of its completions do not end" in halts(late, length_cap=0.6)
    assert halts(Algorithm(), surviving=-0.3, length_cap=0.6) is None


def test_uniforms_are_a_function_of_seed_and_iteration():
    both = uniforms_of([3, 7], 5, 2, 4)
    assert both.dtype == np.float32 and (both >= 0).all() and (both < 1).all()
    np.testing.assert_array_equal(both[1:], uniforms_of([7], 5, 2, 4))
    assert len({digest(u.tolist()) for u in (both[0], both[1], uniforms_of([3], 6, 2, 4)[0])}) == 3
    many = uniforms_of([0], 0, 100, 100)
    assert abs(many.mean() - 0.5) < 0.02 and abs(many.var() - 1 / 12) < 0.005


def test_what_cannot_be_run_is_refused_before_a_model_is_loaded(model, tmp_path):
    def refused(match, arms=ARMS, **rl):
        with pytest.raises(ValueError, match=match):
            run(make(model, arms, **rl), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()

    refused("no reward called 'truth'", (RlArm("a", "a", reward="truth"),))
    refused("groups have 1", samples=1)
    refused("more than max_length = 20", max_length=20)
    refused(
        "3 minibatches, which do not divide the 2 rows",
        (RlArm("a", "a", algorithm=Algorithm(estimator=ESTIMATORS["train_old"], minibatches=3)),),
    )
    refused("the arm a has no guide prompt: guidance above 0", (RlArm("a", "a", guidance=1.0),))
    refused(
        "late_sequence clips",
        (
            RlArm(
                "a",
                "a",
                algorithm=Algorithm(ESTIMATORS["late_sequence"]),
                guide_prompt=IP,
                guidance=1.0,
            ),
        ),
    )
    refused(
        "for which text experiments make no pass",
        (
            RlArm(
                "a", "a", algorithm=Algorithm(pmi=(0.5, 1.0), pmi_against="guide"), guide_prompt=IP
            ),
        ),
    )
    refused(
        "arms is .'standard', 'standard'.: it must name at least one, and none twice",
        (ARMS[0], ARMS[0]),
    )
    refused("the environment holds <function", environment=Paid(rate=lambda: 1))
    by_hand = Prompt("by hand", "own", "words", "here", transform=lambda example, seed: example)
    refused(
        "the arm a holds <function", (RlArm("a", "a", train_prompt=PromptDistribution((by_hand,))),)
    )


@pytest.mark.parametrize(
    "kernel, sentence",
    [
        (
            dict(attention="splash"),
            "attention 'splash' runs on a TPU, and the mesh is made of CPU devices",
        ),
        (
            dict(experts="pallas"),
            "experts 'pallas' is for a mixture of experts, and llama has none",
        ),
    ],
)
def test_a_kernel_that_cannot_be_is_refused_before_a_model_is_loaded(
    model, tmp_path, monkeypatch, kernel, sentence
):
    monkeypatch.setattr(reinforced, "load_base", None)
    named = make(model, ARMS)
    named = dataclasses.replace(named, model=dataclasses.replace(named.model, **kernel))
    with pytest.raises(ValueError, match=sentence):
        run(named, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_base_that_cannot_be_quantised_is_refused_before_it_is_loaded(
    model, tmp_path, monkeypatch
):
    # whether qwix is there is not asked here
    monkeypatch.setattr("ip_jax.lab.experiment.check_quantised", lambda kind: None)
    config = dataclasses.replace(hub.load_config(str(model)), d_ff=40)
    monkeypatch.setattr(hub, "load_config", lambda *_: config)
    monkeypatch.setattr(hub, "load_pretrained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(
        ValueError, match="the weights down have 40 inputs, which blocks of 16 do not divide"
    ):
        run(
            dataclasses.replace(make(model), model=ModelConfig(str(model), quantised="nf4")),
            tmp_path / "refused",
        )
    assert not (tmp_path / "refused").exists()
