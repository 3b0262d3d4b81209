"""The benchmarks: which measurements each needs, each in a process of its own, and what of them
stands in the table beside its target.
"""

import functools
import re
import tempfile
from collections.abc import Callable, Iterator

from benchmarks.gpu import experts, reinforced, sampling, training
from benchmarks.gpu.sizes import Sizes

# run(measure, *arguments, **environment): see common.result_in_own_process
Run = Callable[..., dict]
GIB = 2**30
COMPILATION = {
    "what": "the speed configuration's step, from tracing to the compiled program",
    "unit": "s",
    "target": "<= 60",
}


def speed_and_compilation(run: Run, sizes: Sizes) -> Iterator[tuple[str, dict]]:
    """The speed configuration against HF + PEFT, and its step's compilation, first and from the
    persistent cache in a fresh process.
    """
    too_large = []
    for remat, rows in sizes.speed:
        with tempfile.TemporaryDirectory() as folder:
            caching = dict(
                JAX_COMPILATION_CACHE_DIR=folder, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
            )
            ours = run(
                training.measure_step,
                sizes,
                remat,
                rows,
                sizes.steps,
                sizes.repeats,
                XLA_CLIENT_MEM_FRACTION="0.93",
                **caching,
            )
            if not _out_of_memory(ours):
                yield (
                    "compilation",
                    _compilation(
                        ours,
                        functools.partial(
                            run, training.measure_compilation, sizes, remat, rows, **caching
                        ),
                    ),
                )
                break
        too_large.append(f"{remat}, {rows} rows")
    else:
        yield "compilation", COMPILATION | ours
    yield (
        "sft_speed",
        _against(
            ours,
            run(_peer, "measure_training", sizes),
            what=(
                f"LoRA r=8 on 7 targets, rows of {sizes.row} tokens in {sizes.segments} examples,"
                " every position counts"
            ),
            too_large=too_large,
            number="tokens_per_s",
            unit="tokens/s",
            target=">= 14000",
            ratio_target=">= 2",
        ),
    )


def _compilation(first: dict, again: Callable[[], dict]) -> dict:
    if "error" in first:
        return COMPILATION | first

    def seconds(timing):
        return round(timing["lower_s"] + timing["compile_s"], 2)

    row = COMPILATION | {
        "measured": seconds(first),
        "first": {name: first[name] for name in ("lower_s", "compile_s", "cache_hits")},
    }
    cached = again()
    if "error" in cached:
        return row | {"from_cache_error": cached["error"]}
    if not cached["cache_hits"]:
        return row | {
            "from_cache_error": (
                "a fresh process compiled it again: the persistent cache had no such program"
            ),
            "again": cached,
        }
    return row | {"from_cache_s": seconds(cached), "from_cache_target": "<= 10", "again": cached}


def memory(run: Run, sizes: Sizes) -> Iterator[tuple[str, dict]]:
    """The memory configuration: the largest number of bytes that were in use at once, weights
    included.
    """
    ours = run(
        training.measure_step,
        sizes,
        "full",
        sizes.memory_rows,
        1,
        1,
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )
    row = {
        "what": f"full remat, {sizes.memory_rows} rows of {sizes.row} tokens",
        "unit": "GiB",
        "target": "<= 40",
    }
    if "error" in ours:
        yield "sft_memory", row | ours
    else:
        peak = ours["peak_bytes"]
        yield (
            "sft_memory",
            row
            | {
                "measured": peak and round(peak / GIB, 2),
                "planned_gib": round(ours["planned_bytes"] / GIB, 2),
                "ours": ours,
            },
        )


def sampling_rates(run: Run, sizes: Sizes) -> Iterator[tuple[str, dict]]:
    """Each batch size against the roofline and HF generate."""
    ours = {batch: run(sampling.measure_sampling, sizes, batch) for batch in sizes.batches}
    peers = run(_peer, "measure_generation", sizes)
    for batch in sizes.batches:
        row = _against(
            ours[batch],
            peers.get(str(batch), peers),
            what=f"{batch} prompts of {sizes.prompt} tokens, {sizes.new} new, decoded at once",
            number="tokens_per_s",
            unit="tokens/s",
            target=None,
            ratio_target=">= 5",
        )
        if "error" not in row:
            for part in ("of_roofline", "of_overlapped_roofline"):
                row |= {part: ours[batch][part], f"{part}_target": ">= 0.6"}
        yield f"sampling_{batch}", row


