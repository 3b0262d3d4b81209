"""From what the compiler says, or from formulas where there is no compiler, to bytes, seconds and
chip-hours.

Seconds are estimates: the slowest of the time that the FLOPs take at the chip's published peak, the
traffic at its bandwidth and the collectives over its links, as if these overlapped wholly and
nothing else took time. A real step takes longer.
"""

import dataclasses
from collections.abc import Callable

from jax.sharding import AbstractMesh, Mesh

from ip_jax.lab.experiment import ModelConfig
from ip_jax.models import flops
from ip_jax.models.chips import Chip
from ip_jax.models.families import DecoderConfig
from ip_jax.planning import formulas, sampling
from ip_jax.planning.chips import Topology
from ip_jax.planning.formulas import Step
from ip_jax.planning.hlo import Cost
from ip_jax.planning.programs import Compiled, Initial, TooLarge, batch_of, per_device
from ip_jax.planning.sampling import Sampled
from ip_jax.planning.workload import Workload, abstract_params
from ip_jax.training.sharding import param_shardings


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A program's time by what would bound it, alone."""

    compute: float
    memory: float
    links: float

    @property
    def total(self) -> float:
        """The largest: the estimate."""
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """What it is bound by."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def seconds(cost: Cost, chip: Chip) -> Seconds:
    """Of one run of a program."""
    return Seconds(cost.flops / chip.peak, cost.traffic / chip.bandwidth, cost.moved / chip.links)


def resident(begun: Initial) -> dict[str, float]:
    """Bytes on each device, for the whole experiment, by kind."""
    state, frozen = begun.state, per_device(begun.frozen)
    trained = {"adapters": per_device(state.trained)} if frozen else {}
    return (
        {"weights": frozen or per_device(state.trained)}
        | trained
        | {"optimizer": per_device(state.adam)}
    )


def step_tokens(workload: Workload) -> float:
    """Positions of the rows in use of one step over all runs, on average."""
    return sum(packed.rows * packed.shape.length for packed in workload.packing)


def step_flops(workload: Workload) -> float:
    """Model FLOPs of one step over all runs, on average, as if every position of the rows in use
    were a token (`models.flops`).
    """
    works = [
        flops.shape_work(workload.config, packed.shape, packed.rows) for packed in workload.packing
    ]
    return sum(flops.step_flops(workload.config, workload.sizes.lora, work) for work in works)


def parts_of_step(workload: Workload) -> list[Step]:
    """The rows of an average step that are computed, empty ones too, as formulas take them: those
    of each shape.
    """
    shapes = [(packed.shape, packed.micro_batches) for packed in workload.packing]
    return [
        Step(
            flops.shape_work(workload.config, shape, count * shape.rows),
            count,
            shape.rows,
            shape.length,
        )
        for shape, count in shapes
    ]


def formula_cost(workload: Workload, begun: Initial) -> Cost:
    """Cost of an average step on one device by formula."""
    return formulas.update_cost(workload.sizes, parts_of_step(workload), begun)


def step_memory(workload: Workload, begun: Initial, compiled: Compiled | None) -> dict[str, float]:
    """Bytes on each device while a step runs, by kind."""
    kinds = resident(begun) | {
        "batch": sum(per_device(batch_of(workload.mesh, shape)) for shape in workload.shapes)
    }
    activations = max(
        formulas.activations(workload.sizes, step) + formulas.row_adapters(workload.sizes, step)
        for step in parts_of_step(workload)
    )
    activations += 2 * per_device(begun.state.trained)
    return running_memory(kinds, activations, compiled)


def sampling_memory(
    workload: Workload, begun: Initial, sampled: Sampled | None
) -> dict[str, float]:
    """Bytes on each device while the largest of the evaluation's calls is sampled, by kind."""
    cast = {"weights, cast": per_device(begun.weights)} if workload.sft.train == "full" else {}
    return (
        resident(begun)
        | cast
        | sampling.memory(
            workload.sizes, sampling.largest(workload.sampling), begun.weights, sampled
        )
    )


def loading_memory(
    config: DecoderConfig, model: ModelConfig, mesh: Mesh | AbstractMesh
) -> dict[str, dict[str, float]]:
    """The stage in which a base that is to be quantised lies on the devices as it was read, by name
    and kind; none where it is not.
    """
    if not model.quantised:
        return {}
    return {
        "loading": {
            "weights, unquantised": per_device(
                abstract_params(config, model.weights, param_shardings(mesh, config))
            )
        }
    }


