"""Sampling from arrays of prompts inside a jitted program: every group is put into a slot of its
own at once, and nothing is refilled.

The same prefill and decoding steps as `sampling.sampler`, for prompts that lie on the device
already. Dims: R runs, Q groups (one prompt each), G samples of a group, C completion slots, X
prompt slots.
"""

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.sampling.slots import Refill, SlotShape, decode, prefill, separate_layers, start_slots


@dataclasses.dataclass(frozen=True)
class ArraySampling:
    """What is code rather than data. A completion ends with any of `stop_ids`, or at `slots`
    tokens.
    """

    samples: int
    slots: int
    stop_ids: tuple[int, ...]
    dtype: str = "float32"


@flax.struct.dataclass
class Draw:
    """What decides the random bits of the samples, as in `sampling.plan.Request`: sample i draws
    from (seed, example_id, i, token index).
    """

    seed: Int[Array, " R"]
    example_id: Int[Array, "R Q"]
    temperature: Float[Array, " R"]


@flax.struct.dataclass
class Guide:
    """A guide prompt for each group, as long as its prompt has slots, and each run's weight
    (`sampling.plan.Request`).
    """

    prompts: Int[Array, "R Q X"]
    prompt_length: Int[Array, "R Q"]
    weight: Float[Array, " R"]


def sample_groups(
    model: tuple,
    prompts: Int[Array, "R Q X"],
    prompt_length: Int[Array, "R Q"],
    draw: Draw,
    options: ArraySampling,
    guide: Guide | None = None,
) -> tuple[Int[Array, "R Q G C"], Int[Array, "R Q G"], Float[Array, "R Q G C"]]:
    """(tokens, length, log-probabilities at the temperature) of G completions of each prompt; zeros
    behind an end.

    `model` is (graphdef, lora, base). `prompt_length` is at least 1. The log-probabilities are
    those of the distribution that is sampled, the guided one.
    """
    runs, groups, positions = prompts.shape
    shape = SlotShape(
        runs,
        groups,
        options.samples,
        prompt=max(positions - 1, 1),
        ring=options.slots,
        guided=guide is not None,
    )
    example_id = draw.example_id
    if guide is not None:

        def pairs(*both):
            return jnp.stack(both, axis=2).reshape(runs, 2 * groups, *both[0].shape[2:])

        prompts, prompt_length, example_id = (
            pairs(prompts, guide.prompts),
            pairs(prompt_length, guide.prompt_length),
            pairs(example_id, example_id),
        )
        groups *= 2
    rows = (runs, groups, options.samples)

    def of_run(x):
        return jnp.broadcast_to(x[:, None, None], rows)

    last = prompt_length - 1
    refill = Refill(
        group=jnp.broadcast_to(jnp.arange(groups), (runs, groups)),
        prompt=prompts[..., : shape.prompt],
        token=jnp.take_along_axis(prompts, last[..., None], axis=-1)[..., 0],
        length=prompt_length,
        limit=jnp.full(rows, options.slots),
        temperature=of_run(draw.temperature),
        top_p=jnp.ones(rows),
        seed=of_run(draw.seed).astype(jnp.uint32),
        example_id=jnp.broadcast_to(example_id[..., None], rows).astype(jnp.uint32),
        sample_id=jnp.broadcast_to(jnp.arange(options.samples), rows).astype(jnp.uint32),
        guidance=None if guide is None else of_run(guide.weight),
    )
    slots = start_slots(*model, jnp.zeros(0, jnp.int32), shape=shape, dtype=options.dtype)
    slots = prefill(*model, slots, refill, prefix=0, dtype=options.dtype)
    slots = decode(
        *model,
        separate_layers(*model),
        slots,
        jnp.zeros(runs, jnp.int32),
        jnp.array(options.stop_ids, jnp.int32),
        dtype=options.dtype,
        candidates=256,
    )
    tokens, made, log_probs = (
        x[:, :: shape.copies] for x in (slots.tokens, slots.made, slots.log_probs)
    )
    inside = jnp.arange(options.slots) < made[..., None]
    return jnp.where(inside, tokens, 0), made, jnp.where(inside, log_probs, 0)
