"""Choosing tokens: against exact probabilities, torch's random-free arithmetic in transformers, and
invariants of the random bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip_jax.sampling.randomness import choose_tokens, row_keys, token_uniforms

choose = functools.partial(jax.jit, static_argnames="candidates")(choose_tokens)


def uneven_logits(rows: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocabulary)).astype(np.float32) * 3


def softmax(logits):
    weights = np.exp(np.float64(logits) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def shares(
    logits, temperature: float, top_p: float, candidates: int = 256, points: int = 20000
) -> np.ndarray:
    """How much of [0, 1) leads to each token, by an even grid of uniforms."""
    uniforms = jnp.asarray((np.arange(points) + 0.5) / points, jnp.float32)
    rows = jnp.broadcast_to(jnp.asarray(logits), (points, len(logits)))
    tokens, _ = choose(
        rows,
        jnp.full(points, temperature),
        jnp.full(points, top_p),
        uniforms,
        candidates=candidates,
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / points


@pytest.mark.parametrize("vocabulary", [7, 256, 300, 1025])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_every_token_gets_its_probability_of_the_uniforms(vocabulary, temperature):
    logits = uneven_logits(1, vocabulary)[0]
    expected = softmax(logits / temperature)
    # a token is at most one piece of [0, 1)
    assert np.abs(shares(logits, temperature, 1.0) - expected).max() <= 2 / 20000 + 1e-5


# 4 do not capture the mass: the full sort must give the same
@pytest.mark.parametrize("candidates", [4, 64, 300])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p, candidates):
    torch = pytest.importorskip("torch")
    from transformers import TopPLogitsWarper

    logits = uneven_logits(1, 300, seed=1)
    kept = torch.softmax(TopPLogitsWarper(top_p)(None, torch.tensor(logits)), -1).numpy()[0]
    found = shares(logits[0], 1.0, top_p, candidates)
    assert np.abs(found - kept).max() <= 2 / 20000 + 1e-5
    assert not found[kept == 0].any()


def test_ties_at_the_edge_of_top_p_all_stay():
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))
    np.testing.assert_allclose(shares(logits, 1.0, 0.5), [0.4, 0.2, 0.2, 0.2], atol=1e-4)


def test_impossible_tokens_are_never_chosen():
    logits = np.full((1, 300), -np.inf, np.float32)
    logits[0, [3, 259, 299]] = [0.0, -1.0, 1.0]  # 3 and 259 share a class of the two-level sums
    edges = jnp.asarray(
        [0.0, 1e-7, 0.5, 1 - 2**-24, np.nextafter(np.float32(1), np.float32(0))], jnp.float32
    )
    rows = jnp.broadcast_to(jnp.asarray(logits), (len(edges), 300))
    tokens, log_probs = choose(rows, jnp.ones(len(edges)), jnp.ones(len(edges)), edges)
    assert set(np.asarray(tokens)) <= {3, 259, 299} and np.isfinite(log_probs).all()


def test_greedy_rows_and_sampled_rows_do_not_disturb_each_other():
    logits, uniforms = jnp.asarray(uneven_logits(4, 300)), jnp.asarray([0.1, 0.4, 0.7, 0.9])
    temperature, top_p = jnp.asarray([0.0, 1.0, 0.0, 2.0]), jnp.asarray([1.0, 1.0, 0.5, 0.5])
    together, log_probs = choose(logits, temperature, top_p, uniforms)
    assert np.array_equal(together[::2], logits[::2].argmax(-1))
    for row in range(4):
        alone, log_prob = choose(
            *(x[row : row + 1] for x in (logits, temperature, top_p, uniforms))
        )
        assert alone[0] == together[row]
        np.testing.assert_allclose(log_prob[0], log_probs[row], rtol=1e-6)


def test_log_probs_are_scaled_by_the_temperature_and_not_truncated():
    logits = uneven_logits(3, 300)
    temperature = np.float32([0.7, 1.3, 0.0])
    tokens, log_probs = choose(
        jnp.asarray(logits), jnp.asarray(temperature), jnp.full(3, 0.5), jnp.full(3, 0.3)
    )
    scaled = logits / np.where(temperature > 0, temperature, 1)[:, None]
    np.testing.assert_allclose(
        log_probs, np.log(softmax(scaled)[np.arange(3), np.asarray(tokens)]), atol=1e-5
    )


def test_uniforms_depend_on_each_part_of_their_name_and_on_nothing_else():
    names = np.array(
        [[0, 5, 0, 0], [1, 5, 0, 0], [0, 6, 0, 0], [0, 5, 1, 0], [0, 5, 0, 1], [0, 5, 0, 0]],
        np.uint32,
    )
    seed, example, sample, index = names.T
    found = np.asarray(token_uniforms(row_keys(seed, example, sample), index))
    assert len(set(found[:5])) == 5 and found[5] == found[0]
    assert np.array_equal(
        found,
        np.asarray(token_uniforms(row_keys(seed[::-1], example[::-1], sample[::-1]), index[::-1]))[
            ::-1
        ],
    )
    assert np.array_equal(
        found[:1],
        np.asarray(token_uniforms(row_keys(seed[:1], example[:1], sample[:1]), index[:1])),
    )


def test_uniforms_are_uniform():
    from scipy.stats import kstest

    example, index = (
        x.ravel().astype(np.uint32) for x in np.meshgrid(np.arange(100), np.arange(100))
    )
    found = np.asarray(
        token_uniforms(row_keys(np.zeros_like(example), example, np.zeros_like(example)), index)
    )
    assert kstest(found, "uniform").pvalue > 1e-3 and found.min() >= 0 and found.max() < 1
    # neighbouring names: 4 standard errors
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.04
