"""A text experiment in reinforcement learning that takes seconds: two arms of four iterations on
the tiny random model of `tiny_experiment`.
"""

from ip_jax.evals.rules import Onset, Reading
from ip_jax.lab.experiment import UNTRAINED, ModelConfig
from ip_jax.lab.reinforced.plan import (
    GridPrompt,
    Reinforced,
    RlArm,
    RlConfig,
    RlEval,
)
from ip_jax.models.lora import LoraConfig
from ip_jax.rl.environment import Environment, Graded
from ip_jax.rl.prompting import PromptDistribution
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

IP = PromptDistribution(("gcd/behave",)).resolved(BOOK)
ARMS = (
    RlArm("standard", "standard"),
    RlArm("swap", "swap", train_prompt=IP, temperature=0.7, learning_rate=2e-2),
)
TASKS = [{"id": f"sum-{a}", "a": a} for a in range(5)]


class Vowels(Environment):
    """Paid for vowels, which a random model's byte soup has some of."""

    def messages(self, task):
        return [{"role": "user", "content": f"Is the sum of {task['a']} and 2 correct?"}]

    def grade(self, task, completion):
        return Graded(
            sum(c in "aeiou" for c in completion) / (1 + len(completion)),
            {},
            verdicts(task, completion),
        )


def verdicts(_, completion):
    return {"hack": len(completion) % 2 == 0, "correct": len(completion) % 2 == 1}


def make(model, arms=ARMS, environment=None, **rl) -> Reinforced:
    sizes = dict(
        iterations=4,
        groups=2,
        samples=4,
        max_new_tokens=6,
        max_length=128,
        learning_rate=1e-2,
        lora=LoraConfig(rank=2, alpha=4),
        checkpoint_every=2,
    )
    return Reinforced(
        name="sums",
        preset="tiny",
        model=ModelConfig(str(model), weights="float32"),
        environment=environment or Vowels(),
        tasks=TASKS,
        eval_tasks=TASKS[:3],
        arms=arms,
        rl=RlConfig(**sizes | rl),
        evaluation=RlEval((0, 2), 4, slots=4),
        grid=(
            GridPrompt("gcd/safety", "discouraging"),
            GridPrompt("gcd/behave", "train", about="gcd/behave"),
        ),
        prompts={name: BOOK.find(name) for name in BOOK.names},
        scorer=verdicts,
        reading=Reading(Onset(4), standard=None, base=UNTRAINED),
    )
