"""The step on meshes of eight fake devices: the results of one device, shards of the promised size,
no wide all-gather.
"""

import collections
import dataclasses
import functools
import math
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models as tiny
from closeness import assert_near
from jax.sharding import NamedSharding, PartitionSpec

from ip_jax.models.assemble import assemble
from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig, param_shapes, uniform_attention
from ip_jax.models.lora import LoraConfig, projection_shapes
from ip_jax.models.placement import BY_ROW, constrain
from ip_jax.training.schedules import Schedule
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import (
    MeshConfig,
    base_shardings,
    batch_sharding,
    make_mesh,
    mesh_for,
    mesh_sizes,
    param_shardings,
    state_shardings,
)
from ip_jax.training.state import full_weights, init_state

# The vocabulary outweighs a layer, and one kernel of all layers outweighs one whole layer, so that
# a gather of either is seen.
CONFIG = DecoderConfig(
    "llama", 2048, 32, 48, 12, 8, 4, 8, uniform_attention(8, 1000.0), 1e-5, 256, True
)
LORA = LoraConfig(rank=4, alpha=4)
OPTIONS = SftOptions(Schedule("constant", total=100), max_grad_norm=1.0)
FULL = dataclasses.replace(OPTIONS, train="full")
RUNS, STEPS = 2, 2
MESHES = [
    pytest.param(dict(data=8), marks=pytest.mark.slow),
    dict(run=2, data=4),
    dict(run=2, data=2, tensor=2),
    dict(data=2, tensor=4),
]
KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def program(config: DecoderConfig = CONFIG, runs: int = RUNS):
    """(graphdef, state, base) on the host."""
    graphdef, lora, base = split_decoder(
        config, tiny.random_params(config), tiny.random_lora(config, LORA, runs), LORA
    )
    state = init_state(lora, np.linspace(1e-4, 2e-4, runs), np.full(runs, 0.01), np.arange(runs))
    return graphdef, jax.device_get(state), base


@functools.cache
def batches(blocks: int = 1):
    """Two micro-batches of 8 rows for each run, which share them but for blocks of runs."""
    examples = [
        tiny.random_examples(RUNS, (14, 9, 12, 10) * 4, CONFIG.vocab_size, seed)
        for seed in range(STEPS)
    ]
    return [
        tiny.pack(
            [[[e] for e in run] for run in step],
            length=16,
            responses=12,
            micro_batches=2,
            blocks=blocks,
        )
        for step in examples
    ]


@functools.cache
def single_device():
    graphdef, state, base = program()
    return run_steps(compile_sft_step(graphdef, OPTIONS), state, base, batches())


