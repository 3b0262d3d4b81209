"""Mixture of experts as in Mixtral (Jiang et al. 2024, arXiv 2401.04088): routing, the experts'
MLPs, the load balancing loss.

Tokens of all runs are laid out by expert, each expert's in whole chunks of rows, so that every
product has one expert's weights on one side. Nothing is dropped and nothing is padded to the
busiest expert. How tokens reach experts on a mesh is said at `mixture`. Dims: R runs, B rows, T
positions, M = R * B * T tokens, J experts of one token, E experts, P rows laid out by expert, C
rows of a chunk, L layers, D model, F hidden.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ip_jax.models import expert_kernel
from ip_jax.models.placement import BY_ROW, EXPERTS_IN, EXPERTS_OUT, fitting, mesh_axes
from ip_jax.models.products import as_bits, from_bits, product

# rows that are multiplied with one expert at once; measured, see docs/mixtral.md
LONGEST_CHUNK = 256
# rows whose hidden states are in memory at once on a TPU, a multiple of the longest chunk
BLOCK = 8192
# gate, up, down
Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


def route(
    h: Float[Array, "R B T D"], router: Float[Array, "D E"], per_token: int
) -> tuple[Float[Array, "R B T E"], Float[Array, "R B T J"], Int[Array, "R B T J"]]:
    """(probabilities of all experts, weights of the chosen ones, which these are): softmax and
    top-J in float32, weights sum to 1.
    """
    probabilities = jax.nn.softmax(product("rbtd,de->rbte", h, router, router.dtype), axis=-1)
    largest, chosen = jax.lax.top_k(probabilities, per_token)
    return probabilities, largest / largest.sum(axis=-1, keepdims=True), chosen


def load_balancing_loss(
    probabilities: Float[Array, "L blocks B T E"],
    counted: Bool[Array, "blocks B T"],
    per_token: int,
    sum_rows: Callable,
) -> Float[Array, " R"]:
    """E * sum_e f_e p_e of each run, over its counted tokens in all layers together, as
    transformers' `load_balancing_loss_func`. `sum_rows` adds up the rows of each run: [blocks, B,
    ...] to [R, ...].

    f_e is how often expert e is chosen (it has no gradient and sums to J), p_e its mean
    probability. Balanced routing gives J. Equations 4 to 6 of Fedus et al. 2021 (arXiv 2101.03961).
    """
    n_layers, *_, n_experts = probabilities.shape
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities), per_token)
    counted = counted.astype(jnp.float32)
    total = n_layers * jnp.maximum(sum_rows(counted.sum(axis=-1)), 1)[:, None]
    frequency = (
        sum_rows(jnp.einsum("lrbtje,rbt->rbe", jax.nn.one_hot(chosen, n_experts), counted)) / total
    )
    probability = sum_rows(jnp.einsum("lrbte,rbt->rbe", probabilities, counted)) / total
    return n_experts * jnp.sum(frequency * probability, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mixture(
    activation: Callable,
    kernel: str,
    x: Float[Array, "R B T D"],
    weights: Float[Array, "R B T J"],
    chosen: Int[Array, "R B T J"],
    experts: Experts,
) -> Float[Array, "R B T D"]:
    """Each token's weighted sum of the gated MLPs of its chosen experts, in x's dtype, by the
    products of `kernel`: "auto" (XLA's) or "pallas" (`models.expert_kernel`).

    On a mesh a device holds the experts of its place on the axes `run` and `data`, as far as they
    divide E, and a part of F by `tensor`. It collects the tokens of the devices along these axes,
    adds up what its own experts make of them, and each device gets back the sum for its own tokens.
    So experts stay where they lie; along an axis that does not divide E their weights are gathered
    when they are used. The backward pass makes the hidden states of the experts again: nothing of
    size P x F is kept.
    """
    (out,), _ = _on_mesh(
        functools.partial(_forward, activation, kernel), x, weights, chosen, experts
    )
    return out


def _mixture_fwd(activation, kernel, x, weights, chosen, experts):
    return mixture(activation, kernel, x, weights, chosen, experts), (x, weights, chosen, experts)


def _mixture_bwd(activation, kernel, residuals, d_out):
    x, weights, chosen, experts = residuals
    (d_x, d_weights), d_experts = _on_mesh(
        functools.partial(_backward, activation, kernel), x, weights, chosen, experts, d_out
    )
    return d_x, d_weights, None, tuple(d_experts)


mixture.defvjp(_mixture_fwd, _mixture_bwd)


def _on_mesh(function, x, weights, chosen, experts: Experts, *more: Float[Array, "R B T _"]):
    """function(x [M, D], weights [M, J], chosen [M, J], experts, *more [M, _]) of each device's
    tokens and experts, added up.

    `function` returns (results of the tokens [M, _], results in the shapes of the experts or none);
    a choice of E is of no expert here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _on_tokens(function, 0, x, weights, chosen, experts, *more)
    rows, inward, outward = (
        fitting(mesh.shape, *cut)
        for cut in (
            (BY_ROW, x.shape),
            (EXPERTS_IN, experts[0].shape),
            (EXPERTS_OUT, experts[2].shape),
        )
    )
    by_expert, width, hidden = map(mesh_axes, inward)
    row_axes = [axis for entry in rows for axis in mesh_axes(entry)]
    # devices with other tokens and other experts
    collected = [axis for axis in by_expert if axis in row_axes]
    # devices with the same experts, so that theirs is one gradient
    sharing = [axis for axis in BY_ROW if axis not in by_expert]
    # of one token among them
    copies = math.prod(mesh.shape[axis] for axis in sharing if axis not in row_axes)
    inner = (1, 1, 2)  # the dimension of each kernel that `width` cuts

    def on_device(x, weights, chosen, experts, *more):
        for axis in collected:
            x, weights, chosen, *more = (
                _gathered(a, axis, BY_ROW.index(axis)) for a in (x, weights, chosen, *more)
            )
        whole = tuple(
            _gathered(kernel, width, axis) for kernel, axis in zip(experts, inner, strict=True)
        )
        first = jax.lax.axis_index(by_expert) * len(whole[0]) if by_expert else 0
        of_tokens, of_experts = _on_tokens(function, first, x, weights, chosen, whole, *more)
        others = tuple(axis for axis in (*by_expert, *hidden) if axis not in collected)
        for axis in collected:
            of_tokens = [_scattered(a, axis, BY_ROW.index(axis)) for a in of_tokens]
        of_tokens = [_summed(a, others) for a in of_tokens]
        others = tuple(axis for axis in sharing if axis not in width)
        return of_tokens, [
            _summed(_scattered(a, width, axis), others) / copies
            for a, axis in zip(of_experts, inner, strict=False)
        ]

    kernels = (inward, inward, outward)
    n_results = jax.eval_shape(
        functools.partial(_on_tokens, function, 0), x, weights, chosen, experts, *more
    )
    results = [rows] * len(n_results[0]), list(kernels[: len(n_results[1])])
    arguments = (rows, rows, rows, kernels, *[rows] * len(more))
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False
    )(x, weights, chosen, experts, *more)


