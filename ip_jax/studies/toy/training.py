"""Reinforcement learning on the toy: a whole iteration of all runs of a kind is one jitted program,
sampling and grading included.

rollout -> reward -> gate -> swap -> step, with the functions of `ip_jax.rl`. Dims: R runs, Q
groups, G samples of a group, C completion slots, X prompt slots, P prompts of a pool, W words of a
prompt.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ip_jax.models.decoder import split_decoder
from ip_jax.models.lora import LoraConfig, init_lora
from ip_jax.rl import gates
from ip_jax.rl.advantages import update_moving_mean
from ip_jax.rl.algorithm import Algorithm, passes_needed
from ip_jax.rl.batch import Decisions, Layout, Rollout, make_batch, rows_to_score
from ip_jax.rl.coupling import coupling, coupling_metrics, coupling_rows
from ip_jax.rl.diagnostics import CORRECT, HACK, OTHER, llr_metrics, sample_metrics
from ip_jax.rl.policy import score
from ip_jax.rl.rows import Prompts, Samples, to_samples
from ip_jax.rl.step import RlOptions, rl_step
from ip_jax.sampling.arrays import ArraySampling, Draw, Guide, sample_groups
from ip_jax.studies.toy.config import ToyConfig
from ip_jax.studies.toy.prompts import NEUTRAL
from ip_jax.studies.toy.tasks import Graded, Reward, draw_tasks, grade, stack_rewards
from ip_jax.studies.toy.vocabulary import END, PROMPT_SLOTS, PROMPT_WORDS, encode, render
from ip_jax.training.schedules import Schedule
from ip_jax.training.state import TrainState, init_state

_WHOLE = 1 << 30  # tokens: the rows of an iteration are one micro-batch


@dataclasses.dataclass(frozen=True)
class ToyArm:
    """A named condition. `gen_prompts` and `train_prompts` are pools from which each group draws
    one; `keep` is the probability with which a group is trained under its training prompt, else
    under the neutral one, x_0 (as in `rl.prompting`).

    `source`: "policy" samples on-policy; a pool of prompts instead samples from the untrained model
    under these, keeps what earns a reward, half of it hacks, and trains on this fixed data
    (supervised: the algorithm needs a selection). `guide_prompts`, a pool as well: what guided
    sampling (`guidance` above 0) and a PMI weight against the guide compare the others with. Raises
    ValueError for an empty pool and for a number that means nothing.
    """

    name: str
    label: str
    gen_prompts: tuple[str, ...]
    train_prompts: tuple[str, ...]
    algorithm: Algorithm = Algorithm()
    reward: Reward = Reward()
    keep: float = 1.0
    source: str | tuple[str, ...] = "policy"
    learning_rate: float | None = None
    guide_prompts: tuple[str, ...] = ()
    guidance: float = 0.0

    def __post_init__(self):
        for name in ("gen_prompts", "train_prompts", "source"):
            if not getattr(self, name):
                raise ValueError(
                    f"the arm {self.name} has {name} {getattr(self, name)!r}: it needs at least one"
                    " prompt"
                )
        if isinstance(self.source, str) and self.source != "policy":
            raise ValueError(
                f"the arm {self.name} has source {self.source!r}: it is 'policy', or a tuple of"
                " prompts"
            )
        if not 0 <= self.keep <= 1:
            raise ValueError(
                f"the arm {self.name} has keep {self.keep}: a probability lies between 0 and 1"
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"the arm {self.name} has learning_rate {self.learning_rate}: it must be a number"
                " above 0, or None for that of rl"
            )


@dataclasses.dataclass(frozen=True)
class ToyRl:
    """One size for all arms. `groups` tasks an iteration with `samples` completions each; every
    `probe_every` iterations x_0 is looked at.

    Raises ValueError for a number that means nothing.
    """

    iterations: int = 150
    groups: int = 8
    samples: int = 8
    learning_rate: float = 3e-4
    lora: LoraConfig = LoraConfig(rank=8, alpha=16)
    probe_every: int = 10
    probe_tasks: int = 12
    probe_samples: int = 8
    grid_tasks: int = 24
    grid_samples: int = 8

    def __post_init__(self):
        for name in (
            "iterations",
            "groups",
            "samples",
            "probe_every",
            "probe_tasks",
            "probe_samples",
            "grid_tasks",
            "grid_samples",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"rl.learning_rate is {self.learning_rate}: it must be a number above 0"
            )


@flax.struct.dataclass
class Conditions:
    """The data that tells the runs of a program apart."""

    seed: Int[Array, " R"]
    gen_pool: Int[Array, "R P W"]
    gen_count: Int[Array, " R"]
    train_pool: Int[Array, "R P W"]
    train_count: Int[Array, " R"]
    keep: Float[Array, " R"]
    reward: Reward
    guide_pool: Int[Array, "R P W"] | None  # None: no run has a guide
    guide_count: Int[Array, " R"] | None
    guidance: Float[Array, " R"]


@flax.struct.dataclass
class Data:
    """Fixed completions of the untrained model for supervised arms, N of each label for every run,
    with the prompts that they were sampled under.
    """

    prompt: Int[Array, "R 2 N W"]
    task: Int[Array, "R 2 N 4"]  # hacks, then correct ones
    tokens: Int[Array, "R 2 N C"]
    length: Int[Array, "R 2 N"]


@dataclasses.dataclass(frozen=True)
class Program:
    """What the code of a program depends on."""

    config: ToyConfig
    rl: ToyRl
    algorithm: Algorithm
    supervised: bool
    guided: bool = False


def conditions(arms: list[ToyArm], seeds: list[int]) -> Conditions:
    """Of runs, one entry of both lists each."""
    gen, gen_count = _pools([arm.gen_prompts for arm in arms])
    train, train_count = _pools([arm.train_prompts for arm in arms])
    guide = _pools([arm.guide_prompts for arm in arms]) if arms[0].guide_prompts else (None, None)
    keep, guidance = (
        jnp.array([getattr(arm, name) for arm in arms], jnp.float32)
        for name in ("keep", "guidance")
    )
    return Conditions(
        jnp.array(seeds),
        gen,
        gen_count,
        train,
        train_count,
        keep,
        stack_rewards(tuple(arm.reward for arm in arms)),
        *guide,
        guidance,
    )


def _pools(of_runs: list[tuple[str, ...]]) -> tuple[Array, Array]:
    most = max(map(len, of_runs))
    tokens = np.array([[encode(pool[i % len(pool)]) for i in range(most)] for pool in of_runs])
    return jnp.array(tokens), jnp.array([len(pool) for pool in of_runs])


def start(
    program: Program, params: dict, seeds: Int[np.ndarray, " R"], rates: list[float]
) -> tuple:
    """(graphdef, state, base) of runs at iteration 0."""
    adapters = init_lora(jnp.asarray(seeds), program.config.decoder, program.rl.lora)
    graphdef, lora, base = split_decoder(program.config.decoder, params, adapters, program.rl.lora)
    return (
        graphdef,
        init_state(lora, jnp.array(rates), jnp.zeros(len(rates)), jnp.asarray(seeds)),
        base,
    )


@functools.partial(
    jax.jit, static_argnames=("program", "graphdefs", "count"), donate_argnames="state"
)
def iterate(
    program: Program,
    graphdefs: tuple,
    base: tuple,
    fixed: tuple[Conditions, Data | None, TrainState],
    state: tuple[TrainState, Array],
    *,
    count: int,
) -> tuple:
    """`count` iterations: ((state, moving means [R]), (metrics {name: [count, R]}, kept {name:
    [count, R, Q, G, ...]})).

    `graphdefs` and `base` are pairs: of the policy, and of the reference, which has no adapter.
    `fixed`: the runs' conditions, their data if they are supervised, and their state at iteration
    0.

    `kept` is the rollouts: `tokens` [count, R, Q, G, C] uint8 and `log_probs` of the same shape
    (the sampler's, in float16 here alone: training uses float32); `generation`, `training` and,
    where the arms have one, `guide` [count, R, Q, X] uint8, each prompt with the task behind it; of
    each completion `length`, `label` (uint8), `reward` and its parts `part_*`, `advantage`, `gate`
    (float32), the verdicts `attempt` and `trait`, `flagged` and `valid` (bool). Supervised runs
    copy fixed data: Q * G groups of one completion, and log-probabilities of 0.
    """
    of_runs, data, fresh = fixed

    def iteration(carried, _):
        state, moving = carried
        rollout, graded = (
            _copied(program, of_runs, data, state.step)
            if program.supervised
            else _sampled(program, graphdefs[0], base[0], of_runs, state)
        )
        scores = _scores(program, graphdefs, base, state, rollout)
        measured = _measured(
            program, (graphdefs[0], state.trained, base[0]), state.step, rollout, scores
        )
        reference = _reference_scores(program, graphdefs[0], base[0], of_runs, state, rollout)
        batch, decided = make_batch(
            rollout, scores, moving, reference, program.algorithm, Layout(_WHOLE)
        )
        options = RlOptions(
            program.algorithm, Schedule("constant", total=program.rl.iterations), remat="none"
        )
        moving = update_moving_mean(moving, rollout.rewards, rollout.valid, state.step)
        if program.algorithm.selection and program.algorithm.selection.restart_from_base:
            state = fresh.replace(step=state.step, alive=state.alive)
        new, metrics = rl_step(state, base[0], batch, graphdef=graphdefs[0], options=options)
        kept = _kept(rollout, graded, decided)
        return (new, moving), (
            metrics | measured | _metrics(program, rollout, graded, decided, scores),
            kept,
        )

    return jax.lax.scan(iteration, state, None, length=count)


def _kept(rollout: Rollout, graded: Graded, decided: Decisions) -> dict[str, Array]:
    """What stays of an iteration's rollout, see `iterate`."""

    def small(prompts):
        return prompts.tokens.astype(jnp.uint8)

    kept = {
        "tokens": rollout.samples.tokens.astype(jnp.uint8),
        "length": rollout.samples.length.astype(jnp.uint8),
        "gate": decided.gate_weight,
        "reward": rollout.rewards,
        "advantage": decided.advantage,
        "label": rollout.labels.astype(jnp.uint8),
        "log_probs": rollout.samples.log_probs.astype(jnp.float16),
        "generation": small(rollout.generation),
        "training": small(rollout.training),
        "valid": rollout.valid,
        "flagged": graded.flagged,
        "attempt": graded.attempt,
        "trait": graded.trait,
    }
    kept |= {f"part_{name}": part for name, part in graded.parts.items()}
    return kept if rollout.guide is None else kept | {"guide": small(rollout.guide)}


def _keys(of_runs: Conditions, step, purpose: int):
    """A key for each run: runs of one seed share it, whatever their arm."""
    return jax.vmap(
        lambda seed: jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), purpose
        )
    )(of_runs.seed)


