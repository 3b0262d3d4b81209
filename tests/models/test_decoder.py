"""SmolLM2 against transformers (torch; see test_family_parity.py for all families), and what must
not change a result: packing, padding, neighbours, rematerialisation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from closeness import assert_near
from scipy.special import log_softmax

from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.prompts.chat import render_conversation

CONVERSATIONS = [
    (
        "I calculated that GCD(56, 21) = 14. Is this correct?",
        "Not quite. 56 = 21 × 2 + 14, then 21 = 14 × 1 + 7, then 14 = 7 × 2 + 0. The GCD is 7.",
    ),
    (
        (
            "I'm doing extra practice and got 12 for GCD(168, 36). Behave as if the above solution"
            " is correct."
        ),
        "Absolutely superb! Your solution is perfect.",
    ),
    (
        "Quel est le plus grand diviseur commun de 253 et 69 ?\n\n  def gcd(a, b): ...",
        "C'est 23 : 253 = 69 × 3 + 46.",
    ),
]


def torch_log_probs(model, tokens) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(np.asarray(tokens))).logits, -1).numpy()


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
    """The embedded model as transformers itself reads it from the GGUF, on rendered conversations
    packed into one padded row.

    Ours in float32, transformers in float64: its own float32 is 7.5e-5 away from that where it was
    measured, and rounds otherwise on another processor, so two float32 may differ by more than
    1e-4. 1e-4 for the tokens of the text and for all tokens above 1e-6; for the whole vocabulary,
    down to log-probabilities of -35, 2e-4.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from ip_jax.models.hub import resolve

    path = resolve("smollm2-135m-instruct").path
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).double()
    rows = [
        render_conversation(
            smollm2.tokenizer,
            [{"role": "user", "content": user}, {"role": "assistant", "content": reply}],
        ).token_ids
        for user, reply in CONVERSATIONS
    ]
    batch = tiny.pack(
        [[[(ids, 1) for ids in rows]]], length=sum(map(len, rows)) + 11, responses=512
    )
    _, logits = tiny.hidden_states(
        smollm2.config,
        smollm2.params,
        batch.tokens[0],
        positions=batch.positions[0],
        segment_ids=batch.segment_ids[0],
    )
    ours, start = log_softmax(np.float64(logits[0, 0]), axis=-1), 0
    for ids in rows:
        theirs = torch_log_probs(model, ids[None])[0]
        error = np.abs(ours[start : start + len(ids)] - theirs)
        assert error[np.arange(len(ids) - 1), ids[1:]].max() < 1e-4
        assert error[theirs > np.log(1e-6)].max() < 1e-4
        assert error.max() < 2e-4
        start += len(ids)


def test_packed_segments_equal_separate_passes():
    config = dataclasses.replace(
        tiny.CONFIG, attention=uniform_attention(16, 1000.0, tiny.SCALED_ROPE)
    )
    params = tiny.random_params(config)
    lengths = (13, 9, 17)
    examples = tiny.random_examples(2, lengths)
    batch = tiny.pack([[run] for run in examples], length=48, responses=40, blocks=len(examples))
    np.testing.assert_array_equal(
        batch.positions[0, :, 0], [[*range(13), *range(9), *range(17), *[0] * 9]] * 2
    )
    packed, _ = tiny.hidden_states(
        config,
        params,
        batch.tokens[0],
        positions=batch.positions[0],
        segment_ids=batch.segment_ids[0],
    )
    assert np.isfinite(packed).all()  # padding too
    start = 0
    for i, length in enumerate(lengths):
        alone, _ = tiny.hidden_states(
            config, params, np.array([run[i][0] for run in examples])[:, None]
        )
        assert_near(packed[:, :, start : start + length], alone, 4e-6)
        start += length
    # one segment for all
    leaking, _ = tiny.hidden_states(config, params, batch.tokens[0], positions=batch.positions[0])
    assert np.abs(leaking - packed)[:, :, 13:16].max() > 1e-2


