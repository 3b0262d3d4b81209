"""The passes of an iteration: those before the update are what its rows are made of, those of the
update run once each; docs/rl.md lists them.
"""

import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_models as rl
from rl_steps import GENERATION, ONE_ROW, TRAINING, graded, options_of

from ip_jax.lab.reinforced import run as reinforced
from ip_jax.lab.reinforced.records import Recorded
from ip_jax.rl.advantages import Aggregation
from ip_jax.rl.algorithm import Algorithm, passes_needed
from ip_jax.rl.batch import make_batch
from ip_jax.rl.estimators import ESTIMATORS, Auxiliary, Estimator, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.policy import score
from ip_jax.rl.selection import Selection
from ip_jax.rl.step import rl_gradients, rl_step
from ip_jax.training.sharding import make_mesh

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "rl.md"
E, PT, PG, PU, RT, RG = (
    ESTIMATORS,
    "policy_training",
    "policy_generation",
    "policy_guide",
    "reference_training",
    "reference_generation",
)
RELATIVE = Gate("relative", threshold=0.0)
# what it is in docs/rl.md: (algorithm, passes before the update, prompts of the passes with a
# gradient)
TABLE = {
    "plain": (Algorithm(), {}, "t"),
    "importance_token, importance_sequence, late_sequence, late_token": (
        Algorithm(E["late_token"]),
        {},
        "t",
    ),
    "train_old, one update": (Algorithm(E["train_old"]), {}, "t"),
    "train_old, several updates": (Algorithm(E["train_old"], epochs=2, minibatches=2), {PT}, "t"),
    "truncated": (Algorithm(E["truncated"]), {PG}, "t"),
    "ratio_noise": (Algorithm(E["ratio_noise"]), {}, "t"),
    "auxiliary": (Algorithm(E["auxiliary"]), {}, "gt"),
    "auxiliary with old at x_g, several updates": (
        Algorithm(Estimator("clipped", "generation", clip=0.2, auxiliary=Auxiliary()), epochs=2),
        {},
        "gt",
    ),
    "selection": (Algorithm(selection=Selection()), {}, "t"),
    "kl tt in the loss": (Algorithm(kl=Kl("tt", beta=0.1)), {RT}, "t"),
    "kl gg in the loss": (Algorithm(kl=Kl("gg", beta=0.1)), {RG}, "tg"),
    "kl tg in the loss": (Algorithm(kl=Kl("tg", beta=0.1)), {RG}, "t"),
    "kl tt in the reward": (Algorithm(kl=Kl("tt", "reward", "k1", 0.1)), {PT, RT}, "t"),
    "kl gg in the reward": (Algorithm(kl=Kl("gg", "reward", "k1", 0.1)), {RG}, "t"),
    "kl tg in the reward": (Algorithm(kl=Kl("tg", "reward", "k1", 0.1)), {PT, RG}, "t"),
    "gate off, random at a rate, oracle": (Algorithm(gate=Gate("random", rate=0.5)), {}, "t"),
    "any other gate, PMI weights": (Algorithm(gate=RELATIVE), {PT}, "t"),
    "PMI weights against the guide": (
        Algorithm(pmi=(0.3, 2.0), pmi_against="guide"),
        {PT, PU},
        "t",
    ),
    "a gate whose rejected samples are trained at x_g": (
        Algorithm(gate=Gate("relative", threshold=0.0, rejected="train_at_gen")),
        {PT},
        "tg",
    ),
    "auxiliary, kl gg in the loss": (Algorithm(E["auxiliary"], Kl("gg", beta=0.1)), {RG}, "gt"),
    "train_old, several updates, kl tt in the reward, a gate": (
        Algorithm(E["train_old"], Kl("tt", "reward", "k1", 0.1), gate=RELATIVE, epochs=2),
        {PT, RT},
        "t",
    ),
}
SCORES = {
    name: jnp.asarray(np.random.default_rng(i).uniform(-3, -0.1, (1, 2, 16, 2)), jnp.float32)
    for i, name in enumerate((PT, PG, RT, RG, PU))
}


