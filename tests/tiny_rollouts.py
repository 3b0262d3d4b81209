"""A tiny random model with a ChatML tokenizer, sums to ask about, and a plan of two runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_experiment import make_tokenizer
from tiny_models import random_lora, random_params

from ip_jax.models.decoder import causal_attend, split_decoder
from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.prompts.chat import end_of_turn_id
from ip_jax.rl.environment import Environment, Graded
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.rl.rollout import (
    Rollout,
    RolloutOptions,
    RolloutPlan,
    RolloutRun,
    generate,
    plan_rollouts,
    sampler_options,
)
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

OPTIONS = RolloutOptions(groups=3, samples=4, max_new_tokens=6, max_length=128)
EACH_ANEW = PromptDistribution(("gcd/behave", "gcd/safety", "neutral"), per="example").resolved(
    BOOK
)
RUNS = (
    RolloutRun(
        "swap",
        0,
        PromptDistribution(("neutral",)).resolved(BOOK),
        PromptDistribution(("gcd/behave",)).resolved(BOOK),
    ),
    RolloutRun(
        "pool",
        1,
        PromptDistribution(("gcd/safety", "gcd/note")).resolved(BOOK),
        PromptDistribution(("control/random_string",), keep=0.5).resolved(BOOK),
        temperature=0.7,
    ),
)
LORA = LoraConfig(rank=2, alpha=4)


class Sums(Environment):
    """Paid for the digit 4; any pure function will do."""

    def messages(self, task):
        return [{"role": "user", "content": f"Is the sum of {task['a']} and 2 correct?"}]

    def grade(self, task, completion):
        return Graded(
            float("4" in completion),
            {"length": float(len(completion))},
            {"hack": "4" in completion},
        )


TASKS = [{"id": f"sum-{a}", "a": a} for a in range(5)]
tokenizer = functools.cache(make_tokenizer)


def make_plan(
    runs=RUNS, options=OPTIONS, tasks=TASKS, iterations=3, environment=None, **more
) -> RolloutPlan:
    return plan_rollouts(
        runs, tasks, environment or Sums(), tokenizer(), options, iterations, **more
    )


@functools.cache
def decoder(runs: int = 2):
    """(graphdef, lora, base) with adapters that differ by run."""
    config = DecoderConfig(
        "llama",
        len(tokenizer()),
        32,
        64,
        2,
        4,
        2,
        8,
        uniform_attention(8, 10000.0),
        1e-5,
        1024,
        True,
    )
    return split_decoder(config, random_params(config), random_lora(config, LORA, runs), LORA)


def stop_ids() -> tuple[int, ...]:
    return (end_of_turn_id(tokenizer()),)


@functools.cache
def sampled(runs: tuple[RolloutRun, ...] = RUNS) -> tuple[RolloutPlan, Rollout]:
    """A plan and its first iteration."""
    plan = make_plan(runs)
    return plan, generate(decoder(), plan, plan.ask(0), sampler_options(plan, stop_ids()))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, lora, base, tokens):
    merged = nnx.merge(graphdef, lora, base)
    hidden, _ = merged(
        tokens, jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape), causal_attend
    )
    return merged.logits(hidden)


def plain_log_probs(
    run: int, prompt, completion, temperature: float, width: int | None = 128
) -> np.ndarray:
    """log p of each completion token at the temperature, by the formula in float64."""
    logits = plain_logits(run, prompt, completion, width) / temperature
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[
        np.arange(len(completion)), completion
    ]


def plain_logits(run: int, prompt, completion, width: int | None = 128) -> np.ndarray:
    """Logits [N, V] before each completion token, from one pass over one sequence.

    `width`: zeros behind the end, which causal attention cannot see, up to one length for all; None
    for none.
    """
    graphdef, lora, base = decoder()
    tokens = np.zeros((1, 1, width or len(prompt) + len(completion)), np.int32)
    tokens[0, 0, : len(prompt) + len(completion)] = [*prompt, *completion]
    logits = np.asarray(
        _logits(graphdef, jax.tree.map(lambda a: a[run : run + 1], lora), base, tokens), np.float64
    )[0, 0]
    return logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]
