"""The GPU benchmarks where there is no GPU: what they count against torch, how rows survive what fails, and a whole tiny run."""
import contextlib
import functools
import json
import operator
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import result_in_own_process
from benchmarks.gpu import peers, rows, sampling, training
from benchmarks.gpu.model import card, random_params
from benchmarks.gpu.sizes import FULL, TINY
from ip_jax.models.families import param_shapes
from ip_jax.training.sharding import make_mesh

CONFIG = TINY.large.decoder_config()
BATCH, LENGTH = 2, 7
STEP = {"tokens_per_s": 300.0, "lower_s": 1.0, "compile_s": 4.0, "cache_hits": 0, "peak_bytes": 3 * 2**30, "planned_bytes": 2**30}
TOO_LARGE = {"error": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."}


@pytest.fixture(scope="module")
def peer():
    return peers._model(TINY).eval()


def forward_flops(model, tokens: int, cache=None) -> tuple[int, object]:
    """(FLOPs that torch counts, the cache) of `tokens` new tokens in each of BATCH rows."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(torch.ones((BATCH, tokens), dtype=torch.long), past_key_values=cache, use_cache=True)
    return counter.get_total_flops(), out.past_key_values


def test_decoding_counts_what_torch_does(peer):
    peer.set_attn_implementation("eager")  # whose products are counted on any backend
    _, cache = forward_flops(peer, LENGTH - 1)
    flops = 0
    for _ in range(2):
        more, cache = forward_flops(peer, 1, cache)
        flops += more
    work = sampling.decode_work(CONFIG, BATCH, LENGTH, 2)
    assert work.flops == flops
    weights = sum(m.weight.numel() for m in peer.modules() if isinstance(m, torch.nn.Linear))
    positions = LENGTH + LENGTH + 1  # after the first step, and after the second
    cached = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)) // (LENGTH + 1)  # of one position in all rows
    assert work.bytes == 2 * (2 * weights + positions * cached)


def test_prefill_counts_what_torch_does_token_by_token(peer):
    peer.set_attn_implementation("eager")
    cache, flops = None, 0
    for _ in range(LENGTH - 1):
        more, cache = forward_flops(peer, 1, cache)
        flops += more - 2 * BATCH * CONFIG.vocab_size * CONFIG.d_model  # no logits before the last prompt token
    assert sampling.prefill_work(CONFIG, BATCH, LENGTH).flops == flops


def test_four_n_is_twice_the_products_of_a_forward_pass(peer):
    weights = sum(m.weight.numel() for m in peer.modules() if isinstance(m, torch.nn.Linear))
    assert training.flops_per_token(CONFIG) == 4 * weights


def test_the_full_shapes_have_the_published_numbers_of_parameters():
    count = lambda config: sum(int(np.prod(shape)) for shape in param_shapes(config).values())  # noqa: E731
    assert count(FULL.large.decoder_config()) == 7_615_616_512
    assert count(FULL.small.decoder_config()) == 134_515_008
    assert FULL.row == 2048


def test_random_params_are_the_models_arrays_in_bfloat16():
    params = random_params(CONFIG, "bfloat16", make_mesh())
    shapes = param_shapes(CONFIG)
    found = {path: functools.reduce(operator.getitem, path, params) for path in shapes}
    assert {path: array.shape for path, array in found.items()} == shapes
    assert len(jax.tree.leaves(params)) == len(shapes) and {array.dtype.name for array in found.values()} == {"bfloat16"}
    gate = np.asarray(found["layers", "gate"], np.float32)
    assert 0.019 < gate.std() < 0.021 and not np.array_equal(gate[0], gate[1])
    assert (np.asarray(found["layers", "attn_norm"], np.float32) == 1).all()


@pytest.mark.parametrize(
    "work, arguments, expected",
    [(int, ("seven",), "ValueError: invalid literal for int"), (os._exit, (3,), "exit code 3"), (time.sleep, (60,), "longer than 2 s")],
    ids=["raises", "dies", "hangs"],
)
def test_what_fails_in_its_own_process_is_a_sentence(work, arguments, expected):
    assert expected in result_in_own_process(work, *arguments, limit_s=2 if work is time.sleep else 60)["error"]


def test_a_process_has_the_given_environment_and_this_one_does_not():
    assert result_in_own_process(os.getenv, "BENCHMARK_TEST", limit_s=60, environment={"BENCHMARK_TEST": "there"}) == "there"
    assert "BENCHMARK_TEST" not in os.environ


def by_measure(answers: dict):
    """A `run` that answers by the measurement's name, a list one after the other, and the calls that it got."""
    calls = []

    def run(measure, *arguments, **environment):
        name = arguments[0] if measure is rows._peer else measure.__name__
        calls.append((name, arguments, environment))
        answer = answers[name]
        return answer.pop(0) if isinstance(answer, list) else answer

    return run, calls


def test_speed_takes_the_first_configuration_that_fits():
    run, calls = by_measure({
        "measure_step": [TOO_LARGE, STEP], "measure_compilation": STEP | {"lower_s": 0.5, "compile_s": 0.25, "cache_hits": 1},
        "measure_training": {"tokens_per_s": 100.0, "best": "sdpa"},
    })  # fmt: skip
    found = dict(rows.speed_and_compilation(run, TINY))
    assert found["sft_speed"]["too_large"] == ["products, 2 rows"]
    assert (found["sft_speed"]["measured"], found["sft_speed"]["peer"], found["sft_speed"]["ratio"]) == (300, 100, 3)
    assert (found["compilation"]["measured"], found["compilation"]["from_cache_s"]) == (5, 0.75)
    (_, _, first), (_, arguments, second), (name, cached_arguments, cached) = calls[:3]
    assert name == "measure_compilation" and cached_arguments == arguments[:3]
    folders = [environment["JAX_COMPILATION_CACHE_DIR"] for environment in (first, second, cached)]
    assert folders[0] != folders[1] == folders[2]  # a cold compilation stays cold


def test_a_program_that_was_compiled_again_is_not_from_the_cache():
    run, _ = by_measure({"measure_step": STEP, "measure_compilation": STEP, "measure_training": {"error": "ImportError: no torch"}})
    found = dict(rows.speed_and_compilation(run, TINY))
    assert "from_cache_s" not in found["compilation"] and "compiled it again" in found["compilation"]["from_cache_error"]
    assert found["sft_speed"]["measured"] == 300 and found["sft_speed"]["peer_error"] == "ImportError: no torch"


def test_where_nothing_fits_every_row_says_so():
    run, _ = by_measure({
        "measure_step": TOO_LARGE, "measure_training": STEP, "measure_runs": TOO_LARGE, "measure_sampling": TOO_LARGE, "measure_generation": TOO_LARGE,
    })  # fmt: skip
    found = {name: row for benchmark in rows.BENCHMARKS.values() for name, row in benchmark(run, TINY)}
    assert set(found) == {"compilation", "sft_speed", "sft_memory", "sampling_2", "sampling_4", "runs_together"}
    assert all("RESOURCE_EXHAUSTED" in row["error"] for row in found.values())


def test_memory_is_measured_without_preallocation():
    run, calls = by_measure({"measure_step": STEP})
    (row,) = dict(rows.memory(run, TINY)).values()
    assert row["measured"] == 3 and calls[0][2] == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def test_the_peer_checkpoints_where_it_must(monkeypatch):
    """Memory that does not suffice for the first try of each size: the second computes activations again, and still trains."""
    real, tries = peers._fitting, []

    def fitting(work):
        tries.append(work)
        return None if len(tries) % 2 else real(work)

    monkeypatch.setattr(peers, "_fitting", fitting)
    found = peers.measure_training(TINY)
    assert set(found["options"]) == {f"sdpa, {rows} rows, gradient checkpointing" for rows in TINY.peer_rows}
    assert found["tokens_per_s"] == max(found["options"].values())


def test_full_sizes_are_refused_without_a_gpu():
    with pytest.raises(ValueError, match="need a GPU, and JAX sees a CPU"):
        card(FULL)


@pytest.mark.slow
def test_a_tiny_run_measures_everything():
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--tiny"], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found[json.loads(line)["name"]] = json.loads(line)
    assert {re.sub("_cpu$", "", name) for name in found} == {"compilation", "sft_speed", "sft_memory", "sampling_2", "sampling_4", "runs_together"}
    assert all(row.get("measured") for name, row in found.items() if name != "sft_memory_cpu")  # a CPU does not tell its bytes in use
    assert all(found[name]["ratio"] > 0 for name in ("sft_speed_cpu", "sampling_2_cpu", "sampling_4_cpu", "runs_together_cpu"))
    assert found["compilation_cpu"]["from_cache_s"] > 0
