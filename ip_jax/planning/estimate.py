"""From what the compiler says, or from formulas where there is no compiler, to bytes, seconds and chip-hours.

Seconds are estimates: the slowest of the time that the FLOPs take at the chip's published peak, the traffic at its bandwidth and the
collectives over its links, as if these overlapped wholly and nothing else took time. A real step takes longer.
"""
import dataclasses

import jax

from ip_jax.data.packing import PackedShape
from ip_jax.models import flops
from ip_jax.models.chips import Chip
from ip_jax.models.flops import layer_matrix_params
from ip_jax.planning.chips import Topology
from ip_jax.planning.hlo import Collective, Cost
from ip_jax.planning.programs import Compiled, Initial, TooLarge, batch_of, per_device
from ip_jax.planning.workload import Sampling, Workload
from ip_jax.training.losses import CHUNK_ROWS


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
    return {"weights": frozen or per_device(state.trained)} | trained | {"optimizer": per_device(state.adam)}


def lora_params(workload: Workload) -> int:
    """Elements of one run's adapter; 0 with full training, which has none."""
    return 0 if workload.sft.train == "full" else flops.lora_params(workload.config, workload.sft.lora)


def step_tokens(workload: Workload, shape: PackedShape) -> int:
    """Positions of one step over all runs, padding included."""
    return workload.runs * shape.micro_batches * shape.micro_rows * shape.length


def step_flops(workload: Workload, shape: PackedShape) -> float:
    """Model FLOPs of one step of this shape over all runs, as if every position were a token (`models.flops`)."""
    lora = None if workload.sft.train == "full" else workload.sft.lora
    return flops.step_flops(workload.config, lora, flops.shape_work(workload.config, shape, workload.runs))


def formula_cost(workload: Workload, shape: PackedShape, begun: Initial) -> Cost:
    """Cost of a step on one device by formula: the model's FLOPs, and where products are made again (remat) 2 more for each token and
    weight but those of down; of the traffic the weights, in each micro-batch and pass, and what is kept of the activations, written and
    read; of the collectives each layer's gathering over (run, data), with full training the scattering of its gradients, and over tensor
    the sums of activations behind attention and MLP. To experts that stay where they lie all tokens are sent, and their outputs back.
    """
    config, mesh, again = workload.config, workload.mesh, workload.sft.remat in ("attention", "full")
    passes = 3 if again else 2
    remat = 2 * layer_matrix_params(config, but="down") * step_tokens(workload, shape) if again else 0  # nothing needs down's result again
    cut, tensor = mesh.shape["run"] * mesh.shape["data"], mesh.shape["tensor"]
    staying = _staying_experts(workload, begun)
    weights = (per_device(begun.weights) - staying) * cut
    traffic = shape.micro_batches * (passes * (weights + staying) + 2 * activations(workload, shape)) + 3 * per_device(begun.state)
    hidden = config.n_layers * config.d_model * step_tokens(workload, shape) * (2 if workload.model.activations == "bfloat16" else 4)
    summed, sent = 2 * passes * hidden / cut, hidden * (cut - 1) / cut if staying else 0
    gradients = per_device(begun.state.trained) * cut if workload.sft.train == "full" else 0
    layers = config.n_layers * shape.micro_batches
    collectives = {
        "all-gather": Collective(passes * layers, passes * shape.micro_batches * weights * (cut - 1) / cut + 3 * sent),  # forward, twice backward
        "reduce-scatter": Collective(layers, shape.micro_batches * gradients * (cut - 1) / cut + 2 * sent),
        "all-reduce": Collective(2 * passes * layers, 2 * summed * (tensor - 1) / tensor),
    }
    return Cost((step_flops(workload, shape) + remat) / mesh.size, traffic, {kind: c for kind, c in collectives.items() if c.moved})


def _staying_experts(workload: Workload, begun: Initial) -> float:
    """Bytes of the experts on a device that is never sent any of them (`models.moe.mixture`): none where run and data do not divide their number."""
    mesh, n_experts = workload.mesh, workload.config.n_experts
    if not n_experts or n_experts % (mesh.shape["run"] * mesh.shape["data"]):
        return 0.0
    leaves = jax.tree.leaves_with_path(begun.weights)
    return per_device([leaf for path, leaf in leaves if "expert" in jax.tree_util.keystr(path)])