def running_memory(
    kinds: dict[str, float], activations: float, compiled: Compiled | None
) -> dict[str, float]:
    """`kinds`, the bytes of a program's arguments, and what it takes besides: what the compiler
    says, or `activations` by formula.
    """
    if compiled is None:
        return kinds | {"activations": activations}
    rest = compiled.memory.arguments - sum(kinds.values())
    return kinds | {
        "activations": compiled.memory.temporaries + compiled.memory.kept,
        "layout": max(rest, 0.0),
    }


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program, how often the whole experiment runs it, and what one run costs; `compile_seconds`
    is None where nothing was compiled.
    """

    name: str
    times: float
    cost: Cost
    seconds: Seconds | None
    compile_seconds: float | None


def phase(
    name: str,
    times: float,
    found: Compiled | TooLarge | None,
    formula: Callable[[], Cost],
    topology: Topology,
) -> Phase:
    """The phase of a program that was compiled, or by formula."""
    cost, took = (found.cost, found.seconds) if isinstance(found, Compiled) else (formula(), None)
    return Phase(name, times, cost, topology.chip and seconds(cost, topology.chip), took)


def grouping(runs: int, programs: float) -> str:
    """How runs train side by side, in words."""
    return (
        f"{programs:.3g} programs of {runs} runs"
        if programs != 1
        else f"one program of {runs} runs"
    )


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan: bytes are those of one device; `memory` by stage and kind, `needed` by stage;
    `allowed` is 0 where it is not known.

    `runs` of the largest program, `programs` of all. `tokens_per_step`: positions of the rows in
    use. `left_out`: what the hours do not cover.
    """

    model: str
    topology: str
    devices: int
    mesh: dict[str, int]
    source: str
    grouping: str
    runs: int
    programs: float
    tokens_per_step: int
    memory: dict[str, dict[str, float]]
    needed: dict[str, float]
    allowed: float
    phases: list[Phase]
    mfu: float | None
    hours: dict[str, float]  # of all chips together, by stage
    advice: list[str]
    left_out: str = "compilation and loading"
    shares: dict[str, float] = dataclasses.field(default_factory=dict)  # of an iteration's time

    @property
    def fits(self) -> bool | None:
        """None where the memory of the device is not known."""
        return (
            all(needed <= self.allowed for needed in self.needed.values()) if self.allowed else None
        )

    def record(self) -> dict:
        """As JSON."""
        return dataclasses.asdict(self) | {"fits": self.fits}


RESERVED = 0.25 * 2**30  # of a TPU's memory: XLA has 15.75 of a v5e's 16 GiB


def allowed_and_needed(
    topology: Topology, memory: dict[str, dict[str, float]], refused: dict[str, TooLarge]
) -> tuple[float, dict[str, float]]:
    """(bytes that a device has, 0 where it is not known; bytes that each stage needs). What the
    compiler refused needs what it says, and too much.
    """
    allowed = topology.chip.memory - RESERVED if topology.chip else 0.0
    needed = {stage: sum(kinds.values()) for stage, kinds in memory.items()}
    return allowed, needed | {
        stage: max(needed[stage], allowed + 1, found.needed) for stage, found in refused.items()
    }


def summary(
    workload: Workload,
    topology: Topology,
    phases: list[Phase],
    memory: dict,
    refused: dict[str, TooLarge],
) -> Planned:
    """The plan: sums, whether it fits, what to change if it does not. A stage that the compiler
    refused needs what the compiler says.
    """
    allowed, needed = allowed_and_needed(topology, memory, refused)
    hours, mfu = {}, None
    if topology.chip:
        steps = [phase for phase in phases if phase.name == "step"]

        def spent(of):
            return sum(phase.times * phase.seconds.total for phase in of) * topology.count / 3600

        hours = {
            "training": spent(steps),
            "evaluation": spent([phase for phase in phases if phase not in steps]),
        }
        mfu = (
            step_flops(workload)
            * workload.steps
            * workload.programs
            / (hours["training"] * 3600 * topology.chip.peak)
        )
    advice = [
        line
        for stage in memory
        if allowed and needed[stage] > allowed
        for line in _advice(workload, stage, memory[stage])
    ]
    if workload.programs > 1 and workload.sft.train == "lora":
        held = f"sft.memory_gb {workload.sft.memory_gb:g} holds {workload.runs} runs at once"
        advice.append(
            f"training: {held}: fewer --sft.tokens-per-micro-batch or more --sft.remat may hold"
            " more"
        )
    advice += empty_rows(
        workload.mesh,
        sum(packed.rows for packed in workload.packing) / workload.mesh.shape["run"],
        "",
        "training",
    )
    advice += (
        sampling.weights_for_every_token(workload.config, workload.mesh, workload.sampling)
        if topology.chip
        else []
    )
    return Planned(
        workload.model.name,
        topology.name,
        topology.count,
        dict(workload.mesh.shape),
        workload.source,
        grouping(workload.runs, workload.programs),
        workload.runs,
        workload.programs,
        round(step_tokens(workload)),
        memory,
        needed,
        allowed,
        phases,
        mfu,
        hours,
        advice,
    )


def empty_rows(mesh: Mesh | AbstractMesh, rows: float, of: str, stage: str) -> list[str]:
    """What to change where a step has fewer rows (`of` whom) than the mesh's axis data has devices:
    some devices compute empty ones alone.
    """
    data = mesh.shape["data"]
    if rows >= data:
        return []
    return [
        f"{stage}: a step has {rows:.3g} rows{of} for data={data} devices, the others are empty:"
        " use --mesh.tensor or --mesh.run, or fewer chips"
    ]


def _advice(workload: Workload, stage: str, kinds: dict[str, float]) -> list[str]:
    """What to change, the largest kind of bytes first."""
    sft, lines = workload.sft, []
    for kind in sorted(kinds, key=kinds.get, reverse=True):
        if kind == "activations" and stage == "training":
            if sft.remat != "full":
                lines.append("recompute activations: --sft.remat full")
            if max(shape.micro_rows for shape in workload.shapes) > workload.mesh.shape["data"]:
                lines.append(
                    "smaller micro-batches: --sft.tokens-per-micro-batch"
                    f" {sft.tokens_per_micro_batch // 2}"
                )
        if kind == "caches":
            lines.append(
                "fewer completions side by side: --evaluation.slots"
                f" {max(s.options.slots for s in workload.sampling) // 2}"
            )
        if kind in ("adapters", "optimizer") and workload.runs > 1:
            lines.append(f"fewer runs in one program (now {workload.runs})")
        lines += sampling.more_chips(
            kind, any(call.options.whole_layers for call in workload.sampling)
        )
    return [f"{stage}: {line}" for line in dict.fromkeys(lines)]
