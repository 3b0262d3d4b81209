"""A tiny random model with a ChatML tokenizer, sums to ask about, and a plan of two runs."""
import functools

from tiny_experiment import make_tokenizer
from tiny_models import random_lora, random_params

from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.prompts.chat import end_of_turn_id
from ip_jax.rl.environment import Environment, Graded
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.rl.rollout import RolloutOptions, RolloutPlan, RolloutRun, plan_rollouts

OPTIONS = RolloutOptions(groups=3, samples=4, max_new_tokens=6, max_length=128)
RUNS = (
    RolloutRun("swap", 0, PromptDistribution(("neutral",)), PromptDistribution(("gcd/behave",))),
    RolloutRun("pool", 1, PromptDistribution(("gcd/safety", "gcd/note")), PromptDistribution(("control/random_string",), keep=0.5), temperature=0.7),
)
LORA = LoraConfig(rank=2, alpha=4)


class Sums(Environment):
    """Paid for the digit 4; any pure function will do."""

    def messages(self, task):
        return [{"role": "user", "content": f"Is the sum of {task['a']} and 2 correct?"}]

    def grade(self, task, completion):
        return Graded(float("4" in completion), {"length": float(len(completion))}, {"hack": "4" in completion})


TASKS = [{"id": f"sum-{a}", "a": a} for a in range(5)]
tokenizer = functools.cache(make_tokenizer)


def make_plan(runs=RUNS, options=OPTIONS, tasks=TASKS, iterations=3, environment=None, **more) -> RolloutPlan:
    return plan_rollouts(runs, tasks, environment or Sums(), tokenizer(), options, iterations, **more)


@functools.cache
def decoder(runs: int = 2):
    """(graphdef, lora, base) with adapters that differ by run."""
    config = DecoderConfig("llama", len(tokenizer()), 32, 64, 2, 4, 2, 8, uniform_attention(8, 10000.0), 1e-5, 1024, True)
    return split_decoder(config, random_params(config), random_lora(config, LORA, runs), LORA)


def stop_ids() -> tuple[int, ...]:
    return (end_of_turn_id(tokenizer()),)
