"""Our iteration of reinforcement learning on one GPU: rollout and update by the functions of a run,
on random prompts and rewards.

What a run does besides is left out on both sides: text, grading, records, metrics of samples.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.model import one_device, random_params
from benchmarks.gpu.sizes import RlSizes, Sizes
from benchmarks.gpu.training import MODEL
from ip_jax.lab.reinforced import programs
from ip_jax.lab.reinforced.plan import uniforms_of
from ip_jax.planning.reinforced_workload import rollout_of
from ip_jax.rl import batch as batches
from ip_jax.rl import rollout as rollouts
from ip_jax.rl.algorithm import passes_needed
from ip_jax.rl.step import RlBatch
from ip_jax.training import hosts
from ip_jax.training.meter import peak_memory
from ip_jax.training.sharding import base_shardings
from ip_jax.training.state import TrainState

SEED = 0


class NoText:
    """In the place of a tokenizer: the ids are random, and nobody reads them."""

    def decode(self, ids: np.ndarray, skip_special_tokens: bool) -> str:
        """The empty text."""
        return ""


def rollout_plan(work: RlSizes) -> rollouts.RolloutPlan:
    """What a run's rollouts are made of, each task's prompt `work.prompt` random ids. Every
    iteration asks all tasks.
    """
    ids = np.random.default_rng(SEED).integers(
        1, work.hf.vocab_size, (work.rl.groups, work.prompt), np.int32
    )
    prompts = [rollouts.Prompted("random ids", row) for row in ids]
    run = rollouts.RolloutRun("benchmark", SEED, temperature=work.rl.temperature)
    slots = -(-work.prompt // rollouts.PROMPT_QUANTUM) * rollouts.PROMPT_QUANTUM
    return rollouts.RolloutPlan(
        (run,),
        [{"id": i} for i in range(work.rl.groups)],
        NoText(),
        work.rl.rollout,
        lambda index, _: prompts[index],
        {"gen": slots, "train": slots, "guide": 0},
    )


def graded(plan: rollouts.RolloutPlan, sampled: rollouts.Rollout) -> batches.Rollout:
    """The rollout with random rewards in [0, 1), as the arrays of an update."""
    shape = sampled.samples.length.shape
    rewards = np.random.default_rng((SEED, sampled.asked.iteration)).random(shape, np.float32)
    temperatures = np.array([run.temperature for run in plan.runs], np.float32)
    return batches.Rollout(
        sampled.samples,
        plan.prompts(sampled.asked, "gen"),
        plan.prompts(sampled.asked, "train"),
        temperatures,
        rewards,
        np.ones(shape, bool),
        np.zeros(shape, np.int32),
        uniforms_of([SEED], sampled.asked.iteration, *shape[1:]),
    )


@dataclasses.dataclass(frozen=True)
class Halves:
    """The two halves of an iteration, each finished when it returns."""

    roll_out: Callable[[TrainState, int], rollouts.Rollout]  # (state, iteration)
    # (state, rollout) -> (state, metrics [1])
    learn: Callable[[TrainState, rollouts.Rollout], tuple[TrainState, dict]]


def program(
    kind: programs.Kind, plan: rollouts.RolloutPlan, params: dict
) -> tuple[Halves, TrainState]:
    """(an iteration of one run, its state before the first). Raises ValueError for an algorithm
    with passes before its update: none is made.
    """
    if passes_needed(kind.algorithm):
        raise ValueError(
            f"the algorithm needs {', '.join(sorted(passes_needed(kind.algorithm)))} before its"
            " update: the benchmark's needs nothing"
        )
    decoders, start = programs.decoders(kind, params, [SEED], [kind.rl.learning_rate])
    frozen, state = (
        jax.device_put(decoders.frozen, base_shardings(kind.mesh, decoders.frozen)),
        start(),
    )
    options = rollouts.sampler_options(plan, (), kind.model.activations, kind.rl.slots, kind.mesh)
    decide = jax.jit(
        functools.partial(batches.make_batch, algorithm=kind.algorithm, layout=kind.layout)
    )
    shapes = update_rows(kind, plan)
    places, update = (
        programs.rows_sharding(kind.mesh, shapes),
        programs.update_step(kind, decoders.policy, state, frozen, shapes),
    )

    def learn(state: TrainState, sampled: rollouts.Rollout) -> tuple[TrainState, dict]:
        batch, _ = decide(graded(plan, sampled), {}, jnp.zeros(1), None)
        state, metrics = update(state, frozen, hosts.place(batch, places))
        return state, hosts.fetch(metrics)

    return (
        Halves(
            lambda state, step: rollouts.generate(
                (decoders.policy, state.trained, frozen), plan, plan.ask(step), options
            ),
            learn,
        ),
        state,
    )


def update_rows(kind: programs.Kind, plan: rollouts.RolloutPlan) -> RlBatch:
    """The rows of an update as jax.ShapeDtypeStruct."""
    sides = ((kind.rl.groups, plan.slots[side]) for side in ("gen", "train"))
    decide = functools.partial(batches.make_batch, algorithm=kind.algorithm, layout=kind.layout)
    return jax.eval_shape(
        decide, rollout_of(1, kind.rl, *sides), {}, jax.ShapeDtypeStruct((1,), jnp.float32), None
    )[0]


def measure_iteration(sizes: Sizes) -> dict:
    """One iteration behind another that compiles: `RlSizes.rates`, and how many positions the
    update computes, where completions share prompts.
    """
    mesh, work = one_device(sizes), sizes.reinforced
    kind = programs.Kind(mesh, work.hf.decoder_config(), work.rl, MODEL, work.algorithm)
    plan = rollout_plan(work)
    halves, state = program(kind, plan, random_params(kind.config, MODEL.weights, mesh))
    spent = []
    for step in range(2):
        started = time.perf_counter()
        sampled = halves.roll_out(state, step)
        between = time.perf_counter()
        state, metrics = halves.learn(state, sampled)
        spent.append((between - started, time.perf_counter() - between))
        if sampled.samples.length.min() != work.rl.max_new_tokens or not metrics["alive"].all():
            raise ValueError(
                f"iteration {step} is no whole one: a completion stopped early, or the loss is not"
                " finite"
            )
    rows = update_rows(kind, plan).policy
    return {
        **work.rates(*spent[1]),
        "measured_iterations": 1,
        "warm_up_iterations": 1,
        "first_rollout_s": round(spent[0][0], 1),
        "first_update_s": round(spent[0][1], 1),
        "grad_norm": round(float(metrics["grad_norm"][0]), 4),
        "samples_per_row": work.rl.samples_per_row,
        "update_positions": rows.prompt.size + rows.tokens.size,
        "micro_batches": rows.tokens.shape[0],
        "remat": work.rl.remat,
        "peak_bytes": peak_memory(),
    }
