"""The swap: a completion in padded group rows under the training prompt has the log-probabilities
of an unpadded pass under that prompt.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_rollouts import EACH_ANEW, RUNS, decoder, plain_log_probs, sampled

from ip_jax.models.decoder import split_decoder
from ip_jax.prompts.chat import end_of_turn_id
from ip_jax.rl.policy import score
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.rl.rollout import RolloutOptions, RolloutRun, generate, plan_rollouts, sampler_options
from ip_jax.rl.rows import Samples, lay_out, to_samples
from ip_jax.studies.gcd_approval.environment import GcdApproval, claims
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

TOLERANCE = 1e-4  # float32; the passes sum in different orders
EACH = dataclasses.replace(
    RUNS[1],
    train_prompt=EACH_ANEW,
)
jitted_score = jax.jit(score, static_argnames=("graphdef", "dtype"))


def scored(
    plan, rollout, side: str, micro_batches: int = 2, model: tuple | None = None
) -> np.ndarray:
    """The trainer's log-probabilities [R, Q, G, C] of the rollout's completions under the prompts
    of one side.
    """
    graphdef, lora, base = model or decoder()
    temperature = jnp.array([run.temperature for run in plan.runs], jnp.float32)
    rows = lay_out(
        plan.prompts(rollout.asked, side), rollout.samples, temperature, None, micro_batches
    )
    return np.asarray(
        to_samples(
            jitted_score(lora, base, rows, graphdef=graphdef, dtype="float32"),
            *rollout.samples.length.shape[1:],
        )
    )


def test_sampler_and_trainer_agree_under_the_generation_prompt_at_each_temperature():
    plan, rollout = sampled()
    assert {run.temperature for run in plan.runs} == {1.0, 0.7}
    np.testing.assert_allclose(
        scored(plan, rollout, "gen"), rollout.samples.log_probs, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    "runs", [RUNS, (RUNS[0], EACH)], ids=["prompt of a group", "prompt of a completion"]
)
def test_a_swapped_completion_scores_as_in_an_unpadded_pass(runs):
    plan, rollout = sampled(runs)
    found, samples = scored(plan, rollout, "train"), rollout.samples
    for place in np.ndindex(2, 3, 4):
        run, group, index = place
        length = samples.length[place]
        prompt = rollout.asked.groups[run][group].train[index].token_ids
        width = None if index == group == 0 else 128
        expected = plain_log_probs(
            run, prompt, samples.tokens[place][:length], plan.runs[run].temperature, width
        )
        np.testing.assert_allclose(found[place][:length], expected, atol=TOLERANCE)
        assert not found[place][length:].any()
    assert np.abs(found - samples.log_probs).max() > 0.01  # the two prompts are told apart


def test_what_lies_behind_the_end_of_a_completion_or_a_prompt_changes_nothing():
    plan, rollout = sampled()
    rng = np.random.default_rng(0)
    mask = np.asarray(rollout.samples.mask)
    dirty = Samples(
        np.where(mask, rollout.samples.tokens, rng.integers(0, 300, mask.shape)).astype(np.int32),
        rollout.samples.length,
        rollout.samples.log_probs,
    )
    wider = dataclasses.replace(
        plan, slots={side: slots + 24 for side, slots in plan.slots.items()}
    )
    np.testing.assert_allclose(
        scored(plan, dataclasses.replace(rollout, samples=dirty), "train"),
        scored(plan, rollout, "train"),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        scored(wider, rollout, "train", micro_batches=3),
        scored(plan, rollout, "train"),
        atol=TOLERANCE,
    )


@pytest.mark.slow
def test_sampler_and_trainer_agree_on_a_real_model(smollm2):
    runs = tuple(
        RolloutRun("real", 0, PromptDistribution((name,)).resolved(BOOK), temperature=temperature)
        for name, temperature in (("neutral", 0.7), ("gcd/safety", 1.0))
    )
    options = RolloutOptions(groups=2, samples=4, max_new_tokens=24, max_length=160)
    plan = plan_rollouts(
        runs, claims(8, 0, [], None, len), GcdApproval(), smollm2.tokenizer, options, 1
    )
    model = split_decoder(smollm2.config, smollm2.params)
    rollout = generate(
        model, plan, plan.ask(0), sampler_options(plan, (end_of_turn_id(smollm2.tokenizer),))
    )
    np.testing.assert_allclose(
        scored(plan, rollout, "gen", model=model), rollout.samples.log_probs, atol=TOLERANCE
    )