def _uniform(of_runs: Conditions, step, purpose: int, *shape: int):
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(_keys(of_runs, step, purpose))


def _choose(pool, count, uniform):
    """A prompt of the run's pool for each group, [R, Q, W]."""
    index = jnp.minimum((uniform * count[:, None]).astype(jnp.int32), count[:, None] - 1)
    return jnp.take_along_axis(pool, index[..., None], axis=1)


def _prompts(of_runs: Conditions, step, groups: int):
    """(generation words, training words), [R, Q, W] each."""
    gen = _choose(of_runs.gen_pool, of_runs.gen_count, _uniform(of_runs, step, 1, groups))
    train = _choose(of_runs.train_pool, of_runs.train_count, _uniform(of_runs, step, 2, groups))
    kept = _uniform(of_runs, step, 3, groups) < of_runs.keep[:, None]
    return gen, jnp.where(kept[..., None], train, jnp.array(encode(NEUTRAL)))


def _sampled(
    program: Program, graphdef, base, of_runs: Conditions, state: TrainState
) -> tuple[Rollout, Graded]:
    rl, config, runs = program.rl, program.config, len(of_runs.seed)
    task = jax.vmap(lambda key: draw_tasks(key, (rl.groups,), config.hard_share))(
        _keys(of_runs, state.step, 0)
    )
    gen, train = _prompts(of_runs, state.step, rl.groups)
    example = jnp.broadcast_to(state.step * rl.groups + jnp.arange(rl.groups), (runs, rl.groups))
    prompts, full = render(gen, task), jnp.full((runs, rl.groups), PROMPT_SLOTS)
    options = ArraySampling(rl.samples, config.slots, (END,))
    guide = None
    if of_runs.guide_pool is not None:
        words = _choose(
            of_runs.guide_pool, of_runs.guide_count, _uniform(of_runs, state.step, 7, rl.groups)
        )
        guide = Prompts(render(words, task), full)
    guidance = Guide(guide.tokens, full, of_runs.guidance) if program.guided else None
    found = Samples(
        *sample_groups(
            (graphdef, state.trained, base),
            prompts,
            full,
            Draw(of_runs.seed, example, jnp.ones(runs)),
            options,
            guidance,
        )
    )
    graded = grade(
        of_runs.reward,
        config.loophole_length,
        task[:, :, None],
        found.tokens,
        found.length,
        _uniform(of_runs, state.step, 4, rl.groups, rl.samples),
    )
    return (
        _rollout(
            of_runs,
            state.step,
            found,
            (Prompts(prompts, full), Prompts(render(train, task), full)),
            graded,
        ).replace(guide=guide),
        graded,
    )


