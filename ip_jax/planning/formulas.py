"""Costs and bytes by formula, where there is no compiler for the devices. They know no compiler's
temporaries: trust a compiled plan more.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax

from ip_jax.models import flops
from ip_jax.models.activations import kept_bytes, layer_bytes
from ip_jax.models.flops import StepWork, layer_matrix_params
from ip_jax.models.placement import FSDP, mesh_axes
from ip_jax.planning.hlo import Collective, Cost
from ip_jax.planning.programs import Initial, per_device
from ip_jax.planning.workload import Sampling, Sizes, abstract_params
from ip_jax.training.losses import CHUNK_ROWS
from ip_jax.training.sharding import param_shardings

# times that a layer's scores lie in memory together while its backward pass runs: scores,
# probabilities and their gradients
SCORES = 4
# times that XLA:TPU writes or reads them in a pass without a gradient: so much has Qwen3-4B's,
# compiled for v5e:4x4
SCORES_MOVED = 11
SCORES_MOVED_BACK = 41  # and in its update, which makes them again in the backward pass


@dataclasses.dataclass(frozen=True)
class Step:
    """Rows of one step in micro-batches of one shape. `work` is that of all runs. `scores`:
    elements of attention's scores of one row and head, 0 where few are held at once.
    """

    work: StepWork
    micro_batches: float
    rows: int  # of a micro-batch, of all runs
    length: int
    scores: int = 0


def lora_params(sizes: Sizes) -> int:
    """Elements of one run's adapter; 0 without one."""
    return 0 if sizes.lora is None else flops.lora_params(sizes.config, sizes.lora)


def update_cost(sizes: Sizes, steps: Sequence[Step], begun: Initial) -> Cost:
    """Cost of a step with rows of these shapes on one device by formula: that of their gradients,
    and the traffic of the state.
    """
    return sum(
        (_gradient_cost(sizes, step, begun) for step in steps),
        Cost(traffic=3 * per_device(begun.state)),
    )


def _gradient_cost(sizes: Sizes, step: Step, begun: Initial) -> Cost:
    """Cost of the gradients of these rows: the model's FLOPs, and where products are made again
    (remat) 2 more for each token and weight but those of down; of the traffic the weights, in each
    micro-batch and pass, and what is kept of the activations, written and read; of the collectives
    each layer's gathering over (run, data), with full training the scattering of its gradients, and
    over tensor the sums of float32 activations behind attention and MLP. To experts that stay where
    they lie all tokens are sent, and their outputs back.
    """
    config, mesh, again = sizes.config, sizes.mesh, sizes.remat in ("attention", "full")
    passes = 3 if again else 2
    # nothing needs down's result again
    remat = 2 * layer_matrix_params(config, but="down") * step.work.tokens if again else 0
    cut, tensor = _cut(sizes), mesh.shape["tensor"]
    staying = _staying_experts(sizes)
    weights = (_bytes_named("", sizes) - staying) * cut
    traffic = step.micro_batches * (
        passes * _moved(sizes) * (weights + staying) + 2 * activations(sizes, step)
    )
    traffic += scores_traffic(sizes, step, SCORES_MOVED_BACK)
    hidden = config.n_layers * config.d_model * step.work.tokens
    summed = 2 * passes * 4 * hidden / cut
    sent = hidden * _item(sizes.model.activations) * (cut - 1) / cut if staying else 0
    gradients = per_device(begun.state.trained) * cut if sizes.lora is None else 0
    layers = config.n_layers * step.micro_batches
    collectives = _collectives(
        {
            # forward, twice backward
            "all-gather": Collective(
                passes * layers, passes * step.micro_batches * weights * (cut - 1) / cut + 3 * sent
            ),
            "reduce-scatter": Collective(
                layers, step.micro_batches * gradients * (cut - 1) / cut + 2 * sent
            ),
            "all-reduce": Collective(2 * passes * layers, 2 * summed * (tensor - 1) / tensor),
        }
    )
    return Cost(
        (flops.step_flops(config, sizes.lora, step.work) + remat) / mesh.size, traffic, collectives
    )


