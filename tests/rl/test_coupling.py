"""Gradient coupling against plain gradients of one run and one sequence at a time, and what must
not change it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_models as rl
import tiny_models as tiny
from flax import nnx
from rl_steps import graded

from ip_jax.models.decoder import causal_attend, split_decoder
from ip_jax.rl.coupling import coupling, coupling_metrics, coupling_rows
from ip_jax.rl.diagnostics import CORRECT, HACK, OTHER

RUNS, COUNT, SLOTS, PROMPT = 2, 2, 3, 5
TRAINING, NEUTRAL = ([1, 2, 3, 2, 1], [3, 1, 2]), ([2, 3], [1])
TEMPERATURE = np.array([0.7, 1.3], np.float32)
LABELS = np.array(
    [
        [[HACK, OTHER, HACK, HACK], [CORRECT, HACK, CORRECT, CORRECT]],
        [[OTHER, OTHER, CORRECT, OTHER], [HACK, OTHER, OTHER, OTHER]],
    ]
)
# the first two valid ones
FIRST = {
    (0, HACK): ((0, 2), (0, 3)),
    (0, CORRECT): ((1, 0), (1, 2)),
    (1, HACK): (),
    (1, CORRECT): ((0, 2),),
}


@functools.cache
def model(at_start: bool):
    """(graphdef, lora, base); at the start of training B is zero."""
    adapters = tiny.random_lora(rl.CONFIG, rl.LORA, RUNS, seed=3)
    adapters = {
        target: {"a": of["a"], "b": of["b"] * (not at_start)} for target, of in adapters.items()
    }
    return split_decoder(rl.CONFIG, tiny.random_params(rl.CONFIG), adapters, rl.LORA)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def rollout(slots: int = PROMPT):
    """(rollout, x_0). Sample (0, 0) of run 0, a hack, and the only hack of run 1 are not valid."""
    valid = np.ones(LABELS.shape, bool)
    valid[0, 0, 0] = valid[1, 1, 0] = False
    samples = rl.random_samples(RUNS, 2, 4, SLOTS, seed=1)
    training, neutral = (
        rl.prompts(*prompts, runs=RUNS, slots=slots) for prompts in (TRAINING, NEUTRAL)
    )
    return (
        graded(
            samples,
            training,
            training,
            0.0,
            temperature=jnp.array(TEMPERATURE),
            labels=jnp.array(LABELS),
            valid=jnp.array(valid),
        ),
        neutral,
    )


_coupling = jax.jit(coupling, static_argnames="graphdef")


def found(made, at_start: bool = False, runs: slice = slice(None)):
    """kappa [R, N] of some of the runs."""
    graphdef, lora, base = model(at_start)

    def of_runs(tree):
        return jax.tree.map(lambda x: x[runs], tree)

    return np.asarray(
        _coupling(of_runs(lora), base, coupling_rows(*of_runs(made), COUNT), graphdef=graphdef)
    )


@functools.partial(jax.jit, static_argnums=0)
def _gradient(graphdef, lora, base, ids, bounds, temperature):
    """Of the log-probability of ids[bounds[0] : bounds[1]] behind what stands before them; what
    lies behind is not seen.
    """
    place = jnp.arange(1, len(ids))

    def log_prob(lora):
        decoder = nnx.merge(graphdef, lora, base)
        hidden, _ = decoder(ids[None, None], jnp.arange(len(ids))[None, None], causal_attend)
        log_p = jax.nn.log_softmax(hidden[0, 0] @ decoder.vocabulary().T / temperature, axis=-1)
        return jnp.sum(log_p[place - 1, ids[1:]] * (place >= bounds[0]) * (place < bounds[1]))

    return jax.grad(log_prob)(lora)


def alone(made, run: int, place: tuple[int, int], at_start: bool) -> float:
    """The cosine in float64 of the gradients of one run's single sequence under each prompt."""
    graphdef, lora, base = model(at_start)
    own, samples = jax.tree.map(lambda x: x[run : run + 1], lora), made[0].samples
    completion = np.asarray(samples.tokens)[run][place][: int(samples.length[run][place])].tolist()

    def gradient(prompt: list[int]) -> np.ndarray:
        ids, bounds = prompt + completion, np.array([len(prompt), len(prompt) + len(completion)])
        return rl.flat(
            _gradient(
                graphdef,
                own,
                base,
                np.array(ids + [0] * (PROMPT + SLOTS - len(ids))),
                bounds,
                TEMPERATURE[run],
            )
        )[0]

    p, q = gradient(TRAINING[place[0]]), gradient(NEUTRAL[place[0]])
    return p @ q / np.linalg.norm(p) / np.linalg.norm(q)


@pytest.mark.parametrize("at_start", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cosines_are_those_of_plain_gradients_of_the_first_samples_of_each_label(at_start):
    made = rollout()
    kappa = found(made, at_start).reshape(RUNS, 2, COUNT)
    for (run, label), places in FIRST.items():
        wanted = [alone(made, run, place, at_start) for place in places] + [np.nan] * (
            COUNT - len(places)
        )
        np.testing.assert_allclose(kappa[run, (HACK, CORRECT).index(label)], wanted, atol=2e-5)
    # the prompts differ, and so do the samples
    assert 0.01 < np.nanstd(kappa) and np.nanmax(kappa) < 0.999


def test_a_prompt_is_coupled_to_itself_with_one():
    made = rollout()
    kappa = found((made[0], made[0].training))
    np.testing.assert_allclose(kappa[np.isfinite(kappa)], 1, atol=1e-5)
    assert np.isfinite(kappa).sum() == sum(map(len, FIRST.values()))


@pytest.mark.slow
def test_runs_together_are_runs_alone_and_padding_changes_nothing():
    made = rollout()
    kappa = found(made)
    for run in range(RUNS):
        np.testing.assert_allclose(found(made, runs=slice(run, run + 1))[0], kappa[run], atol=1e-5)
    np.testing.assert_allclose(found(rollout(slots=8)), kappa, atol=1e-5)


def test_one_prompt_a_completion_is_taken_with_its_completion():
    made, neutral = rollout()
    each = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=1), made.training)
    of_groups, of_each = (
        jax.tree.leaves(coupling_rows(rollout, neutral, COUNT))
        for rollout in (made, made.replace(training=each))
    )
    assert len(of_groups) == 5 and all(
        (a == b).all() for a, b in zip(of_groups, of_each, strict=True)
    )


def test_means_are_over_the_samples_that_a_run_has():
    means = coupling_metrics(jnp.array([[0.2, 0.4, 0.5, np.nan], [np.nan, np.nan, 1.0, 0.0]]))
    np.testing.assert_allclose(means["coupling_hack"], [0.3, np.nan], rtol=1e-6)
    np.testing.assert_allclose(means["coupling_correct"], [0.5, 0.5], rtol=1e-6)