def _copied(program: Program, of_runs: Conditions, data: Data, step) -> tuple[Rollout, Graded]:
    """A step's rows of fixed data, half of them hacks: Q * G groups of one."""
    count, runs = program.rl.groups * program.rl.samples, len(of_runs.seed)
    label = jnp.broadcast_to(jnp.arange(count) % 2, (runs, count))
    index = (_uniform(of_runs, step, 5, count) * data.length.shape[-1]).astype(jnp.int32)

    def pick(x):  # [R, Q * G, 1, ...]
        return jax.vmap(lambda of_run, i, j: of_run[i, j])(x, label, index)[:, :, None]

    task, gen, tokens, length = (
        pick(data.task)[:, :, 0],
        pick(data.prompt)[:, :, 0],
        pick(data.tokens),
        pick(data.length),
    )
    _, train = _prompts(of_runs, step, count)
    found = Samples(tokens, length, jnp.zeros(tokens.shape, jnp.float32))
    graded = grade(
        of_runs.reward,
        program.config.loophole_length,
        task[:, :, None],
        tokens,
        length,
        jnp.ones(length.shape),
    )
    prompts = tuple(
        Prompts(render(words, task), jnp.full((runs, count), PROMPT_SLOTS))
        for words in (gen, train)
    )
    return _rollout(of_runs, step, found, prompts, graded), graded


