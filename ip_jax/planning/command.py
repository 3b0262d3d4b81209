"""`ip-jax plan`: compile or count, estimate, say whether it fits and what it costs; with `--search`, for several candidates."""
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console

from ip_jax.data.packing import PackedShape
from ip_jax.models import hub
from ip_jax.planning import estimate, report
from ip_jax.planning.chips import Topology, read_sizes
from ip_jax.planning.estimate import Phase, Planned
from ip_jax.planning.hlo import Cost
from ip_jax.planning.programs import Compiled, TooLarge, compile_lowered, initial, lower_sampler, lower_step, per_device
from ip_jax.planning.search import Candidate, candidates, ranked
from ip_jax.planning.workload import Sampling, Shapes, Workload, declared, measured
from ip_jax.settings.experiment import SftConfig

# (mesh, None) -> what is to be done on it; (mesh, sft) -> the same training with these settings, without evaluations
WorkloadOn = Callable[[object, SftConfig | None], Workload]


def workload_on(config, model: str | None, experiment_of: Callable) -> WorkloadOn:
    """How to count the work of a config on a mesh. `experiment_of(config)` gives the Supervised of a config with data; `model` is
    the name of another model to plan for.
    """
    if model:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=model, revision=None))
    if isinstance(config, Shapes):
        decoder, unasked = hub.load_config(model) if model else config.hf.decoder_config(), dataclasses.replace(config.questions, sweeps=0)
        return lambda mesh, sft: declared(dataclasses.replace(config, sft=sft, questions=unasked) if sft else config, decoder, mesh)
    experiment = experiment_of(config)
    trained = tuple(arm for arm in experiment.arms if arm.train_prompt)
    unasked = dataclasses.replace(experiment.evaluation, full_steps=(), neutral_steps=())
    return lambda mesh, sft: measured(dataclasses.replace(experiment, sft=sft, arms=trained, evaluation=unasked) if sft else experiment, mesh)


def plan(work_on: WorkloadOn, topology: Topology, sizes: tuple[int, int, int] | None, console: Console) -> Planned:
    """Everything that the tables show, for one mesh (run, data, tensor); None: all devices along data, as `run` does.

    Where there is no compiler for the devices, every number comes from formulas.
    """
    mesh = topology.mesh(*(sizes or (1, topology.count, 1)))
    workload = work_on(mesh, None)
    steps, sampled = dict.fromkeys(workload.steps), None
    if topology.devices is not None:
        for shape in steps:
            with console.status(f"compiling the training step, {shape.micro_batches} x {shape.micro_rows} rows of {shape.length}"):
                steps[shape] = compile_lowered(functools.partial(lower_step, workload, shape, mesh))
        if workload.sampling:
            with console.status("compiling prefill and decoding"):
                sampled = _compile_sampler(workload, _largest(workload), mesh)
    return _assembled(workload, topology, mesh, steps, sampled)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The compiled sampler, and bytes on each device: `layers` of the copy of the weights layer by layer, `slots` of the caches."""

    prefill: Compiled | TooLarge
    decode: Compiled | TooLarge
    layers: float
    slots: float


def _compile_sampler(workload: Workload, work: Sampling, mesh) -> Sampled:
    sampler = lower_sampler(workload, work, mesh)
    prefill, decode = (compile_lowered(lambda program=program: program) for program in (sampler.prefill, sampler.decode))
    return Sampled(prefill, decode, per_device(sampler.layers), per_device(sampler.slots))


def _largest(workload: Workload) -> Sampling:
    """The sampling program with the largest caches stands for all: what it needs and takes, the others do not exceed."""
    return max(workload.sampling, key=lambda s: s.plan.shape.groups * (s.plan.shape.prompt + s.plan.shape.rows * s.plan.shape.ring))


def _assembled(workload: Workload, topology: Topology, mesh, steps: dict[PackedShape, Compiled | TooLarge | None], sampled: Sampled | None) -> Planned:
    """The plan from what was compiled; what was not, or was refused, by formula."""
    begun, phases, refused = initial(workload, mesh), [], {}
    for shape, found in steps.items():
        name = "step" if len(steps) == 1 else f"step, {shape.micro_batches} x {shape.micro_rows} x {shape.length}"
        formula = functools.partial(estimate.formula_cost, workload, shape, begun, mesh)
        phases.append(_phase(name, workload.steps[shape] * workload.programs, found, formula, topology))
        if isinstance(found, TooLarge):
            refused["training"] = found
    largest = max(steps, key=functools.partial(estimate.step_tokens, workload))
    memory = {"training": estimate.step_memory(workload, largest, begun, steps[largest] if isinstance(steps[largest], Compiled) else None, mesh)}
    if workload.sampling:
        work, parts = _largest(workload), (sampled.prefill, sampled.decode) if sampled else (None, None)
        formulas = (estimate.prefill_cost, estimate.decode_cost)
        for (name, times), found, formula in zip(_calls(workload), parts, formulas, strict=True):
            phases.append(_phase(name, times, found, functools.partial(formula, workload, work, begun, mesh), topology))
            if isinstance(found, TooLarge):
                refused["sampling"] = found
        memory["sampling"] = estimate.resident(begun) | {
            "weights by layer": sampled.layers if sampled else per_device(begun.base),
            "caches": sampled.slots if sampled else estimate.caches(workload, work, mesh),
            "activations": max((part.memory.temporaries for part in parts if isinstance(part, Compiled)), default=0.0),
        }
    return estimate.summary(workload, topology, mesh, phases, memory, refused)


def _calls(workload: Workload) -> list[tuple[str, float]]:
    """(program, how often the whole experiment runs it) of the sampler."""
    count = lambda of: workload.programs * sum(s.times * of(s) for s in workload.sampling)  # noqa: E731
    return [("prefill", count(lambda s: s.prefills)), ("decoding a token", count(lambda s: s.decode_steps))]


def _phase(name: str, times: float, found: Compiled | TooLarge | None, formula: Callable[[], Cost], topology: Topology) -> Phase:
    cost, took = (found.cost, found.seconds) if isinstance(found, Compiled) else (formula(), None)
    return Phase(name, times, cost, topology.chip and estimate.seconds(cost, topology.chip), took)


def search(work_on: WorkloadOn, topology: Topology, console: Console) -> list[Candidate]:
    """The candidates that an analytic cut leaves, compiled where there is a compiler, the best first."""
    if topology.chip is None:
        raise ValueError(f"--search ranks by a chip's published numbers, and none are known for {jax.devices()[0].device_kind}: name a topology")
    found = []
    for candidate in candidates(work_on, topology):
        console.print(f"{candidate.name} ...", style="dim")
        if topology.devices is None:
            found.append(candidate)
            continue
        mesh = topology.mesh(*candidate.sizes)
        compiled = compile_lowered(functools.partial(lower_step, candidate.workload, candidate.shape, mesh))
        found.append(candidate.compiled(compiled, topology))
    return ranked(found, topology)


def run_plan(work_on: WorkloadOn, topology: Topology, options, console: Console) -> None:
    """What the command does, its options read: `mesh`, `search`, `json`."""
    if options.search:
        found = search(work_on, topology, console)
        report.print_candidates(found, topology, console)
        record = [candidate.record() for candidate in found]
    else:
        planned = plan(work_on, topology, options.mesh and read_sizes(options.mesh), console)
        report.print_plan(planned, console)
        record = planned.record()
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1))
        console.print(f"written to {options.json}", highlight=False)
