"""What the GPU benchmarks measure, in full and as a tiny trial of the same code that runs on a CPU."""
import dataclasses

from configs.sft_shapes import QWEN2_7B
from ip_jax.planning.workload import HfFields

SMOLLM2 = HfFields(  # HuggingFaceTB/SmolLM2-135M-Instruct, config.json
    "LlamaForCausalLM", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens, rows and repeats of every benchmark. `platform`: where it must run, None for anywhere."""

    platform: str | None
    large: HfFields
    small: HfFields
    segment: int = 512  # tokens of one example, all of them in the loss but the first
    segments: int = 4  # examples of one packed row
    speed: tuple[tuple[str, int], ...] = (("products", 8), ("products", 4), ("attention", 8), ("full", 8))  # (remat, rows), the first that fits
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

    @property
    def row(self) -> int:
        """Tokens of one packed row."""
        return self.segment * self.segments


FULL = Sizes("gpu", QWEN2_7B, SMOLLM2)
_SMALL = dict(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
TINY = Sizes(
    None, dataclasses.replace(QWEN2_7B, **_SMALL), dataclasses.replace(SMOLLM2, **_SMALL), segment=16, speed=(("products", 2), ("full", 2)), memory_rows=2,
    steps=2, repeats=2, peer_rows=(1, 2), prompt=16, new=8, batches=(2, 4), copied=2**20, matmul=128, runs=3, examples=2, lengths=(8, 24),
)  # fmt: skip
