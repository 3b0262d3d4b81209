"""What an absolute gate compares with in a text experiment: as many samples as an iteration has,
drawn under the training prompts themselves.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ip_jax.rl.gates import Gate, mean_log_prob, reference_quantile
from ip_jax.rl.rollout import Asked, Group, RolloutPlan, generate
from ip_jax.sampling.sampler import SamplerOptions


def reference_plan(plan: RolloutPlan) -> RolloutPlan:
    """`plan` with its training prompts in the place of the generation prompts, and no guides."""
    runs = tuple(
        dataclasses.replace(run, gen_prompt=run.train_prompt, guide_prompt=None, guidance=0.0)
        for run in plan.runs
    )
    return dataclasses.replace(
        plan, runs=runs, slots=plan.slots | {"gen": plan.slots["train"], "guide": 0}
    )


def reference_scoring(
    rollouts: RolloutPlan, gate: Gate, options_of: Callable[[RolloutPlan], SamplerOptions]
) -> Callable[[tuple, Asked], Float[np.ndarray, " R"] | None]:
    """(the policy as `sample` takes it, what an iteration asked) -> `gates.reference_quantile` of
    each run, None where `gate` needs none.

    The tasks are the iteration's, the random bits others, and a function of the same things, so
    that an iteration that is done again finds the same. Of these samples only the quantile is kept,
    in the metrics.
    """
    if not gate.needs_reference:
        return lambda decoder, asked: None
    quantile, plan = (gate.like or gate).quantile, reference_plan(rollouts)
    options = options_of(plan)

    def scores(decoder: tuple, asked: Asked) -> Float[np.ndarray, " R"]:
        groups = tuple(
            tuple(Group(group.task, group.train, group.train) for group in run)
            for run in asked.groups
        )
        own = generate(decoder, plan, Asked(-1 - asked.iteration, groups), options).samples
        return np.asarray(
            reference_quantile(
                jnp.asarray(mean_log_prob(own.log_probs, own.mask).reshape(len(groups), -1)),
                quantile,
            )
        )

    return scores
