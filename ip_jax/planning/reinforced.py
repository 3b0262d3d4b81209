"""The plan of a text experiment in reinforcement learning: update, passes without a gradient,
rollouts, evaluations.

All completions are taken to be as long as their limit. Grading is not planned: what a reward takes
is the environment's own affair.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from rich.console import Console

from ip_jax.models import flops
from ip_jax.models.families import DecoderConfig
from ip_jax.models.flops import StepWork
from ip_jax.planning import estimate, formulas, sampling
from ip_jax.planning import reinforced_programs as programs
from ip_jax.planning.chips import Topology
from ip_jax.planning.estimate import Phase, Planned
from ip_jax.planning.formulas import Step
from ip_jax.planning.programs import Compiled, TooLarge, compile_lowered, lower_sampling, per_device
from ip_jax.planning.reinforced_workload import Program, RlWorkload
from ip_jax.planning.workload import Sampling, Sizes
from ip_jax.rl.rows import Rows

UPDATES, ROLLOUTS, EVALUATION = "updates", "rollouts", "evaluation"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What runs while the devices hold the same arrays: its programs, bytes on a device by kind,
    and the program that the compiler refused.
    """

    name: str
    part: str  # UPDATES, ROLLOUTS or EVALUATION
    phases: tuple[Phase, ...]
    memory: dict[str, float]
    refused: TooLarge | None
    lines: tuple[str, ...] = ()  # what would need less of `part`'s own bytes


@dataclasses.dataclass(frozen=True)
class Planner:
    """Where it is planned for, and where progress is told."""

    topology: Topology
    console: Console

    def compiled(self, what: str, make: Callable):
        """make(), or None where there is no compiler for the devices."""
        if self.topology.devices is None:
            return None
        with self.console.status(f"compiling {what}"):
            return make()


def plan(workload: RlWorkload, topology: Topology, console: Console) -> Planned:
    """Everything that the tables show. Where there is no compiler for the devices, every number
    comes from formulas.
    """
    planner = Planner(topology, console)
    stages = [
        Stage(name, UPDATES, (), kinds, None)
        for name, kinds in estimate.loading_memory(
            workload.config, workload.model, workload.mesh
        ).items()
    ]
    for program in workload.programs:
        of = "" if len(workload.programs) == 1 else f" of {', '.join(program.arms)}"
        begun = programs.initial(program)
        held, decoder = estimate.resident(begun.policy), begun.models()["policy"]
        stages += [_update(planner, program, begun, of), *_scores(planner, program, begun, of)]
        for part, calls in ((ROLLOUTS, (program.sampling,)), (EVALUATION, program.evaluations)):
            if calls:
                stages.append(
                    _sampling(
                        planner,
                        (program.sizes, decoder, held),
                        (part + of, part),
                        calls,
                        program.count,
                    )
                )
    if workload.untrained:
        bare = Sizes(
            workload.config, workload.model, workload.untrained_mesh, 0, None, workload.rl.remat
        )
        decoder = programs.untrained_decoder(workload)
        stages.append(
            _sampling(
                planner,
                (bare, decoder, {"weights": per_device(decoder[2])}),
                ("untrained model", EVALUATION),
                workload.untrained,
                1,
            )
        )
    return summary(workload, topology, stages)


def _update(planner: Planner, program: Program, begun: programs.Begun, of: str) -> Stage:
    batch, sizes = program.batch(), program.sizes
    found = planner.compiled(
        f"the update{of}", lambda: compile_lowered(lambda: programs.lower_update(program))
    )
    steps = [
        step_of(sizes, rows)
        for rows in (batch.policy, batch.kl, batch.auxiliary)
        if rows is not None
    ]
    by_formula = max(formulas.activations(sizes, step) for step in steps) + 2 * per_device(
        begun.policy.state.trained
    )
    held = estimate.resident(begun.policy) | {"rows": per_device(programs.on_mesh(program, batch))}
    epochs = program.kind.algorithm.epochs

    def cost():
        return formulas.update_cost(sizes, steps, begun.policy).times(epochs)

    phase = estimate.phase(
        f"update{of}", program.kind.rl.iterations * program.count, found, cost, planner.topology
    )
    return _stage(
        f"update{of}",
        UPDATES,
        [phase],
        estimate.running_memory(held, by_formula, _if_compiled(found)),
        [found],
        _smaller_rows(program, batch.policy),
    )


