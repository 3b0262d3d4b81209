"""How often the runs of a toy hack, are correct and show the trait under a grid of prompts, by
sampling on held-out tasks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ip_jax.sampling.arrays import ArraySampling, Draw, sample_groups
from ip_jax.studies.toy.config import ToyConfig
from ip_jax.studies.toy.tasks import draw_tasks, grade
from ip_jax.studies.toy.vocabulary import END, PROMPT_SLOTS, render

VERDICTS = ("hack", "attempt", "correct", "trait", "well_formed")


def count_verdicts(
    config: ToyConfig,
    model: tuple,
    prompts: Int[Array, "P W"],
    seeds: Int[Array, " R"],
    *,
    tasks: int,
    samples: int = 8,
    held_out: bool = True,
) -> dict[str, Int[Array, "R P"]]:
    """How many of `tasks * samples` completions of each run under each prompt have each verdict, at
    temperature 1; all prompts see the same tasks.

    `model` is (graphdef, lora, base). Runs of one seed see the same tasks. Pure, for use inside
    jit.
    """
    runs, count = len(seeds), len(prompts)
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds)
    task = jax.vmap(lambda key: draw_tasks(key, (tasks,), config.hard_share, held_out))(keys)
    task = jnp.broadcast_to(task[:, None], (runs, count, tasks, 4))
    tokens = render(prompts[:, None], task).reshape(runs, count * tasks, PROMPT_SLOTS)
    draw = Draw(
        seed=seeds,
        example_id=jnp.broadcast_to(jnp.arange(count * tasks), (runs, count * tasks)),
        temperature=jnp.ones(runs),
    )
    options = ArraySampling(samples, config.slots, (END,))
    completion, length, _ = sample_groups(
        model, tokens, jnp.full((runs, count * tasks), PROMPT_SLOTS), draw, options
    )
    task = task.reshape(runs, count * tasks, 1, 4)
    graded = grade(
        config.reward, config.loophole_length, task, completion, length, jnp.ones(length.shape)
    )
    return {name: getattr(graded, name).reshape(runs, count, -1).sum(axis=-1) for name in VERDICTS}
