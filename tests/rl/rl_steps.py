"""Graded rollouts of the enumerable policy, and the gradients that the step takes from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import rl_models as rl

from ip_jax.rl.advantages import Aggregation
from ip_jax.rl.algorithm import Algorithm, passes_needed
from ip_jax.rl.batch import Layout, Rollout, make_batch, rows_to_score
from ip_jax.rl.policy import score
from ip_jax.rl.rows import Prompts, Samples, to_samples
from ip_jax.rl.step import RlBatch, RlOptions, rl_gradients
from ip_jax.training.schedules import Schedule

# in as many slots, which compile once
GENERATION, TRAINING = (rl.prompts(ids, slots=4) for ids in ([1, 2, 3], [3, 0, 1, 2]))
ONE_ROW = Layout(tokens_per_micro_batch=10**6)
CONSTANT = Schedule("constant", total=100)
SUMS = dict(baseline="none", aggregation=Aggregation("seq_mean_token_sum"))
_score = jax.jit(score, static_argnames=("graphdef", "dtype"))
_gradients = jax.jit(rl_gradients, static_argnames=("graphdef", "options"))
log_probs_of = jax.jit(rl.sequence_log_probs, static_argnames="runs")


def graded(samples: Samples, generation: Prompts, training: Prompts, rewards, **changes) -> Rollout:
    """A rollout in which everything is valid and every uniform is 1/2, unless told otherwise."""
    shape = samples.length.shape
    plain = dict(
        temperature=jnp.ones(shape[0], jnp.float32),
        valid=jnp.ones(shape, bool),
        labels=jnp.zeros(shape, jnp.int32),
        uniforms=jnp.full(shape, 0.5, jnp.float32),
    )
    return Rollout(
        samples,
        generation,
        training,
        rewards=jnp.asarray(np.broadcast_to(rewards, shape), jnp.float32),
        **plain | changes,
    )


def options_of(algorithm: Algorithm, **changes) -> RlOptions:
    """Options without a remat policy: what a tiny model would recompute is nothing."""
    return RlOptions(algorithm, CONSTANT, remat="none", **changes)


def passes(trained, rollout: Rollout, algorithm: Algorithm, layout: Layout = ONE_ROW) -> dict:
    """The log-probabilities [R, Q, G, C] that the algorithm asks for, by name."""
    runs, groups, of_group = rollout.samples.length.shape
    found = {}
    for name in sorted(passes_needed(algorithm)):
        who, where = name.split("_")
        rows = rows_to_score(getattr(rollout, where), rollout, layout)
        graphdef, *states = (
            (rl.policy(runs)[0], trained, rl.policy(runs)[2])
            if who == "policy"
            else (rl.reference()[0], {}, rl.reference()[1])
        )
        found[name] = to_samples(
            _score(*states, rows, graphdef=graphdef, dtype="float32"), groups, of_group
        )
    return found


def batch_of(
    trained, rollout: Rollout, algorithm: Algorithm, layout: Layout = ONE_ROW, moving=None
) -> RlBatch:
    """The rows of the update, with the passes that it needs."""
    return make_batch(
        rollout, passes(trained, rollout, algorithm, layout), moving, None, algorithm, layout
    )[0]


def step_gradients(trained, batch: RlBatch, algorithm: Algorithm) -> tuple[np.ndarray, dict]:
    """(gradients of the runs' losses as vectors [R, n] in float64, sums). What `rl_gradients` does
    not look at makes no program of its own.
    """
    runs = batch.policy.tokens.shape[1]
    looked_at = ("estimator", "kl", "entropy_bonus", "epochs", "minibatches")
    seen = Algorithm(
        **{name: getattr(algorithm, name) for name in looked_at if algorithm.selection is None}
    )
    graphdef, _, base = rl.policy(runs)
    gradients, sums = _gradients(trained, base, batch, graphdef=graphdef, options=options_of(seen))
    return rl.flat(gradients), jax.device_get(sums)


def gradients_of(
    trained, rollout: Rollout, algorithm: Algorithm, layout: Layout = ONE_ROW, moving=None
) -> np.ndarray:
    """`step_gradients` of `batch_of`, the gradients alone."""
    return step_gradients(
        trained, batch_of(trained, rollout, algorithm, layout, moving), algorithm
    )[0]


def weighted(batch: RlBatch, weights) -> RlBatch:
    """One run's single row, its completions weighed by `weights` [S] instead of each by 1 / S."""
    signal = batch.policy.signal
    changed = signal.weight * len(weights) * jnp.asarray(weights, jnp.float32)[:, None]
    return batch.replace(policy=batch.policy.replace(signal=signal.replace(weight=changed)))


def scores_weighted(trained, prompt: Prompts, samples: Samples, weights) -> np.ndarray:
    """sum over y of weight(y) * grad log pi(y | prompt), [R, n]: by reverse mode through sequence
    log-probabilities alone.
    """
    return rl.flat(_score_sum(trained, prompt, samples, jnp.asarray(weights, jnp.float32)))


@jax.jit
@functools.partial(jax.grad, argnums=0)
def _score_sum(trained, prompt, samples, weights):
    return jnp.sum(
        weights * rl.sequence_log_probs(trained, prompt, samples, runs=samples.length.shape[0])
    )


def assert_same(found: np.ndarray, expected: np.ndarray, relative: float = 1e-4):
    """Equal up to float32: errors are measured by the largest entry, which is not 0."""
    scale = np.abs(expected).max()
    assert scale > 1e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * scale)
