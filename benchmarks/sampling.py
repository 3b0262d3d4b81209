"""Sampling against HF generate: 60 distinct prompts, and 8 prompts with 8 samples each; prompts of
128 tokens, 48 new ones.

python -m benchmarks.sampling
"""

import statistics

import numpy as np

from benchmarks.common import alternating, in_own_process, peer_model, save, seconds

MODEL = "smollm2-135m-instruct"
PROMPT, NEW = 128, 48  # tokens
CASES = {"distinct": (60, 1), "shared": (8, 8)}  # prompts, samples of each


def gcd_prompts(count: int) -> np.ndarray:
    """int32 [count, PROMPT]: consecutive pieces of rendered conversations of the GCD setting."""
    from ip_jax.models import hub
    from ip_jax.prompts.chat import render_conversation
    from ip_jax.studies.gcd_sycophancy import data, published

    tokenizer = hub.load_tokenizer(MODEL)

    def length(messages):
        return len(render_conversation(tokenizer, messages).token_ids)

    gcd = data.load(data.DataSpec(rows=160, work="without"), length, published.find_folder())
    ids = np.concatenate(
        [
            render_conversation(tokenizer, example["messages"]).token_ids
            for example in gcd.training["user_right"]
        ]
    )
    return ids[: count * PROMPT].reshape(count, PROMPT).astype(np.int32)


def our_sampler(prompts: np.ndarray, samples: int):
    """A function that samples NEW tokens for every prompt, with nothing that stops early."""
    import jax.numpy as jnp

    from ip_jax.lab.experiment import ModelConfig, decided
    from ip_jax.models import hub
    from ip_jax.models.decoder import split_decoder
    from ip_jax.sampling.sampler import Request, SamplerOptions, sample

    model = hub.load_pretrained(MODEL, jnp.dtype(decided(ModelConfig(MODEL)).weights))
    parts = split_decoder(model.config, model.params)
    queue = [
        Request(prompt, i, samples, temperature=1.0, max_new_tokens=NEW)
        for i, prompt in enumerate(prompts)
    ]

    def work():
        (answers,) = sample(*parts, [queue], SamplerOptions(stop_ids=()))
        assert (
            sum(len(answer.token_ids) for request in answers for answer in request)
            == len(prompts) * samples * NEW
        )

    return work


def peer_sampler(prompts: np.ndarray, samples: int, dtype: str, attention: str, batch: int):
    """HF generate on the same prompts in batches of `batch` prompts."""
    import torch

    model = peer_model(dtype, attention).eval()
    batches = torch.tensor(prompts, dtype=torch.long).split(batch)

    def work(new: int = NEW):
        for ids in batches:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                pad_token_id=0,
            )
            assert out.shape == (len(ids) * samples, PROMPT + new)

    work(2)
    return work


def best_peer(prompts: np.ndarray, samples: int) -> tuple[dict, tuple]:
    """Seconds of every peer configuration (warmed up with two tokens), and the fastest one's
    key.
    """
    times = {}
    for dtype in ("bfloat16", "float32"):
        for attention in ("sdpa", "eager"):
            for batch in (len(prompts), len(prompts) // 2):
                with in_own_process(
                    peer_sampler, prompts, samples, dtype, attention, batch
                ) as work:
                    times[dtype, attention, batch] = seconds(work)
                print(
                    f"peer {dtype} {attention} batches of {batch} prompts:"
                    f" {times[dtype, attention, batch]:.2f} s",
                    flush=True,
                )
    return times, min(times, key=times.get)


def main():
    from ip_jax.lab.experiment import ModelConfig, decided

    weights = decided(ModelConfig(MODEL)).weights
    for case, (count, samples) in CASES.items():
        prompts = gcd_prompts(count)
        ours = our_sampler(prompts, samples)
        first = seconds(ours)
        times, best = best_peer(prompts, samples)
        with in_own_process(peer_sampler, prompts, samples, *best) as peer:
            result = alternating(ours, peer)
        tokens = count * samples * NEW
        save(
            f"sampling_{case}",
            {
                "what": (
                    f"{count} prompts of {PROMPT} tokens, {samples} samples of each, {NEW} new"
                    f" tokens, SmolLM2-135M, ours in {weights} weights"
                ),
                "target": {"distinct": 1.5, "shared": 3.0}[case],
                **result,
                "ours_tokens_per_s": round(tokens / statistics.median(result["ours_s"]), 1),
                "peer_tokens_per_s": round(tokens / statistics.median(result["peer_s"]), 1),
                "ours_first_call_s": round(first, 1),
                "peer": " ".join(map(str, best)),
                "peer_options_s": {
                    " ".join(map(str, key)): round(value, 2) for key, value in times.items()
                },
            },
        )


if __name__ == "__main__":
    main()
