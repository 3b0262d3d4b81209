"""A frozen base in 4 or 8 bits (QLoRA, Dettmers et al. 2023): the projections of the layers as
qwix's QArray, the rest as it is.

A quantised kernel stays so in memory: `dense` makes one layer's weights again where a product needs
them, forward and backward.
"""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np

from ip_jax.models.families import DecoderConfig, param_shapes

KINDS = ("nf4", "int8")
BLOCK = 64  # inputs that share one scale in nf4, as in QLoRA
SMALLEST_BLOCK = 16
KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


def check_quantised(kind: str) -> None:
    """Raises ValueError for a kind that is not known or where qwix is not installed."""
    if kind not in KINDS:
        raise ValueError(
            f"model.quantised is {kind!r}: choose from {', '.join(KINDS)}, or None for weights as"
            " they are"
        )
    if importlib.util.find_spec("qwix") is None:
        raise ValueError(
            f"model.quantised = {kind!r} needs qwix, which is not installed: pip install"
            " 'ip_jax[quant]'"
        )


def check_quantisable(kind: str, config: DecoderConfig) -> None:
    """Raises ValueError for a mixture of experts, and for nf4 where a projection's inputs have no
    block of 16 or more: `quantise` cannot take them.
    """
    if config.n_experts:
        raise ValueError(
            f"model.quantised is {kind!r} and the model is a mixture of experts, whose experts"
            " cannot be quantised: set it to None"
        )
    for (*_, name), shape in param_shapes(config).items():
        if kind == "nf4" and name in KERNELS and _block(shape[1]) < SMALLEST_BLOCK:
            raise ValueError(
                f"model.quantised is 'nf4' and the weights {name} have {shape[1]} inputs, which"
                f" blocks of {SMALLEST_BLOCK} do not divide: choose int8, or None"
            )


def quantise(params: dict, kind: str, place) -> dict:
    """`params` with each kernel [L, I, O] of the layers quantised: int8 with one scale for each
    output, nf4 with one for each output and block of 64 inputs (where 64 does not divide the
    inputs, their largest common divisor with it). Scales keep the weights' dtype.

    `place(params)` names the sharding of each array (`sharding.base_shardings`). One kernel after
    the other: the given jax array is deleted before the next one. `check_quantised` and
    `check_quantisable` say what can be asked for.
    """

    def compute(make, kernel, shardings):
        made = jax.block_until_ready(jax.jit(make, out_shardings=shardings)(kernel))
        kernel.delete()
        return made

    return _each_kernel(params, kind, place, compute)


def quantised_shapes(params: dict, kind: str, place) -> dict:
    """What `quantise` makes of `params`, whose leaves and those of the result are
    jax.ShapeDtypeStruct.
    """

    def shapes(make, kernel, shardings):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(make, kernel),
            shardings,
        )

    return _each_kernel(params, kind, place, shapes)


def _each_kernel(params: dict, kind: str, place, evaluate) -> dict:
    """`params` with evaluate(function that quantises a kernel, kernel, shardings of the result) in
    place of each kernel of the layers.
    """
    layers = dict(params["layers"])
    for name in KERNELS:
        kernel = layers.pop(name)
        make = functools.partial(_quantise_stack, kind=kind, dtype=kernel.dtype)
        layers[name] = evaluate(
            make, kernel, place({"layers": {name: jax.eval_shape(make, kernel)}})["layers"][name]
        )
    return params | {"layers": layers}


def rounded(kernel: np.ndarray, kind: str) -> np.ndarray:
    """One layer's kernel [I, O] as a product finds it after `quantise`: the same numbers, in its
    dtype.
    """
    return np.asarray(_there_and_back(kernel[np.newaxis], kind))


@functools.partial(jax.jit, static_argnums=1)
def _there_and_back(stack, kind: str):
    return jax.vmap(dense)(_quantise_stack(stack, kind=kind, dtype=stack.dtype))[0]


def item_bytes(dtype) -> float:
    """Bytes of one element in a device's memory, where two elements of 4 bits share one."""
    return jnp.dtype(dtype).itemsize * (0.5 if dtype in (jnp.uint4, jnp.int4) else 1)


def _block(inputs: int) -> int:
    return math.gcd(BLOCK, inputs)


def _quantise_stack(stack, *, kind: str, dtype):
    """A layer at a time, in float32: the whole stack in float32 would not fit."""
    import qwix

    scales = (
        dict(channelwise_axes=(1,))
        if kind == "int8"
        else dict(channelwise_axes=(1,), tiled_axes={0: _block(stack.shape[1])})
    )
    quantised = jax.lax.map(
        lambda kernel: qwix.quantize(kernel.astype(jnp.float32), kind, **scales), stack
    )
    return dataclasses.replace(quantised, scale=quantised.scale.astype(dtype))


def is_quantised(kernel) -> bool:
    """Whether `kernel` is a QArray rather than an array."""
    return hasattr(kernel, "qvalue")


def dense(kernel):
    """The kernel as an array: a quantised one in the dtype of its scales, another one itself."""
    if not is_quantised(kernel):
        return kernel
    import qwix

    return qwix.dequantize(kernel)
