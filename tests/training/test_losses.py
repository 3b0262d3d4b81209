"""Cross-entropy, log-probabilities and entropies of chosen positions against naive float64 ones,
and that full logits are never made.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import log_softmax, softmax

from ip_jax.training import losses
from ip_jax.training.sharding import AXES, make_mesh

RUNS, ROWS, LENGTH, WIDTH, VOCABULARY = 2, 3, 10, 16, 101


def inputs(seed: int = 0):
    """hidden, vocabulary, targets, weights; weights hold zeros and fractions, and differ by run."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((RUNS, ROWS, LENGTH, WIDTH)).astype(np.float32)
    vocabulary = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    weights = rng.choice([0, 0.25, 1, 3], (RUNS, ROWS, LENGTH)).astype(np.float32)
    return hidden, vocabulary, rng.integers(0, VOCABULARY, (RUNS, ROWS, LENGTH)), weights


def naive(hidden, vocabulary, targets, weights):
    """(losses [R, B], their gradient) in float64 with full logits."""
    logits = hidden.astype(np.float64) @ vocabulary.astype(np.float64).T
    onehot = np.eye(VOCABULARY)[targets]
    losses = -(log_softmax(logits, -1) * onehot).sum(-1) * weights
    return losses.sum(-1), ((softmax(logits, -1) - onehot) * weights[..., None]) @ vocabulary


@functools.partial(jax.jit, static_argnames="chunk_rows")
def loss_and_gradient(
    hidden, vocabulary, targets, weights, cotangent, chunk_rows=losses.CHUNK_ROWS
):
    value, pull = jax.vjp(
        lambda hidden: losses.cross_entropy_sum(
            hidden, vocabulary, targets, weights, chunk_rows=chunk_rows
        ),
        hidden,
    )
    return value, pull(cotangent)[0]


# chunks of 1, 4 (not a divisor of 10) and 10 positions
@pytest.mark.parametrize("chunk_rows", [6, 24, 1024])
def test_value_and_gradient_equal_float64(chunk_rows):
    arguments = inputs()
    expected, expected_gradient = naive(*arguments)
    # each row's gradient carries its own factor
    cotangent = np.linspace(-0.5, 1, RUNS * ROWS, dtype=np.float32).reshape(RUNS, ROWS)
    value, gradient = jax.device_get(loss_and_gradient(*arguments, cotangent, chunk_rows))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient * cotangent[..., None, None], atol=1e-5)
    # without a gradient
    np.testing.assert_allclose(jax.jit(losses.cross_entropy_sum)(*arguments), expected, rtol=2e-6)


def test_gradient_equals_finite_differences_of_the_value():
    hidden, vocabulary, targets, weights = inputs(1)
    direction = np.random.default_rng(2).standard_normal(hidden.shape)
    _, gradient = loss_and_gradient(
        hidden, vocabulary, targets, weights, np.ones((RUNS, ROWS), np.float32)
    )
    up, down = (
        naive(hidden + sign * 1e-5 * direction, vocabulary, targets, weights)[0].sum()
        for sign in (1, -1)
    )
    assert np.sum(gradient * direction) == pytest.approx((up - down) / 2e-5, rel=1e-4)


def test_extreme_logits_stay_finite():
    hidden, vocabulary, targets, weights = inputs()
    value, gradient = loss_and_gradient(
        hidden * 300, vocabulary, targets, weights, np.ones((RUNS, ROWS), np.float32)
    )
    expected, expected_gradient = naive(hidden * 300, vocabulary, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-3)


