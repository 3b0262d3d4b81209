"""The mixture of experts of one layer on one GPU: its Pallas kernel beside XLA's products, one
expert after the other.
"""

import functools
import statistics

import jax
import jax.numpy as jnp

from benchmarks.common import alternating
from benchmarks.gpu.model import one_device
from benchmarks.gpu.sizes import Sizes
from ip_jax.models import moe

KERNELS = "pallas", "auto"
LARGEST_DIFFERENCE = 0.02  # of results in bfloat16


def measure_mixture(sizes: Sizes, tokens: int, calls: int, with_gradient: bool) -> dict:
    """TFLOP/s of the kernel and of XLA's products on `tokens` tokens in bfloat16, forward (and back
    to tokens and router, as with adapters), in turns of `calls`: {"ours_s", "peer_s", "ratio",
    "tflops_per_s", "auto_tflops_per_s", "difference": the largest one of any result or gradient, as
    a part of its largest element}. Raises ValueError where that is more than bfloat16 explains.
    """
    config = sizes.mixture.decoder_config()
    with jax.set_mesh(one_device(sizes)):
        inputs = jax.jit(functools.partial(_inputs, config, tokens))(jax.random.key(0))
        differences = [
            _difference(*both)
            for both in zip(
                *(_results(kernel, inputs, (0, 1, 3)) for kernel in KERNELS), strict=True
            )
        ]
        # which NaN is not
        if not all(difference < LARGEST_DIFFERENCE for difference in differences):
            raise ValueError(
                f"the kernel's results and gradients differ from XLA's by {differences} of the"
                " largest: its speed says nothing"
            )
        programs = [
            _compiled(kernel, inputs, (0, 1) if with_gradient else ()) for kernel in KERNELS
        ]
        works = [functools.partial(_run, program, inputs, calls) for program in programs]
        for work in works:
            work()
        result = alternating(*works, repeats=sizes.repeats)
    # gate, up and down of each chosen expert; what the backward pass makes again does not count
    flops = (
        tokens
        * config.experts_per_token
        * 6
        * config.d_model
        * config.d_ff
        * (2 if with_gradient else 1)
    )

    def rate(spent):
        return float(f"{calls * flops / statistics.median(spent) / 1e12:.3g}")

    rates = {"tflops_per_s": rate(result["ours_s"]), "auto_tflops_per_s": rate(result["peer_s"])}
    return {"tokens": tokens, "calls": calls, **result, **rates, "difference": max(differences)}


def _inputs(config, tokens: int, key):
    """(x, weights, chosen, experts) of random tokens and weights, routed by a random router."""
    keys = jax.random.split(key, 5)
    width, hidden, n = config.d_model, config.d_ff, config.n_experts
    kernels = [(n, width, hidden), (n, width, hidden), (n, hidden, width)]
    experts = tuple(
        jax.random.normal(k, shape, jnp.bfloat16) * shape[1] ** -0.5
        for k, shape in zip(keys, kernels, strict=False)
    )
    x = jax.random.normal(keys[3], (1, tokens, 1, width), jnp.bfloat16)
    _, weights, chosen = moe.route(
        x,
        jax.random.normal(keys[4], (width, n), jnp.bfloat16) * width**-0.5,
        config.experts_per_token,
    )
    return x, weights, chosen, experts


def _compiled(kernel: str, inputs, wanted: tuple[int, ...]):
    """The compiled (x, weights, chosen, experts) -> (the mixture, its gradients by the `wanted`
    ones).
    """

    def run(*inputs):
        def mixture(*given):
            x, weights, chosen, experts = (
                dict(enumerate(inputs)) | dict(zip(wanted, given, strict=True))
            ).values()
            return moe.mixture(jax.nn.silu, kernel, x, weights, chosen, experts)

        y, pull = jax.vjp(mixture, *(inputs[i] for i in wanted))
        return y, pull(y) if wanted else ()

    return jax.jit(run).lower(*inputs).compile()


def _results(kernel: str, inputs, wanted: tuple[int, ...]) -> list:
    return jax.tree.leaves(_compiled(kernel, inputs, wanted)(*inputs))


def _difference(ours, theirs) -> float:
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


def _run(program, inputs, calls: int) -> None:
    jax.block_until_ready([program(*inputs) for _ in range(calls)][-1])