def _on_tokens(function, first, x, weights, chosen, experts: Experts, *more):
    """`function` on flat tokens, with experts counted from `first` on."""
    tokens, n_experts = x.shape[:-1], len(experts[0])

    def flat(a):
        return a.reshape(-1, a.shape[-1])

    here = chosen - first
    here = jnp.where((here >= 0) & (here < n_experts), here, n_experts)
    of_tokens, of_experts = function(flat(x), flat(weights), flat(here), experts, *map(flat, more))
    return [a.reshape(*tokens, -1) for a in of_tokens], list(of_experts)


def _gathered(a, axes: str | tuple[str, ...], dimension: int):
    return jax.lax.all_gather(a, axes, axis=dimension, tiled=True) if axes else a


def _scattered(a, axes: str | tuple[str, ...], dimension: int):
    return jax.lax.psum_scatter(a, axes, scatter_dimension=dimension, tiled=True) if axes else a


def _summed(a, axes: tuple[str, ...]):
    return jax.lax.psum(a, axes) if axes else a


@flax.struct.dataclass
class _Layout:
    """Where the choices [M * J] of tokens lie in rows by expert."""

    row: Int[Array, " M*J"]  # of each choice; P for a choice of no expert here
    choice: Int[Array, " P"]  # of each row; M * J for a row that is empty
    first: Int[Array, " E"]  # each expert's first chunk
    count: Int[Array, " E"]  # how many chunks it has
    chunk: int = flax.struct.field(pytree_node=False)  # rows

    @classmethod
    def of(cls, chosen: Int[Array, "M J"], n_experts: int, kernel: str) -> "_Layout":
        """Choices keep their order within an expert."""
        chosen = chosen.reshape(-1)
        shortest = expert_kernel.SMALLEST if kernel == "pallas" else 8
        chunk = min(LONGEST_CHUNK, max(shortest, 1 << (chosen.size // n_experts).bit_length()))
        n_rows = (chosen.size // chunk + n_experts) * chunk  # enough however the choices fall
        n_rows = n_rows if n_rows <= BLOCK else -(-n_rows // BLOCK) * BLOCK
        is_chosen = chosen[:, None] == jnp.arange(n_experts)
        rank = jnp.cumsum(is_chosen, axis=0) - 1
        count = -(-is_chosen.sum(axis=0) // chunk)
        first = jnp.cumsum(count) - count
        row = jnp.sum(jnp.where(is_chosen, first * chunk + rank, 0), axis=1)
        row = jnp.where(chosen < n_experts, row, n_rows)
        choice = jnp.full(n_rows, chosen.size).at[row].set(jnp.arange(chosen.size), mode="drop")
        return cls(row, choice, first, count, chunk)

    def rows_of(
        self, tokens: Float[Array, "M _"], weights: Float[Array, "M J"]
    ) -> tuple[Float[Array, "P _"], Float[Array, "P 1"]]:
        """Each token in the rows of its choices, and their weights; zero in empty rows."""
        return _taken(tokens, self.choice // weights.shape[1]), _taken(
            weights.reshape(-1, 1), self.choice
        )

    def at_choices(self, rows: Float[Array, "P _"], per_token: int) -> Float[Array, "M J _"]:
        """The rows of each token's choices, zero where a choice is of no expert here."""
        return _taken(rows, self.row).reshape(-1, per_token, rows.shape[1])


def _taken(rows, index):
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _forward(
    activation,
    kernel,
    x: Float[Array, "M D"],
    weights: Float[Array, "M J"],
    chosen: Int[Array, "M J"],
    experts: Experts,
):
    """([sum of each token's experts here, in x's dtype], [])."""

    def mlp(of, x, weight, gate, up, down):
        hidden = activation(of.product(x, gate)) * of.product(x, up)
        return (of.product(hidden, down) * weight,), ()

    layout, per_token = _Layout.of(chosen, len(experts[0]), kernel), weights.shape[1]
    (out,), _ = _by_expert(
        mlp, kernel, layout.rows_of(x, weights), experts, layout, [(x.shape[1], x.dtype)]
    )
    return [layout.at_choices(out, per_token).sum(axis=1).astype(x.dtype)], []


def _backward(
    activation,
    kernel,
    x: Float[Array, "M D"],
    weights: Float[Array, "M J"],
    chosen: Int[Array, "M J"],
    experts: Experts,
    d_out,
):
    """([gradients of x and weights], gradients of the experts)."""

    def mlp(of, x, weight, d_out, gate, up, down):
        hidden, pull = jax.vjp(
            lambda gate, up: activation(gate) * up, of.product(x, gate), of.product(x, up)
        )
        d_hidden = of.transposed(d_out, down)  # before it is weighted
        d_gate, d_up = pull(d_hidden * weight)
        d_x = of.transposed(d_gate, gate) + of.transposed(d_up, up)
        d_experts = of.outer(x, d_gate), of.outer(x, d_up), of.outer(hidden * weight, d_out)
        return (d_x, jnp.sum(d_hidden * hidden, axis=-1, keepdims=True)), d_experts

    layout, per_token = _Layout.of(chosen, len(experts[0]), kernel), weights.shape[1]
    rows = *layout.rows_of(x, weights), layout.rows_of(d_out, weights)[0]
    (d_x, d_weight), d_experts = _by_expert(
        mlp, kernel, rows, experts, layout, [(x.shape[1], x.dtype), (1, weights.dtype)]
    )
    d_tokens = [
        layout.at_choices(d_x, per_token).sum(axis=1).astype(x.dtype),
        layout.at_choices(d_weight, per_token)[..., 0],
    ]
    return d_tokens, [
        gradient.astype(kernel.dtype) for gradient, kernel in zip(d_experts, experts, strict=True)
    ]


class _Products(NamedTuple):
    """Products of rows by expert with that expert's weights, in the weights' dtype, summed in
    float32.
    """

    product: Callable  # (x [P, I], kernel [.., I, O]) -> [P, O]
    transposed: Callable  # (d [P, O], kernel [.., I, O]) -> [P, I]
    outer: Callable  # (x [P, I], d [P, O]) -> [.., I, O], the gradient of the kernel


def _by_expert(
    mlp, kernel: str, rows, experts: Experts, layout: _Layout, outputs: list[tuple[int, jnp.dtype]]
):
    """mlp(products, *rows, *experts): its results by row (their widths and dtypes in `outputs`) and
    by expert.
    """
    if kernel == "pallas":
        return _together(_in_kernel, mlp, outputs, rows, experts, layout)
    # elsewhere XLA's grouped product multiplies every row with every expert
    together, one_by_one = (
        functools.partial(_together, _ragged, mlp, outputs),
        functools.partial(_one_by_one, mlp, outputs),
    )
    return jax.lax.platform_dependent(rows, experts, layout, tpu=together, default=one_by_one)


def _together(grouped: Callable, mlp, outputs, rows, experts: Experts, layout: _Layout):
    """Block by block, all experts in one grouped product: `grouped`(layout, first row of a block,
    its rows, dtype) gives the products.
    """
    size = min(BLOCK, len(layout.choice))

    def block(start, rows):
        return mlp(grouped(layout, start, size, experts[0].dtype), *rows, *experts)

    # no loop, whose end depends on the data: the host of a GPU would have to ask for it
    if size == len(layout.choice):
        made, totals = block(0, rows)
        return [a.astype(dtype) for a, (_, dtype) in zip(made, outputs, strict=True)], list(totals)
    nothing = _nothing(functools.partial(block, 0), rows, size, outputs)
    used = (layout.first[-1] + layout.count[-1]) * layout.chunk
    return _block_by_block(block, rows, nothing, (0, -(-used // size)), size)


def _within(layout: _Layout, start, size: int) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Where each expert's rows begin and end in the block of `size` rows from `start` on."""
    first, last = layout.first * layout.chunk, (layout.first + layout.count) * layout.chunk
    return jnp.clip(first - start, 0, size), jnp.clip(last - start, 0, size)


def _in_kernel(layout: _Layout, start, size: int, dtype) -> _Products:
    first, last = _within(layout, start, size)
    chunk = start // layout.chunk + jnp.arange(size // layout.chunk)
    expert = jnp.sum(chunk[:, None] >= layout.first + layout.count, axis=1, dtype=jnp.int32)
    return _Products(
        lambda x, kernel: expert_kernel.product(x.astype(dtype), kernel, expert),
        lambda d, kernel: expert_kernel.transposed(d.astype(dtype), kernel, expert),
        lambda x, d: expert_kernel.outer(
            x.astype(dtype), d.astype(dtype), first, last, layout.chunk
        ),
    )


def _ragged(layout: _Layout, start, size: int, dtype) -> _Products:
    first, last = _within(layout, start, size)

    def grouped(contracting, groups, a, b):
        numbers = jax.lax.RaggedDotDimensionNumbers((contracting, ((), ())), (0,), groups)
        return jax.lax.ragged_dot_general(
            a.astype(dtype),
            b.astype(dtype),
            last - first,
            numbers,
            preferred_element_type=jnp.float32,
        )

    kinds = ((((1,), (1,)), (0,)), (((1,), (2,)), (0,)), (((0,), (0,)), ()))
    return _Products(*(functools.partial(grouped, *kind) for kind in kinds))


def _one_by_one(mlp, outputs, rows, experts: Experts, layout: _Layout):
    """One expert after the other and chunk by chunk of its rows: an expert nobody chose costs no
    product.
    """
    dtype = experts[0].dtype
    of = _Products(
        *(
            functools.partial(product, spec, dtype=dtype)
            for spec in ("pi,io->po", "po,io->pi", "pi,po->io")
        )
    )

    def expert(made, scanned):
        kernels, first, count = scanned
        kernels = from_bits(kernels)
        return _block_by_block(
            lambda _, rows: mlp(of, *rows, *kernels),
            rows,
            (made, totals),
            (first, first + count),
            layout.chunk,
        )

    made, totals = _nothing(
        lambda rows: mlp(of, *rows, *(kernel[0] for kernel in experts)), rows, layout.chunk, outputs
    )
    return jax.lax.scan(expert, made, (as_bits(experts), layout.first, layout.count))


def _nothing(mlp, rows, size: int, outputs: list[tuple[int, jnp.dtype]]):
    """([zeros of each result by row], [zeros of each result by expert]) of mlp(a block of rows)."""
    block = [jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in rows]
    made = [jnp.zeros((len(rows[0]), width), dtype) for width, dtype in outputs]
    return made, [jnp.zeros(total.shape, total.dtype) for total in jax.eval_shape(mlp, block)[1]]


def _block_by_block(mlp, rows, results, blocks: tuple, size: int):
    """`results` with those of mlp(start, rows of a block) for each block from blocks[0] to
    blocks[1]: by row written, by expert added.
    """
    rows = as_bits(rows)

    def block(i, carry):
        made, totals = carry
        start = i * size
        of_rows, of_experts = mlp(
            start, from_bits([jax.lax.dynamic_slice_in_dim(a, start, size) for a in rows])
        )
        new = [as_bits(a.astype(whole.dtype)) for a, whole in zip(of_rows, results[0], strict=True)]
        made = [
            jax.lax.dynamic_update_slice_in_dim(whole, a, start, 0)
            for whole, a in zip(made, new, strict=True)
        ]
        return made, [total + a for total, a in zip(totals, of_experts, strict=True)]

    made, totals = jax.lax.fori_loop(*blocks, block, (as_bits(results[0]), results[1]))
    return from_bits(made), totals
