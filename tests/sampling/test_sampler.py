"""The sampler against whole-sequence passes, and its invariants: sharing, refilling and batching
change nothing.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
from sampling_models import TINY, full_logits, one_run, prompts

from ip_jax.sampling import slots
from ip_jax.sampling.plan import make_plan, make_refill
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.training.sharding import make_mesh

OPTIONS = SamplerOptions(stop_ids=(-1,), slots=8, prefill_prompts=4, prompt_buckets=(16, 32, 64))


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_same(first, second):
    """The same tokens for every request and sample (float32 on one device: no near-ties in these
    small cases).
    """
    for request, other in zip(first, second, strict=True):
        for a, b in zip(request, other, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and a.ended == b.ended
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


def assert_follows(model, run, request, answer, temperature=1.0, greedy=True):
    """Log-probabilities, and greedy tokens, as one pass over the whole sequence gives them."""
    sequence = np.concatenate([request.prompt_ids, answer.token_ids])
    logits = full_logits(model, run, sequence)[len(request.prompt_ids) - 1 : -1] / temperature
    expected = np.take_along_axis(log_softmax(logits), answer.token_ids[:, None], -1)[:, 0]
    np.testing.assert_allclose(answer.log_probs, expected, atol=1e-4)
    if greedy:
        assert answer.token_ids.tolist() == logits.argmax(-1).tolist()


def test_greedy_tokens_and_log_probs_equal_whole_sequence_passes_through_refills(two_runs):
    queues = [
        [
            Request(prompt, i, max_new_tokens=12)
            for i, prompt in enumerate(prompts(11 + run, seed=run))
        ]
        for run in range(2)
    ]
    for run, (queue, answers) in enumerate(
        zip(queues, sample(*two_runs, queues, OPTIONS), strict=True)
    ):
        for request, (answer,) in zip(queue, answers, strict=True):
            assert_follows(two_runs, run, request, answer)
            assert len(answer.token_ids) == 12 and not answer.ended


def test_prompts_at_the_edges_of_buckets(untrained):
    queue = [
        Request(prompts(1, length)[0], length, max_new_tokens=3)
        for length in (1, 2, 15, 16, 17, 32, 33, 64)
    ]
    for request, (answer,) in zip(queue, sample(*untrained, [queue], OPTIONS)[0], strict=True):
        assert_follows(untrained, 0, request, answer)


def test_what_all_prompts_begin_with_is_computed_once_and_changes_nothing(two_runs):
    beginning = prompts(1, 21)[0]  # 16 of these are shared: a multiple of 8
    queues = [
        [
            Request(np.append(beginning, prompt), i, max_new_tokens=4)
            for i, prompt in enumerate(prompts(8, seed=run))
        ]
        for run in range(2)
    ]
    assert len(make_plan(queues, OPTIONS).prefix) == 16
    for run, (queue, answers) in enumerate(
        zip(queues, sample(*two_runs, queues, OPTIONS), strict=True)
    ):
        for request, (answer,) in zip(queue, answers, strict=True):
            assert_follows(two_runs, run, request, answer)


def test_sampled_log_probs_are_scaled_and_untruncated(untrained):
    queue = [
        Request(prompt, i, temperature=0.6, top_p=0.5, max_new_tokens=8)
        for i, prompt in enumerate(prompts(8))
    ]
    for request, (answer,) in zip(queue, sample(*untrained, [queue], OPTIONS)[0], strict=True):
        assert_follows(untrained, 0, request, answer, temperature=0.6, greedy=False)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.6)])
def test_frequencies_are_the_models_probabilities(untrained, temperature, top_p):
    from scipy.stats import chisquare

    request = Request(
        prompts(1, 20)[0], 0, n_samples=6000, temperature=temperature, top_p=top_p, max_new_tokens=1
    )
    (answers,) = sample(*untrained, [[request]], dataclasses.replace(OPTIONS, slots=500))[0]
    probability = np.exp(
        np.float64(log_softmax(full_logits(untrained, 0, request.prompt_ids)[-1] / temperature))
    )
    order = np.argsort(-probability)
    probability[order[np.cumsum(probability[order]) - probability[order] >= top_p]] = 0
    probability /= probability.sum()
    counts = np.bincount([answer.token_ids[0] for answer in answers], minlength=len(probability))
    assert not counts[probability == 0].any()
    rare = probability * len(answers) < 5

    def group(x):
        return np.append(x[~rare], x[rare].sum())

    seen, expected = group(counts), group(probability * len(answers))
    assert chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_samples_of_one_request_equal_separate_requests(untrained):
    request = Request(prompts(1, 30)[0], 3, n_samples=5, temperature=1.0, max_new_tokens=10)
    ((together,),) = sample(*untrained, [[request]], OPTIONS)
    separate = [dataclasses.replace(request, n_samples=1, first_sample=i) for i in (4, 3, 2, 1, 0)]
    filler = [
        Request(prompt, 90 + i, temperature=1.0, max_new_tokens=10)
        for i, prompt in enumerate(prompts(9))
    ]
    apart = [answer for (answer,) in sample(*untrained, [filler + separate], OPTIONS)[0][-5:]]
    assert_same([together], [tuple(apart[::-1])])
    assert len({answer.token_ids.tobytes() for answer in together}) == 5


def test_refilling_batching_and_order_change_nothing(untrained):
    limits = (3, 12, 7, 5)
    queue = [
        Request(
            prompt,
            i,
            n_samples=1 + i % 3,
            temperature=(0.0, 1.0)[i % 2],
            top_p=(1.0, 0.8)[i % 3 == 0],
            seed=1 + i % 5,
            max_new_tokens=limits[i % 4],
        )
        for i, prompt in enumerate(prompts(13))
    ]
    (free,) = sample(*untrained, [queue], OPTIONS)
    stop = (int(free[5][0].token_ids[2]),)
    (answers,) = sample(*untrained, [queue], dataclasses.replace(OPTIONS, stop_ids=stop))
    (at_once,) = sample(*untrained, [queue], dataclasses.replace(OPTIONS, stop_ids=stop, slots=40))
    (backwards,) = sample(*untrained, [queue[::-1]], dataclasses.replace(OPTIONS, stop_ids=stop))
    assert_same(answers, at_once)
    assert_same(answers, backwards[::-1])
    assert answers[5][0].ended and len(answers[5][0].token_ids) <= 3


def test_stop_tokens_end_a_completion_and_belong_to_it(untrained):
    queue = [Request(prompt, i, max_new_tokens=12) for i, prompt in enumerate(prompts(8))]
    free = [answer.token_ids.tolist() for (answer,) in sample(*untrained, [queue], OPTIONS)[0]]
    stop = free[0][6]
    for (answer,), tokens in zip(
        sample(*untrained, [queue], dataclasses.replace(OPTIONS, stop_ids=(stop,)))[0],
        free,
        strict=True,
    ):
        assert answer.token_ids.tolist() == (
            tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        )
        assert len(answer.log_probs) == len(answer.token_ids) and answer.ended == (stop in tokens)


def test_a_single_new_token(untrained):
    queue = [Request(prompt, i, max_new_tokens=1 + i % 2) for i, prompt in enumerate(prompts(8))]
    for request, (answer,) in zip(queue, sample(*untrained, [queue], OPTIONS)[0], strict=True):
        assert_follows(untrained, 0, request, answer)
        assert len(answer.token_ids) == request.max_new_tokens


def test_runs_together_equal_runs_alone_with_queues_of_any_length(two_runs):
    queues = [
        [
            Request(prompt, i, n_samples=2, temperature=0.8, max_new_tokens=9)
            for i, prompt in enumerate(prompts(count, seed=5))
        ]
        for count in (7, 5)
    ]
    together = sample(*two_runs, queues, OPTIONS)
    for run in range(2):
        assert_same(together[run], sample(*one_run(two_runs, run), [queues[run]], OPTIONS)[0])
    first, second = (answers[0][0].token_ids.tolist() for answers in together)
    assert first != second  # the same prompt and random bits, other adapters
    empty, some = sample(*two_runs, [[], queues[1]], OPTIONS)
    assert empty == [] and len(some) == 5


def test_one_program_for_all_values(untrained):
    def ask(temperature, top_p, seed, limit, count):
        queue = [
            Request(prompt, i, 1, temperature, top_p, seed, limit)
            for i, prompt in enumerate(prompts(count))
        ]
        sample(*untrained, [queue], OPTIONS)

    ask(0.0, 1.0, 0, 12, 16)
    before = slots.decode._cache_size(), slots.prefill._cache_size()
    ask(0.7, 0.9, 5, 16, 17)
    ask(1.3, 1.0, 2**31, 1, 30)
    assert (slots.decode._cache_size(), slots.prefill._cache_size()) == before


@pytest.mark.slow
def test_calls_that_need_less_than_their_room_share_its_program(untrained):
    options = dataclasses.replace(OPTIONS, room=(64, 40))
    queues = [
        [
            Request(prompt, i, temperature=1.0, max_new_tokens=limit)
            for i, prompt in enumerate(prompts(16, length))
        ]
        for length, limit in ((64, 40), (9, 3), (30, 20))
    ]
    answers, programs = [], []
    for queue in queues:
        answers.append(sample(*untrained, [queue], options)[0])
        programs.append(slots.decode._cache_size())
    assert len(set(programs)) == 1
    for queue, roomy in zip(queues[1:], answers[1:], strict=True):
        assert_same(roomy, sample(*untrained, [queue], OPTIONS)[0])
    assert slots.decode._cache_size() > programs[0], "without room each has its own"


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ((28, 31, 40), (40,)),
        ((20, 27, 40), (24, 40)),
        ((3, 30, 100, 150), (8, 32, 104, 160)),
        ((129,), (128,)),
    ],
)
def test_another_prefill_length_pays_where_it_saves_a_third(lengths, expected):
    queue = [
        Request(prompt, i) for length in lengths for i, prompt in enumerate(prompts(2, length))
    ]
    plan = make_plan([queue], SamplerOptions(stop_ids=(), prefill_prompts=2 * len(lengths)))
    assert plan.prefill_lengths == expected


@pytest.mark.parametrize(
    "count, slots, data, expected",
    [
        (60, 64, 1, 15),
        (16, 64, 1, 16),
        (17, 64, 1, 9),
        (60, 64, 4, 16),
        (18, 64, 4, 12),
        (60, 32, 1, 16),
    ],
)
def test_prompts_that_begin_together_do_so_in_equal_refills(count, slots, data, expected):
    """Of at most 16 prompts and whole for each device; where prompts wait for free slots, refills
    are as large as they may be.
    """
    mesh = make_mesh(data=data)
    plan = make_plan(
        [[Request(prompt, i) for i, prompt in enumerate(prompts(count, 20))]],
        SamplerOptions(stop_ids=(), slots=slots, mesh=mesh),
    )
    assert plan.prefill_prompts == expected


@pytest.mark.parametrize("n_samples", [1, 2])
def test_no_cache_is_copied_for_a_token(untrained, n_samples):
    queue = [
        Request(prompt, i, n_samples=n_samples, temperature=1.0)
        for i, prompt in enumerate(prompts(4))
    ]
    plan = make_plan([queue], OPTIONS)
    graphdef, lora, base = untrained
    empty = slots.start_slots(graphdef, lora, base, plan.prefix, shape=plan.shape, dtype="float32")
    layers = slots.separate_layers(graphdef, lora, base)
    nothing = np.zeros(1, np.int32)
    program = (
        slots.decode.lower(
            graphdef, lora, base, layers, empty, nothing, nothing, dtype="float32", candidates=256
        )
        .compile()
        .as_text()
    )
    for cache in (empty.prompt_k, empty.prompt_v, empty.own_k, empty.own_v):
        shape = re.escape(f"f32[{','.join(map(str, cache[0].shape))}]")
        # the loop carries it
        assert len(re.findall(rf"= {shape}\S* get-tuple-element\(", program)) >= TINY.n_layers
        assert not re.findall(rf"= {shape}\S* copy\(", program)


def test_a_prefill_copies_no_stack_of_layers(untrained):
    """XLA:CPU slices bfloat16 through a float32 copy: of SmolLM2-135M's layers 425 MB for every
    refill.
    """
    graphdef, lora, base = jax.tree.map(
        lambda a: a.astype("bfloat16") if isinstance(a, jax.Array) else a, untrained
    )
    queue = [Request(prompt, i) for i, prompt in enumerate(prompts(4))]
    plan = make_plan([queue], OPTIONS)
    empty = slots.start_slots(graphdef, lora, base, plan.prefix, shape=plan.shape, dtype="float32")
    refill = make_refill(plan, [list(enumerate(plan.queues[0]))], [queue])
    program = (
        slots.prefill.lower(
            graphdef, lora, base, empty, refill, prefix=len(plan.prefix), dtype="float32"
        )
        .compile()
        .as_text()
    )
    stack = ",".join(map(str, base["layers"]["gate"]["kernel"].shape))
    loops = "".join(line for line in program.splitlines() if " while(" in line)
    assert re.findall(rf"\b(\w+)\[{stack}\]", loops) == ["bf16"] * 2  # gate and up, as they are


def test_progress_ends_with_all_and_a_prompt_is_prefilled_once(untrained, monkeypatch):
    prefilled = []
    original = slots.prefill
    monkeypatch.setattr(
        "ip_jax.sampling.sampler.prefill",
        lambda *args, **options: prefilled.append(args[4]) or original(*args, **options),
    )
    same = prompts(4)
    queue = [Request(same[i % 4], i, temperature=1.0, max_new_tokens=4) for i in range(8)]
    seen = []
    sample(*untrained, [queue], OPTIONS, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8) and seen == sorted(seen)
    assert sum(int((refill.limit.max(axis=-1) > 0).sum()) for refill in prefilled) == 4


def test_bad_requests_are_refused_in_a_sentence(untrained, two_runs):
    fine = Request(prompts(1, 10)[0], 0)
    with pytest.raises(
        ValueError,
        match=(
            r"Request 1 of run 0 \(example 77\) has a prompt of 65 tokens: with 48 new tokens at"
            r" most 64 are allowed"
        ),
    ):
        sample(*untrained, [[fine, Request(prompts(1, 65)[0], 77)]], OPTIONS)
    # 256 positions in the model
    with pytest.raises(ValueError, match="with 200 new tokens at most 56 are allowed"):
        sample(*untrained, [[Request(prompts(1, 60)[0], 0, max_new_tokens=200)]], OPTIONS)
    with pytest.raises(ValueError, match="3 queues of sampling requests for the 2 runs"):
        sample(*two_runs, [[fine]] * 3, OPTIONS)
    for change, message in {
        "n_samples": "at least 1",
        "temperature": "or more",
        "top_p": r"\(0, 1\]",
        "max_new_tokens": "at least 1",
    }.items():
        with pytest.raises(ValueError, match=f"example 0: {change} is -1: .*{message}"):
            dataclasses.replace(fine, **{change: -1})
    with pytest.raises(ValueError, match="at least one token"):
        Request(np.zeros(0, np.int32), 0)


@pytest.mark.parametrize(
    "axes, whole",
    [
        pytest.param(dict(run=2, data=4), False, marks=pytest.mark.slow),
        (dict(run=2, data=2, tensor=2), False),
        (dict(run=2, data=2, tensor=2), True),
        pytest.param(dict(data=2, tensor=4), False, marks=pytest.mark.slow),
        pytest.param(dict(data=8), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sharded_over_a_mesh_as_on_one_device(two_runs, axes, whole):
    """Every third prompt with temperature and top-p, the others greedy."""
    from ip_jax.training.sharding import base_shardings, make_mesh

    graphdef, lora, base = two_runs
    mesh = make_mesh(**axes)
    spread = (
        graphdef,
        jax.device_put(lora, jax.NamedSharding(mesh, jax.P("run"))),
        jax.device_put(base, base_shardings(mesh, base)),
    )

    def how(i):
        return dict(temperature=0.8, top_p=0.9) if i % 3 == 0 else {}

    queues = [
        [
            Request(prompt, i, n_samples=2, max_new_tokens=8, **how(i))
            for i, prompt in enumerate(prompts(7 - run, seed=run))
        ]
        for run in range(2)
    ]
    sharded = sample(*spread, queues, dataclasses.replace(OPTIONS, mesh=mesh, whole_layers=whole))
    near_ties = 0
    for run, (answers, expected) in enumerate(
        zip(sharded, sample(*two_runs, queues, OPTIONS), strict=True)
    ):
        for request, answer, other in zip(queues[run], answers, expected, strict=True):
            at = np.flatnonzero(answer[0].token_ids != other[0].token_ids)[:1]
            if len(at) and not request.temperature:  # only where the two best logits all but tie
                logits = np.sort(
                    full_logits(
                        two_runs, run, np.concatenate([request.prompt_ids, answer[0].token_ids])
                    )[len(request.prompt_ids) - 1 + at[0]]
                )
                assert logits[-1] - logits[-2] < 1e-4
            near_ties += len(at)
    assert near_ties <= 1


@pytest.mark.parametrize("whole", [False, True])
def test_for_a_token_no_logits_and_no_vocabulary_are_gathered_and_of_whole_layers_nothing(
    two_runs, whole
):
    """Of the programs compiled for eight devices: nothing as large as a vocabulary's matrix, or as
    all rows' logits, is gathered.
    """
    from ip_jax.training.sharding import base_shardings, make_mesh

    graphdef, lora, base = two_runs
    mesh = make_mesh(run=2, data=2, tensor=2)
    lora, base = (
        jax.device_put(lora, jax.NamedSharding(mesh, jax.P("run"))),
        jax.device_put(base, base_shardings(mesh, base)),
    )
    queues = [
        [
            Request(prompt, i, temperature=1.0, top_p=0.9, max_new_tokens=8)
            for i, prompt in enumerate(prompts(8, seed=run))
        ]
        for run in range(2)
    ]
    plan = make_plan(queues, dataclasses.replace(OPTIONS, mesh=mesh))
    with jax.set_mesh(mesh):
        held = slots.start_slots(
            graphdef, lora, base, plan.prefix, shape=plan.shape, dtype="float32"
        )
        layers = slots.separate_layers(graphdef, lora, base, whole=whole)
        nothing = np.zeros(1, np.int32)
        decode = slots.decode.lower(
            graphdef,
            lora,
            base,
            layers,
            held,
            np.zeros(2, np.int32),
            nothing,
            dtype="float32",
            candidates=256,
        ).compile()
    vocabulary, width = base["embed"].shape
    gathered = [
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", decode.as_text())
    ]
    kernel = base["layers"]["gate"]["kernel"].shape
    assert ((kernel[1], kernel[2] // 2) in gathered) is not whole, (
        "a layer's part by tensor, for each token or once before"
    )
    assert not any(vocabulary in dims or np.prod(dims) >= vocabulary * width for dims in gathered)
    places = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(layers[0][1])
    }
    assert places["['gate']['kernel'].value"] == jax.P(None if whole else ("run", "data"), "tensor")


@pytest.mark.parametrize(
    "axes, heads_cut", [(dict(run=2, data=2, tensor=2), 2), (dict(data=2, tensor=4), 1)], ids=str
)
def test_each_device_has_its_part_of_the_caches(two_runs, axes, heads_cut):
    """Runs over run, groups over data, kv heads over tensor where it divides the two there are;
    before, during and after decoding.
    """
    from ip_jax.training.sharding import base_shardings, make_mesh

    graphdef, lora, base = two_runs
    mesh = make_mesh(**axes)
    lora, base = (
        jax.device_put(lora, jax.NamedSharding(mesh, jax.P("run"))),
        jax.device_put(base, base_shardings(mesh, base)),
    )
    queues = [
        [Request(prompt, i, max_new_tokens=8) for i, prompt in enumerate(prompts(8, seed=run))]
        for run in range(2)
    ]
    plan = make_plan(queues, dataclasses.replace(OPTIONS, mesh=mesh))
    shards = axes.get("run", 1) * axes["data"] * heads_cut
    with jax.set_mesh(mesh):
        held = slots.start_slots(
            graphdef, lora, base, plan.prefix, shape=plan.shape, dtype="float32"
        )
        layers = slots.separate_layers(graphdef, lora, base)
        nothing = np.zeros(1, np.int32)
        decode = slots.decode.lower(
            graphdef,
            lora,
            base,
            layers,
            held,
            np.zeros(2, np.int32),
            nothing,
            dtype="float32",
            candidates=256,
        ).compile()
        held = [held, decode(lora, base, layers, held, np.zeros(2, np.int32), nothing)]
    cache = held[1].prompt_k[0].shape
    of_device = f"f32[{','.join(map(str, held[1].prompt_k[0].sharding.shard_shape(cache)))}]"
    assert (
        of_device in decode.as_text()
        and f"f32[{','.join(map(str, cache))}]" not in decode.as_text()
    )
    for caches in (held[1].prompt_k, held[1].prompt_v, held[1].own_k, held[1].own_v):
        for array in caches:
            assert {shard.data.nbytes for shard in array.addressable_shards} == {
                array.nbytes // shards
            }
