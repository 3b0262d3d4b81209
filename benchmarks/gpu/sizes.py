"""What the GPU benchmarks measure, in full and as a tiny trial of the same code that runs on a
CPU.
"""

import dataclasses

from configs.rl_shapes import PRESETS
from configs.sft_shapes import MIXTRAL_8X7B, QWEN2_7B
from ip_jax.lab.reinforced.plan import RlConfig
from ip_jax.planning.workload import HfFields
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.estimators import Kl

SMOLLM2 = HfFields(  # HuggingFaceTB/SmolLM2-135M-Instruct, config.json
    "LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=1e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class RlSizes:
    """One iteration of reinforcement learning. `prompt`: tokens of every prompt; `peer_batches`,
    `peer_rows`: completions that the peer samples, and learns from, at once, the first of each that
    fits.
    """

    hf: HfFields
    rl: RlConfig
    algorithm: Algorithm
    prompt: int = 1536
    peer_batches: tuple[int, ...] = (256, 128, 64)
    peer_rows: tuple[int, ...] = (16, 8, 4)

    @property
    def completions(self) -> int:
        """Of one iteration."""
        return self.rl.groups * self.rl.samples

    @property
    def learned_tokens(self) -> int:
        """Prompt and completion of all completions, each with a prompt of its own."""
        return self.completions * (self.prompt + self.rl.max_new_tokens)

    def rates(self, rollout_s: float, update_s: float) -> dict[str, float]:
        """What both sides report of an iteration: seconds, their shares, and tokens/s.
        `tokens_per_s`: completion tokens of the whole iteration.
        """
        sampled, both = self.completions * self.rl.max_new_tokens, rollout_s + update_s
        return {
            "tokens_per_s": round(sampled / both, 1),
            "rollout_tokens_per_s": round(sampled / rollout_s, 1),
            "update_tokens_per_s": round(self.learned_tokens / update_s, 1),
            "iteration_s": round(both, 3),
            "rollout_s": round(rollout_s, 3),
            "update_s": round(update_s, 3),
            "rollout_share": round(rollout_s / both, 3),
            "update_share": round(update_s / both, 3),
        }


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens, rows and repeats of every benchmark. `platform`: where it must run, None for
    anywhere.
    """

    platform: str | None
    large: HfFields
    small: HfFields
    mixture: HfFields
    reinforced: RlSizes
    segment: int = 512  # tokens of one example, all of them in the loss but the first
    segments: int = 4  # examples of one packed row
    # (remat, rows), the first that fits
    speed: tuple[tuple[str, int], ...] = (
        ("products", 8),
        ("products", 4),
        ("attention", 8),
        ("full", 8),
    )
    memory_rows: int = 16
    steps: int = 5  # timed together, in each of the repeats
    repeats: int = 3
    peer_rows: tuple[int, ...] = (2, 4, 8)
    prompt: int = 512
    new: int = 256
    batches: tuple[int, ...] = (64, 256)
    copied: int = 2**32  # bytes of the array whose copy gives the bandwidth
    matmul: int = 8192  # side of the square product that gives the peak
    runs: int = 12
    examples: int = 8  # of one step and run
    lengths: tuple[int, int] = (150, 260)  # of GCD examples, in tokens
    # of a micro-batch in training, of a decoding step
    mixture_tokens: tuple[int, int] = (16_384, 64)
    mixture_calls: tuple[int, int] = (10, 300)  # of either, timed together

    @property
    def row(self) -> int:
        """Tokens of one packed row."""
        return self.segment * self.segments


_PUBLISHED = PRESETS["qwen3-4b"]
_REINFORCED = RlSizes(
    _PUBLISHED.hf,
    # random weights say nothing definite: top-p would sort the whole vocabulary for every token, as
    # it need not for a trained model
    dataclasses.replace(_PUBLISHED.rl, max_new_tokens=512, max_length=2048, top_p=1.0),
    dataclasses.replace(_PUBLISHED.algorithm, kl=Kl()),
)
FULL = Sizes("gpu", QWEN2_7B, SMOLLM2, MIXTRAL_8X7B, _REINFORCED)
_SMALL = dict(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
_SMALL_REINFORCED = RlSizes(
    dataclasses.replace(_PUBLISHED.hf, head_dim=16, **_SMALL),
    dataclasses.replace(
        _REINFORCED.rl,
        groups=2,
        samples=4,
        max_new_tokens=8,
        max_length=24,
        samples_per_row=2,
        tokens_per_micro_batch=64,
    ),
    _REINFORCED.algorithm,
    prompt=16,
    peer_batches=(8, 4),
    peer_rows=(4, 2),
)
TINY = Sizes(
    None,
    dataclasses.replace(QWEN2_7B, **_SMALL),
    dataclasses.replace(SMOLLM2, **_SMALL),
    dataclasses.replace(MIXTRAL_8X7B, **_SMALL),
    _SMALL_REINFORCED,
    segment=16,
    speed=(("products", 2), ("full", 2)),
    memory_rows=2,
    steps=2,
    repeats=2,
    peer_rows=(1, 2),
    prompt=16,
    new=8,
    batches=(2, 4),
    copied=2**20,
    matmul=128,
    runs=3,
    examples=2,
    lengths=(8, 24),
    mixture_tokens=(64, 4),
    mixture_calls=(2, 2),
)
