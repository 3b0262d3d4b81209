"""Costs and bytes by formula, where there is no compiler for the devices. They know no compiler's temporaries: trust a compiled plan more."""
import dataclasses

import jax

from ip_jax.models import flops
from ip_jax.models.flops import StepWork, layer_matrix_params
from ip_jax.planning.hlo import Collective, Cost
from ip_jax.planning.programs import Initial, per_device
from ip_jax.planning.workload import Sampling, Sizes
from ip_jax.training.losses import CHUNK_ROWS

SCORES = 4  # times that a layer's scores lie in memory together while its backward pass runs: scores, probabilities and their gradients
SCORES_MOVED = 11  # times that XLA:TPU writes or reads them in a pass without a gradient: so much has Qwen3-4B's, compiled for v5e:4x4
SCORES_MOVED_BACK = 41  # and in its update, which makes them again in the backward pass


@dataclasses.dataclass(frozen=True)
class Step:
    """The rows of one step. `work` is that of all runs. `scores`: elements of attention's scores of one row and head, 0 where few are held at once."""

    work: StepWork
    micro_batches: int
    micro_rows: int  # of each run
    length: int
    scores: int = 0


def lora_params(sizes: Sizes) -> int:
    """Elements of one run's adapter; 0 without one."""
    return 0 if sizes.lora is None else flops.lora_params(sizes.config, sizes.lora)


def update_cost(sizes: Sizes, step: Step, begun: Initial) -> Cost:
    """Cost of a step on one device by formula: the model's FLOPs, and where products are made again (remat) 2 more for each token and
    weight but those of down; of the traffic the weights, in each micro-batch and pass, and what is kept of the activations, written and
    read; of the collectives each layer's gathering over (run, data), with full training the scattering of its gradients, and over tensor
    the sums of activations behind attention and MLP. To experts that stay where they lie all tokens are sent, and their outputs back.
    """
    config, mesh, again = sizes.config, sizes.mesh, sizes.remat in ("attention", "full")
    passes = 3 if again else 2
    remat = 2 * layer_matrix_params(config, but="down") * step.work.tokens if again else 0  # nothing needs down's result again
    cut, tensor = mesh.shape["run"] * mesh.shape["data"], mesh.shape["tensor"]
    staying = _staying_experts(sizes, begun)
    weights = (per_device(begun.weights) - staying) * cut
    traffic = step.micro_batches * (passes * (weights + staying) + 2 * activations(sizes, step)) + 3 * per_device(begun.state)
    traffic += scores_traffic(sizes, step, SCORES_MOVED_BACK)
    hidden = config.n_layers * config.d_model * step.work.tokens * (2 if sizes.model.activations == "bfloat16" else 4)
    summed, sent = 2 * passes * hidden / cut, hidden * (cut - 1) / cut if staying else 0
    gradients = per_device(begun.state.trained) * cut if sizes.lora is None else 0
    layers = config.n_layers * step.micro_batches
    collectives = {
        "all-gather": Collective(passes * layers, passes * step.micro_batches * weights * (cut - 1) / cut + 3 * sent),  # forward, twice backward
        "reduce-scatter": Collective(layers, step.micro_batches * gradients * (cut - 1) / cut + 2 * sent),
        "all-reduce": Collective(2 * passes * layers, 2 * summed * (tensor - 1) / tensor),
    }
    return Cost((flops.step_flops(config, sizes.lora, step.work) + remat) / mesh.size, traffic, {kind: c for kind, c in collectives.items() if c.moved})


def _staying_experts(sizes: Sizes, begun: Initial) -> float:
    """Bytes of the experts on a device that is never sent any of them (`models.moe.mixture`): none where run and data do not divide their number."""
    mesh, n_experts = sizes.mesh, sizes.config.n_experts
    if not n_experts or n_experts % (mesh.shape["run"] * mesh.shape["data"]):
        return 0.0
    leaves = jax.tree.leaves_with_path(begun.weights)
    return per_device([leaf for path, leaf in leaves if "expert" in jax.tree_util.keystr(path)])