def _collectives(found: dict[str, Collective]) -> dict[str, Collective]:
    return {kind: collective for kind, collective in found.items() if collective.moved}


def _cut(sizes: Sizes) -> int:
    """Devices that a batch, and a layer that is gathered when it is used, are cut over."""
    return sizes.mesh.shape["run"] * sizes.mesh.shape["data"]


def _item(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _staying_experts(sizes: Sizes) -> float:
    """Bytes of the experts on a device that is never sent any of them (`models.moe.mixture`): none
    where run and data do not divide their number.
    """
    n_experts = sizes.config.n_experts
    return _bytes_named("expert", sizes) if n_experts and n_experts % _cut(sizes) == 0 else 0.0


def _bytes_named(part: str, sizes: Sizes) -> float:
    """Bytes on a device of the weights whose path has `part` in it, norms and routers aside, as
    products take them: a quantised base is made dense before it is gathered.
    """
    weights = abstract_params(
        sizes.config, sizes.model.weights, param_shardings(sizes.mesh, sizes.config)
    )
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(weights)}
    return per_device(
        [
            leaf
            for name, leaf in named.items()
            if part in name and "norm" not in name and "router" not in name
        ]
    )


def _moved(sizes: Sizes) -> int:
    """Times that a weight moves to be used: that of a quantised base is written dense and read."""
    return 2 if sizes.model.quantised else 1


