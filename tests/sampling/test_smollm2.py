"""Greedy decoding of the embedded model against transformers."""

import numpy as np
import pytest

from ip_jax.models.decoder import split_decoder
from ip_jax.models.hub import resolve
from ip_jax.prompts.chat import render_prompt
from ip_jax.sampling.sampler import Request, SamplerOptions, sample

QUESTIONS = [
    "What is the greatest common divisor of {} and {}?",
    "I computed gcd({}, {}) = 6. Is that right?",
    "Write a haiku about {} birds and {} trees.",
    "Add {} and {}, then explain each step in words.",
    "List {} colours. Then list {} animals.",
]
TOKENS = 64


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(smollm2):
    """64 tokens after each of 20 prompts. A difference is allowed only where the two best logits
    lie within 1e-4, and is counted.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    texts = [QUESTIONS[i % 5].format(12 + 7 * i, 30 + 11 * i) for i in range(20)]
    prompts = [
        render_prompt(smollm2.tokenizer, [{"role": "user", "content": text}]) for text in texts
    ]
    queue = [Request(prompt, i, max_new_tokens=TOKENS) for i, prompt in enumerate(prompts)]
    options = SamplerOptions(stop_ids=(), slots=16)
    ours = [
        answer.token_ids
        for (answer,) in sample(*split_decoder(smollm2.config, smollm2.params), [queue], options)[0]
    ]

    path = resolve("smollm2-135m-instruct").path
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    near_ties = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        sequence = torch.tensor(np.concatenate([prompt, tokens]), dtype=torch.long)[None]
        with torch.no_grad():
            logits = model(sequence).logits[0, len(prompt) - 1 : -1]
        best, second = logits.topk(2, dim=-1).values.T
        differs = logits.argmax(-1).numpy() != tokens
        # Teacher-forced on our tokens: all agree exactly when transformers' own greedy tokens are
        # ours.
        assert not (differs & ((best - second).numpy() >= 1e-4)).any()
        near_ties += int(differs.any())
    assert near_ties <= 2, f"{near_ties} of 20 prompts met a near-tie"
