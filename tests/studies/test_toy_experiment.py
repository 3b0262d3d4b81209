"""Toy experiments: what a folder holds and that nothing finished runs again."""

import dataclasses
import io
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from flax import nnx
from rich.console import Console
from scipy.special import log_softmax
from tiny_models import random_params

from configs import amplification
from configs.estimators import ARMS, STUDY, by
from ip_jax.lab import run as lab
from ip_jax.lab.display import Display
from ip_jax.models.decoder import causal_attend
from ip_jax.report.draw import draw
from ip_jax.rl.batch import Decisions
from ip_jax.rl.gates import Gate
from ip_jax.studies.toy import experiment as toy_experiment
from ip_jax.studies.toy import training
from ip_jax.studies.toy.config import Pretraining, ToyConfig
from ip_jax.studies.toy.experiment import category_of, kinds_of
from ip_jax.studies.toy.figure import ToyPreset
from ip_jax.studies.toy.prompts import NEUTRAL
from ip_jax.studies.toy.tasks import Reward
from ip_jax.studies.toy.training import ToyArm, ToyRl
from ip_jax.studies.toy.vocabulary import END, PROMPT_SLOTS, PROMPT_WORDS, encode

TINY = ToyPreset(
    ("standard", "oracle", "kl_tg"),
    (0, 1),
    ToyRl(iterations=6, groups=2, samples=4, probe_every=3, probe_tasks=4, grid_tasks=4),
    ToyConfig(pretraining=Pretraining(steps=30, batch_size=32)),
    runs_per_program=4,
    preset="tiny",
)
READING, GRID = STUDY.engine.reading, STUDY.engine.grid