def rollout():
    rng = np.random.default_rng(5)
    samples = rl.everything(groups=2)
    samples = samples.replace(
        log_probs=jnp.asarray(rng.uniform(-3, -0.1, samples.tokens.shape), jnp.float32)
    )

    def two(prompt):
        return jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), prompt)

    return graded(samples, two(GENERATION), two(TRAINING), rng.normal(size=samples.length.shape))


def batch_of(algorithm: Algorithm, scores: dict):
    return make_batch(rollout(), scores, None, None, algorithm, ONE_ROW)


def forward_passes(jaxpr) -> int:
    """Look-ups of input tokens in the embedding [V, D], of which each forward pass has one and a
    backward pass none.
    """
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "gather" and equation.invars[0].aval.shape == (
            rl.CONFIG.vocab_size,
            rl.CONFIG.d_model,
        )
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            found += forward_passes(inner) if hasattr(inner, "eqns") else 0
    return found


def test_a_pass_is_counted_once():
    graphdef, trained, base = rl.policy()
    rows = rl.rows_of(GENERATION, rl.everything())
    assert (
        forward_passes(
            jax.make_jaxpr(
                lambda trained: score(trained, base, rows, graphdef=graphdef, dtype="float32")
            )(trained).jaxpr
        )
        == 1
    )


@pytest.mark.parametrize("name", TABLE)
def test_passes_before_the_update_are_those_that_its_rows_are_made_of(name):
    """Each changes them, and no other is asked for."""
    algorithm, needed, _ = TABLE[name]
    assert passes_needed(algorithm) == set(needed)
    scores = {of: SCORES[of] for of in needed}
    made = batch_of(algorithm, scores)
    for of in needed:
        other = batch_of(algorithm, scores | {of: SCORES[of] - 0.3 * jnp.arange(32).reshape(16, 2)})
        assert any(
            np.any(np.asarray(a) != np.asarray(b))
            for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(other), strict=True)
        ), of


@pytest.mark.parametrize("name", TABLE)
def test_an_update_makes_each_pass_with_a_gradient_once(name):
    """One for each prompt at which something is trained; a micro-batch has the prompt of one of
    them.
    """
    algorithm, needed, prompts = TABLE[name]
    batch, _ = batch_of(algorithm, {of: SCORES[of] for of in needed})
    graphdef, trained, base = rl.policy()
    of_rows = [rows for rows in (batch.policy, batch.kl, batch.auxiliary) if rows is not None]
    at = {"t": np.asarray(TRAINING.tokens[0, 0]), "g": np.asarray(GENERATION.tokens[0, 0])}
    found = [
        which
        for rows in of_rows
        for prompt in np.asarray(rows.prompt)[:, 0, 0]
        for which in at
        if (prompt == at[which]).all()
    ]
    assert sorted(found) == sorted(prompts * algorithm.minibatches)
    options = options_of(algorithm)
    one = jax.make_jaxpr(
        lambda trained: rl_gradients(trained, base, batch, graphdef=graphdef, options=options)
    )(trained)
    assert forward_passes(one.jaxpr) == len(of_rows)


def test_a_step_of_several_updates_is_one_loop_over_one_pass():
    algorithm, needed, _ = TABLE["train_old, several updates"]
    batch, _ = batch_of(algorithm, {of: SCORES[of] for of in needed})
    graphdef, trained, base = rl.policy()
    options = options_of(algorithm)
    step = jax.make_jaxpr(
        lambda state: rl_step(state, base, batch, graphdef=graphdef, options=options)
    )(rl.state_of(trained))
    assert forward_passes(step.jaxpr) == 1


