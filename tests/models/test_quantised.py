"""A base in 4 and 8 bits: the numbers, the decoder and its LoRA gradients over it, no layer dense
but the one at work.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from scipy.special import log_softmax

from ip_jax.lab.experiment import ModelConfig
from ip_jax.models import quantised
from ip_jax.models.decoder import split_decoder
from ip_jax.models.lora import LoraConfig
from ip_jax.models.quantised import KERNELS, KINDS, check_quantisable, dense, quantise
from ip_jax.training.schedules import Schedule
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import base_shardings, batch_sharding, make_mesh, state_shardings
from ip_jax.training.state import init_state

LORA = LoraConfig(rank=4, alpha=4)
CONFIG = dataclasses.replace(tiny.CONFIG, d_model=64, d_ff=96, n_layers=5)
OPTIONS = SftOptions(Schedule("constant", total=100))
# Dettmers et al. 2023, appendix E
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    pytest.importorskip("qwix")
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def quantised_params(kind: str, dtype=np.float32, axes: dict = {}) -> dict:  # noqa: B006
    return held_as(kind, tiny.random_params(CONFIG, dtype), axes)


def held_as(kind: str, params: dict, axes: dict = {}) -> dict:  # noqa: B006
    mesh = make_mesh(**axes)
    return quantise(
        jax.device_put(params, base_shardings(mesh, params)),
        kind,
        functools.partial(base_shardings, mesh),
    )


def by_numpy(kernel: np.ndarray, kind: str) -> np.ndarray:
    """The kernel [I, O] rounded to what `kind` can hold, in float64: the nearest of NF4 by blocks
    of inputs, or 255 steps by output.
    """
    inputs, outputs = kernel.shape
    blocks = kernel.astype(np.float64).reshape(
        inputs if kind == "int8" else -1, 1 if kind == "int8" else np.gcd(64, inputs), outputs
    )
    axes = (0, 1) if kind == "int8" else 1
    largest = np.abs(blocks).max(axis=axes, keepdims=True)
    if kind == "int8":
        return (np.clip(np.round(blocks / largest * 127.5), -128, 127) * largest / 127.5).reshape(
            inputs, outputs
        )
    nearest = np.abs((blocks / largest)[..., None] - NF4).argmin(axis=-1)
    return (NF4[nearest] * largest).reshape(inputs, outputs)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_numbers_are_those_of_the_paper(kind):
    held, params = quantised_params(kind), tiny.random_params(CONFIG)
    for name in KERNELS:
        found = jax.vmap(dense)(held["layers"][name])
        expected = np.stack([by_numpy(kernel, kind) for kernel in params["layers"][name]])
        # a weight in the middle between two values may go to either: for int8 the largest do
        other = np.abs(found - expected) > 1e-5
        largest = np.abs(params["layers"][name]).max(axis=1, keepdims=True)
        assert (
            other & (np.abs(params["layers"][name]) < largest)
        ).mean() < 1e-3 and other.mean() < 2 / found.shape[1]
        assert np.abs(expected - params["layers"][name]).max() > 1e-3
    jax.tree.map(
        np.testing.assert_array_equal,
        *({name: p["layers"][name] for name in ("attn_norm", "mlp_norm")} for p in (held, params)),
    )
    np.testing.assert_array_equal(held["embed"], params["embed"])


TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 8, 40))


def log_probs(params: dict) -> np.ndarray:
    """[1, 8, 40, V] of random rows, in float64."""
    return log_softmax(tiny.hidden_states(CONFIG, params, TOKENS)[1].astype(np.float64), axis=-1)


@pytest.mark.slow
def test_log_probabilities_change_by_little_in_4_bits_and_by_far_less_in_8():
    """Mean |difference| of the next token's and mean KL over the vocabulary. One scale for a whole
    kernel gives 0.32 and 0.081, or 0.025 and 0.00058.
    """
    exact, changes = log_probs(tiny.random_params(CONFIG)), {}
    for kind in KINDS:
        found = log_probs(quantised_params(kind))
        of_next = np.take_along_axis(
            found - exact, np.roll(TOKENS, -1, axis=-1)[..., None], axis=-1
        )[:, :, :-1]
        changes[kind] = np.abs(of_next).mean(), (np.exp(exact) * (exact - found)).sum(-1).mean()
    assert np.all(np.less(changes["nf4"], (0.3, 0.07))) and np.all(
        np.less(changes["int8"], (0.022, 4e-4))
    )
    assert np.all(np.multiply(changes["int8"], (10, 100)) < changes["nf4"])


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_each_output_has_scales_of_its_own(kind):
    """What queries gain and keys lose, dimension by dimension, changes no score: nor may it change
    what is held of them.
    """
    params, layers, kv_heads, head_dim = (
        tiny.random_params(CONFIG),
        CONFIG.n_layers,
        CONFIG.n_kv_heads,
        CONFIG.head_dim,
    )
    # both halves of a head rotate together
    gain = 2.0 ** np.random.default_rng(0).integers(
        -5, 6, (layers, 1, kv_heads, 1, 1, head_dim // 2)
    )
    of_q, of_k = (
        np.broadcast_to(gain, (layers, 1, kv_heads, group, 2, head_dim // 2))
        .reshape(layers, 1, -1)
        .astype(np.float32)
        for group in (CONFIG.n_heads // kv_heads, 1)
    )
    uneven = params | {
        "layers": (
            params["layers"]
            | {
                "q": params["layers"]["q"] * of_q,
                "k": params["layers"]["k"] / of_k,
            }
        )
    }
    np.testing.assert_allclose(
        log_probs(held_as(kind, uneven)), log_probs(held_as(kind, params)), rtol=0, atol=1e-5
    )


def program(params, config=CONFIG, runs: int = 2):
    """(graphdef, state, base)."""
    graphdef, lora, base = split_decoder(config, params, tiny.random_lora(config, LORA, runs), LORA)
    return (
        graphdef,
        jax.device_get(init_state(lora, np.full(runs, 1e-3), np.zeros(runs), np.arange(runs))),
        base,
    )


def test_int8_takes_inputs_of_any_number():
    kernel = np.random.default_rng(0).standard_normal((2, 37, 8)).astype(np.float32)
    found = jax.vmap(dense)(quantised._quantise_stack(kernel, kind="int8", dtype=jnp.float32))
    assert 0 < np.abs(found - kernel).max() <= np.abs(kernel).max() / 127.5


@functools.cache
def batch(blocks: int = 1):
    return (
        tiny.pack(
            [[[e] for e in run] for run in tiny.random_examples(2, (14, 9, 12, 10))],
            length=16,
            responses=12,
            blocks=blocks,
        ),
    )


def one_step(params, options=OPTIONS):
    graphdef, state, base = program(params)
    state, metrics = compile_sft_step(graphdef, options)(jax.device_put(state), base, batch())
    return jax.device_get((state.trained, state.adam.mu, metrics))


@functools.cache
def loss_of_weights_as_they_are():
    return one_step(tiny.random_params(CONFIG))[2]["loss"]


@functools.cache
def on_one_device(kind: str):
    """A step over the quantised values as a dense base."""
    return one_step(densely(quantised_params(kind)))


def densely(params: dict) -> dict:
    return params | {
        "layers": (
            params["layers"] | {name: jax.vmap(dense)(params["layers"][name]) for name in KERNELS}
        )
    }


@pytest.mark.parametrize(
    "kind, remat",
    [
        ("int8", "products"),
        *(pytest.param("nf4", remat, marks=pytest.mark.slow) for remat in ("none", "full")),
    ],
)
def test_loss_and_lora_gradients_are_those_of_the_dense_values(kind, remat):
    found = one_step(quantised_params(kind), dataclasses.replace(OPTIONS, remat=remat))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), found, on_one_device(kind)
    )
    assert np.abs(found[2]["loss"] - loss_of_weights_as_they_are()).max() > 1e-4


def test_one_layer_is_dense_at_a_time():
    """In bfloat16: no floating-point array of a whole stack [5, I, O] but adapters exists anywhere
    in the compiled step.
    """
    graphdef, state, base = program(quantised_params("nf4", jnp.bfloat16))
    text = (
        compile_sft_step(graphdef, dataclasses.replace(OPTIONS, remat="none"))
        .lower(jax.device_put(state), base, batch())
        .compile()
        .as_text()
    )
    stacks = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"\b(?:f32|bf16|u16)\[(5,\d+,\d+)\]", text)
    }
    kernels = {
        (5, *shape[1:])
        for shape in (base["layers"][name]["kernel"].get_value().shape for name in KERNELS)
    }
    assert re.search(r"u4\[5,64,96\]", text) and not stacks & kernels


def test_a_mesh_gives_the_results_of_one_device():
    axes = dict(run=2, data=2, tensor=2)
    mesh, params = make_mesh(**axes), quantised_params("nf4", axes=axes)
    graphdef, state, base = program(params)
    places = state_shardings(mesh, state), base_shardings(mesh, base), batch_sharding(mesh)
    values = base["layers"]["up"]["kernel"].get_value().qvalue
    assert {shard.data.size for shard in values.addressable_shards} == {values.size // 8}
    sharded, metrics = compile_sft_step(graphdef, OPTIONS, *places)(
        jax.device_put(state, places[0]), base, jax.device_put(batch(blocks=2), places[2])
    )
    trained, _, expected = on_one_device("nf4")
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
        jax.device_get((sharded.trained, metrics)),
        (trained, expected),
    )


def test_what_cannot_be_quantised_is_refused_in_a_sentence(monkeypatch):
    with pytest.raises(
        ValueError, match="model.quantised is 'nf3': choose from nf4, int8, or None"
    ):
        ModelConfig(quantised="nf3")
    odd = dataclasses.replace(CONFIG, d_ff=40)
    with pytest.raises(
        ValueError,
        match=(
            "model.quantised is 'nf4' and the weights down have 40 inputs, which blocks of 16 do"
            " not divide: choose int8"
        ),
    ):
        check_quantisable("nf4", odd)
    check_quantisable("int8", odd)
    with pytest.raises(
        ValueError,
        match=(
            "model.quantised is 'int8' and the model is a mixture of experts, whose experts cannot"
            " be quantised"
        ),
    ):
        check_quantisable(
            "int8", dataclasses.replace(CONFIG, family="mixtral", n_experts=3, experts_per_token=2)
        )
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="needs qwix, which is not installed: pip install 'ip_jax\\[quant\\]'"
    ):
        ModelConfig(quantised="int8")
