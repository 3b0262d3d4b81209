"""What every benchmark shares: alternating repeats, the peer in a process of its own, the machine's description, one JSON file a result."""
import contextlib
import datetime
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

RESULTS = pathlib.Path(__file__).parent / "results"


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternating(ours: Callable[[], None], peer: Callable[[], None], repeats: int = 5) -> dict:
    """Seconds of both, in turns, and the median of the pairwise ratios peer / ours (above 1: ours is faster)."""
    pairs = [(seconds(ours), seconds(peer)) for _ in range(repeats)]
    return {
        "ours_s": [round(a, 3) for a, _ in pairs], "peer_s": [round(b, 3) for _, b in pairs],
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
    }


@contextlib.contextmanager
def in_own_process(make: Callable[..., Callable[[], None]], *arguments):
    """A function that runs make(*arguments)() once in a process of its own, where neither side's memory and threads are in the other's way."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()  # else a child that died would be waited for
    here.recv()

    def work():
        here.send("go")
        here.recv()

    yield work
    here.send("stop")
    process.join()


def _serve(connection, make, arguments):
    work = make(*arguments)
    connection.send("ready")
    while connection.recv() == "go":
        work()
        connection.send("done")


def peer_model(dtype: str, attention: str):
    """SmolLM2-135M in HF transformers with dense random weights, on which its speed does not depend (opened from the GGUF they stay packed)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True, attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def save(name: str, result: dict) -> None:
    """Writes benchmarks/results/NAME.json with the machine and the versions, and prints the result."""
    import jax

    machine = {
        "processor": _processor(), "cores": os.cpu_count(), "devices": [d.device_kind for d in jax.devices()],
        "python": platform.python_version(), **{package: version(package) for package in ("jax", "jaxlib", "flax", "transformers")},
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"name": name, **result, "machine": machine}, indent=2) + "\n")
    print(json.dumps({"name": name, **result}))


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()
