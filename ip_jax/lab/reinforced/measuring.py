"""What is measured of a text experiment's policy in the iterations that begin at an evaluation,
beside what training makes anyway.

Nothing here changes weights, rollouts or random bits: it reads the state that sampled an iteration,
and its record.
"""

from collections.abc import Callable, Collection

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ip_jax.rl.batch import Rollout
from ip_jax.rl.coupling import coupling, coupling_metrics, coupling_rows
from ip_jax.rl.prompting import Choice
from ip_jax.rl.rollout import PROMPT_QUANTUM, RolloutPlan, right_padded, task_order
from ip_jax.training import hosts


def measuring_couplings(
    plan: RolloutPlan,
    steps: Collection[int],
    policy: tuple,
    mesh: Mesh,
    dtype: str,
    remat: str,
    kernel: str,
) -> Callable[[dict, Rollout, int], dict[str, np.ndarray]]:
    """(trained weights, the iteration's rollout, iteration) -> {quantity: [R]} of `rl.coupling`,
    for the iterations `steps`.

    `policy`: (graphdef, frozen weights on the mesh). One program for all of them: x_0's prompt
    slots are as many as the longest of `steps` needs.
    """
    neutral = {step: _neutral(plan, step) for step in steps}
    slots = (
        -(
            -max(len(ids) for runs in neutral.values() for run in runs for ids in run)
            // PROMPT_QUANTUM
        )
        * PROMPT_QUANTUM
    )
    graphdef, frozen = policy
    lay_out, place = jax.jit(coupling_rows), NamedSharding(mesh, PartitionSpec(None, None, "run"))

    @jax.jit
    def on_mesh(trained, frozen, rows):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return coupling(
                trained, frozen, rows, graphdef=graphdef, dtype=dtype, remat=remat, kernel=kernel
            )

    def measure(trained: dict, rollout: Rollout, step: int) -> dict[str, np.ndarray]:
        rows = lay_out(rollout, right_padded(neutral[step], slots))
        found = coupling_metrics(hosts.fetch(on_mesh(trained, frozen, hosts.place(rows, place))))
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    return measure


def _neutral(plan: RolloutPlan, iteration: int) -> list[list[np.ndarray]]:
    """x_0 of every run's groups: their tasks without any extra text, as the model reads them."""
    options, choice = plan.options, Choice(plan.runs[0].train_prompt.neutral, 0)

    def order(run):
        return task_order(len(plan.tasks), run.seed, iteration * options.groups, options.groups)

    return [[plan.render(index, choice).token_ids for index in order(run)] for run in plan.runs]
