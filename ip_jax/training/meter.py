"""How fast a program trains: seconds, tokens and FLOPs of each step, compilations, memory. These
are facts of the wall clock, apart from metrics.jsonl.
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from ip_jax.models.chips import chip_of
from ip_jax.models.families import DecoderConfig
from ip_jax.models.flops import batch_work, step_flops
from ip_jax.models.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Programs that were compiled and the seconds that it took; `cached` of them came from the
    persistent cache.
    """

    programs: int = 0
    seconds: float = 0.0
    cached: int = 0

    def since(self, before: "Compiled") -> "Compiled":
        """What came after `before`."""
        return Compiled(
            self.programs - before.programs,
            self.seconds - before.seconds,
            self.cached - before.cached,
        )


class Compilations:
    """Counts, while open, what this process compiles: `so_far`."""

    def __enter__(self):
        self.so_far = Compiled()
        jax.monitoring.register_event_duration_secs_listener(self._heard_duration)
        jax.monitoring.register_event_listener(self._heard)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._heard_duration)
        jax.monitoring.unregister_event_listener(self._heard)

    def _heard_duration(self, event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":  # reading the cache included
            self.so_far = dataclasses.replace(
                self.so_far,
                programs=self.so_far.programs + 1,
                seconds=self.so_far.seconds + seconds,
            )

    def _heard(self, event: str, **_):
        if event == "/jax/compilation_cache/cache_hits":
            self.so_far = dataclasses.replace(self.so_far, cached=self.so_far.cached + 1)


def peak_memory() -> int | None:
    """The most bytes that were in use at once on one of this process's devices since it began; None
    where the backend does not tell (CPU).
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)


@dataclasses.dataclass(frozen=True)
class Mark:
    """A moment: monotonic seconds, and what had been compiled by then."""

    seconds: float
    compiled: Compiled


@dataclasses.dataclass(frozen=True)
class StepSize:
    """What one step does, over all runs: `padded` are the positions that are computed, real tokens
    and padding; `flops` the model's, of real tokens.
    """

    tokens: int
    padded: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of the steps of one session: `step` is the median of their seconds, the others are totals
    over totals. `mfu` is None where the chip's peak is not known.
    """

    steps: int
    step: float
    tokens: float
    padded: float
    mfu: float | None

    def __str__(self):
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        return f"{self.tokens:.0f} tokens/s ({self.padded:.0f} with padding){mfu}"


class Meter:
    """Measures the steps of one program over `devices`, as the loop runs them: the next one is
    begun before one is seen to end.

    A step lasts from its beginning, or from the end of the one before where that is later, until
    its metrics are there: evaluations and checkpoints between steps do not count. Steps in whose
    time something was compiled stand in `rows`, but in no rate, unless all are such.
    """

    def __init__(self, devices: Sequence[jax.Device], compilations: Compilations):
        chip = chip_of(devices[0].device_kind)
        self.peak = chip and chip.peak * len(devices)
        self.compilations = compilations
        self.rows: list[dict] = []
        self._running: collections.deque[tuple[Mark, StepSize]] = collections.deque()
        self._first = self._ended = self.mark()

    def mark(self) -> Mark:
        """Now."""
        return Mark(time.monotonic(), self.compilations.so_far)

    def begun(self, at: Mark, size: StepSize) -> None:
        """A step of this size was begun at `at`, before its batch was read."""
        self._running.append((at, size))

    def ended(self, step: int) -> dict:
        """The oldest of the steps that were begun is done: its row, as JSON."""
        (begun, size), end = self._running.popleft(), self.mark()
        start = max(begun, self._ended, key=lambda mark: mark.seconds)
        self._ended = end
        compiled = end.compiled.since(start.compiled)
        row = {
            "step": step,
            "seconds": end.seconds - start.seconds,
            "tokens": size.tokens,
            "padded_tokens": size.padded,
            "model_flops": size.flops,
            "compiled_programs": compiled.programs,
            "compile_seconds": compiled.seconds,
            "peak_memory_bytes": peak_memory(),
        }
        row |= {
            "tokens_per_second": row["tokens"] / row["seconds"],
            "padded_tokens_per_second": row["padded_tokens"] / row["seconds"],
            "mfu": self._mfu([row]),
        }
        self.rows.append(row)
        return row

    def rates(self) -> Rates:
        """Of all steps so far, of which there must be one."""
        rows = [row for row in self.rows if not row["compiled_programs"]] or self.rows
        total = {
            name: sum(row[name] for row in rows) for name in ("seconds", "tokens", "padded_tokens")
        }
        step = statistics.median(row["seconds"] for row in rows)
        return Rates(
            len(self.rows),
            step,
            total["tokens"] / total["seconds"],
            total["padded_tokens"] / total["seconds"],
            self._mfu(rows),
        )

    def _mfu(self, rows: list[dict]) -> float | None:
        """Model FLOPs over what the devices' published bfloat16 peak would do in that time."""
        return (
            sum(row["model_flops"] for row in rows)
            / (sum(row["seconds"] for row in rows) * self.peak)
            if self.peak
            else None
        )

    def summary(self) -> str:
        """One line about all steps of this session."""
        rates, compiled, memory = (
            self.rates(),
            self.mark().compiled.since(self._first.compiled),
            peak_memory(),
        )
        parts = [f"{rates.steps} steps, {rates.step:.3g} s each (median), {rates}"]
        if memory is not None:
            parts.append(f"at most {memory / 2**30:.2f} GiB on a device")
        parts.append(
            f"{compiled.programs} programs compiled in {compiled.seconds:.1f} s, {compiled.cached}"
            " of them from the cache"
        )
        return ", ".join(parts)


def step_size(
    config: DecoderConfig, lora: LoraConfig | None, batches: Sequence[Mapping[str, np.ndarray]]
) -> StepSize:
    """The size of a step's packed batches (see training.state.Batch, arrays [M, blocks, B, ...]);
    `lora` is None in full training. Empty micro-batches are not computed.
    """
    segments = [arrays["segment_ids"] for arrays in batches]
    works = [
        batch_work(config, ids, arrays["positions"], arrays["response_weight"])
        for ids, arrays in zip(segments, batches, strict=True)
    ]
    padded = sum(np.count_nonzero(ids.any(axis=(1, 2, 3))) * ids[0].size for ids in segments)
    return StepSize(
        int(sum(work.tokens for work in works)),
        int(padded),
        sum(step_flops(config, lora, work) for work in works),
    )
