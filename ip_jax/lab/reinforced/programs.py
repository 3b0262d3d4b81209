"""The programs of a text experiment in reinforcement learning: what `run` executes on arrays and
`ip-jax plan` compiles from shapes alone.

Both call these functions, so that what is planned is what runs. The sampler's programs are those of
`sampling.slots`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ip_jax.lab.experiment import ModelConfig
from ip_jax.lab.reinforced.plan import RlConfig
from ip_jax.lab.supervised.programs import call, chosen_kernel, with_experts
from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig
from ip_jax.models.lora import init_lora
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.batch import Layout
from ip_jax.rl.policy import score
from ip_jax.rl.rollout import PROMPT_QUANTUM
from ip_jax.rl.rows import Rows
from ip_jax.rl.step import RlBatch, RlOptions, compile_rl_step
from ip_jax.training.sharding import base_shardings, batch_sharding, replicated, state_shardings
from ip_jax.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the code of a program depends on: its runs, their prompts and rewards aside."""

    mesh: Mesh | AbstractMesh
    config: DecoderConfig
    rl: RlConfig
    model: ModelConfig
    algorithm: Algorithm

    @property
    def layout(self) -> Layout:
        """How the update's rows are laid out."""
        return Layout(
            self.rl.tokens_per_micro_batch, self.rl.samples_per_row, self.mesh.shape["data"]
        )

    @property
    def kernel(self) -> str:
        """Attention's over rows of completions that share a prompt (`models.kernels`). Raises as
        `lab.supervised.programs.chosen_kernel`.
        """
        return attention_kernel(self.mesh, self.config, self.model, self.rl)


def attention_kernel(
    mesh: Mesh | AbstractMesh, config: DecoderConfig, model: ModelConfig, rl: RlConfig
) -> str:
    """The kernel of a program's updates and passes.

    Raises as `lab.supervised.programs.chosen_kernel`.
    """
    return chosen_kernel(mesh, config, model, longest=rl.max_length + PROMPT_QUANTUM)


@dataclasses.dataclass(frozen=True)
class Decoders:
    """The policy, with adapters that are trained, and the reference, the same base without: each
    graph with the weights as it takes them, which are the same arrays.
    """

    policy: nnx.GraphDef
    frozen: nnx.State
    reference: nnx.GraphDef
    reference_frozen: nnx.State


def decoders(
    kind: Kind,
    params: dict,
    seeds: Sequence[int],
    rates: Sequence[float],
    evaluate: Callable = call,
) -> tuple[Decoders, Callable[[], TrainState]]:
    """(the decoders, a function that gives the runs' state at iteration 0 on the mesh). With
    `evaluate` = jax.eval_shape, the leaves of `params` may be jax.ShapeDtypeStruct and all that is
    given are shapes.
    """
    rl, numbers = kind.rl, jnp.array(seeds)
    config = with_experts(kind.mesh, kind.config, kind.model)
    adapters = evaluate(lambda seeds: init_lora(seeds, kind.config, rl.lora), numbers)
    policy, trained, frozen = split_decoder(config, params, adapters, rl.lora)
    reference, _, reference_frozen = split_decoder(config, params)

    def start(trained) -> TrainState:
        return init_state(trained, jnp.array(rates), jnp.full(len(seeds), rl.weight_decay), numbers)

    start = jax.jit(start, out_shardings=state_shardings(kind.mesh, jax.eval_shape(start, trained)))
    return Decoders(policy, frozen, reference, reference_frozen), lambda: evaluate(start, trained)


def score_pass(kind: Kind, graphdef: nnx.GraphDef) -> Callable:
    """The jitted pass without a gradient (trained, frozen, rows) -> [M, R, B, S, C]; the
    reference's `trained` is {}.
    """

    def on_mesh(trained, frozen, rows: Rows):
        with jax.sharding.use_abstract_mesh(kind.mesh.abstract_mesh):
            return score(
                trained,
                frozen,
                rows,
                graphdef=graphdef,
                dtype=kind.model.activations,
                kernel=kind.kernel,
            )

    return jax.jit(on_mesh)


def update_step(
    kind: Kind, graphdef: nnx.GraphDef, state: TrainState, frozen: nnx.State, batch: RlBatch
) -> Callable:
    """The jitted step (state, frozen, batch) -> (state, metrics), its shardings pinned to the mesh.
    Of the arguments only shapes count.
    """
    options = RlOptions(
        kind.algorithm, kind.rl.schedule, kind.model.activations, kind.rl.remat, kind.kernel
    )
    places = (
        state_shardings(kind.mesh, state),
        base_shardings(kind.mesh, frozen),
        rows_sharding(kind.mesh, batch),
        replicated(kind.mesh),
    )
    return compile_rl_step(graphdef, options, *places)


def rows_sharding(mesh: Mesh | AbstractMesh, rows: Rows | RlBatch) -> NamedSharding:
    """Rows [M, R, B, ...] lie on the axes run and data; on run alone where data does not divide
    their B.
    """
    divides = all(leaf.shape[2] % mesh.shape["data"] == 0 for leaf in jax.tree.leaves(rows))
    return batch_sharding(mesh) if divides else NamedSharding(mesh, PartitionSpec(None, "run"))
