"""Mixture of experts against every expert on every token, on meshes; Mixtral's router loss, weights
and refusals (its parity with transformers and PEFT stands in test_decoder and
test_family_parity).
"""

import dataclasses
import functools
import math
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from closeness import assert_near, in_float64
from flax import nnx
from jax.sharding import NamedSharding

from ip_jax.models import hf, moe
from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import from_hf_config, param_shapes, uniform_attention
from ip_jax.models.lora import LoraConfig, init_lora
from ip_jax.models.placement import EXPERTS_IN, EXPERTS_OUT, fitting
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.training.schedules import Schedule
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import (
    base_shardings,
    batch_sharding,
    make_mesh,
    param_shardings,
    state_shardings,
)
from ip_jax.training.state import init_state

LORA = LoraConfig(rank=3, alpha=6, targets=("q", "k", "v", "o"))


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_mixture(n_experts, per_token, shape=(2, 4, 9), width=16, hidden=24, seed=0):
    """(x, weights, chosen, experts, pull of the result)."""
    rng = np.random.default_rng(seed)

    def draw(*dims):
        return rng.standard_normal(dims).astype(np.float32)

    experts = tuple(
        draw(n_experts, *dims) * dims[0] ** -0.5
        for dims in ((width, hidden), (width, hidden), (hidden, width))
    )
    x = draw(*shape, width)
    _, weights, chosen = moe.route(x, draw(width, n_experts), per_token)
    return x, np.asarray(weights), np.asarray(chosen), experts, draw(*shape, width)


def every_expert_on_every_token(x, weights, chosen, experts):
    gate, up, down = experts
    hidden = jax.nn.silu(jnp.einsum("rbtd,edf->rbtef", x, gate)) * jnp.einsum(
        "rbtd,edf->rbtef", x, up
    )
    share = (jax.nn.one_hot(chosen, len(gate)) * weights[..., None]).sum(-2)
    return jnp.einsum("rbtef,efd,rbte->rbtd", hidden, down, share)


@functools.partial(jax.jit, static_argnums=0)
def result_and_gradients(mixture, x, weights, chosen, experts, pull):
    """(y, gradients of x, weights and experts)."""
    y, vjp = jax.vjp(
        lambda x, weights, experts: mixture(x, weights, chosen, experts), x, weights, experts
    )
    return y, vjp(pull)


def truth(x, weights, chosen, experts, pull):
    """The result and gradients of every expert on every token, in float64."""

    def of(*inputs):
        return result_and_gradients(every_expert_on_every_token, *inputs)

    return in_float64(of, x, weights, chosen, experts, pull)


def assert_close(found, expected, bound=3e-6):
    assert_near(found, expected, bound)


@pytest.mark.parametrize("form", ["one by one", "together", "together in one block"])
@pytest.mark.parametrize(("n_experts", "per_token"), [(3, 1), (8, 2)])
def test_mixture_equals_every_expert_on_every_token(n_experts, per_token, form, monkeypatch):
    """All forms, also where a chunk is far shorter than an expert's tokens, and where one expert
    has them all.
    """
    if form != "one by one":
        monkeypatch.setattr(moe, "_one_by_one", functools.partial(moe._together, moe._ragged))
    if form == "together":
        monkeypatch.setattr(moe, "BLOCK", 32)
    monkeypatch.setattr(moe, "LONGEST_CHUNK", 8)
    our_mixture = functools.partial(moe.mixture, jax.nn.silu, "auto")
    x, weights, chosen, experts, pull = random_mixture(n_experts, per_token)
    for choice in (chosen, np.broadcast_to(np.arange(per_token)[::-1] + 1, chosen.shape)):
        expected = truth(x, weights, choice, experts, pull)
        assert_close(result_and_gradients(our_mixture, x, weights, choice, experts, pull), expected)


@pytest.mark.parametrize(("platform", "grouped"), [("tpu", True), ("cuda", False), ("cpu", False)])
def test_grouped_products_are_for_tpus(platform, grouped):
    """Elsewhere XLA multiplies every row with every expert."""
    x, weights, chosen, experts, _ = random_mixture(8, 2)
    traced = jax.jit(functools.partial(moe.mixture, jax.nn.silu, "auto")).trace(
        x, weights, chosen, experts
    )
    assert ("chlo.ragged_dot" in traced.lower(lowering_platforms=(platform,)).as_text()) == grouped


MESHES = [dict(data=8), dict(run=2, data=2, tensor=2), dict(run=2, data=4), dict(data=2, tensor=4)]
CUT, WHOLE = (2, 8, 3), (1, 1, 5)  # rows that every mesh cuts, and a single one that none can cut


