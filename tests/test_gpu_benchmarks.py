"""The GPU benchmarks where there is no GPU: what they count against torch, how rows survive what
fails, and a whole tiny run.
"""

import contextlib
import functools
import io
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
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import result_in_own_process
from benchmarks.gpu import peers, reinforced, rows, sampling, training
from benchmarks.gpu.__main__ import _table
from benchmarks.gpu.model import card, random_params
from benchmarks.gpu.sizes import FULL, TINY
from ip_jax.lab.reinforced.programs import Kind
from ip_jax.models.families import param_shapes
from ip_jax.rl.algorithm import passes_needed
from ip_jax.training.sharding import make_mesh

CONFIG = TINY.large.decoder_config()
BATCH, LENGTH = 2, 7
STEP = {
    "tokens_per_s": 300.0,
    "lower_s": 1.0,
    "compile_s": 4.0,
    "cache_hits": 0,
    "peak_bytes": 3 * 2**30,
    "planned_bytes": 2**30,
}
ROWS = {
    "compilation",
    "sft_speed",
    "sft_memory",
    "sampling_2",
    "sampling_4",
    "runs_together",
    "experts_training",
    "experts_decoding",
    "rl_iteration",
    "rl_rollout",
    "rl_update",
}
TOO_LARGE = {
    "error": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."
}


@pytest.fixture(scope="module")
def peer():
    return peers._model(TINY, TINY.large).eval()


