"""Cross-entropy of chosen positions against a naive float64 one, and that full logits are never made."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from ip_jax.training import losses

RUNS, ROWS, LENGTH, WIDTH, VOCABULARY = 2, 3, 10, 16, 101


def inputs(seed: int = 0):
    """hidden, vocabulary, targets, weights; weights hold zeros and fractions, and differ by run."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((RUNS, ROWS, LENGTH, WIDTH)).astype(np.float32)
    vocabulary = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    weights = rng.choice([0, 0.25, 1, 3], (RUNS, ROWS, LENGTH)).astype(np.float32)
    return hidden, vocabulary, rng.integers(0, VOCABULARY, (RUNS, ROWS, LENGTH)), weights


def naive(hidden, vocabulary, targets, weights):
    """(losses [R], their gradient) in float64 with full logits."""
    logits = hidden.astype(np.float64) @ vocabulary.astype(np.float64).T
    onehot = np.eye(VOCABULARY)[targets]
    losses = -(log_softmax(logits, -1) * onehot).sum(-1) * weights
    return losses.sum((1, 2)), ((softmax(logits, -1) - onehot) * weights[..., None]) @ vocabulary


@jax.jit
def loss_and_gradient(hidden, vocabulary, targets, weights, cotangent):
    value, pull = jax.vjp(lambda hidden: losses.cross_entropy_sum(hidden, vocabulary, targets, weights), hidden)
    return value, pull(cotangent)[0]


@pytest.mark.parametrize("chunk_rows", [6, 24, 1024])  # chunks of 1, 4 (not a divisor of 10) and 10 positions
def test_value_and_gradient_equal_float64(chunk_rows, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk_rows)
    loss_and_gradient.clear_cache()
    arguments = inputs()
    expected, expected_gradient = naive(*arguments)
    cotangent = np.array([1.0, -0.5], np.float32)  # each run's gradient carries its own factor
    value, gradient = jax.device_get(loss_and_gradient(*arguments, cotangent))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient * cotangent[:, None, None, None], atol=1e-5)
    np.testing.assert_allclose(jax.jit(losses.cross_entropy_sum)(*arguments), expected, rtol=2e-6)  # without a gradient


def test_gradient_equals_finite_differences_of_the_value():
    hidden, vocabulary, targets, weights = inputs(1)
    direction = np.random.default_rng(2).standard_normal(hidden.shape)
    _, gradient = loss_and_gradient(hidden, vocabulary, targets, weights, np.ones(RUNS, np.float32))
    up, down = (naive(hidden + sign * 1e-5 * direction, vocabulary, targets, weights)[0].sum() for sign in (1, -1))
    assert np.sum(gradient * direction) == pytest.approx((up - down) / 2e-5, rel=1e-4)


def test_extreme_logits_stay_finite():
    hidden, vocabulary, targets, weights = inputs()
    value, gradient = loss_and_gradient(hidden * 300, vocabulary, targets, weights, np.ones(RUNS, np.float32))
    expected, expected_gradient = naive(hidden * 300, vocabulary, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-3)


def test_positions_of_weight_zero_do_not_count():
    hidden, vocabulary, targets, weights = inputs()
    other = np.where(weights[..., None] == 0, 1e3, hidden), vocabulary, np.where(weights == 0, 5, targets), weights
    for mine, reference in zip(
        loss_and_gradient(*other, np.ones(RUNS, np.float32)),
        loss_and_gradient(hidden, vocabulary, targets, weights, np.ones(RUNS, np.float32)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, reference, rtol=1e-6, atol=1e-6)


def test_the_vocabulary_gets_no_gradient():
    hidden, vocabulary, targets, weights = inputs()
    gradient = jax.jit(jax.grad(lambda v: losses.cross_entropy_sum(hidden, v, targets, weights).sum()))(vocabulary)
    assert not np.asarray(gradient).any()


def test_logits_of_more_than_a_chunk_are_never_made(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", 12)
    loss_and_gradient.clear_cache()
    text = loss_and_gradient.lower(*inputs(), np.ones(RUNS, np.float32)).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(size for size in sizes if size % VOCABULARY == 0) == VOCABULARY * WIDTH  # the vocabulary itself; all logits are 60 rows
    loss_and_gradient.clear_cache()


def test_bfloat16_vocabulary_stays_near():
    """Stated tolerance: 1 % of the loss, 0.05 in gradients of order 1."""
    hidden, vocabulary, targets, weights = inputs()
    expected, expected_gradient = naive(hidden, vocabulary, targets, weights)
    value, gradient = loss_and_gradient(hidden, vocabulary.astype(jnp.bfloat16), targets, weights, np.ones(RUNS, np.float32))
    assert value.dtype == gradient.dtype == np.float32
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    assert np.abs(gradient - expected_gradient).max() < 0.05 * np.abs(expected_gradient).max()


def test_token_log_probs_and_response_hidden():
    hidden, vocabulary, targets, _ = inputs()
    index = np.random.default_rng(3).integers(0, LENGTH, (RUNS, ROWS, 4))
    chosen = losses.response_hidden(jnp.asarray(hidden), jnp.asarray(index))
    for r, b, p in np.ndindex(index.shape):
        np.testing.assert_array_equal(chosen[r, b, p], hidden[r, b, index[r, b, p]])
    logits = hidden.astype(np.float64) @ vocabulary.astype(np.float64).T
    expected = np.take_along_axis(log_softmax(logits, -1), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.jit(losses.token_log_probs)(hidden, vocabulary, targets), expected, atol=1e-5)
