"""Fixed data for supervised arms: what the untrained model says under some prompts and is paid for,
hacks and correct answers apart.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ip_jax.sampling.arrays import ArraySampling, Draw, sample_groups
from ip_jax.studies.toy.config import ToyConfig
from ip_jax.studies.toy.tasks import Reward, draw_tasks, grade
from ip_jax.studies.toy.training import Data
from ip_jax.studies.toy.vocabulary import END, PROMPT_SLOTS, encode, render

EXAMPLES = 256  # of each label, for each run
_TASKS = 8192  # sampled at once, one completion each
_MOST = 200  # rounds of sampling: a rate of 1 in 5000 is enough


def fixed_data(
    config: ToyConfig, model: tuple, sources: Sequence[tuple[str, ...]], seeds: Sequence[int]
) -> Data:
    """EXAMPLES hacks and as many correct answers for each run, drawn from a pool of the untrained
    `model`'s samples under its source's prompts.

    Raises ValueError for prompts under which the model hardly ever hacks or is hardly ever correct.
    """
    pools = {source: _pool(config, model, source) for source in dict.fromkeys(sources)}
    picks = []
    for source, seed in zip(sources, seeds, strict=True):
        rng = np.random.default_rng([seed, 7])
        drawn = [rng.integers(0, len(of_label[0]), EXAMPLES) for of_label in pools[source]]
        picks.append(
            [
                tuple(field[index] for field in of_label)
                for of_label, index in zip(pools[source], drawn, strict=True)
            ]
        )
    stacked = (
        jnp.array([[of_label[field] for of_label in run] for run in picks]) for field in range(4)
    )
    return Data(*stacked)


def _pool(config: ToyConfig, model: tuple, source: tuple[str, ...]) -> tuple:
    """((prompt, task, tokens, length) of hacks, the same of correct answers), sampled until there
    are EXAMPLES of both.
    """
    words = jnp.array(np.array([encode(prompt) for prompt in source]))
    found: tuple[list, list] = ([], [])
    for round_ in range(_MOST):
        *fields, graded = jax.device_get(_sample(config, *model, words, round_))
        for kept, label in zip(found, (graded.hack, graded.correct), strict=True):
            kept.append(tuple(field[label] for field in fields))
        counts = [sum(len(part[-1]) for part in kept) for kept in found]
        if min(counts) >= EXAMPLES:
            return tuple(
                tuple(np.concatenate(field) for field in zip(*kept, strict=True)) for kept in found
            )
    raise ValueError(
        f"under {', '.join(source)} the toy's untrained model gave {counts[0]} hacks and"
        f" {counts[1]} correct answers in {_MOST * _TASKS} samples: {EXAMPLES} of both are needed"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(config: ToyConfig, graphdef, lora, base, words, round_):
    tasks, prompts = jax.random.split(
        jax.random.fold_in(jax.random.key(11, impl="threefry2x32"), round_)
    )
    task = draw_tasks(tasks, (1, _TASKS), config.hard_share)
    prompt = words[jax.random.randint(prompts, (1, _TASKS), 0, len(words))]
    draw = Draw(jnp.array([11]), (jnp.arange(_TASKS) + round_ * _TASKS)[None], jnp.ones(1))
    tokens, length, _ = sample_groups(
        (graphdef, lora, base),
        render(prompt, task),
        jnp.full((1, _TASKS), PROMPT_SLOTS),
        draw,
        ArraySampling(1, config.slots, (END,)),
    )
    graded = grade(
        Reward(), config.loophole_length, task[:, :, None], tokens, length, jnp.ones(length.shape)
    )

    def one_row_each(x):
        return x.reshape(_TASKS, *x.shape[3:])

    return prompt[0], task[0], *jax.tree.map(one_row_each, (tokens, length, graded))
