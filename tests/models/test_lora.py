"""LoRA against PEFT on a transformers model: logits, gradients, initial values; dropout; settings
that are refused.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from ip_jax.models.decoder import Projection, causal_attend, project, split_decoder
from ip_jax.models.lora import TARGETS, LoraConfig, init_lora, projection_shapes

SETTINGS = {
    "rank-stabilised": LoraConfig(rank=4, alpha=4, rslora=True),
    "two targets": LoraConfig(rank=3, alpha=3, targets=("q", "v")),
}


@pytest.mark.parametrize(
    ("setting", "family"), [("rank-stabilised", "gemma"), ("two targets", "llama")]
)
def test_logits_and_gradients_equal_peft(setting, family):
    """Of these settings; test_family_parity.py has the plain one for all families."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
    lora = SETTINGS[setting]
    config, params = tiny.from_hf(tiny.hf_model(family))
    adapters = tiny.random_lora(config, lora, runs=2)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, config.vocab_size, (2, 3, 14))
    pull = rng.standard_normal((2, 3, 14, config.vocab_size)).astype(np.float32)
    logits, gradients = logits_and_gradients(config, params, adapters, lora, tokens, pull)
    for run in range(2):
        wrapped = tiny.peft_model(
            tiny.hf_model(family), lora, jax.tree.map(lambda a, run=run: a[run], adapters)
        )
        expected = wrapped(torch.tensor(tokens[run])).logits
        np.testing.assert_allclose(logits[run], expected.detach().numpy(), atol=2e-5)
        expected.backward(torch.tensor(pull[run]))
        for target, layer, which, parameter in tiny.peft_parameters(wrapped):
            reference = parameter.grad.numpy().T
            mine = gradients[target][which][run, layer]
            np.testing.assert_allclose(
                mine,
                reference,
                atol=1e-5 * np.abs(reference).max(),
                rtol=1e-4,
                err_msg=f"{target}.{which} of layer {layer}",
            )


def logits_and_gradients(config, params, adapters, lora, tokens, pull):
    tokens = jnp.asarray(tokens)

    @jax.jit
    def run(adapters):
        def logits_of(adapters):
            decoder = nnx.merge(*split_decoder(config, params, adapters, lora))
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
            hidden, _ = decoder(tokens, positions, causal_attend)
            return decoder.logits(hidden)

        logits, vjp = jax.vjp(logits_of, adapters)
        return logits, vjp(pull)[0]

    return jax.device_get(run(adapters))


def test_fresh_adapters_have_pefts_distribution():
    """PEFT's A: uniform within 1 / sqrt(inputs), so variance 1 / (3 inputs); B: zero."""
    pytest.importorskip("peft")
    lora = LoraConfig(rank=8)
    config, _ = tiny.from_hf(tiny.hf_model("llama-wide-heads"))
    ours = jax.device_get(init_lora(jnp.arange(4), config, lora))
    for target, layer, which, parameter in tiny.peft_parameters(
        tiny.peft_model(tiny.hf_model("llama-wide-heads"), lora)
    ):
        theirs, mine = parameter.detach().numpy().T, ours[target][which][:, layer]
        assert mine.shape == (4, *theirs.shape)
        if which == "b":
            assert not theirs.any() and not mine.any()
        else:
            bound = projection_shapes(config)[target][0] ** -0.5
            assert (
                0.95 * bound < np.abs(mine).max() <= bound
                and 0.95 * bound < np.abs(theirs).max() <= bound
            )
            assert np.var(mine) == pytest.approx(bound**2 / 3, rel=0.1)
            assert np.var(theirs) == pytest.approx(bound**2 / 3, rel=0.2)


def test_a_fresh_adapter_is_a_function_of_its_seed():
    here, there = (
        jax.device_get(init_lora(jnp.array(seeds), tiny.CONFIG, LoraConfig(rank=8)))
        for seeds in ([7, 3, 7, 1], [3, 9, 5, 4])
    )
    for target in TARGETS:
        np.testing.assert_array_equal(here[target]["a"][1], there[target]["a"][0])
        np.testing.assert_array_equal(here[target]["a"][0], here[target]["a"][2])
    seen = np.concatenate([here[target]["a"][:2].ravel() for target in TARGETS])
    assert len(np.unique(seen)) > 0.99 * seen.size  # seeds, targets and layers all differ


