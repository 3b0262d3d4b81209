"""What every training step shares: its end, where the gradients of R runs go onto the weights of
the runs that are alive, and how it is compiled.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ip_jax.training.schedules import Schedule
from ip_jax.training.state import TrainState, adam


def apply_gradients(
    state: TrainState,
    gradients,
    loss: Float[Array, " R"],
    schedule: Schedule,
    max_grad_norm: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[TrainState, dict]:
    """(state with AdamW's update, {"grad_norm", "learning_rate", "alive"}: [R]) for per-run
    `gradients` [R, ...]; `state.step` is the caller's.

    `max_grad_norm` bounds each run's norm by itself. A run whose loss or gradient is not finite is
    frozen from then on.
    """
    grad_norm = jnp.sqrt(
        sum(
            jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients)
        )
    )
    if max_grad_norm is not None:
        shrink = jnp.minimum(1.0, max_grad_norm / jnp.maximum(grad_norm, 1e-12))
        gradients = jax.tree.map(lambda g: g * per_run(shrink, g), gradients)
    alive = state.alive & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    rate = state.learning_rate * schedule(state.step)
    direction, adam_state = jax.vmap(adam(*betas).update)(gradients, state.adam, state.trained)

    def keep(new, old):
        return jnp.where(per_run(alive, old), new, old)

    trained = jax.tree.map(
        lambda p, d: p - per_run(rate, p) * (d + per_run(state.weight_decay, p) * p),
        state.trained,
        direction,
    )
    state = state.replace(
        alive=alive,
        trained=jax.tree.map(keep, trained, state.trained),
        adam=jax.tree.map(keep, adam_state, state.adam),
    )
    return state, {"grad_norm": grad_norm, "learning_rate": rate, "alive": alive}


def per_run(values: Float[Array, " R"], like: Float[Array, "R ..."]) -> Float[Array, "R ..."]:
    """[R] reshaped to broadcast against an array [R, ...]."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def compile_step(
    step: Callable,
    state_sharding=None,
    frozen_sharding=None,
    batch_sharding=None,
    metric_sharding=None,
):
    """`step(state, frozen, batch) -> (state, metrics)`, jitted with pinned shardings (None:
    wherever the arrays lie) and the state donated.
    """
    if state_sharding is None:
        return jax.jit(step, donate_argnums=0)

    def on_mesh(state, frozen, batch):
        # where `constrain` finds it
        with jax.sharding.use_abstract_mesh(batch_sharding.mesh.abstract_mesh):
            return step(state, frozen, batch)

    return jax.jit(
        on_mesh,
        donate_argnums=0,
        in_shardings=(state_sharding, frozen_sharding, batch_sharding),
        out_shardings=(state_sharding, metric_sharding),
    )
