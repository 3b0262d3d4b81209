"""What a training program carries: trained weights and optimizer state with a leading run axis,
per-run scalars, the step.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class TrainState:
    """State of R runs. Every leaf but `step` has a leading run axis; learning rates and weight
    decays are data, not code.
    """

    step: Int[Array, ""]
    # pytree of [R, ...] float32: adapters, or with full training all weights, of which each run has
    # its own copy
    trained: Any
    adam: optax.ScaleByAdamState  # leaves [R, ...]
    learning_rate: Float[Array, " R"]  # peak
    weight_decay: Float[Array, " R"]
    dropout_seed: Int[Array, " R"]
    alive: Bool[Array, " R"]  # False from the first step whose loss or gradient was not finite


@flax.struct.dataclass
class Batch:
    """One step's packed rows, in M micro-batches of B rows for each block of runs (see
    `models.run_rows`), those of its runs side by side: one row belongs to one run. P is the
    bucketed number of response positions of a row.

    runs: int32 [M, blocks, B], the run of each row, counted within its block; row_numbers: which of
    its run's rows in this step it is. tokens, segment_ids (0 = padding, from 1), positions: int32
    [M, blocks, B, T]. segment_index: int32 [M, blocks, B, S, L], the row position of token l of
    segment s, T where there is none. response_index: int32 [M, blocks, B, P], the position in the
    row that predicts a response token; response_target: its token id; response_weight: float32, 1
    for a response token and 0 for padding.
    """

    runs: Int[Array, "M blocks B"]
    row_numbers: Int[Array, "M blocks B"]
    tokens: Int[Array, "M blocks B T"]
    segment_ids: Int[Array, "M blocks B T"]
    positions: Int[Array, "M blocks B T"]
    segment_index: Int[Array, "M blocks B S L"]
    response_index: Int[Array, "M blocks B P"]
    response_target: Int[Array, "M blocks B P"]
    response_weight: Float[Array, "M blocks B P"]


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction as torch.optim.AdamW computes it; learning rate and decoupled weight decay
    are applied per run by the step.
    """
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def init_state(
    trained,
    learning_rate: Float[Array, " R"],
    weight_decay: Float[Array, " R"],
    seeds: Int[Array, " R"],
) -> TrainState:
    """A state at step 0 for the weights `trained` (a pytree of [R, ...] arrays): the adapters, or
    `full_weights`.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        adam=jax.vmap(adam().init)(trained),
        learning_rate=jnp.asarray(learning_rate, jnp.float32),
        weight_decay=jnp.asarray(weight_decay, jnp.float32),
        dropout_seed=jnp.asarray(seeds, jnp.int32),
        alive=jnp.ones(len(learning_rate), bool),
    )


def full_weights(base):
    """What full training trains: the weights of the one run of its program, [1, ...] in float32."""
    return jax.tree.map(lambda weight: weight.astype(jnp.float32)[None], base)
