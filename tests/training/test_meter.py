"""Step times by a clock of the test's own, compilations as jax makes them, and which steps a
profile takes.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, pack, random_examples

from ip_jax.models import flops
from ip_jax.models.chips import CHIPS
from ip_jax.models.lora import LoraConfig
from ip_jax.training import meter
from ip_jax.training.meter import Compilations, Compiled, Meter, StepSize
from ip_jax.training.profile import Trace, traced_steps


class Clock:
    """Stands in for the moment and for what had been compiled by then."""

    def __init__(self, patch):
        self.now, self.so_far = 100.0, Compiled()
        patch.setattr(meter, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    def at(self, seconds: float, compiled: int = 0):
        self.now = 100.0 + seconds
        self.so_far = Compiled(
            self.so_far.programs + compiled,
            self.so_far.seconds + compiled * 2.0,
            self.so_far.cached,
        )


@pytest.fixture
def measured(monkeypatch):
    """Four steps as the loop runs them: the first compiles until 5 s; after the second an
    evaluation, which compiles, lasts from 9 to 20 s.
    """
    clock = Clock(monkeypatch)
    meter_ = Meter([types.SimpleNamespace(device_kind="TPU v5 lite")] * 2, clock)
    size = StepSize(tokens=60, padded=80, flops=394e12)
    marks = [meter_.mark()]  # step 0 is begun
    clock.at(5, compiled=1)
    meter_.begun(marks[0], size)
    meter_.begun(meter_.mark(), size)  # step 1, while step 0 computes
    clock.at(7)
    meter_.ended(0)
    clock.at(9)
    meter_.ended(1)
    clock.at(20, compiled=3)
    meter_.begun(meter_.mark(), size)
    clock.at(21)
    meter_.begun(meter_.mark(), size)
    clock.at(24)
    meter_.ended(2)
    clock.at(27)
    meter_.ended(3)
    return meter_


def test_steps_overlap_and_evaluations_do_not_count(measured):
    assert [(row["step"], row["seconds"], row["compiled_programs"]) for row in measured.rows] == [
        (0, 7, 1),
        (1, 2, 0),
        (2, 4, 0),
        (3, 3, 0),
    ]
    assert measured.rows[0]["compile_seconds"] == 2.0


def test_rates_are_those_of_steps_that_compiled_nothing(measured):
    rates = measured.rates()
    assert (rates.steps, rates.step, rates.tokens, rates.padded) == (4, 3, 180 / 9, 240 / 9)
    assert rates.mfu == pytest.approx(3 * 394e12 / (9 * 2 * CHIPS["v5e"].peak))
    assert [row["mfu"] for row in measured.rows[1:]] == pytest.approx(
        [394 / (seconds * 2 * 197) for seconds in (2, 4, 3)]
    )
    assert (
        measured.summary()
        == "4 steps, 3 s each (median), 20 tokens/s (27 with padding), MFU 33.3%, 4 programs"
        " compiled in 8.0 s, 0 of them from the cache"
    )


def test_where_all_steps_compiled_they_are_the_rate(monkeypatch):
    clock = Clock(monkeypatch)
    meter_ = Meter(jax.devices()[:1], clock)
    meter_.begun(meter_.mark(), StepSize(10, 20, 1e9))
    clock.at(2, compiled=1)
    assert meter_.ended(0)["mfu"] is None, "nobody publishes a CPU's peak here"
    assert meter_.rates().tokens == 5 and "MFU" not in meter_.summary()


def test_memory_is_the_fullest_device(monkeypatch):
    stats = [None, {"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9, "bytes_in_use": 1}, {}]
    monkeypatch.setattr(
        jax,
        "local_devices",
        lambda: [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats],
    )
    assert meter.peak_memory() == 9
    monkeypatch.undo()
    assert meter.peak_memory() is None


def test_compilations_are_counted_while_open_and_the_cache_is_told_apart(tmp_path):
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}

    def compile_(shift):
        return (
            jax.jit(lambda x: jnp.sin(x) + shift)
            .lower(jax.ShapeDtypeStruct((3,), jnp.float32))
            .compile()
        )

    try:
        for name, value in options.items():
            jax.config.update(name, value)
        with Compilations() as first:
            compile_(1.0)
        with Compilations() as second:
            compile_(1.0)
            compile_(2.0)
        compile_(3.0)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert (first.so_far.programs, first.so_far.cached) == (1, 0) and first.so_far.seconds > 0
    assert (second.so_far.programs, second.so_far.cached) == (2, 1)


def test_the_size_of_a_step_leaves_padding_and_empty_micro_batches_out():
    lora = LoraConfig(rank=2, targets=("q",))
    batch = pack(
        [[run[:2], run[2:], [], []] for run in random_examples(2, (11, 7, 19, 4))],
        32,
        32,
        micro_batches=2,
        blocks=2,
    )
    arrays = {
        name: np.asarray(getattr(batch, name))
        for name in ("segment_ids", "positions", "response_weight")
    }
    size = meter.step_size(CONFIG, lora, [arrays, arrays])
    assert (size.tokens, size.padded) == (2 * 2 * 41, 2 * 2 * 2 * 32)
    assert size.flops == 2 * flops.step_flops(
        CONFIG, lora, flops.batch_work(CONFIG, *arrays.values())
    )


@pytest.mark.parametrize(
    "shapes, first, breaks, expected",
    [
        ("aaaaaaaa", 0, (), range(1, 4)),
        ("aaaaaaaa", 4, (), range(5, 8)),
        ("abababab", 0, (), range(2, 5)),
        # an evaluation after three steps lies between steps 2 and 3
        ("aaaaaaab", 0, (3,), range(3, 6)),
        ("aaaaaaaa", 0, (2, 4, 6), range(2, 4)),
        ("aaab", 0, (), range(1, 2)),
        ("aab", 0, (), range(0)),  # the third step is compiled while the second computes
        ("aabb", 0, (), range(3, 4)),
        ("ab", 0, (), range(0)),
        ("aaaa", 3, (), range(0)),
    ],
    ids=str,
)
def test_a_profile_takes_steps_that_compile_nothing(shapes, first, breaks, expected):
    assert traced_steps(shapes, first, len(shapes), breaks) == expected


@pytest.mark.slow
def test_a_profile_that_is_cut_short_is_written(tmp_path):
    from etils import epath

    step = jax.jit(lambda x: x + 1)
    with Trace(epath.Path(tmp_path / "profile"), range(1, 4)) as trace:
        for n in range(3):
            trace.begin(n)
            step(jnp.ones(2)).block_until_ready()
            assert trace.end(n) is None
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    jax.profiler.start_trace(str(tmp_path / "other"))  # it is not running any more
    jax.profiler.stop_trace()