def activations(workload: Workload, shape: PackedShape) -> float:
    """Bytes of one micro-batch's activations on a device, by formula: what each layer keeps for the backward pass, one layer's own arrays
    in float32 and as much for their gradients, and a chunk of logits. With full remat it lies 7 to 25 % below what XLA:TPU takes for a 7B model.
    """
    config, sft, mesh = workload.config, workload.sft, workload.mesh
    tokens = -(-workload.runs * shape.micro_rows // (mesh.shape["run"] * mesh.shape["data"])) * shape.length
    width, item = 2 if workload.model.weights == "bfloat16" else 4, 2 if workload.model.activations == "bfloat16" else 4
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    hidden = config.d_ff * max(config.experts_per_token, 1)
    attention, products = 2 * heads + 2 * kv, heads + 2 * kv + 2 * config.d_model
    products += 0 if config.n_experts else 2 * hidden  # a mixture keeps no hidden states of its experts
    by_policy = {"none": 2 * (attention + products), "products": attention + products, "attention": attention, "full": 0}
    kept = item * config.d_model + width * by_policy[sft.remat]
    of_a_layer = 8 * (4 * config.d_model + (3 * heads + 4 * kv + 4 * hidden) / mesh.shape["tensor"])
    logits = 3 * 4 * CHUNK_ROWS * config.vocab_size / mesh.size
    return tokens * (config.n_layers * kept + of_a_layer) + logits


def caches(workload: Workload, work: Sampling) -> float:
    """Bytes of keys and values on one device, by formula."""
    shape, config, mesh = work.plan.shape, workload.config, workload.mesh
    item = 2 if work.options.dtype == "bfloat16" else 4
    positions = shape.runs * shape.groups * (shape.prompt + shape.rows * shape.ring)
    return 2 * item * config.n_layers * config.n_kv_heads * config.head_dim * positions / (mesh.shape["run"] * mesh.shape["data"])


def decode_cost(workload: Workload, work: Sampling, begun: Initial) -> Cost:
    """Cost of decoding one token for every row, by formula: all weights and caches are read once."""
    shape, config, mesh = work.plan.shape, workload.config, workload.mesh
    rows = shape.runs * shape.groups * shape.rows
    products = 2 * rows * (layer_matrix_params(config) + lora_params(workload) + config.vocab_size * config.d_model)
    weights = per_device(begun.weights) * (mesh.shape["run"] * mesh.shape["data"])
    return Cost(products / mesh.size, weights + per_device(begun.state.trained) + caches(workload, work))


def prefill_cost(workload: Workload, work: Sampling, begun: Initial) -> Cost:
    """Cost of one prefill of the longest prompts, by formula."""
    plan, config, mesh = work.plan, workload.config, workload.mesh
    length = plan.prefill_lengths[-1]
    prompts = plan.shape.runs * plan.prefill_prompts
    attention = 2 * length**2 * config.n_heads * config.head_dim * config.n_layers * prompts
    products = 2 * (layer_matrix_params(config) + lora_params(workload)) * prompts * length + attention
    weights = per_device(begun.weights) * (mesh.shape["run"] * mesh.shape["data"])
    return Cost(products / mesh.size, weights)


def step_memory(workload: Workload, shape: PackedShape, begun: Initial, compiled: Compiled | None) -> dict[str, float]:
    """Bytes on each device while a step runs, by kind."""
    kinds = resident(begun) | {"batch": per_device(batch_of(workload, shape))}
    if compiled is None:
        return kinds | {"activations": activations(workload, shape) + per_device(begun.state.trained) * 2}
    rest = compiled.memory.arguments - sum(kinds.values())
    return kinds | {"activations": compiled.memory.temporaries + compiled.memory.kept, "layout": max(rest, 0.0)}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program, how often the whole experiment runs it, and what one run costs; `compile_seconds` is None where nothing was compiled."""

    name: str
    times: float
    cost: Cost
    seconds: Seconds | None
    compile_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan: bytes are those of one device; `memory` by stage and kind, `needed` by stage; `allowed` is 0 where it is not known."""

    model: str
    topology: str
    devices: int
    mesh: dict[str, int]
    source: str
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

    @property
    def fits(self) -> bool | None:
        """None where the memory of the device is not known."""
        return all(needed <= self.allowed for needed in self.needed.values()) if self.allowed else None

    def record(self) -> dict:
        """As JSON."""
        return dataclasses.asdict(self) | {"fits": self.fits}


RESERVED = 0.25 * 2**30  # of a TPU's memory: XLA has 15.75 of a v5e's 16 GiB


def summary(workload: Workload, topology: Topology, phases: list[Phase], memory: dict, refused: dict[str, TooLarge]) -> Planned:
    """The plan: sums, whether it fits, what to change if it does not. A stage that the compiler refused needs what the compiler says."""
    shape = max(workload.steps, key=lambda shape: step_tokens(workload, shape))
    needed = {stage: max(sum(kinds.values()), refused[stage].needed if stage in refused else 0) for stage, kinds in memory.items()}
    allowed = topology.chip.memory - RESERVED if topology.chip else 0.0
    for stage, found in refused.items():
        needed[stage] = max(needed[stage], allowed + 1, found.needed)
    hours, mfu = {}, None
    if topology.chip:
        steps = [phase for phase in phases if phase.name.startswith("step")]
        spent = lambda of: sum(phase.times * phase.seconds.total for phase in of) * topology.count / 3600  # noqa: E731
        hours = {"training": spent(steps), "evaluation": spent([phase for phase in phases if phase not in steps])}
        useful = sum(step_flops(workload, shape) * count for shape, count in workload.steps.items()) * workload.programs
        mfu = useful / (hours["training"] * 3600 * topology.chip.peak)
    advice = [line for stage in memory if allowed and needed[stage] > allowed for line in _advice(workload, stage, memory[stage])]
    return Planned(
        workload.model.name, topology.name, topology.count, dict(workload.mesh.shape), workload.source, workload.runs, workload.programs,
        step_tokens(workload, shape), memory, needed, allowed, phases, mfu, hours, advice,
    )


def _advice(workload: Workload, stage: str, kinds: dict[str, float]) -> list[str]:
    """What to change, the largest kind of bytes first."""
    sft, lines = workload.sft, []
    for kind in sorted(kinds, key=kinds.get, reverse=True):
        if kind == "activations" and stage == "training":
            if sft.remat != "full":
                lines.append("recompute activations: --sft.remat full")
            if max(shape.micro_rows for shape in workload.steps) > workload.mesh.shape["data"]:
                lines.append(f"smaller micro-batches: --sft.tokens-per-micro-batch {sft.tokens_per_micro_batch // 2}")
        if kind == "caches":
            lines.append(f"fewer completions side by side: --evaluation.slots {max(s.options.slots for s in workload.sampling) // 2}")
        if kind in ("adapters", "optimizer") and workload.runs > 1:
            lines.append(f"fewer runs in one program (now {workload.runs})")
        if kind.startswith("weights"):
            lines.append("more chips: the weights are cut over all of them")
    return [f"{stage}: {line}" for line in dict.fromkeys(lines)]
