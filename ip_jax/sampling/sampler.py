"""Sampling completions for many prompts and runs at once.

Prompts are right-padded into buckets and sorted by length, so a slot is a position. Each distinct
prompt of a run is prefilled once and shared by its rows; what all prompts begin with is prefilled
once for all. Decoding runs on the device until a refill of free slots pays; the refill is arranged
on the host.
"""

import contextlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from ip_jax.sampling.plan import (
    Completion,
    Group,
    Request,
    SamplerOptions,
    check_lengths,
    make_plan,
    make_refill,
    refill_pays,
    take_entries,
)
from ip_jax.sampling.slots import Slots, decode, prefill, separate_layers, start_slots
from ip_jax.training.hosts import fetch

__all__ = ["Completion", "Request", "SamplerOptions", "sample"]


def sample(
    graphdef,
    lora,
    base,
    requests: Sequence[Sequence[Request]],
    options: SamplerOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[tuple[Completion, ...]]]:
    """Completions of every request, in its place: result[run][request][sample].

    `requests` holds one queue for each run of `lora` (any number of queues where the model has no
    LoRA). `on_progress` is called with (completions done, completions in all). Raises ValueError
    for a prompt that is too long or a wrong number of queues.
    """
    runs = {leaf.shape[0] for leaf in jax.tree.leaves(lora)}
    if runs - {len(requests)}:
        raise ValueError(
            f"There are {len(requests)} queues of sampling requests for the {runs.pop()} runs of"
            " the adapters: one queue a run is needed."
        )
    check_lengths(requests, options, nnx.merge(graphdef, lora, base).config.max_positions)
    total = sum(request.n_samples for queue in requests for request in queue)
    if not total:
        return [[] for _ in requests]

    with jax.set_mesh(options.mesh) if options.mesh else contextlib.nullcontext():
        found = _complete(
            graphdef,
            lora,
            base,
            requests,
            options,
            lambda done: on_progress and on_progress(done, total),
        )
    return [
        [
            tuple(found[run][index, i] for i in range(request.n_samples))
            for index, request in enumerate(queue)
        ]
        for run, queue in enumerate(requests)
    ]


def _complete(
    graphdef, lora, base, requests, options: SamplerOptions, on_progress: Callable[[int], None]
) -> list[dict[tuple[int, int], Completion]]:
    """For each run, (index of the request, sample) -> completion."""
    plan = make_plan(requests, options)
    stop_ids = np.array(options.stop_ids, np.int32)
    layers = separate_layers(graphdef, lora, base, whole=options.whole_layers)
    slots = start_slots(graphdef, lora, base, plan.prefix, shape=plan.shape, dtype=options.dtype)
    waiting = [list(queue) for queue in plan.queues]
    held: list[dict[int, Group]] = [{} for _ in requests]
    found: list[dict[tuple[int, int], Completion]] = [{} for _ in requests]
    while any(waiting) or any(held):
        while refill_pays(waiting, held, plan):
            refill = make_refill(plan, take_entries(waiting, held, plan), requests)
            slots = prefill(
                graphdef, lora, base, slots, refill, prefix=len(plan.prefix), dtype=options.dtype
            )
        wanted = np.array([min(len(queue), plan.prefill_prompts) for queue in waiting], np.int32)
        slots = decode(
            graphdef,
            lora,
            base,
            layers,
            slots,
            wanted,
            stop_ids,
            dtype=options.dtype,
            candidates=options.candidates,
        )
        _harvest(slots, plan.shape.copies, held, found, options.stop_ids)
        on_progress(sum(map(len, found)))
    return found


def _harvest(
    slots: Slots,
    copies: int,
    held: list[dict[int, Group]],
    found: list[dict[tuple[int, int], Completion]],
    stop_ids: tuple[int, ...],
) -> None:
    """Moves the completions of finished groups from the slots into `found`, in every process.
    Guides hold nothing of their own.
    """
    fetched = fetch((slots.finished, slots.started, slots.made, slots.tokens, slots.log_probs))
    finished, started, made, tokens, log_probs = (x[:, ::copies] for x in fetched)
    finished = finished.all(axis=-1)
    ring = tokens.shape[-1]
    for run, run_held in enumerate(held):
        for slot in [slot for slot in run_held if finished[run, slot]]:
            for row, owner in enumerate(run_held.pop(slot).rows):
                columns = (started[run, slot] + np.arange(made[run, slot, row])) % ring
                token_ids = tokens[run, slot, row, columns]
                found[run][owner] = Completion(
                    token_ids, log_probs[run, slot, row, columns], bool(token_ids[-1] in stop_ids)
                )
