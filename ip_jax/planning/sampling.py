"""What sampling needs and costs: of several calls the largest stands for all, what it needs and
takes the others do not exceed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from jax.sharding import AbstractMesh, Mesh

from ip_jax.models.families import DecoderConfig
from ip_jax.planning import formulas
from ip_jax.planning.programs import Compiled, Sampler, TooLarge, compile_lowered, per_device
from ip_jax.planning.workload import Sampling, Sizes


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The compiled sampler, and bytes on each device: `layers` of the copy of the weights layer by
    layer, `slots` of the caches.
    """

    prefill: Compiled | TooLarge
    decode: Compiled | TooLarge
    layers: float
    slots: float


def compile_sampler(sampler: Sampler) -> Sampled:
    """Both programs."""
    prefill, decode = (
        compile_lowered(lambda program=program: program)
        for program in (sampler.prefill, sampler.decode)
    )
    return Sampled(prefill, decode, per_device(sampler.layers), per_device(sampler.slots))


def largest(samplings: Sequence[Sampling]) -> Sampling:
    """The call with the largest caches."""
    return max(
        samplings,
        key=lambda s: (
            s.plan.shape.runs
            * s.plan.shape.groups
            * s.plan.shape.copies
            * (s.plan.shape.prompt + s.plan.shape.rows * s.plan.shape.ring)
        ),
    )


def calls(samplings: Sequence[Sampling], programs: float) -> tuple[float, float]:
    """How often so many programs with these calls prefill, and decode a token."""

    def count(of):
        return programs * sum(s.times * of(s) for s in samplings)

    return count(lambda s: s.prefills), count(lambda s: s.decode_steps)


def costs(sizes: Sizes, work: Sampling, adapters) -> tuple[Callable, Callable]:
    """What gives the cost of a prefill and of decoding a token by formula."""
    return functools.partial(formulas.prefill_cost, sizes, work), functools.partial(
        formulas.decode_cost, sizes, work, adapters
    )


def weights_for_every_token(
    config: DecoderConfig, mesh: Mesh | AbstractMesh, calls: Sequence[Sampling]
) -> list[str]:
    """What to change where decoding gathers weights again and again
    (`lab.supervised.programs.layers_fit_whole`, `models.moe.mixture`).
    """
    cut, lines = mesh.shape["run"] * mesh.shape["data"], []
    if cut > 1 and not all(call.options.whole_layers for call in calls):
        why = "whole ones would take more than half of a device's memory"
        lines.append(
            f"sampling: each token gathers the layers, because {why}: --mesh.tensor makes a"
            " device's part smaller"
        )
    if config.n_experts % cut:
        lines.append(
            f"sampling: each token gathers experts, because run x data = {cut} does not divide"
            f" their {config.n_experts}: --mesh.tensor takes the rest"
        )
    return lines


def more_chips(kind: str, whole_layers: bool) -> list[str]:
    """What makes this kind of bytes smaller, where it is weights."""
    if kind == "weights by layer" and whole_layers:
        return ["more chips: whole layers are cut over --mesh.tensor alone"]
    return (
        ["more chips: the weights are cut over all of them"] if kind.startswith("weights") else []
    )


def memory(sizes: Sizes, work: Sampling, weights, sampled: Sampled | None) -> dict[str, float]:
    """Bytes on each device while it samples, by kind, besides what lies there anyway."""
    parts = (sampled.prefill, sampled.decode) if sampled else ()
    return {
        "weights by layer": (
            sampled.layers if sampled else formulas.layer_copies(sizes, work, weights)
        ),
        "caches": sampled.slots if sampled else formulas.caches(sizes, work),
        "activations": max(
            (part.memory.temporaries for part in parts if isinstance(part, Compiled)),
            default=formulas.sampling_activations(sizes, work),
        ),
    }