def activations(sizes: Sizes, step: Step) -> float:
    """Bytes of one micro-batch's activations on a device, by formula: what each layer keeps for the backward pass, one layer's own arrays
    in float32 and as much for their gradients, and a chunk of logits. With full remat it lies 7 to 25 % below what XLA:TPU takes for a 7B model.
    """
    config, mesh = sizes.config, sizes.mesh
    rows = -(-sizes.runs * step.micro_rows // (mesh.shape["run"] * mesh.shape["data"]))
    width, item = 2 if sizes.model.weights == "bfloat16" else 4, 2 if sizes.model.activations == "bfloat16" else 4
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    hidden = config.d_ff * max(config.experts_per_token, 1)
    attention, products = 2 * heads + 2 * kv, heads + 2 * kv + 2 * config.d_model
    products += 0 if config.n_experts else 2 * hidden  # a mixture keeps no hidden states of its experts
    by_policy = {"none": 2 * (attention + products), "products": attention + products, "attention": attention, "full": 0}
    kept = item * config.d_model + width * by_policy[sizes.remat]
    of_a_layer = 8 * (4 * config.d_model + (3 * heads + 4 * kv + 4 * hidden) / mesh.shape["tensor"])
    logits = 3 * 4 * CHUNK_ROWS * config.vocab_size / mesh.size
    return rows * step.length * (config.n_layers * kept + of_a_layer) + SCORES * scores(sizes, step) + logits


def scores(sizes: Sizes, step: Step) -> float:
    """Bytes of one layer's attention scores of a micro-batch on a device, in float32."""
    mesh = sizes.mesh
    rows = -(-sizes.runs * step.micro_rows // (mesh.shape["run"] * mesh.shape["data"]))
    return 4 * rows * step.scores * sizes.config.n_heads / mesh.shape["tensor"]


def scores_traffic(sizes: Sizes, step: Step, moved: int) -> float:
    """Bytes on a device when every layer's scores of every micro-batch are moved so often."""
    return moved * step.micro_batches * sizes.config.n_layers * scores(sizes, step)


def caches(sizes: Sizes, work: Sampling) -> float:
    """Bytes of keys and values on one device, by formula."""
    shape, config, mesh = work.plan.shape, sizes.config, sizes.mesh
    item = 2 if work.options.dtype == "bfloat16" else 4
    positions = shape.runs * shape.groups * shape.copies * (shape.prompt + shape.rows * shape.ring)
    return 2 * item * config.n_layers * config.n_kv_heads * config.head_dim * positions / (mesh.shape["run"] * mesh.shape["data"])


def decode_cost(sizes: Sizes, work: Sampling, weights, adapters) -> Cost:
    """Cost of decoding one token for every row, by formula: all weights and caches are read once."""
    shape, config, mesh = work.plan.shape, sizes.config, sizes.mesh
    rows = shape.runs * shape.groups * shape.copies * shape.rows
    products = 2 * rows * (layer_matrix_params(config) + lora_params(sizes) + config.vocab_size * config.d_model)
    read = per_device(weights) * (mesh.shape["run"] * mesh.shape["data"])
    return Cost(products / mesh.size, read + per_device(adapters) + caches(sizes, work))


def prefill_cost(sizes: Sizes, work: Sampling, weights) -> Cost:
    """Cost of one prefill of the longest prompts, by formula."""
    plan, config, mesh = work.plan, sizes.config, sizes.mesh
    length = plan.prefill_lengths[-1]
    prompts = plan.shape.runs * plan.prefill_prompts * plan.shape.copies
    attention = 2 * length**2 * config.n_heads * config.head_dim * config.n_layers * prompts
    products = 2 * (layer_matrix_params(config) + lora_params(sizes)) * prompts * length + attention
    return Cost(products / mesh.size, per_device(weights) * (mesh.shape["run"] * mesh.shape["data"]))


def score_cost(sizes: Sizes, step: Step, weights) -> Cost:
    """Cost of a pass without a gradient over all rows of a step, by formula: its products, the weights and its own arrays for each micro-batch."""
    config, mesh = sizes.config, sizes.mesh
    cut = mesh.shape["run"] * mesh.shape["data"]
    gathered = step.micro_batches * per_device(weights) * cut
    found = {"all-gather": Collective(config.n_layers * step.micro_batches, gathered * (cut - 1) / cut)} if cut > 1 else {}
    traffic = gathered + step.micro_batches * score_activations(sizes, step) + scores_traffic(sizes, step, SCORES_MOVED)
    return Cost(forward_flops(sizes, step.work) / mesh.size, traffic, found)


def forward_flops(sizes: Sizes, work: StepWork) -> float:
    """Model FLOPs of a pass without a gradient over all runs."""
    config = sizes.config
    products = 2 * (layer_matrix_params(config) + lora_params(sizes)) * work.tokens + 2 * config.vocab_size * config.d_model * work.responses
    return products + 4 * config.n_heads * config.head_dim * work.pairs


def score_activations(sizes: Sizes, step: Step) -> float:
    """Bytes of one micro-batch of a pass without a gradient on a device, by formula: one layer's own arrays, and a chunk of logits."""
    config, mesh = sizes.config, sizes.mesh
    rows = -(-sizes.runs * step.micro_rows // (mesh.shape["run"] * mesh.shape["data"]))
    heads, kv, hidden = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_ff * max(config.experts_per_token, 1)
    of_a_layer = 4 * (4 * config.d_model + (3 * heads + 4 * kv + 3 * hidden) / mesh.shape["tensor"])
    return rows * step.length * of_a_layer + SCORES / 2 * scores(sizes, step) + 4 * CHUNK_ROWS * config.vocab_size / mesh.size
