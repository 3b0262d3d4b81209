"""A training program without a model: R runs whose weights go through an irregular, donated,
deterministic update.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ip_jax.training.state import TrainState, init_state

RUNS, WIDTH = 2, 64


def fresh_state(runs: int = RUNS) -> TrainState:
    rng = np.random.default_rng(0)
    weights = {"w": jnp.asarray(rng.normal(size=(runs, WIDTH)), jnp.float32)}
    return init_state(weights, jnp.linspace(0.1, 0.2, runs), jnp.zeros(runs), jnp.arange(runs))


@jax.jit(donate_argnums=0)
def _update(state: TrainState) -> tuple[TrainState, dict]:
    noise = jax.vmap(
        lambda seed: jax.random.normal(
            jax.random.fold_in(jax.random.key(seed), state.step), (WIDTH,)
        )
    )(state.dropout_seed)
    weights = jnp.sin(3 * state.trained["w"]) + state.learning_rate[:, None] * noise
    adam = state.adam._replace(
        count=state.adam.count + 1, mu={"w": 0.9 * state.adam.mu["w"] + weights}
    )
    return state.replace(step=state.step + 1, trained={"w": weights}, adam=adam), {
        "loss": jnp.abs(weights).sum(axis=1)
    }


def run_step(state: TrainState, step: int) -> tuple[TrainState, dict, dict]:
    assert int(state.step) == step
    return *_update(state), {"tokens": 10 + step}


def state_at(step: int) -> TrainState:
    """What an undisturbed run has after `step` steps."""
    state = fresh_state()
    for n in range(step):
        state = run_step(state, n)[0]
    return state


def assert_same(first: TrainState, second: TrainState) -> None:
    """Bit for bit, dtypes included."""
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
