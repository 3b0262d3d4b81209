"""A tiny random decoder with two different adapters, and the plain way to compute what the sampler
must compute.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ip_jax.models.decoder import causal_attend
from ip_jax.models.families import DecoderConfig, param_shapes, uniform_attention
from ip_jax.models.lora import projection_shapes

TINY = DecoderConfig(
    family="llama",
    vocab_size=300,
    d_model=32,
    d_ff=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    attention=uniform_attention(8, 10000.0),
    norm_eps=1e-5,
    max_positions=256,
    tied_embeddings=True,
)


def random_params(config: DecoderConfig, seed: int = 0) -> dict:
    """Weights of size about 1 / sqrt(inputs), norms near 1, embeddings large enough for uneven
    predictions.
    """
    rng = np.random.default_rng(seed)
    params: dict = {"layers": {}}
    for path, shape in param_shapes(config).items():
        scale = 0.3 if path == ("embed",) else shape[-2] ** -0.5 if len(shape) > 1 else 0.1
        values = rng.normal(size=shape) * scale + (1.0 if path[-1].endswith("norm") else 0.0)
        (params["layers"] if len(path) == 2 else params)[path[-1]] = jnp.asarray(
            values, jnp.float32
        )
    return params


def random_lora(config: DecoderConfig, rank: int, runs: int, seed: int = 1) -> dict:
    """Adapters whose A and B are non-zero and differ by run."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.float32)

    return {
        name: {
            "a": draw(runs, config.n_layers, inputs, rank),
            "b": draw(runs, config.n_layers, rank, outputs),
        }
        for name, (inputs, outputs) in projection_shapes(config).items()
    }


def one_run(model, run: int):
    """The same model with the adapter of one run alone."""
    graphdef, lora, base = model
    return graphdef, jax.tree.map(lambda a: a[run : run + 1], lora), base


@jax.jit(static_argnums=0)
def _logits(graphdef, lora, base, tokens):
    decoder = nnx.merge(graphdef, lora, base)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    hidden, _ = decoder(tokens, positions, causal_attend)
    return decoder.logits(hidden)


def full_logits(model, run: int, token_ids) -> np.ndarray:
    """Logits [T, V] of one whole sequence in one pass without any cache (padded at the end to few
    lengths).
    """
    graphdef, lora, base = one_run(model, run)
    padded = np.zeros((1, 1, -(-len(token_ids) // 64) * 64), np.int32)
    padded[0, 0, : len(token_ids)] = token_ids
    return np.asarray(_logits(graphdef, lora, base, padded))[0, 0, : len(token_ids)]


def prompts(count: int, length: int | None = None, seed: int = 0) -> list[np.ndarray]:
    """Random token ids, of random lengths in one bucket unless a length is given."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, TINY.vocab_size, length or rng.integers(17, 33)).astype(np.int32)
        for _ in range(count)
    ]