def run_steps(step, state, base, batches):
    """(adapters, [metrics]) on the host."""
    seen = []
    for batch in batches:
        state, metrics = step(state, base, (batch,))
        seen.append(jax.device_get(metrics))
    return jax.device_get(state.trained), seen


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_mesh_gives_the_results_of_one_device(axes):
    graphdef, state, base = program()
    mesh = make_mesh(**axes)
    places = state_shardings(mesh, state), base_shardings(mesh, base), batch_sharding(mesh)
    step = compile_sft_step(graphdef, OPTIONS, *places)
    base = jax.device_put(base, places[1])
    for kernel in KERNELS:  # 12 layers are whole, all else is cut over all eight devices
        array = base["layers"][kernel]["kernel"].get_value()
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // 8}
    assert {shard.data.shape for shard in base["embed"].get_value().addressable_shards} == {
        (2048 // 8, 32)
    }
    placed = [jax.device_put(batch, places[2]) for batch in batches(axes.get("run", 1))]

    text = step.lower(jax.device_put(state, places[0]), base, (placed[0],)).compile().as_text()
    layer = sum(
        int(np.prod(shape[1:]))
        for path, shape in param_shapes(CONFIG).items()
        if path[0] == "layers"
    )
    gathers = gathered_shapes(text)
    assert max(map(math.prod, gathers)) <= layer < min(CONFIG.vocab_size * 32, 12 * 32 * 32)
    # each layer's kernels, one by one and less what `tensor` cuts, once forward and once backward
    assert collections.Counter(
        shape for shape in gathers if len(shape) == 2
    ) == collections.Counter(kernel_shapes(axes.get("tensor", 1)) * 2)

    first, again = (
        run_steps(step, jax.device_put(state, places[0]), base, placed) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert_near(first, single_device(), 2e-5)
    assert step._cache_size() == 1


@functools.cache
def full_program():
    """(graphdef, state on the host, nothing frozen, one step's batch) of one run whose every weight
    is trained.
    """
    graphdef, frozen, weights = split_decoder(CONFIG, tiny.random_params(CONFIG))
    state = jax.device_get(
        init_state(full_weights(weights), np.full(1, 1e-4), np.full(1, 0.01), np.zeros(1))
    )
    examples = tiny.random_examples(1, (14, 9, 12, 10) * 4, CONFIG.vocab_size)
    return (
        graphdef,
        state,
        frozen,
        (
            tiny.pack(
                [[[e] for e in run] for run in examples], length=16, responses=12, micro_batches=2
            ),
        ),
    )


@functools.cache
def full_on_one_device():
    graphdef, state, frozen, batch = full_program()
    return full_results(compile_sft_step(graphdef, FULL), jax.device_put(state), frozen, batch)


def full_results(step, state, frozen, batch):
    """(gradients of the first step, metrics of two): Adam's first moment is a tenth of the
    gradient.
    """
    state, first = step(state, frozen, batch)
    gradients = jax.tree.map(lambda mean: 10 * np.asarray(mean), state.adam.mu)
    return gradients, *jax.device_get((first, step(state, frozen, batch)[1]))


@pytest.mark.parametrize(
    "axes", [pytest.param(dict(data=8), marks=pytest.mark.slow), dict(data=4, tensor=2)], ids=str
)
def test_full_training_on_a_mesh(axes):
    """The results of one device; weights and moments cut over all devices; nothing wider than a
    layer's kernel is gathered.
    """
    graphdef, state, frozen, batch = full_program()
    mesh = make_mesh(**axes)
    places = (
        state_shardings(mesh, state, "full"),
        base_shardings(mesh, frozen),
        batch_sharding(mesh),
    )
    placed = jax.device_put(state, places[0])
    for tree in (placed.trained, placed.adam.mu, placed.adam.nu):
        for array in (
            tree["embed"].get_value(),
            *(tree["layers"][kernel]["kernel"].get_value() for kernel in KERNELS),
        ):
            assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // 8}
    step, batch = compile_sft_step(graphdef, FULL, *places), jax.device_put(batch, places[2])
    found = full_results(step, placed, frozen, batch)
    assert (
        max(
            map(
                math.prod,
                gathered_shapes(
                    step.lower(jax.device_put(state, places[0]), frozen, batch).compile().as_text()
                ),
            )
        )
        <= 16 * 8 * 32
    )
    assert_near(found, full_on_one_device(), 2e-5)


def gathered_shapes(text: str) -> list[tuple[int, ...]]:
    """The shape of every result of an all-gather in compiled HLO (of each member, where several are
    combined).
    """
    results = re.findall(r"= (\(.*?\)|\S+) all-gather(?:-start)?\(", text)
    return [
        tuple(int(n) for n in shape.split(","))
        for result in results
        for shape in re.findall(r"\w+\[([\d,]+)\]", result)
    ]


def kernel_shapes(tensor: int) -> list[tuple[int, int]]:
    """[in, out] of a device's part of each kernel of one layer, once it is gathered over (run,
    data).
    """
    shapes = projection_shapes(CONFIG)
    return [
        (
            (shapes[k][0] // tensor, shapes[k][1])
            if k in ("o", "down")
            else (shapes[k][0], shapes[k][1] // tensor)
        )
        for k in KERNELS
    ]


def test_a_gathered_embedding_would_be_seen():
    """The measure of the test above on a program that does gather the embedding."""
    mesh = make_mesh(data=8)
    place = base_shardings(mesh, {"embed": np.zeros((2048, 32), np.float32)})["embed"]
    whole = NamedSharding(mesh, PartitionSpec())
    text = (
        jax.jit(lambda x: x + 1, in_shardings=place, out_shardings=whole)
        .lower(np.zeros((2048, 32), np.float32))
        .compile()
        .as_text()
    )
    assert gathered_shapes(text) == [(2048, 32)]


def test_rules():
    mesh = make_mesh(run=2, data=2, tensor=2)
    config = DecoderConfig(
        "qwen2",
        64,
        32,
        48,
        3,
        4,
        2,
        8,
        uniform_attention(8, 1000.0),
        1e-5,
        256,
        tied_embeddings=False,
        qkv_bias=True,
    )
    specs = {path: param_shardings(mesh, config)(path).spec for path in param_shapes(config)}
    every, fsdp, tensor = ("run", "data", "tensor"), ("run", "data"), ("tensor",)
    inward, outward = PartitionSpec(None, fsdp, tensor), PartitionSpec(None, tensor, fsdp)
    assert specs[("embed",)] == PartitionSpec(every, None) and specs[("head",)] == PartitionSpec(
        None, every
    )
    assert {name: specs["layers", name] for name in KERNELS} == {
        name: outward if name in ("o", "down") else inward for name in KERNELS
    }
    assert {specs["layers", f"{name}_bias"] for name in "qkv"} == {PartitionSpec(None, tensor)}
    assert {specs[path] for path in specs if "norm" in path[-1]} == {PartitionSpec()}


def test_loading_places_weights_where_the_step_wants_them():
    """By path before loading, and by the frozen state's own structure: the same shardings, biases
    and head included.
    """
    mesh = make_mesh(run=2, data=2, tensor=2)
    config = DecoderConfig(
        "qwen2",
        101,
        32,
        48,
        3,
        4,
        2,
        8,
        uniform_attention(8, 1000.0),
        1e-5,
        256,
        tied_embeddings=False,
        qkv_bias=True,
    )
    source = tiny.random_params(config)

    def read(path, layer):
        return source[path[0]] if layer is None else source["layers"][path[1]][layer]

    params = assemble(config, read, np.float32, param_shardings(mesh, config), Path("tests"))
    _, _, base = split_decoder(config, params)
    wanted = base_shardings(mesh, base)
    assert (
        jax.tree.leaves(
            jax.tree.map(
                lambda array, place: array.sharding.is_equivalent_to(place, array.ndim),
                base,
                wanted,
            )
        )
        == [True] * 15
    )
    jax.tree.map(np.testing.assert_array_equal, params, source)


def test_axes_that_do_not_divide_are_dropped():
    """101 tokens over 8 devices, 3 runs over 2: whole instead; a dimension keeps those of its axes
    that do divide it.
    """
    mesh = make_mesh(run=2, data=2, tensor=2)
    config = DecoderConfig(
        "gemma", 101, 18, 20, 3, 3, 1, 5, uniform_attention(5, 1000.0), 1e-5, 256, True
    )
    _, state, base = program(config, runs=3)
    place = base_shardings(mesh, base)
    assert place["embed"].get_value().spec == PartitionSpec(None, None)
    # [L, 18, 5]
    assert place["layers"]["k"]["kernel"].get_value().spec == PartitionSpec(None, ("run",), None)
    # [L, 20, 18]
    assert place["layers"]["down"]["kernel"].get_value().spec == PartitionSpec(
        None, ("tensor",), ("run",)
    )
    for leaf in jax.tree.leaves(state_shardings(mesh, state)):
        assert leaf.is_fully_replicated
    by_run = state_shardings(mesh, program(config, runs=4)[1])
    assert by_run.step.is_fully_replicated
    assert {leaf.spec for leaf in jax.tree.leaves(by_run.replace(step=None))} == {
        PartitionSpec(("run",))
    }


def test_a_weight_without_a_rule_is_refused():
    with pytest.raises(
        ValueError,
        match=(
            "no sharding rule matches the parameter layers/gizmo: add one to RULES in"
            " ip_jax.training.sharding"
        ),
    ):
        base_shardings(make_mesh(), {"layers": {"gizmo": np.zeros((2, 4, 4))}})


@pytest.mark.parametrize(
    "axes, experts, hidden",
    [
        (dict(data=8), 1, 32),
        (dict(run=2, data=2, tensor=2), 2, 16),
        (dict(run=2, tensor=4), 4, 8),
    ],
    ids=str,
)
def test_experts_are_cut_over_devices_then_their_hidden_dimension(axes, experts, hidden):
    """[L, E, D, F] and [L, E, F, D] of 8 experts: a device's part."""
    stacks = {
        "expert_gate": np.zeros((2, 8, 16, 32)),
        "expert_up": np.zeros((2, 8, 16, 32)),
        "expert_down": np.zeros((2, 8, 32, 16)),
        "router": np.zeros((2, 16, 8)),
    }
    places = base_shardings(make_mesh(**axes), {"layers": stacks})["layers"]
    parts = {name: places[name].shard_shape(stack.shape) for name, stack in stacks.items()}
    assert parts == {
        "expert_gate": (2, experts, 16, hidden),
        "expert_up": (2, experts, 16, hidden),
        "expert_down": (2, experts, hidden, 16),
        "router": (2, 16, 8),
    }


def test_experts_that_the_axes_do_not_divide_are_cut_within():
    """3 experts over 8 devices: no axis divides them, so that data cuts the inputs as it does
    elsewhere.
    """
    stacks = {"expert_gate": np.zeros((2, 3, 16, 32)), "expert_down": np.zeros((2, 3, 32, 16))}
    places = base_shardings(make_mesh(data=4, tensor=2), {"layers": stacks})["layers"]
    assert {places[name].shard_shape(stacks[name].shape) for name in stacks} == {
        (2, 3, 4, 16),
        (2, 3, 16, 4),
    }


def test_meshes():
    assert make_mesh().devices.size == 1 and dict(make_mesh(data=2, tensor=4).shape) == {
        "run": 1,
        "data": 2,
        "tensor": 4,
    }
    for axes in (dict(run=3, data=3), dict(data=0)):
        with pytest.raises(
            ValueError,
            match=r"a mesh of run=\d, data=\d, tensor=1 needs \d devices, and this program has 8",
        ):
            make_mesh(**axes)


EIGHT = [types.SimpleNamespace(platform="cpu")] * 8


@pytest.mark.parametrize(
    "config, expected",
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(tensor=4), (1, 2, 4)),
        (MeshConfig(run=None, data=2, tensor=2), (2, 2, 2)),
        (MeshConfig(run=2, data=4, platform="cpu"), (2, 4, 1)),
        (MeshConfig(data=2, tensor=None), (1, 2, 4)),
    ],
)
def test_one_axis_takes_what_the_others_leave(config, expected):
    assert tuple(mesh_sizes(config, EIGHT, n_heads=8).values()) == expected


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(run=3), "a mesh of run=3, data=None, tensor=1 does not divide the 8 devices"),
        (
            MeshConfig(data=4),
            (
                "a mesh of run=1, data=4, tensor=1 does not divide the 8 devices of this program:"
                " make one axis None"
            ),
        ),
        (MeshConfig(data=16), "run=1, data=16, tensor=1 does not divide the 8 devices"),
        (MeshConfig(tensor=8), "has tensor=8, which does not divide the model's 12 heads"),
        (
            MeshConfig(platform="tpu"),
            "demands the platform 'tpu' .*, and this machine's devices are cpu",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers(config, message):
    with pytest.raises(ValueError, match=message):
        mesh_sizes(config, EIGHT, n_heads=12)


@pytest.mark.parametrize(
    "axes", [dict(data=None, tensor=None), dict(run=0), dict(tensor=-1)], ids=str
)
def test_a_mesh_that_says_too_little_is_refused(axes):
    with pytest.raises(
        ValueError, match="each axis needs at least 1 device, and one of them may be None"
    ):
        MeshConfig(**axes)


@pytest.mark.parametrize("runs, expected", [(4, (4, 2, 1)), (6, (2, 4, 1)), (1, (1, 8, 1))])
def test_a_program_of_few_runs_gives_the_rest_to_data_and_moves_no_weight(runs, expected):
    mesh = make_mesh(run=4, data=2)
    smaller = mesh_for(mesh, runs)
    assert tuple(smaller.shape.values()) == expected
    kernel = np.zeros((2, 32, 8))
    before, after = (
        base_shardings(m, {"layers": {"q": kernel}})["layers"]["q"] for m in (mesh, smaller)
    )
    assert before.is_equivalent_to(after, 3)


def test_a_mesh_over_devices_of_ones_own():
    devices = jax.devices()[4:]
    assert make_mesh(data=2, tensor=2, devices=devices).devices.flatten().tolist() == devices
    with pytest.raises(ValueError, match="needs 8 devices, and this program has 4"):
        make_mesh(data=8, devices=devices)


def test_constraints_are_nothing_without_a_mesh():
    x = np.zeros((2, 4, 3))
    assert constrain(x, BY_ROW) is x
    with jax.set_mesh(make_mesh(run=2, data=4)):
        assert jax.jit(lambda x: constrain(x, BY_ROW))(x).sharding.shard_shape(x.shape) == (1, 1, 3)
