"""What every benchmark shares: alternating repeats, work in a process of its own, the machine's
description, one JSON file a result.
"""

import contextlib
import datetime
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from unittest import mock

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "transformers", "torch", "peft")


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternating(ours: Callable[[], None], peer: Callable[[], None], repeats: int = 5) -> dict:
    """Seconds of both, in turns, to four digits, and the median of the pairwise ratios peer / ours
    (above 1: ours is faster).
    """
    pairs = [(seconds(ours), seconds(peer)) for _ in range(repeats)]

    # not decimals: tiny work takes less than a millisecond
    def digits(value):
        return float(f"{value:.4g}")

    return {
        "ours_s": [digits(a) for a, _ in pairs],
        "peer_s": [digits(b) for _, b in pairs],
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
    }


def command(config: str, folder: pathlib.Path, environment: dict[str, str]) -> dict:
    """Minutes and peak memory of `ip-jax run` of a config's first preset into `folder`, in a
    process of its own, as a user runs it.
    """
    arguments = [sys.executable, "-m", "ip_jax.cli", "run", config, "--out", str(folder)]
    took = seconds(lambda: subprocess.run(arguments, check=True, env=os.environ | environment))
    return {
        "minutes": round(took / 60, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
    }


@contextlib.contextmanager
def in_own_process(make: Callable[..., Callable[[], None]], *arguments):
    """A function that runs make(*arguments)() once in a process of its own, where neither side's
    memory and threads are in the other's way.
    """
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


def result_in_own_process(
    work: Callable[..., dict], *arguments, limit_s: float, environment: dict[str, str] | None = None
) -> dict:
    """What work(*arguments) returns in a process of its own, or {"error": one sentence} where it
    raises, dies or takes longer than `limit_s`.

    All of its memory, a GPU's too, is given back at the end. `environment` is added to the
    process's variables.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(there, work, arguments), daemon=True)
    with mock.patch.dict(os.environ, environment or {}):
        process.start()
    there.close()  # else a child that died would be waited for
    try:
        result = (
            here.recv()
            if here.poll(max(limit_s, 0))
            else {"error": f"it took longer than {limit_s:.0f} s"}
        )
    except EOFError:
        process.join()
        result = {"error": f"its process ended with exit code {process.exitcode}"}
    process.kill()
    process.join()
    return result


def _send_result(connection, work, arguments):
    try:
        result = work(*arguments)
    # whatever it is, it is this benchmark's row and not the end of the others
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        result = {"error": f"{type(error).__name__}: {first_line}"[:300]}
    connection.send(result)


def peer_model(dtype: str, attention: str):
    """SmolLM2-135M in HF transformers with dense random weights, on which its speed does not depend
    (opened from the GGUF they stay packed).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def save(
    name: str, result: dict, devices: list[str] | None = None, folder: pathlib.Path = RESULTS
) -> None:
    """Writes NAME.json into `folder` with the machine and the versions, and prints the result.
    `devices`: what it ran on, by default this process's.
    """
    folder.mkdir(exist_ok=True)
    machine = describe_machine(devices or _own_devices())
    (folder / f"{name}.json").write_text(
        json.dumps({"name": name, **result, "machine": machine}, indent=2) + "\n"
    )
    print(json.dumps({"name": name, **result}))


def describe_machine(devices: list[str]) -> dict:
    """Processor, devices and the versions of what is compared, as far as it is installed."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "devices": devices,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES if importlib.util.find_spec(package)},
        "date": datetime.date.today().isoformat(),
    }


def _own_devices() -> list[str]:
    import jax

    return [device.device_kind for device in jax.devices()]


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()