def forward_flops(model, tokens: int, cache=None) -> tuple[int, object]:
    """(FLOPs that torch counts, the cache) of `tokens` new tokens in each of BATCH rows."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(
            torch.ones((BATCH, tokens), dtype=torch.long), past_key_values=cache, use_cache=True
        )
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
    # of one position in all rows
    cached = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)) // (
        LENGTH + 1
    )
    assert work.bytes == 2 * (2 * weights + positions * cached)


def test_prefill_counts_what_torch_does_token_by_token(peer):
    peer.set_attn_implementation("eager")
    cache, flops = None, 0
    for _ in range(LENGTH - 1):
        more, cache = forward_flops(peer, 1, cache)
        # no logits before the last prompt token
        flops += more - 2 * BATCH * CONFIG.vocab_size * CONFIG.d_model
    assert sampling.prefill_work(CONFIG, BATCH, LENGTH).flops == flops


def test_four_n_is_twice_the_products_of_a_forward_pass(peer):
    weights = sum(m.weight.numel() for m in peer.modules() if isinstance(m, torch.nn.Linear))
    assert training.flops_per_token(CONFIG) == 4 * weights


def test_the_full_shapes_have_the_published_numbers_of_parameters():
    def count(config):
        return sum(int(np.prod(shape)) for shape in param_shapes(config).values())

    assert count(FULL.large.decoder_config()) == 7_615_616_512
    assert count(FULL.small.decoder_config()) == 134_515_008
    assert count(FULL.reinforced.hf.decoder_config()) == 4_022_468_096
    assert FULL.row == 2048


@pytest.mark.slow
def test_random_params_are_the_models_arrays_in_bfloat16():
    params = random_params(CONFIG, "bfloat16", make_mesh())
    shapes = param_shapes(CONFIG)
    found = {path: functools.reduce(operator.getitem, path, params) for path in shapes}
    assert {path: array.shape for path, array in found.items()} == shapes
    assert len(jax.tree.leaves(params)) == len(shapes) and {
        array.dtype.name for array in found.values()
    } == {"bfloat16"}
    gate = np.asarray(found["layers", "gate"], np.float32)
    assert 0.019 < gate.std() < 0.021 and not np.array_equal(gate[0], gate[1])
    assert (np.asarray(found["layers", "attn_norm"], np.float32) == 1).all()


@pytest.mark.parametrize(
    "work, arguments, expected",
    [
        (int, ("seven",), "ValueError: invalid literal for int"),
        (os._exit, (3,), "exit code 3"),
        (time.sleep, (60,), "longer than 2 s"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_what_fails_in_its_own_process_is_a_sentence(work, arguments, expected):
    assert (
        expected
        in result_in_own_process(work, *arguments, limit_s=2 if work is time.sleep else 60)["error"]
    )


def test_a_process_has_the_given_environment_and_this_one_does_not():
    assert (
        result_in_own_process(
            os.getenv, "BENCHMARK_TEST", limit_s=60, environment={"BENCHMARK_TEST": "there"}
        )
        == "there"
    )
    assert "BENCHMARK_TEST" not in os.environ


def by_measure(answers: dict):
    """A `run` that answers by the measurement's name, a list one after the other, and the calls
    that it got.
    """
    calls = []

    def run(measure, *arguments, **environment):
        name = arguments[0] if measure is rows._peer else measure.__name__
        calls.append((name, arguments, environment))
        answer = answers[name]
        return answer.pop(0) if isinstance(answer, list) else answer

    return run, calls


def test_speed_takes_the_first_configuration_that_fits():
    run, calls = by_measure(
        {
            "measure_step": [TOO_LARGE, STEP],
            "measure_compilation": STEP | {"lower_s": 0.5, "compile_s": 0.25, "cache_hits": 1},
            "measure_training": {"tokens_per_s": 100.0, "best": "sdpa"},
        }
    )
    found = dict(rows.speed_and_compilation(run, TINY))
    assert found["sft_speed"]["too_large"] == ["products, 2 rows"]
    assert (
        found["sft_speed"]["measured"],
        found["sft_speed"]["peer"],
        found["sft_speed"]["ratio"],
    ) == (300, 100, 3)
    assert (found["compilation"]["measured"], found["compilation"]["from_cache_s"]) == (5, 0.75)
    (_, _, first), (_, arguments, second), (name, cached_arguments, cached) = calls[:3]
    assert name == "measure_compilation" and cached_arguments == arguments[:3]
    folders = [environment["JAX_COMPILATION_CACHE_DIR"] for environment in (first, second, cached)]
    assert folders[0] != folders[1] == folders[2]  # a cold compilation stays cold


def test_a_program_that_was_compiled_again_is_not_from_the_cache():
    run, _ = by_measure(
        {
            "measure_step": STEP,
            "measure_compilation": STEP,
            "measure_training": {"error": "ImportError: no torch"},
        }
    )
    found = dict(rows.speed_and_compilation(run, TINY))
    assert (
        "from_cache_s" not in found["compilation"]
        and "compiled it again" in found["compilation"]["from_cache_error"]
    )
    assert (
        found["sft_speed"]["measured"] == 300
        and found["sft_speed"]["peer_error"] == "ImportError: no torch"
    )


def test_where_nothing_fits_every_row_says_so():
    run, _ = by_measure(
        {
            "measure_step": TOO_LARGE,
            "measure_training": STEP,
            "measure_runs": TOO_LARGE,
            "measure_sampling": TOO_LARGE,
            "measure_generation": TOO_LARGE,
            "measure_mixture": TOO_LARGE,
            "measure_iteration": TOO_LARGE,
            "measure_loop": TOO_LARGE,
        }
    )
    found = {
        name: row for benchmark in rows.BENCHMARKS.values() for name, row in benchmark(run, TINY)
    }
    assert set(found) == ROWS
    assert all("RESOURCE_EXHAUSTED" in row["error"] for row in found.values())


def test_memory_is_measured_without_preallocation():
    run, calls = by_measure({"measure_step": STEP})
    (row,) = dict(rows.memory(run, TINY)).values()
    assert row["measured"] == 3 and calls[0][2] == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def test_the_peer_checkpoints_where_it_must(monkeypatch):
    """Memory that does not suffice for the first try of each size: the second computes activations
    again, and still trains.
    """
    real, tries = peers._fitting, []

    def fitting(work):
        tries.append(work)
        return None if len(tries) % 2 else real(work)

    monkeypatch.setattr(peers, "_fitting", fitting)
    found = peers.measure_training(TINY)
    assert set(found["options"]) == {
        f"sdpa, {rows} rows, gradient checkpointing" for rows in TINY.peer_rows
    }
    assert found["tokens_per_s"] == max(found["options"].values())


def test_an_iterations_rates_count_every_token_once():
    work = FULL.reinforced
    rates = work.rates(4.0, 12.0)
    assert (
        work.completions,
        rates["iteration_s"],
        rates["rollout_share"],
        rates["update_share"],
    ) == (256, 16, 0.25, 0.75)
    assert (rates["tokens_per_s"], rates["rollout_tokens_per_s"]) == (256 * 512 / 16, 256 * 512 / 4)
    assert rates["update_tokens_per_s"] == round(256 * 2048 / 12, 1)


def test_an_iteration_has_the_declared_shape_and_no_pass_before_its_update():
    work = FULL.reinforced
    assert not passes_needed(work.algorithm)
    kind = Kind(make_mesh(), work.hf.decoder_config(), work.rl, training.MODEL, work.algorithm)
    learned = reinforced.update_rows(kind, reinforced.rollout_plan(work)).policy
    # 64 rows of 3584 positions, at most 32768 positions at once
    assert learned.prompt.shape == (8, 1, 8, 1536)
    assert learned.tokens.shape == (8, 1, 8, 4, 512)


def test_reinforcement_learning_is_three_rows_of_two_measurements():
    work = TINY.reinforced
    run, calls = by_measure(
        {"measure_iteration": work.rates(1.0, 3.0), "measure_loop": work.rates(6.0, 6.0)}
    )
    found = dict(rows.reinforcement(run, TINY))
    assert [name for name, _, _ in calls] == ["measure_iteration", "measure_loop"]
    assert [
        found[f"rl_{part}"]["ratio"] for part in ("iteration", "rollout", "update")
    ] == pytest.approx([3, 6, 2], rel=0.01)
    assert (
        found["rl_rollout"]["share"],
        found["rl_update"]["share"],
        found["rl_update"]["peer_share"],
    ) == (0.25, 0.75, 0.5)


def test_the_peer_learns_from_every_completion_at_the_largest_size_that_fits(monkeypatch):
    real, tries = peers._fitting, []

    def fitting(work, warm_up, repeats):
        tries.append(work)
        return None if len(tries) in (1, 3) else real(work, warm_up, repeats)

    monkeypatch.setattr(peers, "_fitting", fitting)
    found = peers.measure_loop(TINY)
    assert (found["batch"], found["micro_batch"]) == (4, 2) and len(tries) == 4
    assert found["iteration_s"] == pytest.approx(found["rollout_s"] + found["update_s"], abs=0.002)


def test_the_peers_loss_is_of_the_completions_alone(peer):
    ids, advantage, new = torch.randint(1, 384, (2, 12)), torch.tensor([0.5, -2.0]), 5
    with torch.no_grad():
        log_probs = torch.log_softmax(peer(ids).logits.float() / 0.7, -1)[:, :-1].gather(
            2, ids[:, 1:, None]
        )[..., 0]
        expected = -(advantage * log_probs[:, -new:].sum(1)).sum()
        found = peers._policy_loss(peer, ids, advantage, new, 0.7)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_table_shows_both_parts_of_the_roofline():
    run, _ = by_measure(
        {
            "measure_sampling": {
                "tokens_per_s": 50.0,
                "of_roofline": 0.7,
                "of_overlapped_roofline": 0.65,
            },
            "measure_generation": dict.fromkeys("24", {"tokens_per_s": 10.0}),
        }
    )
    console = Console(width=200, file=io.StringIO())
    console.print(_table(dict(rows.sampling_rates(run, TINY)), ""))
    text = console.file.getvalue()
    assert text.count("0.7 of roofline") == text.count("0.65 of overlapped roofline") == 2


def test_full_sizes_are_refused_without_a_gpu():
    with pytest.raises(ValueError, match="need a GPU, and JAX sees a CPU"):
        card(FULL)


@pytest.mark.slow
def test_a_tiny_run_measures_everything():
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found[json.loads(line)["name"]] = json.loads(line)
    assert {re.sub("_cpu$", "", name) for name in found} == ROWS
    # a CPU does not tell its bytes in use
    assert all(row.get("measured") for name, row in found.items() if name != "sft_memory_cpu")
    assert all(
        found[name]["ratio"] > 0
        for name in (
            "sft_speed_cpu",
            "sampling_2_cpu",
            "sampling_4_cpu",
            "runs_together_cpu",
            "experts_training_cpu",
            "experts_decoding_cpu",
            "rl_iteration_cpu",
        )
    )
    assert found["rl_rollout_cpu"]["share"] + found["rl_update_cpu"]["share"] == pytest.approx(
        1, abs=0.002
    )
    assert found["compilation_cpu"]["from_cache_s"] > 0
