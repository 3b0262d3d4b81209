"""Candidates of `--search`: meshes, remat and micro-batches, cut to a dozen by formula before the
training steps are compiled.
"""

import dataclasses
from collections.abc import Callable

from ip_jax.models.remat import REMAT
from ip_jax.planning import estimate
from ip_jax.planning.chips import Topology
from ip_jax.planning.hlo import Cost
from ip_jax.planning.programs import Compiled, TooLarge, initial
from ip_jax.planning.workload import Workload

MOST = 12  # candidates that are compiled
# formulas of activations are rough: what they put at up to this part of the memory is still tried
MARGIN = 1.25


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run an experiment. `memory`: bytes on each device by stage, all but those of
    training by formula.
    """

    workload: Workload
    cost: Cost  # of the training step
    memory: dict[str, float]
    is_compiled: bool = False  # the training step

    @property
    def needed(self) -> float:
        """Bytes on each device for the whole experiment."""
        return max(self.memory.values())

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Devices along run, data and tensor."""
        return tuple(self.workload.mesh.shape.values())

    @property
    def name(self) -> str:
        """In words."""
        run, data, tensor = self.sizes
        return (
            f"run={run} data={data} tensor={tensor}, remat {self.workload.sft.remat},"
            f" {self.micro_batches} tokens"
        )

    @property
    def micro_batches(self) -> str:
        """Micro-batches of a step, rows and positions of each, in words."""
        return " + ".join(
            f"{p.micro_batches:.3g} x {p.shape.rows} x {p.shape.length}"
            for p in self.workload.packing
        )

    def seconds(self, topology: Topology) -> float:
        """Of one step, estimated."""
        return estimate.seconds(self.cost, topology.chip).total

    def compiled(self, found: Compiled | TooLarge, topology: Topology) -> "Candidate":
        """With what the compiler says of the step in place of the formulas."""
        if isinstance(found, TooLarge):
            return dataclasses.replace(
                self,
                memory=self.memory | {"training": max(found.needed, topology.chip.memory)},
                is_compiled=True,
            )
        return dataclasses.replace(
            self,
            cost=found.cost,
            memory=self.memory | {"training": found.memory.peak},
            is_compiled=True,
        )

    def record(self) -> dict:
        """As JSON."""
        return {
            "mesh": self.sizes,
            "remat": self.workload.sft.remat,
            "tokens_per_micro_batch": self.workload.sft.tokens_per_micro_batch,
            "shapes": [dataclasses.asdict(shape) for shape in self.workload.shapes],
            "cost": dataclasses.asdict(self.cost),
            "memory": self.memory,
            "needed": self.needed,
            "compiled": self.is_compiled,
        }


def meshes(devices: int, runs: int, heads: int) -> list[tuple[int, int, int]]:
    """All (run, data, tensor) over the devices of which run divides the runs and tensor, at most 8,
    the heads.
    """
    return [
        (run, devices // (run * tensor), tensor)
        for run in range(1, devices + 1)
        if devices % run == 0 and runs % run == 0
        for tensor in (1, 2, 4, 8)
        if devices % (run * tensor) == 0 and heads % tensor == 0
    ]


def candidates(work_on: Callable, topology: Topology) -> list[Candidate]:
    """At most MOST candidates that may fit, the fastest step by formula first and of equally fast
    ones that which trains in least, equal programs once.
    """
    found: dict[tuple, Candidate] = {}
    first = work_on(topology.mesh(1, topology.count, 1), None)
    for sizes in meshes(topology.count, first.runs, first.config.n_heads):
        mesh = topology.mesh(*sizes)
        for tokens in (
            first.sft.tokens_per_micro_batch // 4,
            first.sft.tokens_per_micro_batch,
            4 * first.sft.tokens_per_micro_batch,
        ):
            packed = work_on(mesh, dataclasses.replace(first.sft, tokens_per_micro_batch=tokens))
            for remat in REMAT:
                workload = dataclasses.replace(
                    packed, sft=dataclasses.replace(packed.sft, remat=remat)
                )
                begun = initial(workload)
                memory = estimate.loading_memory(workload.config, workload.model, mesh)
                memory["training"] = estimate.step_memory(workload, begun, None)
                memory |= (
                    {"sampling": estimate.sampling_memory(workload, begun, None)}
                    if workload.sampling
                    else {}
                )
                needed = {stage: sum(kinds.values()) for stage, kinds in memory.items()}
                candidate = Candidate(workload, estimate.formula_cost(workload, begun), needed)
                found.setdefault((candidate.sizes, remat, workload.shapes), candidate)
    fitting = [c for c in found.values() if c.needed <= MARGIN * topology.chip.memory] or [
        min(found.values(), key=lambda c: c.needed)
    ]
    return sorted(fitting, key=lambda c: (c.seconds(topology), c.memory["training"]))[:MOST]


def ranked(found: list[Candidate], topology: Topology) -> list[Candidate]:
    """Those that fit first, then by time."""
    return sorted(
        found,
        key=lambda c: (c.needed > topology.chip.memory - estimate.RESERVED, c.seconds(topology)),
    )