def _scores(planner: Planner, program: Program, begun: programs.Begun, of: str) -> list[Stage]:
    """The passes without a gradient that the algorithm needs before its update."""
    stages, resident = [], estimate.resident(begun.policy)
    for name, rows in program.scored().items():
        who, where = name.split("_")
        title = f"{who} at {where} prompt{of}"
        sizes = program.sizes if who == "policy" else dataclasses.replace(program.sizes, lora=None)
        found = planner.compiled(
            f"the {title}",
            lambda name=name: compile_lowered(lambda: programs.lower_score(program, name)),
        )
        step = step_of(sizes, rows)
        held = {"weights": resident["weights"], "rows": per_device(programs.on_mesh(program, rows))}
        held |= {"adapters": resident["adapters"]} if who == "policy" else {}
        memory = resident | estimate.running_memory(
            held, formulas.score_activations(sizes, step), _if_compiled(found)
        )
        cost = functools.partial(formulas.score_cost, sizes, step)
        phase = estimate.phase(
            title, program.kind.rl.iterations * program.count, found, cost, planner.topology
        )
        stages.append(
            _stage(title, UPDATES, [phase], memory, [found], _smaller_rows(program, rows))
        )
    return stages


def _sampling(
    planner: Planner,
    model: tuple[Sizes, tuple, dict],
    names: tuple[str, str],
    calls: Sequence[Sampling],
    count: float,
) -> Stage:
    """The stage of sampling `calls`, `count` times. `model`: (sizes, decoder, bytes of what lies
    there anyway); `names`: of the stage and its part.
    """
    (sizes, decoder, held), (name, part), work = model, names, sampling.largest(calls)
    sampled = planner.compiled(
        f"prefill and decoding, {name}",
        lambda: sampling.compile_sampler(lower_sampling(decoder, sizes.mesh, work)),
    )
    programs_of = (sampled.prefill, sampled.decode) if sampled else (None, None)
    formula = sampling.costs(sizes, work, decoder[1])
    phases = [
        estimate.phase(f"{name}: {what}", times, found, cost, planner.topology)
        for what, times, found, cost in zip(
            ("prefill", "decoding a token"),
            sampling.calls(calls, count),
            programs_of,
            formula,
            strict=True,
        )
    ]
    slots = (
        f"--{'rl' if part == ROLLOUTS else 'evaluation'}.slots {max(1, work.options.slots // 2)}"
    )
    lines = [f"fewer completions side by side: {slots}"] if work.options.slots > 1 else []
    return _stage(
        name,
        part,
        phases,
        held | sampling.memory(sizes, work, decoder[2], sampled),
        programs_of,
        lines,
    )


def _stage(
    name: str,
    part: str,
    phases: Sequence[Phase],
    memory: dict[str, float],
    found: Sequence,
    lines: Sequence[str],
) -> Stage:
    refused = next((one for one in found if isinstance(one, TooLarge)), None)
    return Stage(name, part, tuple(phases), memory, refused, tuple(lines))


def step_of(sizes: Sizes, rows: Rows) -> Step:
    """Rows as formulas take them, every position taken."""
    micro_batches, runs, count, samples, length = rows.tokens.shape
    slots, all_rows = rows.prompt.shape[-1], micro_batches * runs * count
    pairs = _pairs(sizes.config, slots) + samples * (
        _pairs(sizes.config, slots + length) - _pairs(sizes.config, slots)
    )
    width = slots + samples * length
    work = StepWork(all_rows * width, all_rows * samples * length, all_rows * pairs)
    return Step(
        work,
        micro_batches,
        runs * count,
        width,
        samples * length * (slots + length) if sizes.kernel == "xla" else 0,
    )


def _pairs(config: DecoderConfig, length: int) -> float:
    """Pairs of a query and a key that it sees in a causal sequence, in all layers together."""
    windows = [min(kind.window or math.inf, length) for kind in config.layer_kinds]
    return sum(window * length - window**2 / 2 for window in windows)


