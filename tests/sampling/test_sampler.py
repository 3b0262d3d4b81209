"""The sampler against whole-sequence passes, and its invariants: sharing, refilling and batching change nothing."""

import numpy as np
from sampling_models import full_logits, prompts

from ip_jax.sampling.sampler import Request, SamplerOptions, sample

OPTIONS = SamplerOptions(stop_ids=(), slots=8, prefill_prompts=4, prompt_buckets=(16, 32, 64))


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def same(first, second) -> bool:
    return all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(first, second, strict=True))


def test_greedy_tokens_and_log_probs_equal_whole_sequence_passes(two_runs):
    queues = [[Request(prompt, i, max_new_tokens=12) for i, prompt in enumerate(prompts(11, seed=run))] for run in range(2)]
    for run, (queue, answers) in enumerate(zip(queues, sample(*two_runs, queues, OPTIONS), strict=True)):
        for request, (answer,) in zip(queue, answers, strict=True):
            sequence = np.concatenate([request.prompt_ids, answer.token_ids])
            logits = full_logits(two_runs, run, sequence)[len(request.prompt_ids) - 1 : -1]
            assert np.array_equal(answer.token_ids, logits.argmax(-1))
            expected = np.take_along_axis(log_softmax(logits), answer.token_ids[:, None], -1)[:, 0]
            np.testing.assert_allclose(answer.log_probs, expected, atol=5e-5)
            assert len(answer.token_ids) == 12 and not answer.ended