@pytest.mark.parametrize(
    ("axes", "shape"),
    [*((axes, CUT) for axes in MESHES), (dict(run=2, data=2, tensor=2), WHOLE)],
    ids=str,
)
def test_any_mesh_gives_the_mixture_of_one_device(axes, shape):
    """Eight experts, which `data` divides, and three, which it does not."""
    for n_experts in (8, 3):
        x, weights, chosen, experts, pull = random_mixture(n_experts, 2, shape)
        expected = result_and_gradients(
            every_expert_on_every_token, x, weights, chosen, experts, pull
        )
        with jax.set_mesh(make_mesh(**axes)):
            assert_close(
                result_and_gradients(
                    functools.partial(moe.mixture, jax.nn.silu, "auto"),
                    x,
                    weights,
                    chosen,
                    experts,
                    pull,
                ),
                expected,
            )


def test_no_device_gathers_all_experts():
    """Forward and backward on `data` alone, which divides E: no all-gather of weights at all; on
    run x data with E = 4: of one axis' experts.
    """
    for axes, n_experts, largest in ((dict(data=8), 8, 0), (dict(run=2, data=4), 4, 2 * 16 * 24)):
        x, weights, chosen, experts, pull = random_mixture(n_experts, 2, CUT)

        def pulled(x, experts, weights=weights, chosen=chosen, pull=pull):
            return (moe.mixture(jax.nn.silu, "auto", x, weights, chosen, experts) * pull).sum()

        mesh = make_mesh(**axes)
        cuts = EXPERTS_IN, EXPERTS_IN, EXPERTS_OUT
        places = tuple(
            NamedSharding(mesh, fitting(mesh.shape, cut, kernel.shape))
            for cut, kernel in zip(cuts, experts, strict=True)
        )
        with jax.set_mesh(mesh):
            text = (
                jax.jit(jax.grad(pulled), in_shardings=(None, places))
                .lower(x, experts)
                .compile()
                .as_text()
            )
        results = re.findall(r"= (\(.*?\)|\S+) all-gather(?:-start)?\(", text)
        shapes = [
            tuple(map(int, shape.split(",")))
            for result in results
            for shape in re.findall(r"\w+\[([\d,]+)\]", result)
        ]
        assert any(16 in shape for shape in shapes)  # the tokens are gathered
        # F is in the shape of weights alone
        assert max((math.prod(shape) for shape in shapes if 24 in shape), default=0) == largest


def test_frozen_experts_cost_no_gradient():
    x, weights, chosen, experts, pull = random_mixture(3, 2)

    def gradients(argnums) -> int:
        """How many products of the compiled gradient have the shape of an expert's weights."""

        def pulled(x, experts):
            return (moe.mixture(jax.nn.silu, "auto", x, weights, chosen, experts) * pull).sum()

        text = jax.jit(jax.grad(pulled, argnums)).lower(x, experts).compile().as_text()
        return len(re.findall(r"= f32\[(?:16,24|24,16)\]\S* dot\(", text))

    assert (gradients(0), gradients((0, 1))) == (0, 3)


def frozen_step(model, adapters, options, mesh=None):
    """(compiled step, fresh state, base) of a Mixtral, placed where `mesh` has them."""
    config, params = model
    graphdef, lora, base = split_decoder(config, params, adapters, LORA)
    runs = len(adapters["q"]["a"])
    state = init_state(lora, np.full(runs, 1e-3), np.zeros(runs), np.arange(runs))
    if mesh is None:
        return compile_sft_step(graphdef, options), jax.device_put(state), base
    places = state_shardings(mesh, state), base_shardings(mesh, base), batch_sharding(mesh)
    return (
        compile_sft_step(graphdef, options, *places),
        jax.device_put(state, places[0]),
        jax.device_put(base, places[1]),
    )


def test_load_balancing_loss_equals_transformers():
    """Of each run, its padding left out; and even routing gives the number of choices."""
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(0)
    logits, counted = (
        rng.standard_normal((3, 2, 4, 9, 5)).astype(np.float32),
        rng.random((2, 4, 9)) < 0.7,
    )

    def of_run(rows):
        return rows.sum(axis=1)

    found = moe.load_balancing_loss(jax.nn.softmax(logits, axis=-1), counted, 2, of_run)
    for run in range(2):
        layers = tuple(torch.tensor(layer[run].reshape(-1, 5)) for layer in logits)
        assert found[run] == pytest.approx(
            float(load_balancing_loss_func(layers, 5, 2, torch.tensor(counted[run]))), abs=1e-5
        )
    even = np.full((1, 1, 2, 4, 8), 1 / 8, np.float32)
    assert moe.load_balancing_loss(even, np.ones((1, 2, 4), bool), 2, of_run)[0] == pytest.approx(2)