@jax.jit
def with_and_without_dropout(x, kernel, a, b, rate, seeds):
    projections = {"q": Projection(kernel, None, {"a": a, "b": b}, 0.5)}
    return (
        project(x, projections, (rate, {"q": jax.vmap(jax.random.key)(seeds)}))["q"],
        project(x, projections)["q"],
        x @ kernel,
    )


def projected(rate, adapter_scale=1.0, runs=20, rows=100):
    """(with dropout, without, base alone), each [R * B, T, out]: the same input in every row, the
    same adapter for every run, seeds differ.
    """
    rng = np.random.default_rng(0)
    x, kernel, a, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((5, 12), (12, 7), (12, 4), (4, 7))
    )
    x, a, b = (
        np.broadcast_to(array, (*leading, *array.shape))
        for array, leading in ((x, (runs, rows)), (adapter_scale * a, (runs,)), (b, (runs,)))
    )
    results = jax.device_get(with_and_without_dropout(x, kernel, a, b, rate, np.arange(runs)))
    return tuple(result.reshape(runs * rows, 5, 7) for result in results)


def test_dropout_is_on_the_adapters_input_and_keeps_its_mean():
    dropped, plain, base = projected(rate=0.3)
    draws = dropped - base
    assert np.abs(draws[0] - draws[100]).max() > 0.1  # the first rows of two runs
    error = np.abs(draws.mean(axis=0) - (plain - base)[0]) / (
        draws.std(axis=0) / np.sqrt(len(draws))
    )
    assert error.max() < 4.5  # standard errors, 35 values
    np.testing.assert_allclose(projected(rate=0.3, adapter_scale=0.0)[0], base, atol=1e-5)


def test_dropout_drops_inputs_at_its_rate():
    """An adapter that passes the input on unchanged shows the mask: zeros at the rate, all else
    divided by 1 - rate.
    """
    ones, eye = (
        np.ones((20, 20, 4, 16), np.float32),
        np.repeat(np.eye(16, dtype=np.float32)[None], 20, axis=0),
    )

    @jax.jit
    def run(kernel):
        keys = jax.vmap(jax.random.key)(jnp.arange(20))
        return project(
            ones, {"q": Projection(kernel, None, {"a": eye, "b": eye}, 1.0)}, (0.25, {"q": keys})
        )["q"]

    seen = np.asarray(run(np.zeros((16, 16), np.float32)))
    assert set(np.unique(seen)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (seen == 0).mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / seen.size))
    flat = seen.reshape(400, -1)
    # positions and inputs are drawn apart
    assert np.abs(np.corrcoef(flat[:, :20].T) - np.eye(20)).max() < 0.25


def test_no_dropout_is_rate_zero():
    dropped, plain, _ = projected(rate=0.0)
    np.testing.assert_array_equal(dropped, plain)


def test_dropout_of_a_run_comes_from_its_own_seed():
    """In the whole decoder: equal seeds give equal results, others differ, and neighbours do not
    matter.
    """
    lora, params = LoraConfig(rank=4, targets=("k", "down")), tiny.random_params(tiny.CONFIG)
    adapters = jax.tree.map(
        lambda a: np.repeat(a, 3, axis=0), tiny.random_lora(tiny.CONFIG, lora, runs=1)
    )
    tokens = np.repeat(np.random.default_rng(0).integers(0, 101, (1, 2, 9)), 3, axis=0)

    @jax.jit
    def hidden(adapters, tokens, seeds):
        decoder = nnx.merge(*split_decoder(tiny.CONFIG, params, adapters, lora))
        positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
        return decoder(
            tokens, positions, causal_attend, dropout=(0.5, jax.vmap(jax.random.key)(seeds))
        )[0]

    together = jax.device_get(hidden(adapters, tokens, jnp.array([5, 8, 5])))
    np.testing.assert_allclose(together[0], together[2], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.02
    np.testing.assert_allclose(
        hidden(adapters, tokens, jnp.array([8, 1, 2]))[0], together[1], atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(targets=("q", "gates")),
            r"\['gates'\] are not known: choose from q, k, v, o, gate, up, down",
        ),
        (dict(targets=()), "choose from q, k"),
        (dict(rank=0), "rank is 0: it must be at least 1"),
        (dict(dropout=1.0), r"dropout is 1.0: it must lie in \[0, 1\)"),
        (dict(dropout=-0.1), r"dropout is -0.1"),
    ],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LoraConfig(), **change)
