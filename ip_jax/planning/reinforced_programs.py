"""The programs of a reinforced run, lowered from shapes alone for devices that need not be there.
Sampling: `planning.programs.lower_sampling`.
"""

import dataclasses

import jax

from ip_jax.lab.reinforced import programs
from ip_jax.lab.supervised.programs import with_experts
from ip_jax.models.decoder import split_decoder
from ip_jax.planning.programs import Initial, placed
from ip_jax.planning.reinforced_workload import Program, RlWorkload
from ip_jax.planning.workload import abstract_base
from ip_jax.rl.rows import Rows
from ip_jax.rl.step import RlBatch
from ip_jax.training.sharding import state_shardings


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a program has on its mesh before its first iteration, as jax.ShapeDtypeStruct with
    shardings.
    """

    policy: Initial
    decoders: programs.Decoders

    def models(self) -> dict[str, tuple]:
        """(graph, adapters, weights) of whom a pass without a gradient is made."""
        return {
            "policy": (self.policy.graphdef, self.policy.state.trained, self.policy.frozen),
            "reference": (self.decoders.reference, {}, self.decoders.reference_frozen),
        }


def initial(program: Program) -> Begun:
    """The state and the weights of a program. The mesh may be abstract: then the shardings only
    tell sizes.
    """
    kind = program.kind
    params = abstract_base(kind.config, kind.model, kind.mesh)
    decoders, start = programs.decoders(
        kind, params, range(program.runs), [kind.rl.learning_rate] * program.runs, jax.eval_shape
    )
    state = start()
    state = placed(state, state_shardings(kind.mesh, state))
    return Begun(Initial(decoders.policy, state, decoders.frozen, decoders.frozen), decoders)


def untrained_decoder(workload: RlWorkload) -> tuple:
    """(graphdef, adapters, weights) of the model as it comes, as shapes on its mesh."""
    config = with_experts(workload.untrained_mesh, workload.config, workload.model)
    return split_decoder(config, abstract_base(config, workload.model, workload.untrained_mesh))


def on_mesh(program: Program, rows: Rows | RlBatch) -> Rows | RlBatch:
    """`rows` with the sharding that a run gives them."""
    place = programs.rows_sharding(program.kind.mesh, rows)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), rows)


def lower_update(program: Program) -> jax.stages.Lowered:
    """The step that `run` compiles."""
    begun, batch = initial(program).policy, program.batch()
    step = programs.update_step(program.kind, begun.graphdef, begun.state, begun.frozen, batch)
    return step.lower(begun.state, begun.frozen, on_mesh(program, batch))


def lower_score(program: Program, name: str) -> jax.stages.Lowered:
    """One of the passes without a gradient, by its name in `passes_needed`."""
    graphdef, trained, frozen = initial(program).models()[name.split("_")[0]]
    return programs.score_pass(program.kind, graphdef).lower(
        trained, frozen, on_mesh(program, program.scored()[name])
    )
