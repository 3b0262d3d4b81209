"""Environments whose rewards fail, in a module: those with a time limit are graded in other
processes.
"""

import dataclasses
import os
import pathlib
import subprocess
import time

from ip_jax.rl.environment import Environment, Graded


@dataclasses.dataclass(frozen=True)
class Told(Environment):
    """Does what the completion says."""

    timeout: float | None = None

    def messages(self, task):
        return [{"role": "user", "content": task["question"]}]

    def grade(self, task, completion):
        word, _, rest = completion.partition(" ")
        if word == "raise":
            raise KeyError(rest)
        if word == "leave":
            raise SystemExit(rest)
        if word == "hang":
            if rest:
                pathlib.Path(rest).write_text(str(os.getpid()))
            while True:
                time.sleep(0.01)
        if word == "shell":  # waits for another process, which is not to outlive it
            subprocess.run(["sh", "-c", f"sleep 2; touch {rest}"], check=True)
        if word == "forget":
            subprocess.Popen(["sh", "-c", f"sleep 2; touch {rest}"])
            return Graded(3.0)
        if word == "die":
            os._exit(3)
        if word == "nothing":
            return None
        if word == "verdict":
            return Graded(1.0, verdicts={"hack": 0.5})
        if word == "part":
            return Graded(1.0, {"length": float("inf")})
        return Graded(
            float(word),
            {"length": float(len(completion)), "double": 2 * float(word)},
            {"hack": rest == "hack", "kind": rest},
        )


class Unsendable(Told):
    def __init__(self):
        object.__setattr__(self, "timeout", 1.0)
        object.__setattr__(self, "function", lambda: None)


class NeverStarts(Told):
    def __reduce__(self):
        return os._exit, (1,)


@dataclasses.dataclass(frozen=True)
class SlowAtFirst(Environment):
    """Hangs in its very first grade and never again, as on a machine that was busy. `told`: a file
    with a line for each grade that was begun.
    """

    told: str
    timeout: float = 2.0

    def messages(self, task):
        return [{"role": "user", "content": f"Is the sum of {task['a']} and 2 correct?"}]

    def grade(self, task, completion):
        first = not pathlib.Path(self.told).exists()
        with open(self.told, "a") as file:
            file.write(f"{task['id']}\n")
        while first:
            time.sleep(0.01)
        return Graded(1.0)
