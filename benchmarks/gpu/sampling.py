"""Our sampler on one GPU, and the roofline of the same work from a bandwidth and a peak that are
measured here.
"""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.common import seconds
from benchmarks.gpu.model import one_device, random_params
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.training import MODEL
from ip_jax.lab.experiment import EvalConfig
from ip_jax.lab.supervised import programs
from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig
from ip_jax.models.flops import layer_matrix_params
from ip_jax.sampling.sampler import Request, sample

ITEM = 2  # bytes of a weight, key or value: bfloat16


@dataclasses.dataclass(frozen=True)
class Work:
    """What one phase of sampling cannot do without: FLOPs, and bytes read from the device's
    memory.
    """

    flops: float
    bytes: float

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The roofline: the longer of the two alone."""
        return max(self.flops / peak, self.bytes / bandwidth)


def prefill_work(config: DecoderConfig, batch: int, prompt: int) -> Work:
    """All prompt tokens but the last, which the first decoding step is fed: weights read once, no
    vocabulary.
    """
    length = prompt - 1
    pairs = length * (length + 1) / 2
    flops = (
        2 * layer_matrix_params(config) * length
        + 4 * config.n_heads * config.head_dim * config.n_layers * pairs
    )
    return Work(
        batch * flops, ITEM * layer_matrix_params(config) + batch * length * _position_bytes(config)
    )


def decode_work(config: DecoderConfig, batch: int, prompt: int, new: int) -> Work:
    """`new` steps: each reads all weights, the vocabulary projection included, and the keys and
    values of all positions so far.
    """
    weights = layer_matrix_params(config) + config.vocab_size * config.d_model
    # the last prompt token and those sampled so far see themselves too
    positions = new * prompt + new * (new - 1) / 2
    flops = 2 * weights * new + 4 * config.n_heads * config.head_dim * config.n_layers * positions
    return Work(batch * flops, new * ITEM * weights + batch * positions * _position_bytes(config))


def _position_bytes(config: DecoderConfig) -> int:
    return 2 * ITEM * config.n_layers * config.n_kv_heads * config.head_dim


def measure_sampling(sizes: Sizes, batch: int) -> dict:
    """Tokens/s of `batch` prompts with one sample each, all decoded at once, and the part of the
    roofline that this is.

    The roofline is the sum over the two phases, prefill before decoding, of max(bytes / bandwidth,
    FLOPs / peak); `of_overlapped_roofline` is against max(...) of the sums, which would need a
    prefill that costs nothing beside decoding.
    """
    mesh, config = one_device(sizes), sizes.large.decoder_config()
    bandwidth, peak = copy_bandwidth(mesh, sizes.copied), matmul_peak(mesh, sizes.matmul)
    decoder = split_decoder(config, random_params(config, MODEL.weights, mesh))
    rng = np.random.default_rng(0)
    queue = [
        Request(
            rng.integers(1, config.vocab_size, sizes.prompt, np.int32),
            i,
            temperature=1.0,
            max_new_tokens=sizes.new,
        )
        for i in range(batch)
    ]
    options = programs.sampler_options(
        mesh, config, MODEL, EvalConfig(full_steps=(), slots=batch), stop_ids=(), room=(1, 1)
    )

    def work():
        (answers,) = sample(*decoder, [queue], options)
        assert (
            sum(len(answer.token_ids) for request in answers for answer in request)
            == batch * sizes.new
        )

    first = seconds(work)
    spent = [seconds(work) for _ in range(sizes.repeats)]
    phases = (
        prefill_work(config, batch, sizes.prompt),
        decode_work(config, batch, sizes.prompt, sizes.new),
    )
    roofline = sum(phase.seconds(peak, bandwidth) for phase in phases)
    overlapped = Work(
        sum(phase.flops for phase in phases), sum(phase.bytes for phase in phases)
    ).seconds(peak, bandwidth)
    took = statistics.median(spent)
    return {
        "tokens_per_s": round(batch * sizes.new / took, 1),
        "seconds": [round(s, 4) for s in spent],
        "first_call_s": round(first, 1),
        "of_roofline": round(roofline / took, 4),
        "of_overlapped_roofline": round(overlapped / took, 4),
        "roofline_s": round(roofline, 4),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "matmul_tflops_per_s": round(peak / 1e12, 2),
        "dtype": options.dtype,
        "peak_bytes": (mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def copy_bandwidth(mesh: Mesh, size: int) -> float:
    """Bytes/s, read and written, of the fastest of ten copies of an array of `size` bytes."""
    x = jax.device_put(jnp.zeros(size // 4, jnp.float32), mesh.devices.flat[0])
    copy = jax.jit(lambda x: x + 1)
    return 2 * size / _fastest(lambda: copy(x))


def matmul_peak(mesh: Mesh, side: int) -> float:
    """FLOP/s of the fastest of ten bfloat16 products of two square matrices."""
    x = jax.device_put(jnp.ones((side, side), jnp.bfloat16), mesh.devices.flat[0])
    multiply = jax.jit(lambda x: x @ x)
    return 2 * side**3 / _fastest(lambda: multiply(x))


def _fastest(work) -> float:
    jax.block_until_ready(work())
    return min(seconds(lambda: jax.block_until_ready(work())) for _ in range(10))