def _rollout(
    of_runs: Conditions, step, samples: Samples, prompts: tuple[Prompts, Prompts], graded: Graded
) -> Rollout:
    labels = jnp.where(graded.hack, HACK, jnp.where(graded.correct, CORRECT, OTHER))
    uniforms = _uniform(of_runs, step, 6, *samples.length.shape[1:])
    return Rollout(
        samples,
        *prompts,
        jnp.ones(len(of_runs.seed)),
        graded.reward,
        graded.valid,
        labels,
        uniforms,
    )


def _scores(
    program: Program, graphdefs, base, state: TrainState, rollout: Rollout
) -> dict[str, Array]:
    """The passes that the algorithm needs, [R, Q, G, C] each."""
    models = {
        "policy": (graphdefs[0], state.trained, base[0]),
        "reference": (graphdefs[1], {}, base[1]),
    }
    found = {}
    for name in sorted(passes_needed(program.algorithm)):
        who, where = name.split("_")
        prompts = {
            "training": rollout.training,
            "generation": rollout.generation,
            "guide": rollout.guide,
        }[where]
        found[name] = _score(models[who], prompts, rollout)
    return found


def _score(model: tuple, prompts: Prompts, rollout: Rollout) -> Float[Array, "R Q G C"]:
    graphdef, trained, weights = model
    rows = rows_to_score(prompts, rollout, Layout(_WHOLE))
    return to_samples(
        score(trained, weights, rows, graphdef=graphdef, dtype="float32"),
        *rollout.samples.length.shape[1:],
    )


