"""Every family in several shapes against transformers and PEFT (torch): packed rows, LoRA
gradients, sampling, weights in place.
"""

import functools
import re

import jax
import numpy as np
import pytest
import tiny_models as tiny
from closeness import assert_near
from flax import nnx
from scipy.special import log_softmax

from ip_jax.models.decoder import packed_attend, split_decoder
from ip_jax.models.lora import LoraConfig, projection_shapes
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.training.sharding import base_shardings, make_mesh

torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")

LENGTHS = (50, 12, 20)  # longer than the windows and than Llama 3.1's original 32 positions
ROW = sum(LENGTHS) + 7
ONE_EACH = ("llama-3.1", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
OTHERS = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in tiny.HF_MODELS if kind not in ONE_EACH
]


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Programs that run once: without LLVM's optimisations they compile in half the time. XLA's own
    passes are untouched.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def lora_of(config) -> LoraConfig:
    """Of every projection that the family lets be adapted."""
    return LoraConfig(rank=3, alpha=2, targets=tuple(projection_shapes(config)))


def adapter_of(adapters, run: int):
    return jax.tree.map(lambda a: a[run], adapters)


def packed(config, runs: int):
    """(examples, a Batch with one row a run that holds them all)."""
    examples = tiny.random_examples(runs, LENGTHS, config.vocab_size)
    return examples, tiny.pack(
        [[run] for run in examples], length=ROW, responses=ROW, blocks=len(examples)
    )


@pytest.mark.parametrize("kind", [kind for kind in tiny.HF_MODELS if kind not in ONE_EACH])
def test_packed_log_probabilities_equal_peft(kind):
    """Two runs with adapters of their own. Here three sequences packed into one row, there each in
    a left-padded row of its own.
    """
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapters, (examples, batch) = (
        tiny.random_lora(config, lora_of(config), runs=2),
        packed(config, 2),
    )
    _, logits = tiny.hidden_states(
        config,
        params,
        batch.tokens[0],
        adapters,
        lora_of(config),
        batch.positions[0],
        batch.segment_ids[0],
    )
    for run in range(2):
        wrapped = tiny.peft_model(tiny.hf_model(kind), lora_of(config), adapter_of(adapters, run))
        assert_same_log_probs(logits[run], left_padded_logits(wrapped, examples[run]))


@pytest.mark.parametrize("kind", [*ONE_EACH, *OTHERS])
def test_packed_log_probabilities_and_lora_gradients_equal_peft(kind):
    """As above, with the gradients of every A and B."""
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapters, (examples, _) = tiny.random_lora(config, lora_of(config), runs=2), packed(config, 2)
    pull = (
        np.random.default_rng(3).standard_normal((2, 1, ROW, config.vocab_size)).astype(np.float32)
    )
    pull[:, :, sum(LENGTHS) :] = 0
    logits, gradients = jax.device_get(compiled_gradients(config)(adapters, params, pull))
    for run in range(2):
        wrapped = tiny.peft_model(tiny.hf_model(kind), lora_of(config), adapter_of(adapters, run))
        theirs = left_padded_logits(wrapped, examples[run])
        assert_same_log_probs(logits[run], theirs)
        theirs.backward(torch.tensor(pull[run, 0, : sum(LENGTHS)]))
        for target, layer, which, parameter in tiny.peft_parameters(wrapped):
            reference = parameter.grad.numpy().T
            mine, largest = gradients[target][which][run, layer], np.abs(reference).max()
            assert largest > 0
            np.testing.assert_allclose(
                mine,
                reference,
                atol=1e-5 * largest,
                rtol=1e-4,
                err_msg=f"{target}.{which} of layer {layer}",
            )


@functools.cache
def compiled_gradients(config):
    """The compiled function of `gradients_of`."""
    pull = jax.ShapeDtypeStruct((2, 1, ROW, config.vocab_size), np.float32)
    return (
        jax.jit(gradients_of(config))
        .lower(tiny.random_lora(config, lora_of(config), runs=2), tiny.random_params(config), pull)
        .compile()
    )


def gradients_of(config):
    """(adapters, params, pull) -> (logits [R, B, T, V], gradients of sum(pull * logits)) for two
    runs' packed rows.
    """
    batch = packed(config, 2)[1]

    def run(adapters, params, pull):
        def logits_of(adapters):
            decoder = nnx.merge(*split_decoder(config, params, adapters, lora_of(config)))
            attend = packed_attend(batch.segment_ids[0], batch.positions[0], batch.segment_index[0])
            return decoder.logits(decoder(batch.tokens[0], batch.positions[0], attend)[0])

        logits, vjp = jax.vjp(logits_of, adapters)
        return logits, vjp(pull)[0]

    return run