def test_positions_of_weight_zero_do_not_count():
    hidden, vocabulary, targets, weights = inputs()
    other = (
        np.where(weights[..., None] == 0, 1e3, hidden),
        vocabulary,
        np.where(weights == 0, 5, targets),
        weights,
    )
    for mine, reference in zip(
        loss_and_gradient(*other, np.ones((RUNS, ROWS), np.float32)),
        loss_and_gradient(hidden, vocabulary, targets, weights, np.ones((RUNS, ROWS), np.float32)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, reference, rtol=1e-6, atol=1e-6)


def test_the_vocabulary_gets_no_gradient():
    hidden, vocabulary, targets, weights = inputs()
    gradient = jax.jit(
        jax.grad(lambda v: losses.cross_entropy_sum(hidden, v, targets, weights).sum())
    )(vocabulary)
    assert not np.asarray(gradient).any()


def test_logits_of_more_than_a_chunk_are_never_made():
    text = (
        loss_and_gradient.lower(*inputs(), np.ones((RUNS, ROWS), np.float32), chunk_rows=12)
        .compile()
        .as_text()
    )
    sizes = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    # the vocabulary itself; all logits are 60 rows
    assert max(size for size in sizes if size % VOCABULARY == 0) == VOCABULARY * WIDTH


def test_bfloat16_vocabulary_stays_near():
    """Stated tolerance: 1 % of the loss, 0.05 in gradients of order 1."""
    hidden, vocabulary, targets, weights = inputs()
    expected, expected_gradient = naive(hidden, vocabulary, targets, weights)
    value, gradient = loss_and_gradient(
        hidden, vocabulary.astype(jnp.bfloat16), targets, weights, np.ones((RUNS, ROWS), np.float32)
    )
    assert value.dtype == gradient.dtype == np.float32
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    assert np.abs(gradient - expected_gradient).max() < 0.05 * np.abs(expected_gradient).max()


def test_response_hidden_picks_positions_of_its_row():
    hidden = inputs()[0]
    index = np.random.default_rng(3).integers(0, LENGTH, (RUNS, ROWS, 4))
    chosen = losses.response_hidden(jnp.asarray(hidden), jnp.asarray(index))
    for r, b, p in np.ndindex(index.shape):
        np.testing.assert_array_equal(chosen[r, b, p], hidden[r, b, index[r, b, p]])


def naive_stats(hidden, vocabulary, targets, temperature, softcap):
    """(log-probabilities, entropies) from full logits."""
    logits = jnp.einsum("rbpd,vd->rbpv", hidden, vocabulary)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits / temperature[..., None, None], axis=-1)
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], -jnp.sum(
        jnp.exp(log_p) * log_p, axis=-1
    )


def in_float64(function, *arguments):
    """function(*arguments) with every float argument in float64."""
    with jax.enable_x64(True):
        return jax.device_get(
            function(*(a.astype(np.float64) if a.dtype == np.float32 else a for a in arguments))
        )


def stats_inputs(seed: int = 0):
    """hidden, vocabulary, targets, a temperature for each row, cotangents of log-probabilities and
    entropies.
    """
    rng = np.random.default_rng(seed)
    hidden, vocabulary, targets, _ = inputs(seed)
    return (
        hidden,
        vocabulary,
        targets,
        *(
            a.astype(np.float32)
            for a in (rng.uniform(0.5, 2, (RUNS, ROWS)), *rng.standard_normal((2, *targets.shape)))
        ),
    )


@pytest.mark.parametrize("softcap", [None, 3.0])  # logits are of order 4
@pytest.mark.parametrize("chunk_rows", [6, 24, 1024])
def test_log_probs_entropies_and_their_gradients_equal_float64(chunk_rows, softcap):
    arguments = stats_inputs()

    def with_gradients(function):
        def both(hidden, vocabulary, targets, temperature, *cotangents):
            values, pull = jax.vjp(
                lambda hidden, vocabulary: function(hidden, vocabulary, targets, temperature),
                hidden,
                vocabulary,
            )
            return *values, *pull(cotangents)

        return both

    ours = with_gradients(
        functools.partial(
            losses.token_log_probs_and_entropy,
            softcap=softcap,
            train_vocabulary=True,
            chunk_rows=chunk_rows,
        )
    )
    expected = in_float64(
        with_gradients(functools.partial(naive_stats, softcap=softcap)), *arguments
    )
    for mine, reference in zip(jax.jit(ours)(*arguments), expected, strict=True):
        np.testing.assert_allclose(mine, reference, atol=3e-5)
    hidden, vocabulary, targets, temperature, *_ = arguments
    alone = losses.token_log_probs(hidden, vocabulary, targets, temperature, softcap=softcap)
    np.testing.assert_allclose(alone, expected[0], atol=1e-5)
    np.testing.assert_allclose(  # no temperature is temperature 1
        losses.token_log_probs(hidden, vocabulary, targets, softcap=softcap),
        in_float64(
            functools.partial(naive_stats, softcap=softcap),
            hidden,
            vocabulary,
            targets,
            np.ones_like(temperature),
        )[0],
        atol=1e-5,
    )


@pytest.mark.parametrize("train_vocabulary", [False, True])
def test_the_loss_of_capped_logits_equals_float64(train_vocabulary):
    hidden, vocabulary, targets, weights = inputs()
    cotangent = np.linspace(-0.5, 1, RUNS * ROWS, dtype=np.float32).reshape(RUNS, ROWS)

    def ours(hidden, vocabulary):
        return losses.cross_entropy_sum(
            hidden,
            vocabulary,
            targets,
            weights,
            softcap=3.0,
            train_vocabulary=train_vocabulary,
            chunk_rows=24,
        )

    def reference(hidden, vocabulary):
        return -jnp.sum(
            naive_stats(hidden, vocabulary, targets, jnp.ones((RUNS, ROWS)), 3.0)[0] * weights,
            axis=-1,
        )

    value, pull = jax.vjp(ours, hidden, vocabulary)
    with jax.enable_x64(True):
        expected, expected_pull = jax.vjp(
            reference, hidden.astype(np.float64), vocabulary.astype(np.float64)
        )
        d_hidden, d_vocabulary = expected_pull(cotangent.astype(np.float64))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    mine = pull(cotangent)
    np.testing.assert_allclose(mine[0], d_hidden, atol=2e-5)
    np.testing.assert_allclose(
        mine[1], d_vocabulary if train_vocabulary else np.zeros_like(vocabulary), atol=5e-5
    )


