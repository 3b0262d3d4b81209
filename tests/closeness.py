"""How near two float32 computations must be: relative to the largest value, since the rounding of a
sum follows its largest terms, and where it is cheap against the same computation in float64.
"""

import jax
import numpy as np


def assert_near(found, expected, bound: float, floor: float = 1.0) -> None:
    """No leaf is off by more than `bound` times its largest expected value, or times `floor` where
    that is larger: values that should be 0 are sums of terms of about that size.
    """

    def leaf(ours, theirs):
        scale = max(floor, float(np.max(np.abs(theirs), initial=0.0)))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * scale)

    jax.tree.map(leaf, found, expected)


def in_float64(function, *inputs):
    """What a function of arrays gives when all its floats are float64."""

    def widened(x):
        x = np.asarray(x)
        return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(widened, inputs)))