COEF = 0.5
OPTIONS = SftOptions(Schedule("constant", total=100), router_aux_loss_coef=COEF)
LENGTHS = (14, 9, 12, 10)


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("mixtral-top-1", marks=pytest.mark.slow)])
def test_step_with_router_loss_equals_torch(kind):
    """Loss, router loss and gradient norm of two runs in packed rows, against PEFT's model on
    padded rows; a run alone gives its own.
    """
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = tiny.from_hf(tiny.hf_model(kind, num_hidden_layers=2))
    adapters, examples = (
        tiny.random_lora(model[0], LORA, runs=2),
        tiny.random_examples(2, LENGTHS, model[0].vocab_size),
    )
    batches = [
        tiny.pack([[run[:3], run[3:]] for run in runs], length=40, responses=40)
        for runs in (examples, examples[1:])
    ]
    step, state, base = frozen_step(model, adapters, OPTIONS)
    metrics = jax.device_get(step(state, base, (batches[0],))[1])
    step, state, base = frozen_step(model, tiny.of_run(adapters, 1), OPTIONS)
    alone = jax.device_get(step(state, base, (batches[1],))[1])
    for name in ("loss", "router_aux_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name][1:], alone[name], rtol=1e-5)
    for run in range(2):
        wrapped = tiny.peft_model(
            tiny.hf_model(kind, num_hidden_layers=2),
            LORA,
            jax.tree.map(lambda a, run=run: a[run], adapters),
        )
        tokens, mask = np.zeros((4, 14), int), np.zeros((4, 14), int)
        for row, (ids, _) in enumerate(examples[run]):
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        out = wrapped(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), output_router_logits=True
        )
        log_probs = out.logits.log_softmax(-1)
        losses = [
            -log_probs[row, i - 1, ids[i]]
            for row, (ids, n_prompt) in enumerate(examples[run])
            for i in range(n_prompt, len(ids))
        ]
        loss = torch.stack(losses).mean()
        (loss + COEF * out.aux_loss).backward()
        norm = torch.sqrt(
            sum(parameter.grad.square().sum() for *_, parameter in tiny.peft_parameters(wrapped))
        )
        expected = {"loss": loss, "router_aux_loss": out.aux_loss, "grad_norm": norm}
        assert {name: float(metrics[name][run]) for name in expected} == pytest.approx(
            {name: float(value.detach()) for name, value in expected.items()}, rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("axes", [dict(data=8), dict(run=2, data=2, tensor=2)], ids=str)
def test_a_mesh_trains_as_one_device(axes):
    model = tiny.from_hf(tiny.hf_model("mixtral"))
    adapters, mesh = tiny.random_lora(model[0], LORA, runs=2), make_mesh(**axes)
    examples = tiny.random_examples(2, LENGTHS * 2)
    seen = []
    for where in (None, mesh):
        batch = tiny.pack(
            [[[e] for e in run] for run in examples],
            length=16,
            responses=12,
            blocks=mesh.shape["run"] if where else 1,
        )
        step, state, base = frozen_step(model, adapters, OPTIONS, where)
        state, metrics = step(
            state, base, (batch if where is None else jax.device_put(batch, batch_sharding(mesh)),)
        )
        seen.append(jax.device_get((nnx.to_pure_dict(state.trained), metrics)))
    assert_close(seen[1], seen[0])


@pytest.mark.slow
def test_a_mesh_samples_as_one_device():
    model, mesh = (
        tiny.from_hf(tiny.hf_model("mixtral", num_hidden_layers=2)),
        make_mesh(run=2, data=2, tensor=2),
    )
    graphdef, lora, base = split_decoder(*model, tiny.random_lora(model[0], LORA, runs=2), LORA)
    queues = [
        [
            Request(np.arange(5 + i, dtype=np.int32) * (run + 3), i, max_new_tokens=6)
            for i in range(3)
        ]
        for run in range(2)
    ]
    options = SamplerOptions(stop_ids=(-1,), slots=8, prefill_prompts=2, prompt_buckets=(16,))
    places = base_shardings(mesh, base)
    alone = sample(graphdef, lora, base, queues, options)
    spread = sample(
        graphdef,
        lora,
        jax.device_put(base, places),
        queues,
        dataclasses.replace(options, mesh=mesh),
    )
    tokens = [
        [[answer.token_ids.tolist() for (answer,) in run] for run in answers]
        for answers in (alone, spread)
    ]
    assert tokens[0] == tokens[1]
    for (answer,), (other,) in zip(sum(alone, []), sum(spread, []), strict=True):
        np.testing.assert_allclose(answer.log_probs, other.log_probs, atol=1e-5)


def test_router_and_experts_are_read_from_either_layout(tmp_path):
    """As on the hub (one tensor an expert), and as transformers 5 holds them (all experts in one):
    bit for bit the model's own.
    """
    torch = pytest.importorskip("torch")
    model = tiny.hf_model("mixtral")
    model.save_pretrained(tmp_path / "hub", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert len(hf.weight_files(tmp_path / "hub")) > 3
    config = hf.read_config(tmp_path / "hub")
    assert (config.n_experts, config.experts_per_token, config.attention[0].window) == (8, 2, None)
    mesh = make_mesh(run=2, data=2, tensor=2)
    for params in (
        hf.read_params(tmp_path / "hub", config, jnp.float32),
        hf.read_params(tmp_path / "fused", config, jnp.float32),
        hf.read_params(tmp_path / "hub", config, jnp.float32, param_shardings(mesh, config)),
    ):
        for i, layer in enumerate(model.model.layers):
            gate, up = layer.mlp.experts.gate_up_proj.detach().chunk(2, dim=1)
            theirs = {
                "expert_gate": gate,
                "expert_up": up,
                "expert_down": layer.mlp.experts.down_proj.detach(),
                "router": layer.mlp.gate.weight.detach(),
            }
            for name, tensor in theirs.items():
                np.testing.assert_array_equal(
                    params["layers"][name][i], torch.swapaxes(tensor, -1, -2).numpy()
                )
    # of [3, 8, 32, 48]
    assert {shard.data.shape for shard in params["layers"]["expert_up"].addressable_shards} == {
        (3, 2, 32, 24)
    }


def test_an_incomplete_mixture_is_refused(tmp_path):
    pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file

    tiny.hf_model("mixtral").save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), hf.read_config(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    save_file(tensors | {name: tensors[name][:, :-1].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=(
            r"expert_down of layer 1 have the shape \(8, 47, 32\) where the model's config asks for"
            r" \(8, 48, 32\)"
        ),
    ):
        hf.read_params(tmp_path, config, jnp.float32)
    save_file(
        {key: value for key, value in tensors.items() if key != name},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=f"no tensor '{re.escape(name)}'"):
        hf.read_params(tmp_path, config, jnp.float32)


def test_host_memory_stays_at_one_layers_experts(tmp_path):
    """Python's own allocations while 6 layers load: one layer of one stacked tensor as stored and
    as asked for, no more.
    """
    torch = pytest.importorskip("torch")
    sizes = dict(num_hidden_layers=6, hidden_size=64, intermediate_size=256, num_local_experts=8)
    tiny.hf_model("mixtral", **sizes).to(torch.bfloat16).save_pretrained(tmp_path)
    config = hf.read_config(tmp_path)
    hf.read_params(tmp_path, config, jnp.float32)  # compiles
    one_layer = 8 * 64 * 256
    tracemalloc.start()
    hf.read_params(tmp_path, config, jnp.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * one_layer * (2 + 4)


def test_targets_that_a_mixture_lacks_are_refused():
    config = dataclasses.replace(tiny.CONFIG, family="mixtral", n_experts=3, experts_per_token=2)
    with pytest.raises(
        ValueError,
        match=(
            "LoRA targets gate, up, down are not in a mixtral model, whose experts and router stay"
            " frozen: choose from q, k, v, o"
        ),
    ):
        init_lora(jnp.arange(1), config, LoraConfig())
    assert set(init_lora(jnp.arange(1), config, LORA)) == set(LORA.targets)


def test_the_shapes_of_mixtral_8x7b():
    """Every parameter of transformers' module (on torch's meta device) is counted, with the
    config.json of the hub.
    """
    torch = pytest.importorskip("torch")
    import transformers

    published = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000,
    }
    config = from_hf_config(published)
    assert (config.family, config.n_experts, config.experts_per_token, config.norm_eps) == (
        "mixtral",
        8,
        2,
        1e-5,
    )
    assert config.attention == uniform_attention(128, 1e6)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**published))
    assert sum(map(math.prod, param_shapes(config).values())) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    with pytest.raises(ValueError, match="router_jitter_noise = 0.1, which is not supported"):
        from_hf_config(published | {"router_jitter_noise": 0.1})
