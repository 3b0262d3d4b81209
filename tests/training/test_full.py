"""Full fine-tuning: against torch and AdamW, in bfloat16, and what a step may not hold."""

import functools

import jax
import numpy as np
import pytest
import tiny_models as tiny

from ip_jax.models.decoder import params_of, split_decoder
from ip_jax.training.schedules import Schedule
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.state import full_weights, init_state

OPTIONS = SftOptions(Schedule("linear", warmup=1, total=6), max_grad_norm=2.0, train="full")
LENGTHS = (13, 9, 15, 6)
STEPS, RATE, DECAY = 5, 5e-4, 0.1


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def examples_of_steps(vocab: int):
    return [tiny.random_examples(1, LENGTHS, vocab, seed) for seed in range(STEPS)]


def train(config, params, options: SftOptions = OPTIONS):
    """(trained params, [metrics]) on the host: packed rows in two micro-batches."""
    graphdef, frozen, weights = split_decoder(config, params)
    state = jax.device_put(
        init_state(full_weights(weights), np.full(1, RATE), np.full(1, DECAY), np.zeros(1))
    )
    step, seen = compile_sft_step(graphdef, options), []
    for examples in examples_of_steps(config.vocab_size):
        batch = tiny.pack(
            [[run[:2], run[2:]] for run in examples], length=24, responses=24, micro_batches=2
        )
        state, metrics = step(state, frozen, (batch,))
        seen.append(jax.device_get(metrics))
    assert not jax.tree.leaves(frozen) and state.alive.all()
    return params_of(jax.tree.map(lambda weight: weight[0], jax.device_get(state.trained))), seen


def torch_training(model):
    """[(loss, gradient norm)] of separate unpadded passes; the model is trained in place: all
    parameters, tied ones once.
    """
    import torch
    import transformers

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, OPTIONS.schedule.warmup, OPTIONS.schedule.total
    )
    seen = []
    for (examples,) in examples_of_steps(model.config.vocab_size):
        total, count = 0.0, 0
        for ids, n_prompt in examples:
            logits = model(torch.tensor([ids])).logits[0, n_prompt - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[n_prompt:]), reduction="sum"
            )
            count += len(ids) - n_prompt
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.max_grad_norm)
        seen.append((total.item() / count, norm.item()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize(
    "kind",
    [
        "qwen2",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "llama-tied", "gemma")),
    ],
)
def test_steps_equal_torch_adamw_on_every_weight(kind):
    """Untied and tied embeddings, biases, norms that are stored as w - 1: loss curve, gradient
    norms and every trained weight.
    """
    pytest.importorskip("torch")
    # torch gives the input embedding of a padding token, Gemma's 0, no gradient
    model = tiny.hf_model(kind, pad_token_id=None)
    config, start = tiny.from_hf(model)
    trained, metrics = train(config, start)
    seen = torch_training(model)
    np.testing.assert_allclose(
        [m["loss"][0] for m in metrics], [loss for loss, _ in seen], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        [m["grad_norm"][0] for m in metrics], [norm for _, norm in seen], rtol=1e-4
    )
    _, expected = tiny.from_hf(model)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
        trained,
        jax.device_get(expected),
    )
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), trained, jax.device_get(start))
    assert min(jax.tree.leaves(moved)) > RATE / 2


def test_bfloat16_computes_and_float32_remembers():
    """Steps smaller than bfloat16 can hold add up in the master weights. Stated tolerance of the
    loss: 2 %.
    """
    params = tiny.random_params(tiny.CONFIG)
    (exact, seen), (trained, narrow) = (
        train(tiny.CONFIG, params),
        train(
            tiny.CONFIG,
            params,
            SftOptions(OPTIONS.schedule, max_grad_norm=2.0, train="full", weights="bfloat16"),
        ),
    )
    np.testing.assert_allclose(
        [m["loss"][0] for m in narrow], [m["loss"][0] for m in seen], rtol=2e-2
    )
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(trained))
    step = jax.tree.map(lambda new, old: np.abs(new - old).mean(), trained, params)
    like = jax.tree.map(lambda new, old: np.abs(new - old).mean(), exact, params)
    # every kind of weight moves as far as in float32
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0.3), step, like)
