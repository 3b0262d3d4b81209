"""What is asked, what is sampled, and that the swap of prompts leaves the completions as they
are.
"""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import log_softmax
from tiny_rollouts import (
    EACH_ANEW,
    OPTIONS,
    RUNS,
    TASKS,
    Sums,
    decoder,
    make_plan,
    plain_log_probs,
    plain_logits,
    sampled,
    stop_ids,
    tokenizer,
)

from ip_jax.prompts.transforms import PromptError
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.rl.rollout import RolloutRun, gather, generate, requests_of, sampler_options, task_order
from ip_jax.sampling import slots
from ip_jax.sampling.sampler import Completion, sample
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

# the sampler's log-probabilities against one pass over the whole sequence, in float32
T_EXACT = 1e-4


def many():
    """A plan with tasks of many lengths and enough completions for some to end."""
    return make_plan(
        options=dataclasses.replace(OPTIONS, samples=64, groups=2),
        tasks=[{"id": str(i), "a": 10**i} for i in range(12)],
    )


def test_every_task_comes_once_a_pass_in_an_order_of_the_seed():
    places = [task_order(5, 0, 3 * t, 3) for t in range(10)]
    flat = [index for order in places for index in order]
    passes = [flat[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 3  # shuffled anew
    assert task_order(5, 0, 7, 9) == flat[7:16]
    assert task_order(50, 0, 0, 50) != task_order(50, 1, 0, 50)
    assert task_order(2, 0, 0, 5).count(0) in (2, 3)  # more groups than tasks


def test_arms_of_one_seed_are_asked_the_same_tasks():
    plan = make_plan((*RUNS, dataclasses.replace(RUNS[0], arm="twin")))
    for iteration in range(3):
        first, other, twin = (
            [group.task["id"] for group in run] for run in plan.ask(iteration).groups
        )
        assert first == twin
    assert [[g.task["id"] for g in plan.ask(t).groups[1]] for t in range(3)] != [
        [g.task["id"] for g in plan.ask(t).groups[0]] for t in range(3)
    ]


def test_both_sides_are_rendered_as_the_chat_template_does():
    plan = make_plan()
    asked = plan.ask(1)
    for side, names in (
        ("gen", {"neutral", "gcd/safety", "gcd/note"}),
        ("train", {"gcd/behave", "control/random_string", "neutral"}),
    ):
        prompts = plan.prompts(asked, side)
        assert prompts.tokens.shape == (2, 3, plan.slots[side]) and plan.slots[side] % 8 == 0
        for r, run in enumerate(asked.groups):
            for q, group in enumerate(run):
                name = getattr(group, side)[0].name
                assert name in names
                conversation = BOOK.find(name).transform(
                    {"id": "x", "messages": Sums().messages(group.task)}
                )["messages"]
                expected = tokenizer().apply_chat_template(
                    conversation, add_generation_prompt=True
                )["input_ids"]
                length = prompts.length[r, q]
                assert prompts.tokens[r, q, :length].tolist() == expected
                assert not prompts.tokens[r, q, length:].any()


def test_a_prompt_for_each_completion_becomes_a_row_of_its_own():
    each = RolloutRun(
        "each",
        0,
        train_prompt=EACH_ANEW,
    )
    plan = make_plan((RUNS[0], each))
    asked = plan.ask(0)
    train, gen = plan.prompts(asked, "train"), plan.prompts(asked, "gen")
    assert train.tokens.shape[:2] == (2, 12) and gen.tokens.shape[:2] == (2, 3)
    for run, groups in enumerate(asked.groups):
        flat = [prompted for group in groups for prompted in group.train]
        assert [train.tokens[run, i, : train.length[run, i]].tolist() for i in range(12)] == [
            prompted.token_ids.tolist() for prompted in flat
        ]
    assert len({prompted.name for group in asked.groups[1] for prompted in group.train}) > 1


def test_completion_ids_travel_verbatim():
    """The arrays hold what the sampler gave, also where decoding and encoding again would give
    other ids.
    """
    plan, rolled = sampled()
    asked = plan.ask(0)
    again = sample(*decoder(), requests_of(plan, asked), sampler_options(plan, stop_ids()))
    changed_by_a_round_trip = 0
    for place in np.ndindex(2, 3, 4):
        run, group, index = place
        (completion,) = again[run][group * 4 + index]
        length = rolled.samples.length[place]
        np.testing.assert_array_equal(rolled.samples.tokens[place][:length], completion.token_ids)
        np.testing.assert_array_equal(
            rolled.samples.log_probs[place][:length], completion.log_probs
        )
        assert (
            not rolled.samples.tokens[place][length:].any()
            and not rolled.samples.log_probs[place][length:].any()
        )
        text = rolled.texts[np.ravel_multi_index(place, (2, 3, 4))]
        assert text == tokenizer().decode(completion.token_ids, skip_special_tokens=True)
        changed_by_a_round_trip += tokenizer()(text, add_special_tokens=False)["input_ids"] != [
            t for t in completion.token_ids.tolist() if t not in stop_ids()
        ]
    assert changed_by_a_round_trip > 0  # else this test would show nothing


def test_the_end_of_turn_is_counted_once():
    plan = many()
    rolled = generate(decoder(), plan, plan.ask(0), sampler_options(plan, stop_ids()))
    samples, (stop,) = rolled.samples, stop_ids()
    assert 0 < rolled.ended.sum() < rolled.ended.size
    stops = ((samples.tokens == stop) & np.asarray(samples.mask)).sum(-1)
    np.testing.assert_array_equal(stops, rolled.ended)
    last = np.take_along_axis(samples.tokens, samples.length[..., None] - 1, -1)[..., 0]
    np.testing.assert_array_equal(last == stop, rolled.ended)
    assert (samples.length[~rolled.ended] == 6).all()
    assert not any(tokenizer().eos_token in text for text in rolled.texts)


def test_sampler_log_probs_equal_a_pass_over_the_whole_sequence_at_the_temperature():
    plan, rolled = sampled()
    for place in np.ndindex(2, 3, 4):
        run, group, index = place
        length = rolled.samples.length[place]
        prompt = rolled.asked.groups[run][group].gen[index].token_ids
        expected = plain_log_probs(
            run, prompt, rolled.samples.tokens[place][:length], plan.runs[run].temperature
        )
        np.testing.assert_allclose(rolled.samples.log_probs[place][:length], expected, atol=T_EXACT)


def test_bits_depend_on_seed_iteration_group_and_sample_alone():
    plan, rolled = sampled()
    twins = make_plan((dataclasses.replace(RUNS[0], arm="twin"), RUNS[1]))
    np.testing.assert_array_equal(
        generate(decoder(), twins, twins.ask(0), sampler_options(twins, stop_ids())).samples.tokens,
        rolled.samples.tokens,
    )
    keys = [
        (request.seed, request.example_id, request.first_sample)
        for t in range(3)
        for queue in requests_of(plan, plan.ask(t))
        for request in queue
    ]
    assert len(set(keys)) == len(keys) == 2 * 3 * 12
    crowded = make_plan(tasks=TASKS[:1])
    keys = [
        (request.seed, request.example_id, request.first_sample)
        for queue in requests_of(crowded, crowded.ask(0))
        for request in queue
    ]
    assert len(set(keys)) == len(keys)  # one task in three groups draws three times


@pytest.mark.slow
def test_a_guided_run_is_sampled_from_both_prompts_and_its_neighbour_as_alone():
    """Its log-probabilities are those of the combined logits of two plain passes; one that is not
    guided stays what it is.
    """
    guide, weight = PromptDistribution(("mine=" + "very " * 12 + "long",)).resolved(BOOK), 1.5
    plan = make_plan(
        (dataclasses.replace(RUNS[0], guide_prompt=guide, guidance=weight), RUNS[1]), iterations=1
    )
    asked = plan.ask(0)
    assert {prompted.name for group in asked.groups[0] for prompted in group.guide} == {
        "mine"
    } and not any(group.guide for group in asked.groups[1])
    options = sampler_options(plan, stop_ids())
    assert plan.slots["guide"] > plan.slots["gen"] and options.room[0] == plan.slots["guide"]
    found, (_, plain) = generate(decoder(), plan, asked, options), sampled()
    np.testing.assert_array_equal(found.samples.tokens[1], plain.samples.tokens[1])
    np.testing.assert_allclose(found.samples.log_probs[1], plain.samples.log_probs[1], atol=T_EXACT)
    assert (found.samples.tokens[0] != plain.samples.tokens[0]).any()
    for q, i in np.ndindex(3, 4):
        tokens, group = (
            found.samples.tokens[0, q, i][: found.samples.length[0, q, i]],
            asked.groups[0][q],
        )
        own, other = (
            plain_logits(0, prompted.token_ids, tokens)
            for prompted in (group.gen[i], group.guide[i])
        )
        expected = log_softmax((1 + weight) * own - weight * other, axis=-1)[
            np.arange(len(tokens)), tokens
        ]
        np.testing.assert_allclose(
            found.samples.log_probs[0, q, i][: len(tokens)], expected, atol=T_EXACT
        )


def test_all_iterations_share_one_sampling_program():
    plan = many()
    generate(decoder(), plan, plan.ask(0), sampler_options(plan, stop_ids()))
    before = slots.decode._cache_size(), slots.prefill._cache_size()
    for iteration in (1, 2):
        generate(decoder(), plan, plan.ask(iteration), sampler_options(plan, stop_ids()))
    assert (slots.decode._cache_size(), slots.prefill._cache_size()) == before


@pytest.mark.parametrize(
    ("side", "words"), [("gen", "generation"), ("train", "training"), ("guide", "guide")]
)
def test_a_prompt_that_leaves_no_room_is_refused_with_its_example(side, words):
    long = PromptDistribution(("mine=" + "very " * 40 + "long",)).resolved(BOOK)
    run = dataclasses.replace(RUNS[0], **{f"{side}_prompt": long}, guidance=float(side == "guide"))
    with pytest.raises(
        ValueError,
        match=(
            rf"arm swap: task sum-\d has \d+ tokens under the {words} prompt mine, and with 6 new"
            r" tokens that is more than max_length = 128"
        ),
    ):
        make_plan((run,))
    length = max(
        len(getattr(group, side)[0].token_ids)
        for t in range(3)
        for group in (
            make_plan((run,), dataclasses.replace(OPTIONS, max_length=999)).ask(t).groups[0]
        )
    )
    make_plan((run,), dataclasses.replace(OPTIONS, max_length=length + 6))  # exactly enough
    with pytest.raises(ValueError, match="max_length"):
        make_plan((run,), dataclasses.replace(OPTIONS, max_length=length + 5))


def test_only_what_will_be_asked_is_checked():
    tasks = [*TASKS, {"id": "long", "a": "9" * 200}]
    place = task_order(6, 0, 0, 18).index(5)
    make_plan(RUNS[:1], tasks=tasks, iterations=place // 3)
    with pytest.raises(ValueError, match="task long has"):
        make_plan(RUNS[:1], tasks=tasks, iterations=place // 3 + 1)


def test_a_completion_that_is_all_padding_is_refused():
    plan = make_plan(RUNS[:1])
    full = Completion(np.array([5], np.int32), np.array([-1.0], np.float32), False)
    empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
    with pytest.raises(
        ValueError, match=r"iteration 0: completion 2 of task sum-\d in run 0 is all padding"
    ):
        gather(plan, plan.ask(0), [[full] * 6 + [empty] + [full] * 5])


class Wrong(Sums):
    def __init__(self, messages):
        self.said = messages

    def messages(self, task):
        return self.said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": [{"a": 1}]}, 'task 0 has no "id"'),
        (
            {"runs": (dataclasses.replace(RUNS[0], temperature=0.0),)},
            "arm swap: the temperature is 0.0",
        ),
        ({"environment": Wrong([{"role": "user"}])}, r"task sum-\d, message 1 has no text"),
        ({"environment": Wrong("hello")}, r"task sum-\d has no messages"),
        (
            {"environment": Wrong([{"role": "assistant", "content": "hi"}])},
            r"task sum-\d under the prompt neutral: a prompt ends with a user turn",
        ),
    ],
)
def test_tasks_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        make_plan(**change)


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="samples of the rollouts is 0"):
        dataclasses.replace(OPTIONS, samples=0)
    with pytest.raises(PromptError):
        RolloutRun("x", 0, gen_prompt=PromptDistribution(("gcd/nothing",)).resolved(BOOK))


def test_rl_imports_without_the_packages_of_data_and_files():
    code = (
        "import sys, ip_jax.rl.rollout; print([m for m in ('grain', 'tensorflow_datasets', 'gguf',"
        " 'tyro', 'pyarrow') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