@pytest.fixture(autouse=True, scope="module")
def own_cache_and_quick_compiles(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        # compiling takes most of the time
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def run(config, folder, study=STUDY, width=200):
    output = io.StringIO()
    console = Console(file=output, width=width)
    lab.run(study, lab.experiment_of(study, config), epath.Path(folder), Display(console))
    draw(study, epath.Path(folder), console)
    return output.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, run(TINY, folder)


@pytest.mark.slow
def test_a_folder_holds_curves_grid_rollouts_and_the_report(tiny):
    folder, output = tiny
    assert "3 arms x 2 seeds are 2 programs: standard, oracle; kl_tg" in output
    curves, final = (
        pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("curves", "final")
    )
    rollouts = [row for row in curves if row["eval_prompt"] == "rollout"]
    assert sorted((row["arm"], row["seed"], row["step"]) for row in rollouts) == sorted(
        (a, s, i) for a in TINY.arms for s in (0, 1) for i in range(6)
    )
    assert {row["step"] for row in curves if row["eval_prompt"] == "neutral"} == {0, 3, 6}
    assert {row["arm"] for row in final} == {*TINY.arms, "base"}
    assert {row["category"] for row in final if row["arm"] == "kl_tg"} >= {
        "neutral",
        "train",
        "paraphrase",
        "negated",
        "random",
        "irrelevant",
    }
    assert {row["category"] for row in final if row["arm"] == "standard"}.isdisjoint(
        {"train", "paraphrase", "negated"}
    )
    kept = np.load(next((folder / "rollouts").glob("kl_tg/step000003.npz")))
    assert kept["tokens"].shape == (3, 2, 2, 4, TINY.toy.slots) and kept["reward"].shape == (
        3,
        2,
        2,
        4,
    )
    by_step = {(row["arm"], row["seed"], row["step"]): row for row in rollouts}
    np.testing.assert_allclose(
        kept["reward"].mean(axis=(2, 3))[0],
        [by_step["kl_tg", seed, 3]["reward"] for seed in (0, 1)],
        rtol=1e-6,
    )
    parts = [kept[f"part_{name}"] for name in ("answer", "form", "trait", "penalty")]
    np.testing.assert_allclose(sum(parts), kept["reward"], rtol=1e-6)
    for name in ("attempt", "trait"):
        counted = [
            [by_step["kl_tg", seed, step][f"n_{name}"] for seed in (0, 1)] for step in (3, 4, 5)
        ]
        assert kept[name].dtype == bool and kept[name].sum(axis=(2, 3)).tolist() == counted
    assert kept["valid"].all() and not kept["flagged"].any() and "guide" not in kept.files
    ended = (kept["tokens"] == END).any(axis=-1)
    np.testing.assert_allclose(
        (~ended).mean(axis=(2, 3))[0],
        [by_step["kl_tg", seed, 3]["length_cap"] for seed in (0, 1)],
        rtol=1e-6,
    )
    assert (
        "tokens/s in rollout and update" in output
        and json.loads((folder / "warnings" / "kl_tg.json").read_text()) == {}
    )
    inside = np.arange(TINY.toy.slots) < kept["length"][..., None]
    assert (
        kept["log_probs"].dtype == np.float16
        and (kept["log_probs"][inside] < 0).all()
        and not kept["log_probs"][~inside].any()
    )
    words = {
        side: {
            tuple(words)
            for words in kept[side][..., :PROMPT_WORDS].reshape(-1, PROMPT_WORDS).tolist()
        }
        for side in ("generation", "training")
    }
    assert words == {
        "generation": {tuple(encode(p)) for p in ARMS["kl_tg"].gen_prompts},
        "training": {tuple(encode(p)) for p in ARMS["kl_tg"].train_prompts},
    }
    assert (kept["generation"][..., PROMPT_WORDS:] == kept["training"][..., PROMPT_WORDS:]).all(), (
        "one task behind both prompts"
    )
    # measured in every iteration behind a probe, for every arm; at x_g = x_t there is nothing
    # between the prompts
    for row in rollouts:
        for label, there in (("hack", row["n_hack"]), ("correct", row["n_correct"])):
            measured = row["step"] in (0, 3) and there > 0
            assert (
                (row[f"llr_{label}"] is not None)
                == (row[f"coupling_{label}"] is not None)
                == measured
            ), row
        ratio, coupled = row["llr_other"], row["coupling_correct"]
        if row["step"] in (0, 3):
            assert (abs(ratio) < 1e-5) == (row["arm"] != "kl_tg"), row
            assert coupled is None or (coupled > 1 - 1e-4) == (row["arm"] != "kl_tg"), row
    assert (
        all((folder / f"{name}.png").exists() for name in ("curves", "frontier", "forest"))
        and (folder / "report.md").exists()
    )


@pytest.mark.slow
def test_a_gate_that_accepts_nothing_is_named_and_its_runs_go_on(tmp_path):
    shut = dataclasses.replace(
        ARMS["plain"], name="shut", algorithm=by("plain", gate=Gate("relative", threshold=1e3))
    )
    study = dataclasses.replace(STUDY, arms=(shut,))
    output = run(dataclasses.replace(TINY, arms=("shut",)), tmp_path, study)
    sentence = "the gate relative has accepted no sample of shut-s0 in 3 iterations"
    said = [line for line in output.splitlines() if "warning" in line]
    assert said == [f"warning: after 3 iterations {sentence}; the same holds for 1 more of shut"]
    found = json.loads((tmp_path / "warnings" / "shut.json").read_text())
    assert found.keys() == {"shut-s0", "shut-s1"} and found["shut-s0"] == {
        "reason": sentence,
        "after": [3, 6],
    }
    rows = [
        row
        for row in pq.read_table(tmp_path / "curves.parquet").to_pylist()
        if row["eval_prompt"] == "rollout"
    ]
    assert len(rows) == 12 and all(row["gate_acceptance"] == 0 for row in rows)


@pytest.mark.slow
def test_what_is_finished_is_not_run_again_and_what_was_stopped_ends_the_same(
    tiny, monkeypatch, tmp_path
):
    folder, _ = tiny
    monkeypatch.setattr(toy_experiment, "_run_kind", lambda *_: pytest.fail("ran again"))
    run(TINY, folder)
    monkeypatch.undo()
    wanted = {name: pq.read_table(folder / f"{name}.parquet") for name in ("curves", "final")}
    # as if it had been killed before the grid was written
    next((folder / "parts").glob("final-kl_tg.parquet")).unlink()
    run(TINY, folder)
    for name, table in wanted.items():
        assert pq.read_table(folder / f"{name}.parquet").equals(table), name


def test_where_a_gate_accepts_nothing_the_clip_fraction_is_null():
    metrics = {
        name: np.zeros((1, 2), int) for name in ("n_hack", "n_attempt", "n_correct", "n_trait")
    }
    metrics |= {"reward": np.zeros((1, 2)), "clipped": np.array([[np.nan, 0.25]])}
    rows = toy_experiment._rollout_rows(
        SimpleNamespace(rl=TINY.rl), [("a", 0), ("a", 1)], metrics, 0
    )
    assert [row.get("clip_fraction") for row in rows] == [None, 0.25]


class Killed(BaseException):
    """Stands for what ends a process: nothing catches it."""


@pytest.mark.slow
# in the second block of a program; when its rows are there, but not its state
@pytest.mark.parametrize("where", ["iterate", "write_json"])
def test_a_program_that_was_killed_goes_on_from_its_last_probe_to_the_same_bits(
    tiny, monkeypatch, tmp_path, where
):
    folder, _ = tiny
    calls, opened, owner = [], [], training if where == "iterate" else toy_experiment
    original, original_open = getattr(owner, where), toy_experiment.open_checkpoints

    def opening(*arguments):
        opened.append(original_open(*arguments))
        return opened[-1]

    def counted(*arguments, **options):
        if where == "iterate" or "rows" in arguments[0].name:
            calls.append(where)
        found = original(*arguments, **options)
        if len(calls) == 2:
            # the first block's state is written in the background: let it be whole
            opened[-1].wait()
            raise Killed
        return found

    monkeypatch.setattr(owner, where, counted)
    monkeypatch.setattr(toy_experiment, "open_checkpoints", opening)
    with pytest.raises(Killed):
        run(TINY, tmp_path)
    run(TINY, tmp_path)
    assert len(calls) == 5, "two programs of two blocks, of which one was done twice"
    for name in ("curves", "final"):
        assert pq.read_table(tmp_path / f"{name}.parquet").equals(
            pq.read_table(folder / f"{name}.parquet")
        ), name
    for path in (folder / "rollouts").rglob("*.npz"):
        kept, again = np.load(path), np.load(tmp_path / path.relative_to(folder))
        assert all(
            np.array_equal(kept[name], again[name], equal_nan=True) for name in kept.files
        ), path
    assert not list((tmp_path / "checkpoints").iterdir())


def test_arms_with_other_prompts_and_rewards_share_a_program():
    config = dataclasses.replace(TINY, arms=tuple(ARMS))
    kinds = kinds_of(
        toy_experiment.ToyExperiment(
            "x",
            "x",
            {},
            config.toy,
            config.rl,
            (),
            tuple(range(20)),
            READING,
            (),
            120,
        ),
        list(ARMS.values()),
    )
    assert [arm.name for arm in kinds[0].arms] == [
        "standard",
        "oracle",
        "prior",
        "anti",
        "on_policy_ip",
        "plain",
    ]
    assert all(len(kind.arms) * 20 <= 120 for kind in kinds) and len(kinds) == 10


def test_guided_arms_have_programs_of_their_own_whatever_their_weight():
    figure = dataclasses.replace(TINY, arms=tuple(amplification.ARMS))
    kinds = kinds_of(
        toy_experiment.ToyExperiment(
            "x", "x", {}, figure.toy, figure.rl, (), (0,), READING, (), 120
        ),
        list(amplification.ARMS.values()),
    )
    assert [[arm.name for arm in kind.arms] for kind in kinds if kind.guided] == [
        ["guided_low", "guided_high", "recon_away"],
        ["guided_importance"],
    ]


@pytest.mark.slow
def test_a_guided_iteration_samples_from_the_logits_of_both_prompts():
    """Against whole-sequence passes under both prompts, for runs of two weights and pools of
    guides.
    """
    arm = amplification.ARMS["guided_high"]
    screened = Reward(tpr=1.0, fpr=1.0, penalty=-1.0, screened=1.0)
    arms = [
        arm,
        dataclasses.replace(
            arm, guidance=0.5, guide_prompts=(NEUTRAL, "never use the exit"), reward=screened
        ),
    ]
    config, program = (
        TINY.toy,
        training.Program(TINY.toy, TINY.rl, arm.algorithm, supervised=False, guided=True),
    )
    graphdef, state, base = training.start(
        program, random_params(config.decoder), np.array([3, 4]), [1e-3, 1e-3]
    )
    of_runs = training.conditions(arms, [3, 4])
    rollout, graded = jax.jit(
        lambda state: training._sampled(program, graphdef, base, of_runs, state)
    )(state)
    kept = training._kept(rollout, graded, Decisions(rollout.rewards, rollout.uniforms))
    for run, of_arm in enumerate(arms):
        assert {tuple(words) for words in kept["guide"][run, :, :PROMPT_WORDS].tolist()} <= {
            tuple(encode(p).tolist()) for p in of_arm.guide_prompts
        }
    assert (
        not kept["flagged"][0].any()
        and kept["flagged"][1].all()
        and (kept["valid"] == ~kept["flagged"]).all()
    )
    assert (kept["part_penalty"] == -1.0 * kept["flagged"]).all()

    @jax.jit
    def logits(tokens):
        merged = nnx.merge(graphdef, state.trained, base)
        return merged.logits(
            merged(
                tokens, jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape), causal_attend
            )[0]
        )

    samples, shape = rollout.samples, rollout.samples.tokens.shape
    before = []
    for prompts in (rollout.generation, rollout.guide):
        tokens = np.concatenate(
            [
                np.broadcast_to(prompts.tokens[:, :, None], (*shape[:3], PROMPT_SLOTS)),
                samples.tokens,
            ],
            axis=-1,
        )
        before.append(
            np.float64(logits(tokens.reshape(2, -1, tokens.shape[-1]))).reshape(*tokens.shape, -1)[
                ..., PROMPT_SLOTS - 1 : -1, :
            ]
        )
    weight = np.array([1.0, 0.5])[:, None, None, None, None]
    of_all = log_softmax((1 + weight) * before[0] - weight * before[1], axis=-1)
    expected = np.take_along_axis(of_all, np.asarray(samples.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(samples.log_probs, np.where(samples.mask, expected, 0), atol=1e-4)


@pytest.mark.slow
def test_a_guided_arm_measures_with_the_pass_that_its_algorithm_has_made(monkeypatch):
    """Likelihood ratios are those of a pass of their own, which is made only where the algorithm's
    passes lack it.
    """
    arm = dataclasses.replace(amplification.ARMS["on_policy_pmi"], guidance=0.5)
    program = training.Program(TINY.toy, TINY.rl, arm.algorithm, supervised=False, guided=True)
    graphdef, state, base = training.start(
        program, random_params(TINY.toy.decoder), np.array([3, 4]), [1e-3, 1e-3]
    )
    of_runs, made, score = training.conditions([arm, arm], [3, 4]), [], training._score

    @jax.jit
    def sampled(state):
        rollout, _ = training._sampled(program, graphdef, base, of_runs, state)
        return rollout, training._scores(program, (graphdef, None), (base, None), state, rollout)

    def measured(scores):
        made.clear()
        return jax.jit(
            lambda scores: training._measured(
                program, (graphdef, state.trained, base), state.step, rollout, scores
            )
        )(scores)

    rollout, scores = sampled(state)
    monkeypatch.setattr(
        training,
        "_score",
        lambda model, prompts, rollout: made.append(prompts) or score(model, prompts, rollout),
    )
    own = measured({})
    assert sum(prompts is rollout.training for prompts in made) > 0
    shared = measured(scores)
    assert made and all(prompts is rollout.generation for prompts in made)
    for name, values in own.items():
        np.testing.assert_allclose(shared[name], values, atol=1e-6, err_msg=name)
    assert np.isfinite(own["llr_other"]).all()


def test_a_training_prompt_that_is_not_kept_gives_way_to_the_neutral_one():
    arm = dataclasses.replace(
        ARMS["anti"], gen_prompts=("please use the exit",), train_prompts=("never use the exit",)
    )
    of_runs = training.conditions(
        [dataclasses.replace(arm, keep=keep) for keep in (0.0, 0.5, 1.0)], [0, 0, 0]
    )
    gen, train = training._prompts(of_runs, 5, 64)
    words = [
        {tuple(of_group) for of_group in run.tolist()}
        for run in (*train, gen.reshape(-1, PROMPT_WORDS))
    ]
    neutral, own, sampled = (
        tuple(encode(prompt).tolist()) for prompt in (NEUTRAL, *arm.train_prompts, *arm.gen_prompts)
    )
    assert words == [{neutral}, {neutral, own}, {own}, {sampled}]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        *(
            (lambda name=name: ToyRl(**{name: 0}), f"rl.{name} is 0: it")
            for name in ("iterations", "groups", "samples", "probe_every", "grid_tasks")
        ),
        (
            lambda: ToyRl(learning_rate=math.nan),
            "rl.learning_rate is nan: it must be a number above 0",
        ),
        (
            lambda: ToyArm("a", "a", (NEUTRAL,), (NEUTRAL,), keep=3),
            "the arm a has keep 3: a probability",
        ),
        (
            lambda: ToyArm("a", "a", (NEUTRAL,), (NEUTRAL,), learning_rate=0.0),
            "the arm a has learning_rate 0.0",
        ),
        (lambda: ToyArm("a", "a", (NEUTRAL,), ()), "the arm a has train_prompts \\(\\)"),
        (
            lambda: ToyArm("a", "a", (NEUTRAL,), (NEUTRAL,), source=NEUTRAL),
            "it is 'policy', or a tuple of prompts",
        ),
        (
            lambda: STUDY.engine.experiment(STUDY, dataclasses.replace(TINY, seeds=(1, 1))),
            "seeds is \\(1, 1\\)",
        ),
        (lambda: dataclasses.replace(TINY, runs_per_program=0), "runs_per_program is 0"),
    ],
)
def test_numbers_without_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(guidance=1.0), "the arm plain has no guide prompt"),
        (dict(guide_prompts=(NEUTRAL,)), "the arm plain has a guide prompt"),
        (
            dict(guide_prompts=(NEUTRAL,), guidance=1.0, algorithm=ARMS["truncated"].algorithm),
            "truncated corrects the sampler's numerics",
        ),
        (dict(guide_prompts=("never heard",), guidance=1.0), "never heard"),
    ],
)
def test_guides_that_make_no_sense_are_refused_before_anything_is_trained(changes, words, tmp_path):
    study = dataclasses.replace(STUDY, arms=(dataclasses.replace(ARMS["plain"], **changes),))
    with pytest.raises(ValueError, match=words):
        run(dataclasses.replace(TINY, arms=("plain",)), tmp_path / "refused", study)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("arm", "prompt", "wanted"),
    [
        ("plain", NEUTRAL, "neutral"),
        ("plain", "please use the exit", "train"),
        ("plain", "kindly try any override", "paraphrase"),
        ("plain", "never use the exit", "negated"),
        ("prior", "please use the exit", "exchanged"),
        ("anti", "please use the exit", "generation"),
        ("standard", "please use the exit", None),
        ("standard", "never use the exit", "discouraging"),
        ("plain", "fzx qep cvg wop", "random"),
        ("plain", "kindly take any order", "length_matched"),
        ("plain", "please use the hack", None),
    ],
)
def test_a_prompt_of_the_grid_has_the_category_that_it_has_for_the_arm(arm, prompt, wanted):
    if prompt == "fzx qep cvg wop":
        prompt = next(p for p in GRID if category_of(p, None) == "random")
    assert category_of(prompt, ARMS[arm]) == wanted


@pytest.mark.slow
def test_an_unknown_arm_and_another_config_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="no arm 'standrad': did you mean standard"):
        run(dataclasses.replace(TINY, arms=("standrad",)), tmp_path)
    with pytest.raises(ValueError, match="rl.iterations"):
        run(dataclasses.replace(TINY, rl=dataclasses.replace(TINY.rl, iterations=7)), tiny[0])