def _smaller_rows(program: Program, rows: Rows) -> list[str]:
    """What makes micro-batches and what they keep smaller."""
    rl, mesh, lines = program.kind.rl, program.kind.mesh, []
    _, runs, count, samples, _ = rows.tokens.shape
    if rl.remat != "full":
        lines.append("recompute activations: --rl.remat full")
    if count > mesh.shape["data"]:
        lines.append(
            f"smaller micro-batches: --rl.tokens-per-micro-batch {rl.tokens_per_micro_batch // 2}"
        )
    elif samples > 1:
        fewer = max(n for n in range(1, samples) if samples % n == 0)
        lines.append(f"fewer completions in a row: --rl.samples-per-row {fewer}")
    return lines


def _if_compiled(found: Compiled | TooLarge | None) -> Compiled | None:
    return found if isinstance(found, Compiled) else None


def summary(workload: RlWorkload, topology: Topology, stages: Sequence[Stage]) -> Planned:
    """The plan: sums, whether it fits, what to change if it does not."""
    memory = {stage.name: stage.memory for stage in stages}
    allowed, needed = estimate.allowed_and_needed(
        topology, memory, {stage.name: stage.refused for stage in stages if stage.refused}
    )
    hours, shares, mfu = {}, {}, None
    if topology.chip:

        def spent(part):
            return sum(
                phase.times * phase.seconds.total
                for stage in stages
                if stage.part == part
                for phase in stage.phases
            )

        hours = {
            part: spent(part) * topology.count / 3600 for part in (ROLLOUTS, UPDATES, EVALUATION)
        }
        both = hours[ROLLOUTS] + hours[UPDATES]
        shares = {part: hours[part] / both for part in (ROLLOUTS, UPDATES)}
        mfu = sum(map(useful_flops, workload.programs)) / (
            hours[UPDATES] * 3600 * topology.chip.peak
        )
    advice = [
        f"{stage.name}: {line}"
        for stage in stages
        if allowed and needed[stage.name] > allowed
        for line in _advice(workload, stage)
    ]
    largest = max(workload.programs, key=lambda program: program.runs)
    grouping = ", ".join(
        estimate.grouping(program.runs, program.count) for program in workload.programs
    )
    tokens = int(step_of(largest.sizes, largest.batch(largest.in_use).policy).work.tokens)
    for program in workload.programs:
        advice += estimate.empty_rows(
            program.kind.mesh,
            program.batch(program.in_use).policy.tokens.shape[2],
            " of each run",
            "update",
        )
    if topology.chip:
        advice += [
            line
            for program in workload.programs
            for line in sampling.weights_for_every_token(
                workload.config, program.kind.mesh, [program.sampling]
            )
        ]
    return Planned(
        workload.model.name,
        topology.name,
        topology.count,
        dict(largest.kind.mesh.shape),
        workload.source,
        grouping,
        largest.runs,
        sum(program.count for program in workload.programs),
        tokens,
        memory,
        needed,
        allowed,
        [phase for stage in stages for phase in stage.phases],
        mfu,
        hours,
        list(dict.fromkeys(advice)),
        "compilation, loading and grading",
        shares,
    )


def useful_flops(program: Program) -> float:
    """Model FLOPs of all updates and of the passes that they need, empty rows left out."""
    sizes, batch, kind = program.sizes, program.batch(program.in_use), program.kind
    works = [
        step_of(sizes, rows).work
        for rows in (batch.policy, batch.kl, batch.auxiliary)
        if rows is not None
    ]
    updates = kind.algorithm.epochs * sum(
        flops.step_flops(kind.config, kind.rl.lora, work) for work in works
    )
    scored = [
        formulas.forward_flops(
            sizes if name.startswith("policy") else dataclasses.replace(sizes, lora=None),
            step_of(sizes, rows).work,
        )
        for name, rows in program.scored(program.in_use).items()
    ]
    return (updates + sum(scored)) * kind.rl.iterations * program.count


def _advice(workload: RlWorkload, stage: Stage) -> list[str]:
    """What to change, the largest kind of bytes first."""
    lines, runs = [], max(program.runs for program in workload.programs)
    for kind in sorted(stage.memory, key=stage.memory.get, reverse=True):
        if kind in ("caches", "activations"):
            lines += stage.lines
        if kind in ("caches", "adapters", "optimizer") and runs > 1 and "optimizer" in stage.memory:
            lines.append(f"fewer runs in one program: --rl.runs-per-program {runs // 2}")
        lines += sampling.more_chips(
            kind, any(program.sampling.options.whole_layers for program in workload.programs)
        )
    return lines