@pytest.fixture
def passes_made(monkeypatch, tmp_path):
    """(algorithm, iteration) -> names of the passes that the runner of text experiments makes
    before its update, in order; all else stands still.
    """
    fixed = {
        "stop_ids": (0,),
        "sampler_options": None,
        "layers_fit_whole": False,
        "check_failures": None,
        "write_iteration": None,
        "roll_out": Recorded(SimpleNamespace(asked=None), None),
        "_rollout": rollout(),
        "reference_scoring": lambda *_: None,
        "measuring_couplings": lambda *_: {},
        "_updating": lambda state, batch: (state, {"clipped": np.zeros(1)}),
    }
    for name, value in fixed.items():
        monkeypatch.setattr(reinforced, name, lambda *_, value=value: value)
    monkeypatch.setattr(reinforced.tables, "iteration_metrics", lambda recorded, found: found)
    sides = {"training": TRAINING, "generation": GENERATION}
    made = []

    def score_pass(_, who: str):
        def scored(trained, frozen, rows):
            made.extend(
                f"{who}_{name}"
                for name, prompt in sides.items()
                if (np.asarray(rows.prompt[0, 0, 0]) == np.asarray(prompt.tokens[0, 0])).all()
            )
            return -jnp.ones(rows.tokens.shape)

        return scored

    monkeypatch.setattr(reinforced.programs, "score_pass", score_pass)
    sizes = SimpleNamespace(
        iterations=4, grading_workers=1, slots=None, remat="none", gate_patience=5, max_failed=0.0
    )
    experiment = SimpleNamespace(
        environment=None,
        rl=sizes,
        model=SimpleNamespace(activations="float32"),
        evaluation=SimpleNamespace(steps=(0,)),
    )

    def run(algorithm: Algorithm, step: int) -> list[str]:
        made.clear()
        kind = SimpleNamespace(
            mesh=make_mesh(),
            config=None,
            kernel="xla",
            algorithm=algorithm,
            layout=ONE_ROW,
            rl=sizes,
        )
        decoders = SimpleNamespace(
            policy="policy", frozen=None, reference="reference", reference_frozen=None
        )
        rollouts = SimpleNamespace(runs=[SimpleNamespace(guidance=0.0)])
        program = SimpleNamespace(
            runs=[SimpleNamespace(name="run", seed=0)],
            kind=kind,
            rollouts=rollouts,
            records=tmp_path,
            decoders=decoders,
        )
        session = SimpleNamespace(experiment=experiment, model=SimpleNamespace(tokenizer=None))
        with jax.disable_jit():
            reinforced._iteration(session, program, None, [[]], {})(
                SimpleNamespace(trained=None), step
            )
        return list(made)

    return run


# which is the toy's
@pytest.mark.parametrize("name", [name for name in TABLE if "the guide" not in name])
def test_the_runner_makes_each_pass_once(name, passes_made):
    """Those that the algorithm needs; where likelihood ratios are measured (iteration 0) the policy
    at x_t, if it was not among them.
    """
    algorithm, needed, _ = TABLE[name]
    assert sorted(passes_made(algorithm, 1)) == sorted(needed)
    assert sorted(passes_made(algorithm, 0)) == sorted({*needed, PT})


def test_selections_of_all_aggregations_ask_for_nothing():
    for kind, options in (
        ("token_mean", {}),
        ("token_mean_per_chunk", dict(chunk=2)),
        ("seq_mean_token_sum_norm", dict(max_length=8)),
    ):
        assert not passes_needed(
            Algorithm(selection=Selection("filtered"), aggregation=Aggregation(kind, **options))
        )


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_the_docs_says_so(name):
    _, needed, prompts = TABLE[name]
    words = {
        PT: "policy at x_t",
        PG: "policy at x_g",
        PU: "policy at the guide prompt",
        RT: "reference at x_t",
        RG: "reference at x_g",
    }
    before = ", ".join(words[of] for of in (PT, PG, PU, RT, RG) if of in needed) or "none"
    assert (
        f"| {name} | {before} | {', '.join(f'x_{p}' for p in prompts)} |"
        in DOCS.read_text().splitlines()
    )
