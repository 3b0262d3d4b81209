"""Learning-rate schedules as multipliers of a run's peak rate, exactly as the papers' code executes
them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Warm up from 0 over `warmup` steps, then decay to 0 at `total` (HF's
    get_*_schedule_with_warmup).

    The published GCD run ends its schedule early: its length was counted in accumulated steps while
    the loop never accumulated, so the rate is 0 from step 31 of 125 on. `gcd_faithful` is that run,
    `gcd_fixed` the same schedule over all steps.
    """

    kind: str = "linear"
    warmup: int = 0
    total: int = 100

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"schedule kind {self.kind!r} is not known: choose from {', '.join(KINDS)}"
            )
        if not 0 <= self.warmup < max(self.total, 1):
            raise ValueError(
                f"schedule warmup is {self.warmup}: it must lie in 0 .. total - 1 ="
                f" {self.total - 1}"
            )

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Multiplier in [0, 1] at a 0-based step."""
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(self.warmup, 1)
        if self.kind == "constant":
            return jnp.where(step < self.warmup, rising, 1.0)
        left = jnp.clip((self.total - step) / max(self.total - self.warmup, 1), 0, 1)
        falling = left if self.kind == "linear" else 0.5 * (1 - jnp.cos(jnp.pi * left))
        return jnp.where(step < self.warmup, rising, falling)

    def last_active_step(self, steps: int) -> int:
        """How many of the first `steps` steps must run: those after it have rate exactly 0 to the
        end and change nothing.
        """
        active = np.flatnonzero(np.asarray(self(jnp.arange(steps))) > 0)
        return int(active[-1]) + 1 if len(active) else 0


def gcd_faithful(steps: int = 125) -> Schedule:
    """The published schedule as executed: linear over steps // 4 = 31, warmup 5 (Wichers et al.
    2025, repository).
    """
    return Schedule("linear", warmup=5, total=steps // 4)


def gcd_fixed(steps: int = 125) -> Schedule:
    """The published schedule as written: linear over all steps, warmup 5."""
    return Schedule("linear", warmup=5, total=steps)
