"""The mixture of experts of one layer on one GPU: its Pallas kernel beside XLA's products, one expert after the other."""
import functools
import statistics

import jax
import jax.numpy as jnp

from benchmarks.common import alternating
from benchmarks.gpu.model import one_device
from benchmarks.gpu.sizes import Sizes
from ip_jax.models import moe

KERNELS = "pallas", "auto"
CALLS = 10  # that are timed together
LARGEST_DIFFERENCE = 0.02


def measure_mixture(sizes: Sizes, tokens: int, with_gradient: bool) -> dict:
    """TFLOP/s of the kernel and of XLA's products on `tokens` tokens in bfloat16, forward (and back through the activations, as with adapters),
    in turns of CALLS: {"ours_s", "peer_s", "ratio", "tflops_per_s", "auto_tflops_per_s", "difference": the largest of results / the largest result}.
    Raises ValueError where their results differ by more than bfloat16 explains.
    """
    config = sizes.mixture.decoder_config()
    with jax.set_mesh(one_device(sizes)):
        inputs = jax.jit(functools.partial(_inputs, config, tokens))(jax.random.key(0))
        works = [_work(kernel, inputs, with_gradient) for kernel in KERNELS]
        (ours, theirs), result = (work() for work in works), alternating(*works, repeats=sizes.repeats)
    # gate, up and down of each chosen expert; what the backward pass makes again does not count
    flops = tokens * config.experts_per_token * 6 * config.d_model * config.d_ff * (2 if with_gradient else 1)
    rate = lambda spent: float(f"{CALLS * flops / statistics.median(spent) / 1e12:.3g}")  # noqa: E731
    difference = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(ours, theirs, strict=True))
    if not difference < LARGEST_DIFFERENCE:
        raise ValueError(f"the kernel's results differ from XLA's by {difference:.2g} of the largest: its speed says nothing")
    return {"tokens": tokens, "calls": CALLS, **result, "tflops_per_s": rate(result["ours_s"]), "auto_tflops_per_s": rate(result["peer_s"]), "difference": difference}


def _inputs(config, tokens: int, key):
    """(x, weights, chosen, experts) of random tokens and weights, routed by a random router."""
    keys = jax.random.split(key, 5)
    width, hidden, n = config.d_model, config.d_ff, config.n_experts
    kernels = [(n, width, hidden), (n, width, hidden), (n, hidden, width)]
    experts = tuple(jax.random.normal(k, shape, jnp.bfloat16) * shape[1] ** -0.5 for k, shape in zip(keys, kernels, strict=False))
    x = jax.random.normal(keys[3], (1, tokens, 1, width), jnp.bfloat16)
    _, weights, chosen = moe.route(x, jax.random.normal(keys[4], (width, n), jnp.bfloat16) * width**-0.5, config.experts_per_token)
    return x, weights, chosen, experts


def _work(kernel: str, inputs, with_gradient: bool):
    """A function that runs the compiled mixture CALLS times; its results are those that adapters need."""

    def run(x, weights, chosen, experts):
        mixture = lambda x: moe.mixture(jax.nn.silu, kernel, x, weights, chosen, experts)  # noqa: E731
        if not with_gradient:
            return (mixture(x),)
        y, pull = jax.vjp(mixture, x)
        return y, *pull(y)

    compiled = jax.jit(run).lower(*inputs).compile()
    return lambda: jax.block_until_ready([compiled(*inputs) for _ in range(CALLS)][-1])
