"""`ip-jax plan`: compile or count, estimate, say whether it fits and what it costs; with
`--search`, for several candidates.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console

from ip_jax.lab.experiment import SftConfig, decided
from ip_jax.lab.reinforced.plan import RlConfig
from ip_jax.models import hub
from ip_jax.planning import estimate, reinforced, reinforced_workload, report, sampling
from ip_jax.planning.chips import Topology
from ip_jax.planning.estimate import Planned
from ip_jax.planning.programs import (
    Compiled,
    TooLarge,
    compile_step,
    initial,
    lower_sampler,
)
from ip_jax.planning.reinforced_workload import RlShapes, RlWorkload
from ip_jax.planning.search import Candidate, candidates, ranked
from ip_jax.planning.workload import Shapes, Workload, declared, measured
from ip_jax.training.sharding import MeshConfig, mesh_sizes


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned: the mesh that its config asks for, its model's heads, and its work on a
    mesh, `work_on(mesh, None)`; `work_on(mesh, sft)` with other settings of its training
    (supervised work alone).
    """

    mesh: MeshConfig
    n_heads: int
    work_on: Callable[[Mesh | AbstractMesh, SftConfig | None], Workload | RlWorkload]

    def mesh_on(self, topology: Topology) -> Mesh | AbstractMesh:
        """The mesh over all devices, as a run makes it. Raises as `mesh_sizes`."""
        devices = (
            topology.devices
            or [topology.mesh(1, topology.count, 1).abstract_device] * topology.count
        )
        return topology.mesh(**mesh_sizes(self.mesh, devices, self.n_heads))


def subject_of(config, model: str | None, platform: str, experiment_of: Callable) -> Subject:
    """The subject of a config. `experiment_of(config)` gives the Supervised or Reinforced of a
    config with data; `model` is the name of another model to plan for; `platform` decides what the
    config leaves to it. Raises ValueError for the toy.
    """
    by_reward = isinstance(getattr(config, "rl", None), RlConfig)
    if not by_reward and not hasattr(config, "sft"):
        raise ValueError(
            "plan compiles experiments with a language model, and this config trains the toy, which"
            " needs minutes on any machine: run it"
        )
    config = dataclasses.replace(config, model=decided(config.model, platform))
    if model:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, name=model, revision=None)
        )
    if isinstance(config, Shapes):
        decoder = hub.load_config(model) if model else config.hf.decoder_config()
        return Subject(
            config.mesh,
            decoder.n_heads,
            lambda mesh, sft: declared(
                dataclasses.replace(config, sft=sft or config.sft), decoder, mesh
            ),
        )
    if isinstance(config, RlShapes):
        decoder = hub.load_config(model) if model else config.hf.decoder_config()
        return Subject(
            config.mesh,
            decoder.n_heads,
            lambda mesh, _: reinforced_workload.declared(config, decoder, mesh),
        )
    experiment, decoder = (
        experiment_of(config),
        hub.load_config(config.model.name, config.model.revision),
    )
    if by_reward:
        return Subject(
            experiment.mesh,
            decoder.n_heads,
            lambda mesh, _: reinforced_workload.measured(experiment, mesh),
        )
    return Subject(
        experiment.mesh,
        decoder.n_heads,
        lambda mesh, sft: measured(
            dataclasses.replace(experiment, sft=sft or experiment.sft), mesh
        ),
    )


def plan(subject: Subject, topology: Topology, console: Console) -> Planned:
    """Everything that the tables show. Where there is no compiler for the devices, every number
    comes from formulas.
    """
    workload = subject.work_on(subject.mesh_on(topology), None)
    if isinstance(workload, RlWorkload):
        return reinforced.plan(workload, topology, console)
    step = sampled = None
    if topology.devices is not None:
        with console.status("compiling the training step"):
            step = compile_step(workload)
        if workload.sampling:
            with console.status("compiling prefill and decoding"):
                sampled = sampling.compile_sampler(
                    lower_sampler(workload, sampling.largest(workload.sampling))
                )
    return _assembled(workload, topology, step, sampled)


def by_formula(subject: Subject, topology: Topology) -> Planned:
    """What `plan` says without compiling anything."""
    workload = subject.work_on(subject.mesh_on(topology), None)
    if isinstance(workload, RlWorkload):
        quiet = Console(quiet=True)
        return reinforced.plan(workload, dataclasses.replace(topology, devices=None), quiet)
    return _assembled(workload, topology, None, None)


def _assembled(
    workload: Workload,
    topology: Topology,
    step: Compiled | TooLarge | None,
    sampled: sampling.Sampled | None,
) -> Planned:
    """The plan from what was compiled; what was not, or was refused, by formula."""
    begun = initial(workload)
    refused = {"training": step} if isinstance(step, TooLarge) else {}
    phases = [
        estimate.phase(
            "step",
            workload.steps * workload.programs,
            step,
            lambda: estimate.formula_cost(workload, begun),
            topology,
        )
    ]
    memory = estimate.loading_memory(workload.config, workload.model, workload.mesh)
    memory |= {
        "training": estimate.step_memory(
            workload, begun, step if isinstance(step, Compiled) else None
        )
    }
    if workload.sampling:
        work, parts = (
            sampling.largest(workload.sampling),
            (sampled.prefill, sampled.decode) if sampled else (None, None),
        )
        by_formula = sampling.costs(workload.sizes, work, begun.state.trained)
        called = sampling.calls(workload.sampling, workload.programs)
        for name, times, found, formula in zip(
            ("prefill", "decoding a token"), called, parts, by_formula, strict=True
        ):
            phases.append(estimate.phase(name, times, found, formula, topology))
            if isinstance(found, TooLarge):
                refused["sampling"] = found
        memory["sampling"] = estimate.sampling_memory(workload, begun, sampled)
    return estimate.summary(workload, topology, phases, memory, refused)


def search(subject: Subject, topology: Topology, console: Console) -> list[Candidate]:
    """The candidates that an analytic cut leaves, their steps compiled where there is a compiler,
    the best first.
    """
    if topology.chip is None:
        raise ValueError(
            "--search ranks by a chip's published numbers, and none are known for"
            f" {jax.devices()[0].device_kind}: name a topology"
        )
    found = []
    if isinstance(subject.work_on(subject.mesh_on(topology), None), RlWorkload):
        raise ValueError(
            "--search covers supervised training: of reinforcement learning, plan what you would"
            " change (--mesh.tensor, --rl.remat, --rl.slots)"
        )
    for candidate in candidates(subject.work_on, topology):
        console.print(f"{candidate.name} ...", style="dim")
        if topology.devices is None:
            found.append(candidate)
            continue
        found.append(candidate.compiled(compile_step(candidate.workload), topology))
    return ranked(found, topology)


def run_plan(subject: Subject, topology: Topology, options, console: Console) -> None:
    """What the command does, its options read: `search`, `json`."""
    if options.search:
        found = search(subject, topology, console)
        report.print_candidates(found, topology, console)
        record = [candidate.record() for candidate in found]
    else:
        planned = plan(subject, topology, console)
        report.print_plan(planned, console)
        record = planned.record()
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1))
        console.print(f"written to {options.json}", highlight=False)
