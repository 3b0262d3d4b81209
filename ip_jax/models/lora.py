"""LoRA with PEFT's meaning and a leading run axis: one adapter for each run over one frozen
base.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ip_jax.models.families import DecoderConfig

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What PEFT calls r, lora_alpha, use_rslora, lora_dropout and target_modules (without the
    `_proj`).
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise ValueError(
                f"LoRA targets {unknown or '()'} are not known: choose from {', '.join(TARGETS)}"
            )
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}: it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout}: it must lie in [0, 1)")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every projection that LoRA can adapt: those of attention, and those of
    the MLP where it is not a mixture.
    """
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = {
        "q": (config.d_model, heads),
        "k": (config.d_model, kv_heads),
        "v": (config.d_model, kv_heads),
        "o": (heads, config.d_model),
    }
    mlp = {
        "gate": (config.d_model, config.d_ff),
        "up": (config.d_model, config.d_ff),
        "down": (config.d_ff, config.d_model),
    }
    return attention if config.n_experts else attention | mlp


def check_targets(config: DecoderConfig, lora: LoraConfig) -> None:
    """Raises ValueError for a target that the family lacks."""
    shapes = projection_shapes(config)
    lacking = [target for target in lora.targets if target not in shapes]
    if lacking:
        raise ValueError(
            f"LoRA targets {', '.join(lacking)} are not in a {config.family} model, whose experts"
            f" and router stay frozen: choose from {', '.join(shapes)}"
        )


def init_lora(
    seeds: Int[Array, " R"], config: DecoderConfig, lora: LoraConfig
) -> dict[str, dict[str, Float[Array, "R L _ _"]]]:
    """One float32 adapter for each seed: A uniform in +-1/sqrt(inputs) (PEFT's kaiming_uniform with
    a = sqrt 5), B zero.

    A run's adapter is a function of its own seed, never of its neighbours. Returns {target: {"a":
    [R, L, inputs, rank], "b": [R, L, rank, outputs]}}. Raises ValueError for a target that the
    family lacks.
    """
    check_targets(config, lora)
    shapes = projection_shapes(config)

    def init_run(seed):
        key = jax.random.key(seed, impl="threefry2x32")
        adapter = {}
        for target in lora.targets:
            inputs, outputs = shapes[target]
            bound = 1 / math.sqrt(inputs)
            a = jax.random.uniform(
                jax.random.fold_in(key, TARGETS.index(target)),
                (config.n_layers, inputs, lora.rank),
                minval=-bound,
                maxval=bound,
            )
            adapter[target] = {"a": a, "b": jnp.zeros((config.n_layers, lora.rank, outputs))}
        return adapter

    return jax.vmap(init_run)(jnp.asarray(seeds))
