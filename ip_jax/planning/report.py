"""The tables of `ip-jax plan`."""

from rich.console import Console
from rich.table import Table

from ip_jax.planning import estimate
from ip_jax.planning.chips import Topology
from ip_jax.planning.estimate import Planned
from ip_jax.planning.search import Candidate

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def print_plan(planned: Planned, console: Console) -> None:
    """What is planned, bytes on a device, programs, collectives, hours, the verdict."""
    mesh = " ".join(f"{axis}={size}" for axis, size in planned.mesh.items())
    console.print(
        f"{planned.model} on {planned.topology}: {planned.devices} devices, mesh {mesh}",
        style="bold",
        highlight=False,
    )
    console.print(
        f"{planned.grouping}, {planned.tokens_per_step} tokens a step; batches: {planned.source}",
        highlight=False,
    )
    console.print(_memory_table(planned))
    console.print(_program_table(planned))
    if any(phase.cost.collectives for phase in planned.phases):
        console.print(_collective_table(planned))
    if opaque := sum(phase.cost.opaque for phase in planned.phases):
        console.print(
            f"{opaque} custom calls do not say their FLOPs: the compiler's FLOPs and seconds leave"
            " these out",
            style="yellow",
        )
    if open_loops := sum(phase.cost.open_loops for phase in planned.phases if phase.name == "step"):
        console.print(
            f"{open_loops} loops of a step end by its data: they count as if all experts got"
            " equally many tokens",
            style="yellow",
        )
    if planned.mfu is not None:
        hours = " + ".join(f"{spent:.3g} {stage}" for stage, spent in planned.hours.items())
        console.print(
            f"estimates: MFU {planned.mfu:.0%} at most; chip-hours {hours} ="
            f" {sum(planned.hours.values()):.3g}, {planned.left_out} left out",
            highlight=False,
        )
        if planned.shares:
            console.print(
                "an iteration's time:"
                f" {', '.join(f'{share:.1%} {stage}' for stage, share in planned.shares.items())}",
                highlight=False,
            )
    verdict = {
        True: "[green]fits[/green]",
        False: "[red]does not fit[/red]",
        None: "the memory of this device is not known",
    }[planned.fits]
    console.print(
        f"{verdict}{f' in {gib(planned.allowed)} GiB a device' if planned.allowed else ''}",
        highlight=False,
    )
    for line in planned.advice:
        console.print(f"  {line}", highlight=False)


def print_candidates(found: list[Candidate], topology: Topology, console: Console) -> None:
    """One line a candidate, the best first."""
    how = (
        "the training step is compiled, all else by formula"
        if any(candidate.is_compiled for candidate in found)
        else "by formula"
    )
    stages = list(found[0].memory)
    table = Table(
        *"run data tensor remat micro-batch".split(),
        *(f"{stage}, GiB" for stage in stages),
        "fits",
        "step, s",
        "tokens/s",
        "MFU",
        title=f"candidates on {topology.name}, {how}; seconds are estimates",
    )
    for c in found:
        seconds, tokens = c.seconds(topology), estimate.step_tokens(c.workload)
        mfu = estimate.step_flops(c.workload) / (seconds * topology.count * topology.chip.peak)
        fits = "yes" if c.needed <= topology.chip.memory - estimate.RESERVED else "no"
        table.add_row(
            *map(str, c.sizes),
            c.workload.sft.remat,
            c.micro_batches,
            *(gib(c.memory[stage]) for stage in stages),
            fits,
            f"{seconds:.3g}",
            f"{tokens / seconds:.0f}",
            f"{mfu:.0%}",
        )
    console.print(table)


def _memory_table(planned: Planned) -> Table:
    stages = list(planned.memory)
    table = Table("GiB on each device", *stages, title="memory")
    for kind in dict.fromkeys(kind for stage in stages for kind in planned.memory[stage]):
        table.add_row(
            kind,
            *(
                gib(planned.memory[stage][kind]) if kind in planned.memory[stage] else ""
                for stage in stages
            ),
        )
    table.add_section()
    table.add_row("needed", *(gib(planned.needed[stage]) for stage in stages))
    return table


def _program_table(planned: Planned) -> Table:
    table = Table(
        "program",
        "runs",
        "FLOPs",
        "traffic",
        "sent",
        "seconds",
        "bound by",
        "compiled",
        title="one run of a program on each device; seconds are estimates",
    )
    for phase in planned.phases:
        seconds, cost = phase.seconds, phase.cost
        took = (
            "no: formula" if phase.compile_seconds is None else f"in {phase.compile_seconds:.0f} s"
        )
        spent = (f"{seconds.total:.2g}", seconds.bound) if seconds else ("?", "?")
        table.add_row(
            phase.name,
            f"{phase.times:.0f}",
            short(cost.flops),
            f"{short(cost.traffic)}B",
            f"{short(cost.moved)}B",
            *spent,
            took,
        )
    return table


def _collective_table(planned: Planned) -> Table:
    table = Table(
        "program",
        "collective",
        "operations",
        "sent by each device",
        title="collectives of one run of a program",
    )
    for phase in planned.phases:
        for kind, collective in sorted(
            phase.cost.collectives.items(), key=lambda item: -item[1].moved
        ):
            table.add_row(phase.name, kind, str(collective.count), f"{short(collective.moved)}B")
    return table


def gib(n: float) -> str:
    """Bytes as GiB."""
    return f"{n / 2**30:.2f}"


def short(n: float) -> str:
    """A number with a unit: 1.5 T."""
    for size, unit in UNITS:
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g} "
