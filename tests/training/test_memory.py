"""What a compiled step holds: less by each remat policy, base weights once for any number of
runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.models.remat import REMAT
from ip_jax.training.schedules import Schedule
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.state import init_state

LORA = LoraConfig(rank=1, alpha=4, targets=("q", "down"))
OPTIONS = SftOptions(Schedule("constant", total=100))
CONFIG = DecoderConfig(
    "llama", 101, 64, 128, 8, 4, 2, 16, uniform_attention(16, 1000.0), 1e-5, 256, True
)
# its weights outweigh the activations of a few tokens
WIDE = dataclasses.replace(CONFIG, d_model=256, d_ff=512, head_dim=64)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def program(
    runs: int, length: int, rows: int, options: SftOptions, config=CONFIG, dtype=np.float32
):
    """(compiled step, state, base, batches) of `rows` rows of one example each."""
    graphdef, lora, base = split_decoder(
        config, tiny.random_params(config, dtype), tiny.random_lora(config, LORA, runs), LORA
    )
    state = jax.device_put(init_state(lora, np.full(runs, 1e-3), np.zeros(runs), np.arange(runs)))
    batches = (
        tiny.pack(
            [[[e] for e in run] for run in tiny.random_examples(runs, (length,) * rows)],
            length=length,
            responses=length,
        ),
    )
    return (
        compile_sft_step(graphdef, options).lower(state, base, batches).compile(),
        state,
        base,
        batches,
    )


@functools.cache
def by_policy():
    """{policy: (temporary bytes, gradients, loss)}; Adam's first moment is a tenth of the
    gradient.
    """
    found = {}
    for remat in REMAT:
        compiled, *arguments = program(2, 96, 4, dataclasses.replace(OPTIONS, remat=remat))
        state, metrics = compiled(*arguments)
        found[remat] = (
            compiled.memory_analysis().temp_size_in_bytes,
            *jax.device_get((state.adam.mu, metrics["loss"])),
        )
    return found


@pytest.mark.slow
def test_policies_keep_less_and_less():
    sizes = [by_policy()[remat][0] for remat in ("none", "products", "attention", "full")]
    assert all(more > 1.1 * less for more, less in zip(sizes, sizes[1:], strict=False)), sizes


@pytest.mark.slow
def test_policies_change_no_gradient():
    _, *expected = by_policy()["none"]
    assert list(by_policy()) == list(REMAT)
    for _, *found in by_policy().values():
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found, expected
        )


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_base_weights_are_never_copied(dtype):
    """Rows of 4 tokens, small adapters, everything kept: eight runs add their state and batch to
    the arguments of one, and less than one copy of the base to what is held while a step runs. In
    float32 one run holds less than a copy in all; a CPU alone makes one of bfloat16
    (`products.as_bits`).
    """
    held = {}
    for runs in (1, 8):
        compiled, state, base, batch = program(
            runs, 4, 1, dataclasses.replace(OPTIONS, remat="none"), WIDE, dtype
        )
        memory = compiled.memory_analysis()
        held[runs] = (
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            sum(leaf.nbytes for leaf in jax.tree.leaves((state, batch))),
        )
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(base["layers"]))
    assert held[8][0] - held[1][0] == pytest.approx(held[8][2] - held[1][2], rel=0.02)
    assert held[8][1] - held[1][1] < copy, (held, copy)
    assert dtype != np.float32 or held[1][1] < copy, (held, copy)


def test_more_runs_in_the_same_rows_need_their_adapters_alone():
    """Eight rows of one run and of eight, side by side: what each run adds is its gradient, their
    sum, and what becomes of its state.
    """
    held = {runs: program(runs, 96, 8 // runs, OPTIONS)[:2] for runs in (1, 8)}
    one, eight = (compiled.memory_analysis().temp_size_in_bytes for compiled, _ in held.values())
    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(held[1][1].trained))
    assert eight - one < 7 * 4 * adapter < one / 50