def runs_together(run: Run, sizes: Sizes) -> Iterator[tuple[str, dict]]:
    """Many runs in one program against the same ones one after another: total tokens/s."""
    ours = run(training.measure_runs, sizes)
    what = (
        f"{sizes.runs} runs of the small model in one program, {sizes.examples} examples a step and"
        " run, against one after another"
    )
    if "error" in ours:
        yield "runs_together", {"what": what, **ours}
    else:
        yield (
            "runs_together",
            {
                "what": what,
                "unit": "tokens/s",
                "measured": ours["tokens_per_s"],
                "target": None,
                "peer": ours["one_after_another_tokens_per_s"],
                "ratio": ours["ratio"],
                "ratio_target": ">= 3",
                "ours": ours,
            },
        )


def mixture(run: Run, sizes: Sizes) -> Iterator[tuple[str, dict]]:
    """One layer's mixture of experts: the Pallas kernel against XLA's products."""
    for name, tokens, calls, with_gradient in zip(
        ("training", "decoding"),
        sizes.mixture_tokens,
        sizes.mixture_calls,
        (True, False),
        strict=True,
    ):
        ours = run(experts.measure_mixture, sizes, tokens, calls, with_gradient)
        passes = "forward and back to tokens and router" if with_gradient else "forward"
        row = {
            "what": (
                f"one layer's experts, {tokens} tokens, {passes}: model.experts = pallas against"
                " auto"
            ),
            "unit": "TFLOP/s",
            "target": None,
        }
        measured = (
            {}
            if "error" in ours
            else {
                "measured": ours["tflops_per_s"],
                "peer": ours["auto_tflops_per_s"],
                "ratio": ours["ratio"],
                "ratio_target": None,
                "ours": ours,
            }
        )
        yield f"experts_{name}", row | (measured or ours)


def reinforcement(run: Run, sizes: Sizes) -> Iterator[tuple[str, dict]]:
    """One iteration of reinforcement learning against HF generate and PEFT: the whole, its rollout
    and its update, which both sides measure once.
    """
    ours = run(reinforced.measure_iteration, sizes, XLA_CLIENT_MEM_FRACTION="0.93")
    # a cache that grows token by token leaves holes of every size
    peer = run(_peer, "measure_loop", sizes, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    rl, prompt = sizes.reinforced.rl, sizes.reinforced.prompt
    of = (
        f"{rl.groups} prompts of {prompt} tokens, {rl.samples} samples of {rl.max_new_tokens} new"
        f" tokens each, LoRA r={rl.lora.rank}"
    )
    for part, number, what in (
        ("iteration", "tokens_per_s", "completion tokens of rollout and update together"),
        ("rollout", "rollout_tokens_per_s", "completion tokens"),
        ("update", "update_tokens_per_s", "tokens of prompt and completion of each sample"),
    ):
        row = _against(
            ours,
            peer,
            what=f"{of}: {what}",
            number=number,
            unit="tokens/s",
            target=None,
            ratio_target=None,
        )
        if "error" not in row and f"{part}_share" in ours:
            row |= {
                "share": ours[f"{part}_share"],
                "share_target": None,
                "peer_share": peer.get(f"{part}_share"),
            }
        yield f"rl_{part}", row


BENCHMARKS: dict[str, Callable[[Run, Sizes], Iterator[tuple[str, dict]]]] = {
    "training": speed_and_compilation,
    "memory": memory,
    "sampling": sampling_rates,
    "runs": runs_together,
    "experts": mixture,
    "rl": reinforcement,
}


def _peer(name: str, *arguments) -> dict:
    # only here is torch needed: without it the peers' rows say so, and ours stand
    from benchmarks.gpu import peers

    return getattr(peers, name)(*arguments)


def _against(
    ours: dict,
    peer: dict,
    *,
    what: str,
    number: str,
    unit: str,
    target: str | None,
    ratio_target: str | None,
    **more,
) -> dict:
    """A row of our number and the peer's, of which either may be missing."""
    row = {"what": what, "unit": unit, "target": target, "ratio_target": ratio_target, **more}
    if "error" in ours:
        return row | ours
    row |= {"measured": ours[number], "ours": ours}
    if "error" in peer:
        return row | {"peer_error": peer["error"]}
    return row | {
        "peer": peer[number],
        "ratio": round(ours[number] / peer[number], 3),
        "peer_options": peer,
    }


def _out_of_memory(result: dict) -> bool:
    return (
        re.search("RESOURCE_EXHAUSTED|out.of.memory", result.get("error", ""), re.IGNORECASE)
        is not None
    )
