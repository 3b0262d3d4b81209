"""What is planned is what runs: lowered texts, shapes, bytes and FLOPs against a real run and hand
computations.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from tiny_experiment import make_experiment, write_model
from tiny_models import random_params

from ip_jax.data.packing import PackedShape
from ip_jax.data.pipeline import batch_reader, renderer
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import ModelConfig, SftConfig
from ip_jax.lab.supervised import run as supervised
from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig, param_shapes, uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.planning import estimate, formulas, programs, sampling
from ip_jax.planning.chips import CHIPS, Topology
from ip_jax.planning.command import subject_of
from ip_jax.planning.hlo import program_cost
from ip_jax.planning.workload import Packed, Sampling, Sizes, Workload
from ip_jax.sampling import sampler
from ip_jax.sampling.plan import make_plan
from ip_jax.sampling.slots import start_slots
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import MeshConfig, make_mesh
from ip_jax.training.state import Batch

CONFIG = DecoderConfig(
    "llama", 512, 128, 384, 4, 8, 2, 16, uniform_attention(16, 10000.0), 1e-5, 1024, False
)
SFT = SftConfig(
    steps=3,
    batch_size=8,
    learning_rate=1e-3,
    schedule=Schedule("constant"),
    lora=LoraConfig(rank=4),
    tokens_per_micro_batch=4096,
)
SHAPE = PackedShape(
    length=64, segments=1, segment_length=64, responses=32, micro_batches=2, micro_rows=8
)

# elements of a layer's matrices, and of its last one
LAYER, DOWN = 2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 384, 128 * 384


def work(mesh=None, config: DecoderConfig = CONFIG, runs: int = 2, **changes) -> Workload:
    sft = dataclasses.replace(SFT, **changes)
    mesh = mesh or make_mesh(data=8)
    shape = dataclasses.replace(
        SHAPE, micro_rows=8 * runs // mesh.shape["run"], blocks=mesh.shape["run"]
    )
    packing = (Packed(shape, 2, 16 * runs),)
    return Workload(
        config,
        ModelConfig("x", weights="bfloat16", activations="bfloat16"),
        sft,
        mesh,
        runs,
        1.0,
        3,
        packing,
        (),
        "test",
    )


CASES = {
    "lora": dict(arms=("neutral", "ip"), mesh=MeshConfig(run=2, tensor=2)),
    # one run: the axis run joins data
    "full": dict(arms=("neutral",), mesh=MeshConfig(run=2), sft=dict(train="full", steps=2)),
    "nf4": dict(arms=("neutral", "ip"), mesh=MeshConfig(run=2, tensor=2), quantised="nf4"),
}


@pytest.fixture(
    scope="module",
    params=[
        "lora",
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("nf4", marks=pytest.mark.slow),
    ],
)
def lowered_by_run(request, tmp_path_factory):
    """(experiment, {function: texts of what a whole run lowered}) on a mesh of the eight devices,
    trained and sampled.
    """
    folder, texts = tmp_path_factory.mktemp("run"), {}
    options = (
        dict(evaluation=dict(full_steps=(2,), neutral_steps=()), sft=dict(steps=2))
        | CASES[request.param]
    )
    quantised = options.pop("quantised", None) and pytest.importorskip("qwix") and "nf4"
    experiment = make_experiment(write_model(folder / "model"), **options)
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, quantised=quantised)
    )

    def recorded(name, function):
        def call(*arguments, **options):
            texts.setdefault(name, set()).add(function.lower(*arguments, **options).as_text())
            return function(*arguments, **options)

        return call

    make_step = supervised.programs.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            supervised.programs,
            "train_step",
            lambda *arguments: recorded("step", make_step(*arguments)),
        )
        for name in ("prefill", "decode"):
            patch.setattr(sampler, name, recorded(name, getattr(sampler, name)))
        supervised.run_supervised(
            experiment, epath.Path(folder / "out"), Display(Console(quiet=True))
        )
    return experiment, texts


def planned_of(experiment) -> Workload:
    """As the command plans it."""
    subject = subject_of(experiment, None, "cpu", lambda experiment: experiment)
    return subject.work_on(subject.mesh_on(Topology("local", 8, None, jax.devices())), None)


@pytest.mark.slow
def test_the_step_and_the_sampler_lower_to_the_text_of_a_run(lowered_by_run):
    experiment, texts = lowered_by_run
    planned = planned_of(experiment)
    assert planned.steps == 2 and planned.runs == len(experiment.arms)
    assert planned.mesh.shape == (
        {"run": 2, "data": 2, "tensor": 2}
        if planned.runs == 2
        else {"run": 1, "data": 8, "tensor": 1}
    )
    assert {programs.lower_step(planned).as_text()} == texts["step"]
    samplers = [programs.lower_sampler(planned, work) for work in planned.sampling]
    assert {s.decode.as_text() for s in samplers} == texts["decode"]
    assert texts["prefill"] >= {s.prefill.as_text() for s in samplers}, (
        "of the prefills of a call the longest"
    )


def test_the_evaluation_is_counted_as_it_is_run(lowered_by_run):
    experiment, _ = lowered_by_run
    planned = planned_of(experiment)
    sweeps = supervised.plan.sweeps_of_step(
        experiment, [supervised.Run(arm, 0, "") for arm in experiment.arms], 2
    )
    assert sum(s.times for s in planned.sampling) == len(sweeps)
    assert all(len(queue) == 5 for s in planned.sampling for queue in s.requests if queue), (
        "five examples a cell"
    )


def test_the_abstract_batch_has_the_shapes_of_a_packed_one(lowered_by_run):
    experiment, _ = lowered_by_run
    planned, render = (
        planned_of(experiment),
        renderer(supervised.hub.load_tokenizer(experiment.model.name)),
    )
    sources, _ = supervised.plan.training_sources(experiment, render)
    rules = supervised.programs.row_rules(
        programs.programs.Program(planned.mesh, planned.config, planned.sft, planned.model)
    )
    reader = batch_reader(sources, render, 4, 2, 512, rules)
    steps = [[Batch(**arrays) for arrays in reader(step)[0]] for step in range(2)]
    made = [programs.batch_of(planned.mesh, shape) for shape in planned.shapes]
    assert planned.shapes == reader.shapes and jax.tree.map(
        lambda a: (a.shape, a.dtype), steps[0]
    ) == jax.tree.map(lambda a: (a.shape, a.dtype), made)
    for k, packed in enumerate(planned.packing):
        held = [(step[k].segment_ids > 0).any(-1) for step in steps]  # [M, blocks, B]
        assert packed.rows == np.mean([rows.sum() for rows in held])
        assert packed.micro_batches == np.mean([rows.any((1, 2)).sum() for rows in held])


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 1)], ids=str)
def test_bytes_are_parameters_times_item_size_over_shards(sizes):
    kinds = estimate.resident(programs.initial(work(make_mesh(*sizes))))
    cut = sum(
        math.prod(shape) for path, shape in param_shapes(CONFIG).items() if "norm" not in path[-1]
    )
    whole = sum(
        math.prod(shape) for path, shape in param_shapes(CONFIG).items() if "norm" in path[-1]
    )
    assert kinds["weights"] == 2 * cut / math.prod(sizes) + 2 * whole
    a_and_b = sum(
        i + o
        for i, o in [
            (128, 128),
            (128, 32),
            (128, 32),
            (128, 128),
            (128, 384),
            (128, 384),
            (384, 128),
        ]
    )
    adapters = 4 * 2 * 4 * CONFIG.n_layers * a_and_b  # float32, two runs, rank 4
    assert kinds["adapters"] == adapters / sizes[0]
    assert kinds["optimizer"] == pytest.approx(2 * adapters / sizes[0], abs=16), (
        "both moments and a count for each run"
    )


@pytest.mark.parametrize(
    "kind, bits, scales", [("nf4", 4, LAYER / 64), ("int8", 8, 2 * 128 + 2 * 32 + 2 * 384 + 128)]
)
def test_a_quantised_base_takes_its_bits_and_scales_and_is_loaded_whole(kind, bits, scales):
    """A scale for each output and block of 64 inputs, or for each output, in bfloat16 as all
    else.
    """
    pytest.importorskip("qwix")
    planned = work(make_mesh())
    planned = dataclasses.replace(planned, model=dataclasses.replace(planned.model, quantised=kind))
    others = 2 * (2 * 512 * 128 + 9 * 128)  # embedding, head, norms
    assert (
        estimate.resident(programs.initial(planned))["weights"]
        == 4 * (LAYER * bits / 8 + 2 * scales) + others
    )
    loading = estimate.loading_memory(planned.config, planned.model, planned.mesh)
    assert loading == {
        "loading": {"weights, unquantised": 4 * 2 * LAYER + others}
    } and not estimate.loading_memory(planned.config, work().model, planned.mesh)


def test_full_training_keeps_weights_and_moments_in_float32_and_computes_with_a_copy():
    begun = programs.initial(work(train="full", runs=1))
    cut = (
        sum(
            math.prod(shape)
            for path, shape in param_shapes(CONFIG).items()
            if "norm" not in path[-1]
        )
        / 8
    )
    whole = sum(
        math.prod(shape) for path, shape in param_shapes(CONFIG).items() if "norm" in path[-1]
    )
    kinds = estimate.resident(begun)
    assert kinds["weights"] == 4 * (cut + whole) and "adapters" not in kinds
    assert kinds["optimizer"] == pytest.approx(2 * kinds["weights"], abs=16)
    assert programs.per_device(begun.weights) == kinds["weights"] / 2, "bfloat16"


@pytest.fixture(scope="module")
def costs():
    """The compiled step on one device, the same with full remat, and on eight. LLVM's own
    optimisations change no HLO and are left out.
    """
    quick = {"xla_backend_optimization_level": 0}
    steps = {"one": work(make_mesh()), "remat": work(make_mesh(), remat="full"), "eight": work()}
    lowered = {name: programs.lower_step(planned) for name, planned in steps.items()}
    compiled = {name: program.compile(quick) for name, program in lowered.items()}
    return {
        name: (program_cost(program.as_text()), program.memory_analysis())
        for name, program in compiled.items()
    }


def test_the_compiled_step_does_four_products_a_weight_and_token(costs):
    """4 FLOPs for each token and frozen weight, 6 for the adapters, the vocabulary at response
    positions, and attention.

    At this length attention is seven whole products a segment and layer (two forward, five
    backward, which makes the scores again), where the model's FLOPs count three passes of two
    halves. The rest, below 2 %, are rope and sums, which are products on a CPU.
    """
    tokens, segments = 2 * 2 * 8 * 64, 32
    adapters = 4 * (2 * 256 + 2 * 160 + 3 * 512)
    without_attention = (
        4 * 4 * LAYER * tokens + 6 * 4 * adapters * tokens + 4 * 512 * 128 * segments * 32
    )
    product = 2 * 64 * 64 * 128 * 4 * segments
    assert estimate.step_flops(work()) == without_attention + 3 * product
    assert 1 <= costs["one"][0].flops / (without_attention + 7 * product) < 1.02


def test_remat_computes_the_forward_pass_again_but_for_its_last_product(costs):
    once = 2 * 4 * LAYER * 2048
    assert once - 2 * 4 * DOWN * 2048 < costs["remat"][0].flops - costs["one"][0].flops < once
    assert costs["remat"][1].temp_size_in_bytes < costs["one"][1].temp_size_in_bytes


def test_sharded_over_data_each_device_does_its_part(costs):
    one, eight = costs["one"][0], costs["eight"][0]
    assert eight.flops == pytest.approx(one.flops / 8, rel=0.1)
    assert not one.collectives and eight.collectives["all-gather"].count >= CONFIG.n_layers
    assert costs["eight"][1].argument_size_in_bytes < costs["one"][1].argument_size_in_bytes


def test_a_step_costs_what_it_has_of_each_shape_on_average():
    """Of two shapes one and a half micro-batches of four, and one of two: the compiled program,
    which could do all, counts as what is done.
    """
    config = dataclasses.replace(CONFIG, n_layers=1)
    shapes = [
        dataclasses.replace(SHAPE, length=length, segment_length=length, micro_batches=most)
        for length, most in ((32, 4), (64, 2))
    ]
    packing = tuple(
        Packed(shape, used, 8 * used) for shape, used in zip(shapes, (1.5, 1), strict=True)
    )
    planned = dataclasses.replace(work(make_mesh(), config), packing=packing)
    tokens = 8 * (1.5 * 32 + 64)
    assert estimate.step_tokens(planned) == tokens
    found, formula = (
        programs.compile_step(planned).cost,
        estimate.formula_cost(planned, programs.initial(planned)),
    )
    of_layer, adapters, vocabulary = (
        4 * LAYER * tokens,
        6 * 4 * (2 * 256 + 2 * 160 + 3 * 512) * tokens,
        4 * 512 * 128 * 8 * 32 * 2.5,
    )
    # attention is beside these
    assert found.flops == pytest.approx(of_layer + adapters + vocabulary, rel=0.06)
    assert (
        formula.flops
        == estimate.step_flops(planned)
        == pytest.approx(of_layer + adapters + vocabulary, rel=0.05)
    )


@pytest.mark.parametrize(
    "said",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm."
            " Exceeded hbm capacity by 2.75G."
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (18.50G) exceeds available HBM (15.75G)."
        ),
    ],
    ids=["used", "temporaries"],
)
def test_what_the_tpu_compiler_says_about_too_large_programs(said):
    assert programs._too_large(said) == programs.TooLarge(18.5 * 2**30, 15.75 * 2**30)


def test_a_plan_that_the_compiler_refused_does_not_fit_and_says_what_to_change():
    planned = work()
    begun = programs.initial(planned)
    memory = {"training": estimate.step_memory(planned, begun, None)}
    topology = Topology("v5e:2x4", 8, CHIPS["v5e"], jax.devices())
    cost = estimate.formula_cost(planned, begun)
    phases = [estimate.Phase("step", 3.0, cost, estimate.seconds(cost, topology.chip), None)]
    good = estimate.summary(planned, topology, phases, memory, {})
    bad = estimate.summary(
        planned,
        topology,
        phases,
        memory,
        {"training": programs.TooLarge(20 * 2**30, 15.75 * 2**30)},
    )
    assert good.fits and not good.advice
    assert (
        not bad.fits
        and bad.needed["training"] == 20 * 2**30
        and any("--sft.remat" in line for line in bad.advice)
    )
    assert good.hours["training"] == pytest.approx(3 * phases[0].seconds.total * 8 / 3600)
    assert np.isfinite(good.mfu)


MIXTURE = dataclasses.replace(
    CONFIG, family="mixtral", n_layers=2, n_experts=8, experts_per_token=2
)


def sampling_on(mesh, dtype: str, whole: bool = False) -> Sampling:
    """32 tokens behind each of 16 prompts of 40, for two runs."""
    queue = [sampler.Request(np.arange(i, i + 40), i, max_new_tokens=32) for i in range(16)]
    options = sampler.SamplerOptions((0,), slots=16, dtype=dtype, mesh=mesh, whole_layers=whole)
    return Sampling([queue] * 2, make_plan([queue] * 2, options), options, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, sizes, quantised, whole",
    [
        (dataclasses.replace(CONFIG, n_layers=2), (1, 8, 1), None, False),
        (dataclasses.replace(CONFIG, n_layers=2), (2, 2, 2), None, False),
        (dataclasses.replace(CONFIG, n_layers=2), (2, 2, 2), None, True),
        (MIXTURE, (1, 4, 2), None, False),
        (MIXTURE, (1, 4, 2), None, True),
        (dataclasses.replace(MIXTURE, n_experts=4), (1, 8, 1), None, True),
        (dataclasses.replace(CONFIG, n_layers=2), (1, 8, 1), "int8", False),
        (dataclasses.replace(CONFIG, n_layers=2), (1, 8, 1), "int8", True),
    ],
    ids=[
        "data",
        "all axes",
        "all axes, whole layers",
        "experts stay",
        "experts stay, whole layers",
        "experts move, whole layers",
        "int8",
        "int8, whole layers",
    ],
)
def test_the_sampler_sends_what_formulas_say(config, sizes, quantised, whole):
    """In float32, which a CPU gathers as it is. The compiled programs send a little more: choices
    of tokens and experts.
    """
    if quantised:
        pytest.importorskip("qwix")
    mesh = make_mesh(*sizes)
    model = ModelConfig("x", weights="float32", activations="float32", quantised=quantised)
    lora = LoraConfig(rank=4, targets=("q", "k", "v", "o"))
    planned = dataclasses.replace(work(mesh, config, lora=lora), model=model)
    sampled = sampling_on(mesh, "float32", whole)
    lowered, adapters = (
        programs.lower_sampler(planned, sampled),
        programs.initial(planned).state.trained,
    )
    caches = [getattr(lowered.slots, name) for name in ("prompt_k", "prompt_v", "own_k", "own_v")]
    assert formulas.caches(planned.sizes, sampled) == programs.per_device(caches)
    copied = formulas.layer_copies(planned.sizes, sampled, programs.initial(planned).weights)
    assert copied == pytest.approx(
        programs.per_device([base for _, base in lowered.layers]), rel=1e-6
    )
    for program, formula, tokens in zip(
        (lowered.prefill, lowered.decode),
        sampling.costs(planned.sizes, sampled, adapters),
        (2 * 16 * 40, 2 * 16),
        strict=True,
    ):
        sent = program_cost(
            program.compile({"xla_backend_optimization_level": 0}).as_text()
        ).collectives
        told = formula().collectives
        decoding = program is lowered.decode
        kinds = (
            ["all-gather"]
            + ["all-reduce"] * (sizes[2] > 1)
            + ["reduce-scatter"] * (config.n_experts == 8)
            + ["all-to-all"] * decoding
        )
        assert set(told) == set(kinds)
        assert told["all-gather"].moved == pytest.approx(
            sent["all-gather"].moved, rel=0.1 if decoding else 0.25
        )
        assert not decoding or told["all-to-all"].moved == sent["all-to-all"].moved
        assert (
            "reduce-scatter" not in told
            or told["reduce-scatter"].moved == sent["reduce-scatter"].moved
        )
        if "all-reduce" in told:  # of embeddings that are looked up too
            looked_up = 2 * 4 * 128 * tokens * 7 / 8
            assert (
                told["all-reduce"].moved
                < sent["all-reduce"].moved
                < told["all-reduce"].moved + 1.02 * looked_up
            )


@pytest.mark.parametrize("guided", [False, True])
def test_caches_by_formula_are_those_of_the_slots(guided):
    """A guided program has those of both prompts."""
    config = DecoderConfig(
        "llama", 64, 32, 64, 2, 4, 2, 8, uniform_attention(8, 10000.0), 1e-5, 64, True
    )
    request = sampler.Request(
        np.arange(9),
        0,
        n_samples=6,
        max_new_tokens=5,
        guide_ids=np.arange(12) if guided else None,
        guidance=float(guided),
    )
    options = sampler.SamplerOptions((0,), slots=4)
    work = Sampling([[request]], make_plan([[request]], options), options, 1)
    decoder = split_decoder(config, random_params(config))
    slots = jax.eval_shape(
        lambda: start_slots(*decoder, work.plan.prefix, shape=work.plan.shape, dtype="float32")
    )
    held = sum(
        cache.size * 4
        for of_layers in (slots.prompt_k, slots.prompt_v, slots.own_k, slots.own_v)
        for cache in of_layers
    )
    assert (
        formulas.caches(
            Sizes(
                config,
                ModelConfig("tiny", weights="float32"),
                make_mesh(run=1, data=1),
                1,
                None,
                "none",
            ),
            work,
        )
        == held
    )
