"""Guided sampling against passes over both whole sequences, and its invariants: weight 0, sharing,
refilling and batching change nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_models import full_logits, prompts

from ip_jax.sampling.arrays import ArraySampling, Draw, Guide, sample_groups
from ip_jax.sampling.plan import make_plan
from ip_jax.sampling.sampler import Request, SamplerOptions, sample

OPTIONS = SamplerOptions(stop_ids=(-1,), slots=8, prefill_prompts=4, prompt_buckets=(16, 32, 64))


def guided(count: int, seed: int = 0, **more) -> list[Request]:
    """Requests whose prompts and guides have lengths of their own, each with a weight and a
    temperature of its own.
    """
    rng, other = np.random.default_rng(seed), prompts(count, seed=seed + 50)
    return [
        Request(
            prompt,
            i,
            temperature=(0.7, 1.0, 1.3)[i % 3],
            max_new_tokens=9,
            guide_ids=other[i][: rng.integers(1, 17)],
            guidance=(0.5, 3.0)[i % 2],
            **more,
        )
        for i, prompt in enumerate(prompts(count, seed=seed))
    ]


def expected_log_probs(model, run: int, request: Request, token_ids: np.ndarray) -> np.ndarray:
    """[N, V] of the guided distribution before each token, in float64 from one pass over each whole
    sequence without a cache.
    """

    def after(prompt):
        return np.float64(
            full_logits(model, run, np.concatenate([prompt, token_ids]))[len(prompt) - 1 : -1]
        )

    logits = (
        (1 + request.guidance) * after(request.prompt_ids)
        - request.guidance * after(request.guide_ids)
    ) / request.temperature
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def assert_same(first, second):
    for answers, others in zip(first, second, strict=True):
        for one, other in zip(answers, others, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist() and one.ended == other.ended
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_log_probs_are_those_of_the_combined_logits_through_refills(two_runs):
    queues = [guided(11 + run, run) for run in range(2)]
    for run, answers in enumerate(sample(*two_runs, queues, OPTIONS)):
        for request, (answer,) in zip(queues[run], answers, strict=True):
            expected = expected_log_probs(two_runs, run, request, answer.token_ids)
            np.testing.assert_allclose(
                answer.log_probs,
                np.take_along_axis(expected, answer.token_ids[:, None], -1)[:, 0],
                atol=1e-4,
            )


@pytest.mark.slow
def test_frequencies_are_those_of_the_combined_logits(untrained):
    from scipy.stats import chisquare

    request = dataclasses.replace(guided(2)[1], n_samples=6000, max_new_tokens=1)
    (answers,) = sample(*untrained, [[request]], dataclasses.replace(OPTIONS, slots=500))[0]
    probability = np.exp(expected_log_probs(untrained, 0, request, answers[0].token_ids)[0])
    counts = np.bincount([answer.token_ids[0] for answer in answers], minlength=len(probability))
    rare = probability * len(answers) < 5

    def group(x):
        return np.append(x[~rare], x[rare].sum())

    assert chisquare(group(counts), group(probability * len(answers))).pvalue > 1e-3
    unguided = np.exp(
        expected_log_probs(
            untrained, 0, dataclasses.replace(request, guidance=0.0), answers[0].token_ids
        )[0]
    )
    assert np.abs(unguided - probability).sum() > 0.3, "else this test would show nothing"


@pytest.mark.slow
def test_weight_zero_is_the_unguided_sampler(two_runs):
    """Its tokens, whatever the guide, and whatever the others in the program are guided by."""
    queues = [guided(9, run, n_samples=2) for run in range(2)]
    plain = [
        [dataclasses.replace(request, guide_ids=None, guidance=0.0) for request in queue]
        for queue in queues
    ]
    expected = sample(*two_runs, plain, OPTIONS)
    zero = [[dataclasses.replace(request, guidance=0.0) for request in queue] for queue in queues]
    mixed = [
        [request if i % 2 else one for i, (request, one) in enumerate(zip(*both, strict=True))]
        for both in zip(queues, plain, strict=True)
    ]
    assert not make_plan(plain, OPTIONS).shape.guided and make_plan(zero, OPTIONS).shape.guided
    some = sample(*two_runs, mixed, OPTIONS)
    for run, answers in enumerate(sample(*two_runs, zero, OPTIONS)):
        assert_same(answers, expected[run])
        assert_same(some[run][::2], expected[run][::2])
        assert any(
            one.token_ids.tolist() != other.token_ids.tolist()
            for ones, others in zip(some[run][1::2], expected[run][1::2], strict=True)
            for one, other in zip(ones, others, strict=True)
        )


@pytest.mark.slow
def test_refilling_batching_order_and_a_shared_beginning_change_nothing(untrained):
    beginning = prompts(1, 12)[0]  # prompts and guides share 8 tokens of it
    queue = [
        dataclasses.replace(
            request,
            prompt_ids=np.append(beginning, request.prompt_ids),
            guide_ids=np.append(beginning, request.guide_ids),
            max_new_tokens=(3, 9, 6)[i % 3],
            n_samples=1 + i % 3,
        )
        for i, request in enumerate(guided(10))
    ]
    assert len(make_plan([queue], OPTIONS).prefix) == 8
    (free,) = sample(*untrained, [queue], OPTIONS)
    options = dataclasses.replace(OPTIONS, stop_ids=(int(free[4][0].token_ids[2]),))
    (answers,) = sample(*untrained, [queue], options)
    assert answers[4][0].ended and len(answers[4][0].token_ids) <= 3
    assert_same(answers, sample(*untrained, [queue], dataclasses.replace(options, slots=40))[0])
    assert_same(answers, sample(*untrained, [queue[::-1]], options)[0][::-1])
    separate = [dataclasses.replace(queue[2], n_samples=1, first_sample=i) for i in (2, 0, 1)]
    second, zeroth, first = (one for (one,) in sample(*untrained, [separate], options)[0])
    assert_same([answers[2]], [(zeroth, first, second)])


@pytest.mark.slow
def test_a_group_and_its_guide_lie_on_one_device(two_runs):
    from ip_jax.training.sharding import base_shardings, make_mesh

    graphdef, lora, base = two_runs
    mesh = make_mesh(run=2, data=4)
    spread = (
        graphdef,
        jax.device_put(lora, jax.NamedSharding(mesh, jax.P("run"))),
        jax.device_put(base, base_shardings(mesh, base)),
    )
    queues = [guided(7 - run, run) for run in range(2)]
    options = dataclasses.replace(OPTIONS, mesh=mesh)
    assert make_plan(queues, options).shape.groups % 4 == 0
    for answers, expected in zip(
        sample(*spread, queues, options), sample(*two_runs, queues, OPTIONS), strict=True
    ):
        assert_same(answers, expected)


@pytest.mark.slow
def test_groups_in_a_program_equal_requests(two_runs):
    graphdef, lora, base = two_runs
    texts, seeds, weights, temperatures, new = (
        [guided(4, run) for run in range(2)],
        (5, 6),
        (0.5, 2.0),
        (0.7, 1.3),
        5,
    )

    def padded(of):
        return np.array(
            [
                [np.pad(of(request), (0, 32 - len(of(request)))) for request in queue]
                for queue in texts
            ]
        )

    def length(of):
        return np.array([[len(of(request)) for request in queue] for queue in texts])

    own, other = (lambda request: request.prompt_ids), (lambda request: request.guide_ids)
    draw = Draw(
        seed=jnp.array(seeds),
        example_id=jnp.array([[3, 4, 5, 6], [6, 5, 4, 3]]),
        temperature=jnp.array(temperatures),
    )
    guide = Guide(jnp.array(padded(other)), jnp.array(length(other)), jnp.array(weights))
    stop_ids = tuple(range(0, 300, 7))

    @functools.partial(jax.jit, static_argnums=0)
    def in_program(graphdef, lora, base, draw, guide):
        return sample_groups(
            (graphdef, lora, base),
            jnp.array(padded(own)),
            jnp.array(length(own)),
            draw,
            ArraySampling(3, new, stop_ids),
            guide,
        )

    tokens, made, log_probs = in_program(graphdef, lora, base, draw, guide)
    queues = [
        [
            Request(
                request.prompt_ids,
                int(draw.example_id[run, i]),
                3,
                temperatures[run],
                seed=seeds[run],
                max_new_tokens=new,
                guide_ids=request.guide_ids,
                guidance=weights[run],
            )
            for i, request in enumerate(queue)
        ]
        for run, queue in enumerate(texts)
    ]
    assert int(made.min()) < new
    for run, answers in enumerate(
        sample(graphdef, lora, base, queues, SamplerOptions(stop_ids=stop_ids))
    ):
        for place in np.ndindex(4, 3):
            completion, count = answers[place[0]][place[1]], int(made[run, *place])
            assert tokens[run, *place].tolist() == completion.token_ids.tolist() + [0] * (
                new - count
            )
            np.testing.assert_allclose(
                log_probs[run, *place][:count], completion.log_probs, atol=1e-4
            )
            assert not np.any(log_probs[run, *place][count:])


def test_bad_guidance_is_refused_in_a_sentence(untrained):
    fine = guided(1)[0]
    for guidance in (-0.1, float("nan"), float("inf")):
        with pytest.raises(
            ValueError,
            match=f"example 0: guidance is {guidance}: it must be a number of at least 0",
        ):
            dataclasses.replace(fine, guidance=guidance)
    with pytest.raises(ValueError, match="guidance is 0.5, and there are no guide_ids"):
        dataclasses.replace(fine, guide_ids=None)
    with pytest.raises(ValueError, match="guide_ids must be one row of at least one token id"):
        dataclasses.replace(fine, guide_ids=np.zeros(0, np.int32))
    with pytest.raises(
        ValueError,
        match=(
            r"Request 0 of run 0 \(example 0\) has a guide prompt of 65 tokens: with 9 new tokens"
            r" at most 64 are allowed"
        ),
    ):
        sample(*untrained, [[dataclasses.replace(fine, guide_ids=prompts(1, 65)[0])]], OPTIONS)
