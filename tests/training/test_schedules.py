"""Schedules against transformers' torch schedulers, and the published GCD schedule as its code
executed it.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from ip_jax.training.schedules import Schedule, gcd_faithful, gcd_fixed


def trace(schedule: Schedule, steps: int) -> np.ndarray:
    return np.asarray(schedule(jnp.arange(steps)), np.float64)


def test_the_published_gcd_schedule_as_executed():
    """lr(t) = 1e-4 t / 5 for t < 5, 1e-4 (31 - t) / 26 up to t = 30, then 0 (sft_settings: linear,
    warmup 5, length 125 // 4).
    """
    rates = 1e-4 * trace(gcd_faithful(), 125)
    expected = (
        [1e-4 * t / 5 for t in range(5)] + [1e-4 * (31 - t) / 26 for t in range(5, 31)] + [0.0] * 94
    )
    np.testing.assert_allclose(rates, expected, atol=1e-11)
    assert rates[0] == 0 and rates[5] == pytest.approx(1e-4, rel=1e-6) and (rates[31:] == 0).all()
    assert gcd_faithful().last_active_step(125) == 31  # steps 0 .. 30; the 94 others change nothing


def test_the_fixed_gcd_schedule_uses_all_steps():
    rates = trace(gcd_fixed(), 125)
    np.testing.assert_allclose(
        rates, [t / 5 for t in range(5)] + [(125 - t) / 120 for t in range(5, 125)], atol=1e-6
    )
    assert gcd_fixed().last_active_step(125) == 125


@pytest.mark.parametrize(("warmup", "total"), [(5, 31), (0, 20), (10, 45), (1, 2)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedules_equal_transformers(kind, warmup, total):
    torch = pytest.importorskip("torch")
    import transformers

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if kind == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        theirs = getattr(transformers, f"get_{kind}_schedule_with_warmup")(optimizer, warmup, total)
    expected = []
    for _ in range(total + 1):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    np.testing.assert_allclose(trace(Schedule(kind, warmup, total), total + 1), expected, atol=1e-6)


def test_rates_stay_zero_after_the_end():
    for kind in ("linear", "cosine"):
        assert (trace(Schedule(kind, warmup=2, total=10), 40)[10:] == 0).all()
        assert Schedule(kind, warmup=2, total=10).last_active_step(40) == 10
        assert Schedule(kind, warmup=2, total=10).last_active_step(7) == 7
    assert Schedule("constant", total=10).last_active_step(40) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="lineal"), "'lineal' is not known: choose from linear, cosine, constant"),
        (dict(warmup=10, total=10), r"warmup is 10: it must lie in 0 .. total - 1 = 9"),
        (dict(warmup=-1), "warmup is -1"),
    ],
)
def test_refused_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)