def assert_same_log_probs(logits, theirs):
    """Of one packed row [1, T, V], in float32, over the whole vocabulary."""
    ours = log_softmax(logits[0, : sum(LENGTHS)], axis=-1)
    assert_near(ours, theirs.log_softmax(-1).detach().numpy(), 4e-6)


def left_padded_logits(model, examples):
    """[sum of lengths, V]: one batch whose sequences end together."""
    sequences = [ids for ids, _ in examples]
    width = max(map(len, sequences))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
    logits = model(
        tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
    ).logits
    return torch.cat([row[width - len(ids) :] for row, ids in zip(logits, sequences, strict=True)])


@pytest.mark.parametrize(
    "kind",
    [
        "gemma2",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in tiny.HF_MODELS
            if kind != "gemma2"
        ),
    ],
)
def test_greedy_sampling_is_pefts_and_sees_what_it_sees(kind):
    """Two runs, prompts of 24 to 37 tokens that begin alike, 14 new tokens, refilled slots: tokens
    and log-probabilities of whole passes.
    """
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapters = tiny.random_lora(config, lora_of(config), runs=2)
    rng = np.random.default_rng(5)
    beginning = rng.integers(0, config.vocab_size, 21)
    queues = [
        [
            Request(
                np.append(beginning, rng.integers(0, config.vocab_size, n)).astype(np.int32),
                i,
                max_new_tokens=14,
            )
            for i, n in enumerate((3, 9, 16, 5, 11))
        ]
        for _ in range(2)
    ]
    options = SamplerOptions(
        stop_ids=(-1,), slots=3, prefill_prompts=2, prompt_buckets=(16, 32, 64)
    )
    answers = sample(*split_decoder(config, params, adapters, lora_of(config)), queues, options)
    for run in range(2):
        wrapped = tiny.peft_model(tiny.hf_model(kind), lora_of(config), adapter_of(adapters, run))
        for request, (answer,) in zip(queues[run], answers[run], strict=True):
            with torch.no_grad():
                logits = (
                    wrapped(torch.tensor(np.append(request.prompt_ids, answer.token_ids)[None]))
                    .logits[0]
                    .numpy()
                )
            expected = log_softmax(logits, axis=-1)[len(request.prompt_ids) - 1 : -1]
            assert answer.token_ids.tolist() == expected.argmax(-1).tolist()
            assert_near(answer.log_probs, expected[np.arange(14), answer.token_ids], 4e-6)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_alternating_layers_use_the_weights_where_they_lie(kind):
    """No instruction of the compiled forward and backward pass makes an array with several layers'
    base weights.
    """
    config, _ = tiny.from_hf(tiny.hf_model(kind))
    made_by = re.findall(
        r" = f32\[((?:\d+,)*)(?:32,96|96,32|32,48|48,32)\]\S* ([\w-]+)\(",
        compiled_gradients(config).as_text(),
    )
    layers_each = [(np.prod([int(n) for n in stack.split(",") if n]), op) for stack, op in made_by]
    assert {
        (config.n_layers, "get-tuple-element"),
        (config.n_layers, "parameter"),
        (1, "dynamic-slice"),
    } <= set(layers_each)
    assert {op for layers, op in layers_each if layers > 1} == {"get-tuple-element", "parameter"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_alternating_layers_on_a_mesh_give_the_same_and_are_gathered_one_at_a_time(kind):
    config, params = tiny.from_hf(tiny.hf_model(kind))
    adapters = tiny.random_lora(config, lora_of(config), runs=2)
    pull = (
        np.random.default_rng(3).standard_normal((2, 1, ROW, config.vocab_size)).astype(np.float32)
    )
    pull[:, :, sum(LENGTHS) :] = 0
    alone = jax.device_get(compiled_gradients(config)(adapters, params, pull))
    mesh = make_mesh(run=2, tensor=4)
    spread = (
        jax.device_put(adapters, jax.NamedSharding(mesh, jax.P("run"))),
        jax.device_put(params, base_shardings(mesh, params)),
        pull,
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients_of(config)).lower(*spread).compile()
        logits, gradients = jax.device_get(compiled(*spread))
    np.testing.assert_allclose(
        logits[:, :, : sum(LENGTHS)], alone[0][:, :, : sum(LENGTHS)], rtol=0, atol=1e-5
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
        gradients,
        alone[1],
    )
    gathered = re.findall(
        r" = f32\[((?:\d+,)*)(?:32,24|24,32|32,12|12,32)\]\S* all-gather", compiled.as_text()
    )
    assert gathered and all(
        np.prod([int(n) for n in stack.split(",") if n]) == 1 for stack in gathered
    ), gathered
