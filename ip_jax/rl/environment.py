"""What a text environment is: it turns a task into messages, and a completion into a reward with
its parts and verdicts.

A task is a dict with an "id" (such as an example of `ip_jax.data.sources`). The prompts of an arm
are put into the messages from outside, so a reward never sees them.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float

REWARD = "reward"  # the name of the reward itself, beside the names of its parts


@dataclass(frozen=True)
class Graded:
    """`reward`: what is learned from. `parts`: its components, and other rewards that an arm may be
    trained on by name.

    `verdicts` are for the measurements (was it a hack, was it correct), never for the update.
    """

    reward: float
    parts: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, bool | str] = field(default_factory=dict)


class Environment(Protocol):
    """A user's environment derives from this class or has what it has.

    `timeout`: seconds that one grade may take. With a limit, grades are made in worker processes
    that can be ended (the environment and its tasks are pickled, so its class stands in a module);
    None grades in the training process itself and is for quick, safe functions.
    """

    timeout: float | None = None

    def messages(self, task: dict[str, Any]) -> list[dict[str, str]]:
        """The conversation that ends with the user's turn: [{"role": "system" | "user" |
        "assistant", "content": str}, ...].
        """
        ...

    def grade(self, task: dict[str, Any], completion: str) -> Graded:
        """A pure function of the task and the completion's text, special tokens left out."""
        ...


@dataclass(frozen=True)
class Grades:
    """The grades of one iteration. A failed sample has reward 0, no parts and no verdicts, and says
    what failed.

    Python lists have the arrays' order, flat: run, group, sample.
    """

    reward: Float[np.ndarray, "R Q G"]  # float32
    parts: list[dict[str, float]]
    verdicts: list[dict[str, bool | str]]
    failure: list[str | None]
    """None, or "timed out: ...", "raised: ...", "not finite: ...", "died: ..."."""

    @property
    def valid(self) -> Bool[np.ndarray, "R Q G"]:
        """False where the grade failed: such a sample is left out of its group."""
        return np.array([failure is None for failure in self.failure]).reshape(self.reward.shape)
