"""Sampling inside one program against the sampler that serves requests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_models import prompts

from ip_jax.sampling.arrays import ArraySampling, Draw, sample_groups
from ip_jax.sampling.sampler import Request, SamplerOptions, sample

SAMPLES, SLOTS = 3, 7


@pytest.mark.parametrize("stopped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_groups_equal_requests(two_runs, stopped):
    """The same tokens and log-probabilities, zeros behind an end, for prompts of several lengths
    and a temperature for each run.
    """
    graphdef, lora, base = two_runs
    texts, temperatures, seeds = [prompts(4, seed=run) for run in range(2)], (0.7, 1.3), (5, 6)
    width = max(len(prompt) for queue in texts for prompt in queue)
    padded = np.stack(
        [[np.pad(prompt, (0, width - len(prompt))) for prompt in queue] for queue in texts]
    )
    lengths = np.array([[len(prompt) for prompt in queue] for queue in texts])
    stop_ids = tuple(range(0, 300, 5)) if stopped else (-1,)
    draw = Draw(
        seed=jnp.array(seeds),
        example_id=jnp.array([[3, 4, 5, 6], [6, 5, 4, 3]]),
        temperature=jnp.array(temperatures),
    )
    options = ArraySampling(SAMPLES, SLOTS, stop_ids)
    tokens, length, log_probs = jax.jit(
        functools.partial(
            lambda graphdef, lora, base, draw: sample_groups(
                (graphdef, lora, base), jnp.asarray(padded), jnp.asarray(lengths), draw, options
            ),
            graphdef,
        )
    )(lora, base, draw)

    queues = [
        [
            Request(
                prompt,
                int(draw.example_id[run, i]),
                SAMPLES,
                temperatures[run],
                seed=seeds[run],
                max_new_tokens=SLOTS,
            )
            for i, prompt in enumerate(texts[run])
        ]
        for run in range(2)
    ]
    for run, answers in enumerate(
        sample(graphdef, lora, base, queues, SamplerOptions(stop_ids=stop_ids))
    ):
        for group, completions in enumerate(answers):
            for i, completion in enumerate(completions):
                at = run, group, i
                count = int(length[at])
                assert tokens[at].tolist() == completion.token_ids.tolist() + [0] * (SLOTS - count)
                np.testing.assert_allclose(log_probs[at][:count], completion.log_probs, atol=1e-4)
                assert not np.any(log_probs[at][count:])
    assert (int(length.min()) < SLOTS) == stopped