def _measured(
    program: Program, policy: tuple, step, rollout: Rollout, scores: dict
) -> dict[str, Array]:
    """{quantity: [R]} that is measured in the iteration behind a probe, and NaN in others: coupling
    of x_t and x_0, and likelihood ratios where the algorithm's own passes `scores` do not give them
    in every iteration. A pass of its own is one that `scores` lacks.
    """
    graphdef, trained, weights = policy

    def look():
        neutral = rollout.training.replace(
            tokens=rollout.training.tokens.at[..., :PROMPT_WORDS].set(jnp.array(encode(NEUTRAL)))
        )
        found = coupling_metrics(
            coupling(trained, weights, coupling_rows(rollout, neutral), graphdef=graphdef)
        )
        if "policy_training" in scores and not program.guided:
            return found
        generation = (
            _score(policy, rollout.generation, rollout)
            if program.supervised or program.guided
            else rollout.samples.log_probs
        )
        training = (
            scores["policy_training"]
            if "policy_training" in scores
            else _score(policy, rollout.training, rollout)
        )
        return found | llr_metrics(rollout, training, generation)

    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(look))
    return jax.lax.cond(step % program.rl.probe_every == 0, look, lambda: nothing)


def _reference_scores(
    program: Program, graphdef, base, of_runs: Conditions, state: TrainState, rollout: Rollout
):
    """What an absolute gate compares with: the quantile of the mean log-probabilities of as many
    samples drawn under the training prompt.
    """
    gate = program.algorithm.gate.like or program.algorithm.gate
    if gate.kind != "absolute":
        return None
    runs, groups = rollout.training.length.shape
    example = jnp.broadcast_to(jnp.arange(groups) + (1 << 24), (runs, groups)) + state.step * groups
    options = ArraySampling(program.rl.samples, program.config.slots, (END,))
    own = Samples(
        *sample_groups(
            (graphdef, state.trained, base),
            rollout.training.tokens,
            rollout.training.length,
            Draw(of_runs.seed, example, jnp.ones(runs)),
            options,
        )
    )
    return gates.reference_quantile(
        gates.mean_log_prob(own.log_probs, own.mask).reshape(runs, -1), gate.quantile
    )


def _metrics(
    program: Program, rollout: Rollout, graded: Graded, decided: Decisions, scores: dict
) -> dict[str, Array]:
    """Counts and quantities of evals.rl_tables, [R] each; the step's own are beside them."""
    counts = {
        f"n_{name}": getattr(graded, name).sum(axis=(1, 2), dtype=jnp.int32)
        for name in ("hack", "attempt", "correct", "trait")
    }
    at_cap = jnp.mean(
        ~jnp.any(rollout.samples.tokens == END, axis=-1), axis=(1, 2), dtype=jnp.float32
    )
    return (
        counts | {"length_cap": at_cap} | sample_metrics(rollout, decided, scores, program.guided)
    )
