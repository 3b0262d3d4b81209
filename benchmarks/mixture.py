"""The two forms of a mixture of experts, where this program runs: one expert after the other, and
all in `ragged_dot` (which TPUs use).
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import alternating, save
from ip_jax.models import moe

EXPERTS, PER_TOKEN, WIDTH, HIDDEN = 8, 2, 512, 1536
CASES = {
    "train_2048_tokens": (2048, True),
    "decode_16_tokens": (16, False),
    "decode_2_tokens": (2, False),
}


def arguments(tokens: int, dtype):
    """(x, weights, chosen, experts) of random tokens and random experts."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, dtype)

    x = jnp.asarray(rng.standard_normal((1, tokens, 1, WIDTH)), jnp.float32)
    _, weights, chosen = moe.route(x, draw(WIDTH, EXPERTS), PER_TOKEN)
    return (
        x,
        weights,
        chosen,
        (draw(EXPERTS, WIDTH, HIDDEN), draw(EXPERTS, WIDTH, HIDDEN), draw(EXPERTS, HIDDEN, WIDTH)),
    )


def form(implementation, inputs, with_gradient: bool):
    """A function that runs the compiled mixture once: forward, or forward and the gradient of x."""

    def run(x, weights, chosen, experts):
        mixture = functools.partial(moe.mixture, jax.nn.silu, "auto")
        if not with_gradient:
            return mixture(x, weights, chosen, experts)
        y, vjp = jax.vjp(lambda x: mixture(x, weights, chosen, experts), x)
        return y, vjp(y)

    with mock.patch.object(moe, "_one_by_one", implementation):
        compiled = jax.jit(run).lower(*inputs).compile()

    def work():
        return jax.block_until_ready(compiled(*inputs))

    work()
    return work


def main() -> None:
    result = {
        "experts": EXPERTS,
        "per_token": PER_TOKEN,
        "width": WIDTH,
        "hidden": HIDDEN,
        "ratio_of": "ragged_dot seconds / one-by-one seconds",
    }
    for dtype in ("float32", "bfloat16"):
        for name, (tokens, with_gradient) in CASES.items():
            inputs = arguments(tokens, dtype)
            works = (
                form(implementation, inputs, with_gradient)
                for implementation in (
                    moe._one_by_one,
                    functools.partial(moe._together, moe._ragged),
                )
            )
            result[f"{name}_{dtype}"] = alternating(*works)
    save("mixture_cpu", result)


if __name__ == "__main__":
    main()
