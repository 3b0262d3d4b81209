"""Rows in which completions share their prompt: the same log-probabilities and gradients as of
separate, unpadded sequences.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_models as rl
import tiny_models as tiny
from flax import nnx
from scipy.special import log_softmax

from ip_jax.models import grouped, kernels
from ip_jax.models.decoder import causal_attend, split_decoder
from ip_jax.models.lora import LoraConfig
from ip_jax.rl.policy import completion_log_probs, completion_stats, score
from ip_jax.rl.rows import lay_out, micro_batches_of, to_samples
from ip_jax.training.losses import token_log_probs

RUNS, GROUPS, OF_GROUP, SLOTS = 2, 3, 4, 5
PROMPTS = ([5, 9, 2, 7, 11, 3, 4, 8], [6, 1, 3], [8, 8, 2, 4, 9])
TEMPERATURES = np.array([0.7, 1.3], np.float32)
LORA = LoraConfig(rank=3, alpha=6)


@functools.cache
def family(kind: str):
    """(config, params, adapters) of a tiny model."""
    config, params = tiny.from_hf(tiny.hf_model(kind))
    lora = LoraConfig(rank=3, alpha=6, targets=("q", "k", "v", "o"))
    return config, params, lora, tiny.random_lora(config, lora, RUNS)


def separately(config, params, lora, adapters, samples):
    """Log-probabilities [R, Q, G, C] of a pass for each single sequence, by the plain
    log-softmax.
    """
    found = np.zeros(samples.tokens.shape)
    for (r, q, g), length in np.ndenumerate(np.asarray(samples.length)):
        prompt = PROMPTS[q]
        ids = np.array(prompt + samples.tokens[r, q, g, :length].tolist())
        _, logits = tiny.hidden_states(
            config, params, ids[None, None], tiny.of_run(adapters, r), lora
        )
        log_p = log_softmax(np.float64(logits[0, 0]) / TEMPERATURES[r], axis=-1)
        found[r, q, g, :length] = log_p[
            np.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]
        ]
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "mistral", "qwen3")),
    ],
)
def test_log_probs_equal_those_of_separate_unpadded_sequences(kind):
    config, params, lora, adapters = family(kind)
    samples = rl.random_samples(RUNS, GROUPS, OF_GROUP, SLOTS, 97)
    graphdef, state, base = split_decoder(config, params, adapters, lora)
    rows = lay_out(
        rl.prompts(*PROMPTS, runs=RUNS, slots=12),
        samples,
        jnp.array(TEMPERATURES),
        None,
        micro_batches=2,
    )
    found = to_samples(
        jax.jit(functools.partial(score, graphdef=graphdef, dtype="float32"))(state, base, rows),
        GROUPS,
        OF_GROUP,
    )
    np.testing.assert_allclose(
        found, separately(config, params, lora, adapters, samples), atol=2e-5
    )


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_give_the_log_probs_of_separate_sequences_too(kernel, monkeypatch):
    """Splash interpreted, cudnn's calls carried out by XLA (tests/models/test_prompt_kernels.py has
    the kernels' gradients).
    """
    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *arrays, implementation, **options: attention(
            *arrays, implementation="xla", **options
        ),
    )
    monkeypatch.setattr(kernels, "refusal", lambda *_: None)
    monkeypatch.setattr(
        grouped, "KernelAttention", functools.partial(kernels.KernelAttention, interpret=True)
    )
    config, params, lora, adapters = family("llama")
    samples = rl.random_samples(RUNS, GROUPS, OF_GROUP, SLOTS, 97)
    graphdef, state, base = split_decoder(config, params, adapters, lora)
    rows = lay_out(
        rl.prompts(*PROMPTS, runs=RUNS, slots=12),
        samples,
        jnp.array(TEMPERATURES),
        None,
        micro_batches=2,
        samples_per_row=2,
    )
    passed = jax.jit(functools.partial(score, graphdef=graphdef, dtype="float32", kernel=kernel))
    np.testing.assert_allclose(
        to_samples(passed(state, base, rows), GROUPS, OF_GROUP),
        separately(config, params, lora, adapters, samples),
        atol=2e-5,
    )


@pytest.mark.slow
def test_gradients_equal_those_of_separate_sequences():
    config, params, lora, adapters = family("gemma2")
    samples = rl.random_samples(RUNS, GROUPS, OF_GROUP, SLOTS, 97)
    weight = jnp.where(samples.mask, jax.random.normal(jax.random.key(0), samples.tokens.shape), 0)
    graphdef, state, base = split_decoder(config, params, adapters, lora)
    prompts, temperatures = rl.prompts(*PROMPTS, runs=RUNS), jnp.array(TEMPERATURES)
    rows = jax.tree.map(lambda x: x[0], lay_out(prompts, samples, temperatures, None, 1))

    def shared(state):
        return jnp.sum(
            weight
            * completion_log_probs(nnx.merge(graphdef, state, base), rows, "float32", "products")
        )

    def alone(state):
        """Each sequence a row of its own: its prompt's tokens, then its own, attended to
        causally.
        """
        decoder, total = nnx.merge(graphdef, state, base), 0.0
        for q, prompt in enumerate(PROMPTS):
            ids = jnp.concatenate(
                [
                    jnp.broadcast_to(jnp.array(prompt), (RUNS, OF_GROUP, len(prompt))),
                    samples.tokens[:, q],
                ],
                axis=-1,
            )
            positions = jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape)
            hidden, _ = decoder(ids, positions, causal_attend)
            at = temperatures[:, None].repeat(OF_GROUP, 1)
            log_probs = token_log_probs(
                hidden[:, :, len(prompt) - 1 : -1],
                decoder.vocabulary(),
                samples.tokens[:, q],
                at,
                softcap=config.logit_softcap,
            )
            total += jnp.sum(weight[:, q] * log_probs)
        return total

    for got, wanted in zip(
        jax.tree.leaves(jax.grad(shared)(state)),
        jax.tree.leaves(jax.grad(alone)(state)),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, atol=2e-4 * float(jnp.abs(wanted).max()))


def test_entropy_is_that_of_the_distribution_each_token_was_drawn_from():
    graphdef, lora, base = rl.policy()
    rows = jax.tree.map(
        lambda x: x[0], rl.rows_of(rl.prompts([1, 2, 3]), rl.everything(), temperature=0.5)
    )
    log_probs, entropy = completion_stats(nnx.merge(graphdef, lora, base), rows, "float32", "none")
    log_probs, entropy = np.float64(log_probs[0, 0]), np.float64(entropy[0, 0])  # [16, 2]
    first = log_probs[:: rl.VOCABULARY, 0]  # of the four first tokens
    np.testing.assert_allclose(entropy[:, 0], -np.sum(np.exp(first) * first), rtol=1e-5)
    second = log_probs[:, 1].reshape(rl.VOCABULARY, rl.VOCABULARY)
    np.testing.assert_allclose(
        entropy[:, 1], np.repeat(-np.sum(np.exp(second) * second, axis=1), rl.VOCABULARY), rtol=1e-5
    )
    # they are all that can be said
    np.testing.assert_allclose(np.exp(log_probs.sum(1)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("micro_batches", "samples_per_row"), [(1, None), (2, None), (3, 2), (4, 1), (5, 1)]
)
def test_samples_come_back_from_any_layout_in_their_places(micro_batches, samples_per_row):
    samples = rl.random_samples(RUNS, GROUPS, OF_GROUP, SLOTS)
    rows = lay_out(
        rl.prompts(*PROMPTS, runs=RUNS),
        samples,
        jnp.ones(RUNS),
        rl.signal(samples, samples.log_probs, 1),
        micro_batches,
        samples_per_row,
    )
    in_row = samples_per_row or OF_GROUP
    assert rows.tokens.shape[3] == in_row and rows.tokens.shape[0] == micro_batches

    def back(x):
        return to_samples(x, GROUPS, OF_GROUP)

    np.testing.assert_array_equal(back(rows.tokens), samples.tokens)
    np.testing.assert_array_equal(back(rows.signal.advantage), samples.log_probs)
    prompt_of = np.moveaxis(np.asarray(rows.prompt_length), 0, 1).reshape(RUNS, -1)[
        0, : GROUPS * OF_GROUP // in_row
    ]
    np.testing.assert_array_equal(
        prompt_of, np.repeat([len(p) for p in PROMPTS], OF_GROUP // in_row)
    )
    # nothing twice, padding rows count nothing
    assert int((rows.signal.weight > 0).sum()) == int(samples.length.sum())


def test_one_prompt_for_each_completion_makes_rows_of_one():
    samples = rl.random_samples(1, 2, 2, SLOTS)
    rows = rl.rows_of(rl.prompts([1], [1, 2], [1, 2, 3], [3, 1]), samples)
    assert rows.tokens.shape == (1, 1, 4, 1, SLOTS)
    np.testing.assert_array_equal(rows.prompt_length[0, 0], [1, 2, 3, 2])
    np.testing.assert_array_equal(rows.tokens[0, 0, :, 0], samples.tokens.reshape(4, SLOTS))


@pytest.mark.parametrize(
    ("rows", "limit", "multiple", "wanted"),
    [(8, 10_000, 1, 1), (8, 2 * 100 * 3, 1, 3), (8, 1, 1, 8), (8, 1, 4, 2), (9, 2 * 100 * 4, 4, 3)],
)
def test_micro_batches_hold_what_fits(rows, limit, multiple, wanted):
    assert micro_batches_of(rows, 100, 2, limit, multiple) == wanted
