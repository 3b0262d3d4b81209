"""Every family in several shapes against transformers and PEFT (torch): packed rows, LoRA gradients, sampling, weights in place."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from scipy.special import log_softmax

from ip_jax.models.decoder import packed_attend, split_decoder
from ip_jax.models.lora import LoraConfig, projection_shapes
from ip_jax.sampling.sampler import Request, SamplerOptions, sample

torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")

LENGTHS = (31, 12, 20)  # longer than the windows, and packed into rows of 70


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Programs that run once: without LLVM's optimisations they compile in half the time. XLA's own passes are untouched."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def lora_of(config) -> LoraConfig:
    """Adapters of every projection that the family lets be adapted."""
    return LoraConfig(rank=3, alpha=6, targets=tuple(projection_shapes(config)))


def program_of(config, params, batch):
    """jitted adapters, pull -> (logits [R, B, T, V], gradients of sum(pull * logits)) on the rows of a Batch with one micro-batch."""

    def logits_of(adapters, params):
        decoder = nnx.merge(*split_decoder(config, params, adapters, lora_of(config)))
        attend = packed_attend(batch.segment_ids[0], batch.positions[0], batch.segment_index[0])
        hidden, _ = decoder(batch.tokens[0], batch.positions[0], attend)
        return decoder.logits(hidden)

    def run(adapters, params, pull):
        logits, vjp = jax.vjp(lambda adapters: logits_of(adapters, params), adapters)
        return logits, vjp(pull)[0]

    return lambda adapters, pull: jax.jit(run).lower(adapters, params, pull).compile()


def adapter_of(adapters, run: int):
    return jax.tree.map(lambda a: a[run], adapters)


@pytest.mark.parametrize("kind", tiny.HF_MODELS)
def test_packed_log_probabilities_and_lora_gradients_equal_peft(kind):
    """Two runs with adapters of their own. Here three sequences packed into one row, there each in a left-padded row of its own."""
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapters, examples = tiny.random_lora(config, lora_of(config), runs=2), tiny.random_examples(2, LENGTHS, config.vocab_size)
    batch = tiny.pack([[run] for run in examples], length=70, responses=70)
    pull = np.random.default_rng(3).standard_normal((2, 1, 70, config.vocab_size)).astype(np.float32)
    pull[:, :, sum(LENGTHS) :] = 0
    logits, gradients = jax.device_get(program_of(config, params, batch)(adapters, pull)(adapters, params, pull))
    for run in range(2):
        wrapped = tiny.peft_model(tiny.hf_model(kind), lora_of(config), adapter_of(adapters, run))
        theirs = left_padded_logits(wrapped, [ids for ids, _ in examples[run]])
        log_probs = log_softmax(logits[run, 0, : sum(LENGTHS)], axis=-1)
        np.testing.assert_allclose(log_probs, theirs.log_softmax(-1).detach().numpy(), rtol=0, atol=1e-5)
        theirs.backward(torch.tensor(pull[run, 0, : sum(LENGTHS)]))
        for target, layer, which, parameter in tiny.peft_parameters(wrapped):
            reference = parameter.grad.numpy().T
            mine, largest = gradients[target][which][run, layer], np.abs(reference).max()
            assert largest > 0
            np.testing.assert_allclose(mine, reference, atol=1e-5 * largest, rtol=1e-4, err_msg=f"{target}.{which} of layer {layer}")


def left_padded_logits(model, sequences):
    """[sum of lengths, V]: one batch whose sequences end together."""
    width = max(map(len, sequences))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
    logits = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    return torch.cat([row[width - len(ids) :] for row, ids in zip(logits, sequences, strict=True)])


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "mixtral-window", "qwen2-window", "qwen3", "gemma2", "gemma3"])
def test_greedy_sampling_is_pefts_and_sees_what_it_sees(kind):
    """Two runs, prompts of 24 to 37 tokens that begin alike, 14 new tokens, refilled slots: tokens and log-probabilities of whole passes."""
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapters = tiny.random_lora(config, lora_of(config), runs=2)
    rng = np.random.default_rng(5)
    beginning = rng.integers(0, config.vocab_size, 21)
    queues = [
        [Request(np.append(beginning, rng.integers(0, config.vocab_size, n)).astype(np.int32), i, max_new_tokens=14) for i, n in enumerate((3, 9, 16, 5, 11))]
        for _ in range(2)
    ]
    options = SamplerOptions(stop_ids=(-1,), slots=3, prefill_prompts=2, prompt_buckets=(16, 32, 64))
    answers = sample(*split_decoder(config, params, adapters, lora_of(config)), queues, options)
    for run in range(2):
        wrapped = tiny.peft_model(tiny.hf_model(kind), lora_of(config), adapter_of(adapters, run))
        for request, (answer,) in zip(queues[run], answers[run], strict=True):
            with torch.no_grad():
                logits = wrapped(torch.tensor(np.append(request.prompt_ids, answer.token_ids)[None])).logits[0].numpy()
            expected = log_softmax(logits, axis=-1)[len(request.prompt_ids) - 1 : -1]
            assert answer.token_ids.tolist() == expected.argmax(-1).tolist()
            np.testing.assert_allclose(answer.log_probs, expected[np.arange(14), answer.token_ids], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_alternating_layers_use_the_weights_where_they_lie(kind):
    """No instruction of the compiled forward and backward pass makes an array with several layers' base weights."""
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapters = tiny.random_lora(config, lora_of(config), runs=1)
    batch = tiny.pack([[run] for run in tiny.random_examples(1, LENGTHS, config.vocab_size)], length=70, responses=70)
    compiled = program_of(config, params, batch)(adapters, jnp.ones((1, 1, 70, config.vocab_size))).as_text()
    kernels = "32,96|96,32|32,48|48,32"
    made_by = re.findall(rf" = f32\[((?:\d+,)+)(?:{kernels})\]\S* ([\w-]+)\(", compiled)
    assert {"get-tuple-element", "parameter"} <= {op for _, op in made_by}
    assert not [(stack, op) for stack, op in made_by if stack != "1," and op not in ("get-tuple-element", "parameter", "bitcast")], made_by
