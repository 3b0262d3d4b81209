"""Our supervised step on one GPU: its speed, its memory, its compilation, and many runs in one
program.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax import monitoring
from jax.sharding import Mesh

from benchmarks.common import alternating, seconds
from benchmarks.gpu.model import one_device, random_params
from benchmarks.gpu.sizes import Sizes
from ip_jax.data.packing import PackedShape, pack_step, plan_shapes
from ip_jax.lab.experiment import ModelConfig, SftConfig
from ip_jax.lab.supervised import programs
from ip_jax.models.families import DecoderConfig
from ip_jax.models.flops import layer_matrix_params
from ip_jax.models.lora import LoraConfig
from ip_jax.planning.programs import lower_step
from ip_jax.planning.workload import Packed, Workload
from ip_jax.prompts.chat import Rendered
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import batch_sharding
from ip_jax.training.state import Batch

MODEL = ModelConfig("random weights", weights="bfloat16", activations="bfloat16", attention="auto")
TOKENS_PER_MICRO_BATCH = 65_536


def workload(
    config: DecoderConfig,
    mesh: Mesh,
    shapes: Sequence[PackedShape],
    runs: int,
    rank: int,
    remat: str,
) -> Workload:
    """What `ip-jax plan` and `ip-jax run` make the step of, for micro-batches of these shapes."""
    sft = SftConfig(
        1,
        1,
        1e-4,
        Schedule("constant"),
        lora=LoraConfig(rank=rank, alpha=2 * rank),
        remat=remat,
        tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
    )
    packing = tuple(
        Packed(shape, shape.micro_batches, shape.micro_batches * shape.rows) for shape in shapes
    )
    return Workload(config, MODEL, sft, mesh, runs, 1.0, 1, packing, (), "a benchmark's sizes")


def full_rows(sizes: Sizes, rows: int) -> PackedShape:
    """One micro-batch of rows without padding."""
    return PackedShape(
        sizes.row, sizes.segments, sizes.segment, sizes.row - sizes.segments, 1, rows
    )


def random_example(
    rng: np.random.Generator, length: int, vocab_size: int, prompt: int = 1
) -> Rendered:
    """Random token ids, all but the first `prompt` in the loss."""
    return Rendered(rng.integers(1, vocab_size, length, np.int32), np.arange(length) >= prompt)


def flops_per_token(config: DecoderConfig) -> float:
    """4 N: forward, and backward through activations alone (frozen weights have no gradient). N:
    elements of all layers' matrices and of the vocabulary projection, here of every position.
    Attention's scores and the adapters are left out.
    """
    return 4 * (layer_matrix_params(config) + config.vocab_size * config.d_model)


def measure_step(sizes: Sizes, remat: str, rows: int, steps: int, repeats: int) -> dict:
    """Tokens/s of a LoRA r=8 step on `rows` full rows, the seconds to compile it, and the device's
    largest bytes in use (None: not told).
    """
    mesh, shape = one_device(sizes), full_rows(sizes, rows)
    work = workload(sizes.large.decoder_config(), mesh, [shape], 1, 8, remat)
    timing, compiled = _compile(work)
    state, base = _start(work, random_params(work.config, MODEL.weights, mesh))
    rng = np.random.default_rng(0)
    batches = _on_device(
        mesh,
        [
            [
                random_example(rng, sizes.segment, work.config.vocab_size)
                for _ in range(rows * sizes.segments)
            ]
        ],
        [shape],
    )

    def run(count: int):
        nonlocal state
        for _ in range(count):
            state, metrics = compiled(state, base, batches)
        jax.block_until_ready(state)
        return metrics

    metrics = run(2)
    spent = [seconds(lambda: run(steps)) / steps for _ in range(repeats)]
    loss = float(metrics["loss"][0])
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss}: speed is only measured of steps that train")
    rate = rows * sizes.row / statistics.median(spent)
    planned = compiled.memory_analysis()
    return {
        "remat": remat,
        "rows": rows,
        "attention": _kernel(work),
        "tokens_per_s": round(rate, 1),
        "step_s": [round(s, 4) for s in spent],
        "tflops_per_s": round(rate * flops_per_token(work.config) / 1e12, 1),
        "tflops_of": " ".join(flops_per_token.__doc__.split()),
        "peak_bytes": (mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "planned_bytes": (
            planned.argument_size_in_bytes
            + planned.temp_size_in_bytes
            + planned.output_size_in_bytes
            - planned.alias_size_in_bytes
        ),
        "loss": round(loss, 3),
        **timing,
    }


def measure_compilation(sizes: Sizes, remat: str, rows: int) -> dict:
    """Seconds to trace, lower and compile the step of `measure_step`, from shapes alone, and how
    many programs came from the persistent cache.
    """
    shape = full_rows(sizes, rows)
    timing, _ = _compile(
        workload(sizes.large.decoder_config(), one_device(sizes), [shape], 1, 8, remat)
    )
    return timing


def _compile(work: Workload) -> tuple[dict, jax.stages.Compiled]:
    hits = []

    def listen(event, **_):
        return hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None

    start = time.perf_counter()
    lowered = lower_step(work)
    middle = time.perf_counter()
    monitoring.register_event_listener(listen)  # only now: lowering computes on the way
    compiled = lowered.compile()
    end = time.perf_counter()
    monitoring.unregister_event_listener(listen)
    return {
        "lower_s": round(middle - start, 2),
        "compile_s": round(end - middle, 2),
        "cache_hits": len(hits),
    }, compiled


def _program(work: Workload) -> programs.Program:
    return programs.Program(work.mesh, work.config, work.sft, work.model)


def _kernel(work: Workload) -> str:
    return programs.attention_kernel(_program(work))


def _start(work: Workload, params: dict) -> tuple:
    return programs.initial_state(_program(work), params, range(work.runs))[1:]


def _on_device(
    mesh: Mesh, examples: list[list[Rendered]], shapes: Sequence[PackedShape]
) -> tuple[Batch, ...]:
    return jax.device_put(
        tuple(Batch(**arrays) for arrays in pack_step(examples, shapes)[0]), batch_sharding(mesh)
    )


def measure_runs(sizes: Sizes) -> dict:
    """Total tokens/s of `sizes.runs` runs of the small model in one program, and of the same runs
    one after another, in turns.
    """
    mesh, rng, config = one_device(sizes), np.random.default_rng(0), sizes.small.decoder_config()
    drawn = rng.integers(*sizes.lengths, (sizes.steps, sizes.runs, sizes.examples), endpoint=True)
    data = [
        [[random_example(rng, n, config.vocab_size, n // 2) for n in run] for run in step]
        for step in drawn.tolist()
    ]
    params = random_params(config, MODEL.weights, mesh)
    work, steps = _packed_steps(config, mesh, data)
    together = _Runs(steps, *_start(work, params))
    work_of_one, steps_of_one = _packed_steps(
        config, mesh, [[run] for step in data for run in step]
    )
    apart = [
        _Runs(steps_of_one[r :: sizes.runs], *_start(work_of_one, params))
        for r in range(sizes.runs)
    ]

    def one_after_another():
        return [run.train() for run in apart]

    together.train()
    one_after_another()
    result = alternating(together.train, one_after_another, sizes.repeats)
    tokens = int(drawn.sum())
    return {
        "runs": sizes.runs,
        "steps": sizes.steps,
        "tokens": tokens,
        "attention": _kernel(work),
        **result,
        "tokens_per_s": round(tokens / statistics.median(result["ours_s"]), 1),
        "one_after_another_tokens_per_s": round(tokens / statistics.median(result["peer_s"]), 1),
    }


def _packed_steps(
    config: DecoderConfig, mesh: Mesh, data: list[list[list[Rendered]]]
) -> tuple[Workload, list[tuple]]:
    """(the workload, (compiled step, batches on the device) of each step) of `data`, the examples
    of each step and run, packed as a training of these steps is.
    """

    def count(of):
        return np.array([[[of(example) for example in run] for run in step] for step in data])

    lengths, responses = (
        count(lambda example: len(example.token_ids)),
        count(lambda example: int(example.response_mask.sum())),
    )
    shapes = plan_shapes(lengths, responses, TOKENS_PER_MICRO_BATCH)
    work = workload(config, mesh, shapes, len(data[0]), 16, "products")
    _, compiled = _compile(work)
    return work, [(compiled, _on_device(mesh, step, shapes)) for step in data]


@dataclasses.dataclass
class _Runs:
    """Runs that train in one program; the state is donated to each step."""

    steps: list[tuple]  # (compiled step, batches)
    state: object
    base: object

    def train(self) -> None:
        """All steps once."""
        for step, batch in self.steps:
            self.state, _ = step(self.state, self.base, batch)
        jax.block_until_ready(self.state)
