"""Tiny policies for the tests of rl: a decoder whose completions can all be written down, and rows
of given samples.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models as tiny
from flax import nnx

from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.rl.policy import completion_log_probs
from ip_jax.rl.rows import Prompts, Rows, Samples, Signal, lay_out
from ip_jax.training.state import init_state

# three of seven: they compile faster
LORA = LoraConfig(rank=4, alpha=4, targets=("q", "v", "down"))
VOCABULARY, LENGTH = 4, 2
CONFIG = DecoderConfig(
    "llama", VOCABULARY, 16, 24, 2, 2, 1, 8, uniform_attention(8, 1000.0), 1e-5, 64, True
)
# [16, 2]: everything that the policy can say
SEQUENCES = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)), np.int32)


@functools.cache
def policy(runs: int = 1):
    """(graphdef, lora, base) of the enumerable policy; its runs differ, and none is the
    reference.
    """
    return split_decoder(
        CONFIG, tiny.random_params(CONFIG), tiny.random_lora(CONFIG, LORA, runs, seed=3), LORA
    )


def reference():
    """(graphdef, base) of the same weights without adapters."""
    graphdef, _, base = split_decoder(CONFIG, tiny.random_params(CONFIG))
    return graphdef, base


def state_of(lora, learning_rate: float = 1e-2):
    """A state at step 0."""
    runs = jax.tree.leaves(lora)[0].shape[0]
    return init_state(
        jax.tree.map(jnp.array, lora),
        jnp.full(runs, learning_rate),
        jnp.zeros(runs),
        jnp.arange(runs),
    )


def prompts(*of_groups: list[int], runs: int = 1, slots: int | None = None) -> Prompts:
    """The same prompts for all runs, right-padded to `slots`."""
    slots = slots or max(map(len, of_groups))
    tokens = np.array([ids + [0] * (slots - len(ids)) for ids in of_groups], np.int32)
    lengths = np.array([len(ids) for ids in of_groups], np.int32)
    return Prompts(
        jnp.array(np.broadcast_to(tokens, (runs, *tokens.shape))),
        jnp.array(np.broadcast_to(lengths, (runs, len(lengths)))),
    )


def everything(groups: int = 1, runs: int = 1) -> Samples:
    """Each sequence once in every group."""
    tokens = jnp.array(np.broadcast_to(SEQUENCES, (runs, groups, *SEQUENCES.shape)))
    return Samples(
        tokens, jnp.full(tokens.shape[:-1], LENGTH), jnp.zeros(tokens.shape, jnp.float32)
    )


def random_samples(
    runs: int, groups: int, of_group: int, slots: int, vocabulary: int = VOCABULARY, seed: int = 0
) -> Samples:
    """Completions of all lengths from 1 to `slots`."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, slots + 1, (runs, groups, of_group))
    length[..., 0] = slots
    inside = np.arange(slots) < length[..., None]
    tokens = np.where(inside, rng.integers(0, vocabulary, inside.shape), 0)
    log_probs = np.where(inside, rng.uniform(-3, -0.1, inside.shape), 0)
    return Samples(
        jnp.array(tokens, jnp.int32),
        jnp.array(length, jnp.int32),
        jnp.array(log_probs, jnp.float32),
    )


def signal(like: Samples, advantage, weight, old=None, reference_log_probs=None) -> Signal:
    """A signal from arrays [R, Q, G] or [R, Q, G, C]; weights are 0 behind the end."""

    def full(x):
        return jnp.broadcast_to(
            jnp.asarray(x, jnp.float32).reshape(*np.shape(x), *(1,) * (4 - np.ndim(x))),
            like.tokens.shape,
        )

    nothing = np.zeros(like.length.shape, np.float32)
    others = [full(nothing if x is None else x) for x in (old, reference_log_probs)]
    return Signal(full(advantage), jnp.where(like.mask, full(weight), 0), *others)


def rows_of(
    prompt: Prompts,
    samples: Samples,
    of_tokens: Signal | None = None,
    micro_batches: int = 1,
    temperature: float = 1.0,
) -> Rows:
    """`lay_out` at one temperature."""
    return lay_out(
        prompt,
        samples,
        jnp.full(len(prompt.length), temperature, jnp.float32),
        of_tokens,
        micro_batches,
    )


def sequence_log_probs(trained, prompt: Prompts, samples: Samples, runs: int = 1):
    """log pi(y | prompt) of each sample, [R, B, S], with a gradient."""
    graphdef, _, base = policy(runs)
    rows = jax.tree.map(lambda x: x[0], rows_of(prompt, samples))
    return completion_log_probs(nnx.merge(graphdef, trained, base), rows, "float32", "none").sum(-1)


def flat(tree) -> np.ndarray:
    """All leaves as one float64 vector for each run, [R, n]."""
    return np.concatenate(
        [np.asarray(a, np.float64).reshape(a.shape[0], -1) for a in jax.tree.leaves(tree)], axis=1
    )