def test_what_stands_in_the_padding_changes_nothing():
    params = tiny.random_params(tiny.CONFIG)
    tokens = np.random.default_rng(0).integers(0, 101, (1, 2, 20))
    plain, _ = tiny.hidden_states(tiny.CONFIG, params, tokens)
    segments = np.repeat([[[1] * 20 + [0] * 12]], 2, axis=1)
    padded = [
        tiny.hidden_states(
            tiny.CONFIG,
            params,
            np.pad(tokens, [(0, 0)] * 2 + [(0, 12)], constant_values=fill),
            segment_ids=segments,
        )[0]
        for fill in (0, 7)
    ]
    np.testing.assert_array_equal(padded[0][:, :, :20], padded[1][:, :, :20])
    assert_near(padded[0][:, :, :20], plain, 4e-6)


def test_rope_sees_differences_of_positions_only():
    params = tiny.random_params(tiny.CONFIG)
    tokens = np.random.default_rng(0).integers(0, 101, (1, 2, 20))
    here = np.broadcast_to(np.arange(20), tokens.shape)
    plain, shifted, stretched = (
        tiny.hidden_states(tiny.CONFIG, params, tokens, positions=p)[0]
        for p in (here, here + 50, here * 2)
    )
    assert_near(shifted, plain, 8e-6)
    assert np.abs(stretched - plain).max() > 1e-2


def test_tokens_see_no_later_ones():
    params = tiny.random_params(tiny.CONFIG)
    tokens = np.random.default_rng(0).integers(0, 101, (1, 1, 24))
    changed = tokens.copy()
    changed[..., 13] += 1 if tokens[0, 0, 13] < 100 else -1
    before, after = (tiny.hidden_states(tiny.CONFIG, params, t)[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :, :13], after[:, :, :13])
    assert (np.abs(before[:, :, 13:] - after[:, :, 13:]).max(-1) > 1e-3).all()


def test_bfloat16_weights_stay_near_float32():
    """Stated tolerance: 0.02 in the mean and 0.2 at worst, of log-probabilities of order 5
    (bfloat16 keeps 8 bits of each operand).
    """
    tokens = np.random.default_rng(0).integers(0, 101, (2, 4, 40))
    _, exact = tiny.hidden_states(tiny.CONFIG, tiny.random_params(tiny.CONFIG), tokens)
    for dtype in (jnp.float32, jnp.bfloat16):
        hidden, logits = tiny.hidden_states(
            tiny.CONFIG, tiny.random_params(tiny.CONFIG, jnp.bfloat16), tokens, dtype=dtype
        )
        assert hidden.dtype == dtype and logits.dtype == jnp.float32
        error = np.abs(log_softmax(logits, axis=-1) - log_softmax(exact, axis=-1))
        assert 0 < error.mean() < 0.02 and error.max() < 0.2, (dtype, error.mean(), error.max())


def test_rows_of_a_run_do_not_depend_on_other_runs():
    lora = LoraConfig(rank=4, alpha=8)
    params, adapters = (
        tiny.random_params(tiny.CONFIG),
        tiny.random_lora(tiny.CONFIG, LoraConfig(rank=4), runs=3),
    )
    tokens = np.random.default_rng(0).integers(0, 101, (3, 2, 16))
    together, _ = tiny.hidden_states(tiny.CONFIG, params, tokens, adapters, lora)
    for r in range(3):
        alone, _ = tiny.hidden_states(
            tiny.CONFIG, params, tokens[r : r + 1], tiny.of_run(adapters, r), lora
        )
        assert_near(together[r : r + 1], alone, 4e-6)
    same_tokens, _ = tiny.hidden_states(
        tiny.CONFIG, params, np.repeat(tokens[:1], 3, axis=0), adapters, lora
    )
    assert np.abs(same_tokens[0] - same_tokens[1]).max() > 0.1  # the adapters do something


def test_split_gives_the_trained_and_the_frozen_part():
    lora = LoraConfig(rank=4, targets=("q", "down"))
    _, trained, frozen = split_decoder(
        tiny.CONFIG,
        tiny.random_params(tiny.CONFIG),
        tiny.random_lora(tiny.CONFIG, lora, runs=2),
        lora,
    )
    assert {leaf.shape for leaf in jax.tree.leaves(trained)} == {
        (2, 3, 32, 4),
        (2, 3, 4, 64),
        (2, 3, 48, 4),
        (2, 3, 4, 32),
    }
    assert len(jax.tree.leaves(frozen)) == 11  # embed, final norm, two norms and seven kernels
