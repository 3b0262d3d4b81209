"""Mixture of experts against every expert on every token, on meshes, and Mixtral against transformers and PEFT."""
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip_jax.models import moe
from ip_jax.training.sharding import make_mesh


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)  # LLVM's; XLA's own passes are untouched
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_mixture(n_experts, per_token, shape=(2, 4, 9), width=16, hidden=24, seed=0):
    """(x, weights, chosen, experts, pull of the result)."""
    rng = np.random.default_rng(seed)
    draw = lambda *dims: rng.standard_normal(dims).astype(np.float32)  # noqa: E731
    experts = tuple(draw(n_experts, *dims) * dims[0] ** -0.5 for dims in ((width, hidden), (width, hidden), (hidden, width)))
    x = draw(*shape, width)
    _, weights, chosen = moe.route(x, draw(width, n_experts), per_token)
    return x, np.asarray(weights), np.asarray(chosen), experts, draw(*shape, width)


def every_expert_on_every_token(x, weights, chosen, experts):
    gate, up, down = experts
    hidden = jax.nn.silu(jnp.einsum("rbtd,edf->rbtef", x, gate)) * jnp.einsum("rbtd,edf->rbtef", x, up)
    share = (jax.nn.one_hot(chosen, len(gate)) * weights[..., None]).sum(-2)
    return jnp.einsum("rbtef,efd,rbte->rbtd", hidden, down, share)


@functools.partial(jax.jit, static_argnums=0)
def result_and_gradients(mixture, x, weights, chosen, experts, pull):
    """(y, gradients of x, weights and experts)."""
    y, vjp = jax.vjp(lambda x, weights, experts: mixture(x, weights, chosen, experts), x, weights, experts)
    return y, vjp(pull)


def assert_close(found, expected, atol=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), found, expected)


@pytest.mark.parametrize("form", ["one by one", "together"])
@pytest.mark.parametrize(("n_experts", "per_token"), [(3, 1), (8, 2)])
def test_mixture_equals_every_expert_on_every_token(n_experts, per_token, form, monkeypatch):
    """Both forms, also where a chunk is far shorter than an expert's tokens, and where one expert has them all."""
    if form == "together":
        monkeypatch.setattr(moe, "_one_by_one", moe._together)
    monkeypatch.setattr(moe, "LONGEST_CHUNK", 8)
    our_mixture = functools.partial(moe.mixture, jax.nn.silu)
    x, weights, chosen, experts, pull = random_mixture(n_experts, per_token)
    for choice in (chosen, np.broadcast_to(np.arange(per_token)[::-1] + 1, chosen.shape)):
        expected = result_and_gradients(every_expert_on_every_token, x, weights, choice, experts, pull)
        assert_close(result_and_gradients(our_mixture, x, weights, choice, experts, pull), expected)


MESHES = [dict(data=8), dict(run=2, data=2, tensor=2), dict(run=2, data=4), dict(data=2, tensor=4)]
CUT, WHOLE = (2, 8, 3), (1, 1, 5)  # rows that every mesh cuts, and a single one that none can cut


@pytest.mark.parametrize(("axes", "shape"), [*((axes, CUT) for axes in MESHES), (dict(run=2, data=2, tensor=2), WHOLE)], ids=str)
def test_any_mesh_gives_the_mixture_of_one_device(axes, shape):
    """Eight experts, which `data` divides, and three, which it does not."""
    for n_experts in (8, 3):
        x, weights, chosen, experts, pull = random_mixture(n_experts, 2, shape)
        expected = result_and_gradients(every_expert_on_every_token, x, weights, chosen, experts, pull)
        with jax.set_mesh(make_mesh(**axes)):
            assert_close(result_and_gradients(functools.partial(moe.mixture, jax.nn.silu), x, weights, chosen, experts, pull), expected)