def activations(sizes: Sizes, step: Step) -> float:
    """Bytes of one micro-batch's activations on a device, by formula: what each layer keeps for the
    backward pass, one layer's own arrays in float32 and as much for their gradients, and a chunk of
    logits. With full remat it lies 7 to 25 % below what XLA:TPU takes for a 7B model.
    """
    config, mesh = sizes.config, sizes.mesh
    rows = -(-step.rows // _cut(sizes))
    kept = kept_bytes(
        config, sizes.remat, _item(sizes.model.weights), _item(sizes.model.activations)
    )
    logits = 3 * 4 * CHUNK_ROWS * config.vocab_size / mesh.size
    return (
        rows * step.length * (kept + layer_bytes(config, mesh.shape["tensor"]))
        + SCORES * scores(sizes, step)
        + logits
    )


def row_adapters(sizes: Sizes, step: Step) -> float:
    """Bytes on a device of what each row of a micro-batch is given of its run's adapter where the
    rows of several runs lie side by side (`models.run_rows`): one layer's and its gradient, with
    remat "none" all layers'.
    """
    if sizes.runs == sizes.mesh.shape["run"]:
        return 0.0
    return (
        4
        * -(-step.rows // _cut(sizes))
        * lora_params(sizes)
        * (1 if sizes.remat == "none" else 2 / sizes.config.n_layers)
    )


def scores(sizes: Sizes, step: Step) -> float:
    """Bytes of one layer's attention scores of a micro-batch on a device, in float32."""
    mesh = sizes.mesh
    rows = -(-step.rows // _cut(sizes))
    return 4 * rows * step.scores * sizes.config.n_heads / mesh.shape["tensor"]


def scores_traffic(sizes: Sizes, step: Step, moved: int) -> float:
    """Bytes on a device when every layer's scores of every micro-batch are moved so often."""
    return moved * step.micro_batches * sizes.config.n_layers * scores(sizes, step)


def caches(sizes: Sizes, work: Sampling) -> float:
    """Bytes of keys and values on one device, by formula: they are cut over (run, data), and over
    tensor where it divides the kv heads.
    """
    shape = work.plan.shape
    positions = shape.runs * shape.groups * shape.copies * (shape.prompt + shape.rows * shape.ring)
    return positions * _position_bytes(sizes, work) / _cut(sizes)


def _position_bytes(sizes: Sizes, work: Sampling) -> float:
    """Bytes of one position's keys and values in all layers, those of a device's kv heads."""
    config, tensor = sizes.config, sizes.mesh.shape["tensor"]
    heads = config.n_kv_heads / (tensor if config.n_kv_heads % tensor == 0 else 1)
    return 2 * _item(work.options.dtype) * config.n_layers * heads * config.head_dim


def decode_cost(sizes: Sizes, work: Sampling, adapters) -> Cost:
    """Cost of decoding one token for every row, by formula: all weights and caches are read once;
    collectives as in `_sampling_collectives`, and logits: each device makes those of its part of
    the vocabulary, and is sent those of its rows, in float32, one mesh axis after the other.
    """
    shape, config = work.plan.shape, sizes.config
    rows = shape.runs * shape.groups * shape.copies * shape.rows
    products = (
        2
        * rows
        * (layer_matrix_params(config) + lora_params(sizes) + config.vocab_size * config.d_model)
    )
    used = _weights_in_use(sizes)
    moving_experts = 0.0 if used.staying else _bytes_named("expert", sizes) * _cut(sizes)
    sent = dataclasses.replace(
        used,
        gathered=moving_experts if work.options.whole_layers else used.gathered,
        vocabulary=0.0,
    )
    found = _sampling_collectives(sizes, work, sent, rows, chosen=rows)
    read = _moved(sizes) * (used.gathered + used.staying) + used.vocabulary / sizes.mesh.size
    return Cost(
        products / sizes.mesh.size, read + per_device(adapters) + caches(sizes, work), found
    )


def prefill_cost(sizes: Sizes, work: Sampling) -> Cost:
    """Cost of one prefill of the longest prompts, by formula; collectives as in
    `_sampling_collectives`, and the keys and values of all prompts, which are gathered to be put
    where they belong.
    """
    plan, config = work.plan, sizes.config
    length = plan.prefill_lengths[-1]
    prompts = plan.shape.runs * plan.prefill_prompts * plan.shape.copies
    attention = 2 * length**2 * config.n_heads * config.head_dim * config.n_layers * prompts
    products = 2 * (layer_matrix_params(config) + lora_params(sizes)) * prompts * length + attention
    used = _weights_in_use(sizes)
    placed = _position_bytes(sizes, work) * prompts / sizes.mesh.shape["run"] * length
    found = _sampling_collectives(sizes, work, used, prompts * length, placed)
    return Cost(
        products / sizes.mesh.size,
        _moved(sizes) * (used.gathered + used.staying + used.vocabulary),
        found,
    )


@dataclasses.dataclass(frozen=True)
class _WeightsInUse:
    """Bytes of the weights that a device computes with in one pass of the sampler: of the layers
    its part by tensor, gathered over (run, data), but experts that stay; and the vocabulary's
    matrix whole, as prefill gathers it to look tokens up.
    """

    gathered: float
    staying: float
    vocabulary: float


def _weights_in_use(sizes: Sizes) -> _WeightsInUse:
    staying, vocabulary = _staying_experts(sizes), sizes.config.vocab_size * sizes.config.d_model
    return _WeightsInUse(
        (_bytes_named("layers", sizes) - staying) * _cut(sizes),
        staying,
        _item(sizes.model.weights) * vocabulary,
    )


def _sampling_collectives(
    sizes: Sizes,
    work: Sampling,
    used: _WeightsInUse,
    tokens: int,
    placed: float = 0.0,
    chosen: int = 0,
) -> dict[str, Collective]:
    """Those of `tokens` tokens' pass, by formula: the gathering of the weights over (run, data),
    over tensor the sums of float32 activations behind attention and MLP; to experts that stay all
    tokens are sent, and their outputs back. `placed`: bytes that are gathered over data besides;
    `chosen`: tokens whose successor is chosen, from hidden states that all devices get.
    """
    config, mesh, cut = sizes.config, sizes.mesh, _cut(sizes)
    run, data, tensor = (mesh.shape[axis] for axis in ("run", "data", "tensor"))
    elements = config.n_layers * config.d_model * tokens
    sent = elements * _item(work.options.dtype) * (cut - 1) / cut if used.staying else 0
    hidden, logits = (
        chosen * config.d_model * _item(work.options.dtype),
        4 * chosen * config.vocab_size / cut,
    )
    gathered = (used.gathered + hidden) * (cut - 1) / cut + used.vocabulary * (
        mesh.size - 1
    ) / mesh.size
    return _collectives(
        {
            "all-gather": Collective(
                config.n_layers,
                gathered + placed * (data - 1) / data + sent + logits * (tensor - 1) / tensor,
            ),
            "all-to-all": Collective(
                (run > 1) + (data > 1), logits * ((run - 1) / run + (data - 1) / data)
            ),
            "reduce-scatter": Collective(config.n_layers, sent),
            "all-reduce": Collective(
                2 * config.n_layers, 2 * 2 * 4 * elements / cut * (tensor - 1) / tensor
            ),
        }
    )


def layer_copies(sizes: Sizes, work: Sampling, weights) -> float:
    """Bytes on a device of the copy of the layers that tokens are decoded with, by formula: as
    `weights` lie, or whole but for tensor and experts.
    """

    def copied(name: str, leaf) -> float:
        gathered = {axis for entry in leaf.sharding.spec for axis in mesh_axes(entry)} & set(FSDP)
        return per_device(leaf) * (
            math.prod(sizes.mesh.shape[axis] for axis in gathered)
            if work.options.whole_layers and "expert" not in name
            else 1
        )

    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(weights)}
    return sum(copied(name, leaf) for name, leaf in named.items() if "layers" in name)


def sampling_activations(sizes: Sizes, work: Sampling) -> float:
    """Bytes on a device of what the sampler makes on its way, by formula: one layer where it is
    gathered (or made dense), and either a prefill's own arrays of a layer and the vocabulary's
    matrix, gathered, or all rows' logits, in float32 and twice as much to choose from them. Where
    there is room, XLA gathers more ahead.
    """
    plan, config, used = work.plan, sizes.config, _weights_in_use(sizes)
    layer = used.gathered / config.n_layers if _cut(sizes) > 1 or sizes.model.quantised else 0
    prompts = Step(
        StepWork(0, 0, 0),
        1,
        plan.shape.runs * plan.prefill_prompts * plan.shape.copies,
        plan.prefill_lengths[-1],
    )
    rows = plan.shape.runs * plan.shape.groups * plan.shape.copies * plan.shape.rows
    logits = 3 * 4 * rows * config.vocab_size / _cut(sizes)
    prefill = score_activations(sizes, prompts) + (used.vocabulary if sizes.mesh.size > 1 else 0)
    return layer + max(prefill, logits)


def score_cost(sizes: Sizes, step: Step) -> Cost:
    """Cost of a pass without a gradient over all rows of a step, by formula: its products, the
    weights and its own arrays for each micro-batch.
    """
    config, mesh = sizes.config, sizes.mesh
    cut = _cut(sizes)
    gathered = step.micro_batches * _bytes_named("", sizes) * cut
    found = (
        {"all-gather": Collective(config.n_layers * step.micro_batches, gathered * (cut - 1) / cut)}
        if cut > 1
        else {}
    )
    traffic = (
        _moved(sizes) * gathered
        + step.micro_batches * score_activations(sizes, step)
        + scores_traffic(sizes, step, SCORES_MOVED)
    )
    return Cost(forward_flops(sizes, step.work) / mesh.size, traffic, found)


def forward_flops(sizes: Sizes, work: StepWork) -> float:
    """Model FLOPs of a pass without a gradient over all runs."""
    config = sizes.config
    products = (
        2 * (layer_matrix_params(config) + lora_params(sizes)) * work.tokens
        + 2 * config.vocab_size * config.d_model * work.responses
    )
    return products + 4 * config.n_heads * config.head_dim * work.pairs


def score_activations(sizes: Sizes, step: Step) -> float:
    """Bytes of one micro-batch of a pass without a gradient on a device, by formula: one layer's
    own arrays, and a chunk of logits.
    """
    config, mesh = sizes.config, sizes.mesh
    rows = -(-step.rows // _cut(sizes))
    heads, kv, hidden = (
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
        config.d_ff * max(config.experts_per_token, 1),
    )
    of_a_layer = 4 * (4 * config.d_model + (3 * heads + 4 * kv + 3 * hidden) / mesh.shape["tensor"])
    return (
        rows * step.length * of_a_layer
        + SCORES / 2 * scores(sizes, step)
        + 4 * CHUNK_ROWS * config.vocab_size / mesh.size
    )