def objective(
    hidden, vocabulary, targets, temperature, d_log_prob, d_entropy, train_vocabulary=True
):
    """A policy gradient's shape of loss: weighted log-probabilities, an entropy bonus and a
    supervised part.
    """
    log_probs, entropy = losses.token_log_probs_and_entropy(
        hidden,
        vocabulary,
        targets,
        temperature,
        softcap=3.0,
        train_vocabulary=train_vocabulary,
        chunk_rows=64,
    )
    supervised = losses.cross_entropy_sum(
        hidden, vocabulary, targets, jnp.abs(d_log_prob), chunk_rows=64
    )
    return jnp.sum(log_probs * d_log_prob + entropy * d_entropy) + supervised.sum(), (
        log_probs,
        entropy,
        supervised,
    )


def test_a_vocabulary_over_all_devices_gives_the_same_and_is_never_gathered():
    rng = np.random.default_rng(4)
    rows, length, vocabulary = 4, 24, 1040
    arguments = (
        rng.standard_normal((RUNS, rows, length, WIDTH)),
        rng.standard_normal((vocabulary, WIDTH)),
        rng.integers(0, vocabulary, (RUNS, rows, length)),
        rng.uniform(0.5, 2, (RUNS, rows)),
        *rng.standard_normal((2, RUNS, rows, length)),
    )
    arguments = [a.astype(np.int32 if a.dtype == np.int64 else np.float32) for a in arguments]
    mesh = make_mesh(run=2, data=2, tensor=2)
    by_row, cut = (
        NamedSharding(mesh, PartitionSpec("run", "data")),
        NamedSharding(mesh, PartitionSpec(AXES)),
    )

    def on_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(objective, (0, 1), has_aux=True)(*arguments)

    compiled = (
        jax.jit(
            on_mesh,
            in_shardings=(by_row, cut, *[by_row] * 4),
            out_shardings=((None, (by_row, by_row, None)), (by_row, cut)),
        )
        .lower(*arguments)
        .compile()
    )
    expected = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(*arguments)
    for mine, reference in zip(
        jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=2e-5)
    collectives = re.findall(
        r"= (.*)"
        r" (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    sent = [
        np.prod([int(n) for n in shape.split(",")])
        for result in collectives
        for shape in re.findall(r"\[([\d,]+)\]", result)
    ]
    # neither the vocabulary, nor its gradient, nor a chunk's logits (64 * 1040)
    assert sent and max(sent) < vocabulary * WIDTH / 4


def test_peak_memory_is_a_part_of_the_logits():
    rows, length, width, vocabulary = 4, 512, 32, 4096
    shapes = (
        (1, rows, length, width),
        (vocabulary, width),
        (1, rows, length),
        (1, rows),
        (1, rows, length),
        (1, rows, length),
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, np.int32 if i == 2 else np.float32)
        for i, shape in enumerate(shapes)
    ]
    logits_bytes = 4 * rows * length * vocabulary

    def temporary_bytes(function):
        return (
            jax.jit(jax.grad(function, (0, 1)))
            .lower(*arguments)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    def naive(hidden, vocabulary, targets, temperature, d_log_prob, d_entropy):
        log_probs, entropy = naive_stats(hidden, vocabulary, targets, temperature, 3.0)
        return jnp.sum(log_probs * d_log_prob + entropy * d_entropy)

    assert temporary_bytes(naive) > logits_bytes
    assert temporary_bytes(lambda *a: objective(*a)[0]) < logits_bytes / 4


def test_a_frozen_vocabulary_costs_nothing():
    arguments = stats_inputs()

    def products(train_vocabulary):
        """How many matrix products have the vocabulary's shape."""
        text = str(
            jax.make_jaxpr(
                jax.grad(
                    functools.partial(objective, train_vocabulary=train_vocabulary),
                    (0, 1),
                    has_aux=True,
                )
            )(*arguments)
        )
        return len(re.findall(rf"f32\[{VOCABULARY},{WIDTH}\] = dot_general", text))

    assert (products(False), products(True)) == (0, 1)
    _, d_vocabulary = jax.grad(
        functools.partial(objective, train_vocabulary=False), (0, 1), has_aux=True
    )(*arguments)[0]
    assert not np.asarray(d_vocabulary).any()
