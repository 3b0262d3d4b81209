"""One scanned Flax decoder for every family: differences are fields of DecoderConfig, LoRA carries
an explicit run axis.

Declared with NNX, split once (`split_decoder`), then only pytrees: steps and samplers call
`nnx.merge` as their first line. Dims: R runs, B rows, T positions, L layers, D model, F hidden, N
heads, K kv heads, G = N / K, H head dim, V vocabulary.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ip_jax.models.attention import causal_attention, soft_capped, to_rows, to_segments
from ip_jax.models.families import AttentionKind, DecoderConfig
from ip_jax.models.kernels import KernelAttention, packing
from ip_jax.models.lora import TARGETS, LoraConfig
from ip_jax.models.moe import mixture, route
from ip_jax.models.placement import BY_ROW, constrain
from ip_jax.models.products import (
    as_bits,
    base_products,
    entry,
    from_bits,
    kept,
    lora_products,
    product,
    row_sum,
)
from ip_jax.models.remat import rematerialised
from ip_jax.models.rope import apply_rope, rope_tables
from ip_jax.models.run_rows import of_each_row

# attend(q, k, v, layer's cache, layer's kind) -> (context, what the layer emits): what differs
# between training and decoding
Attend = Callable[[Array, Array, Array, Any, AttentionKind], tuple[Array, Any]]
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
# those of a layer, as the family has them
NORMS = (
    "attn_norm",
    "attn_post_norm",
    "mlp_norm",
    "mlp_pre_norm",
    "mlp_post_norm",
    "q_norm",
    "k_norm",
)
MIXTURE = ("router", "expert_gate", "expert_up", "expert_down")


class Emitted(NamedTuple):
    """What a layer, or with a leading axis L all of them, tell besides hidden states."""

    attention: Any  # what `attend` emitted
    router: Float[Array, "*L R B T E"] | None  # probabilities of all experts, where there are any


class Projection(nnx.Module):
    """A stacked linear map [L, inputs, outputs] shared by all runs, with one low-rank update for
    each run.
    """

    def __init__(self, kernel, bias, adapter, scale: float):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)
        self.lora_a = None if adapter is None else nnx.LoRAParam(adapter["a"])
        self.lora_b = None if adapter is None else nnx.LoRAParam(adapter["b"])
        self.scale = scale

    def adapter(self, dtype):
        """(A [N, I, r], scale * B [N, r, O]) in `dtype`: of N runs, or of N rows."""
        return self.lora_a[...].astype(dtype), (self.lora_b[...] * self.scale).astype(dtype)


def project(
    x: Float[Array, "R B T I"], projections: dict[str, Projection], dropout=None
) -> dict[str, Float[Array, "R B T O"]]:
    """Each projection of x: base product over R*B*T rows, bias, and scale * (x A) B, with an
    adapter for each run or, where there are R*B of them, for each row.

    `dropout` is (rate, keys {name: [R] or [R*B]}) on the input of each adapter, as in PEFT.
    """
    kernels = tuple(projection.kernel.get_value() for projection in projections.values())
    ys = dict(zip(projections, base_products(x, kernels), strict=True))
    adapters = {
        name: projection.adapter(x.dtype)
        for name, projection in projections.items()
        if projection.lora_a is not None
    }
    if dropout is None:
        inputs = [(x, list(adapters))] if adapters else []
    else:
        inputs = [(_dropped(x, dropout[0], dropout[1][name]), [name]) for name in adapters]
    for adapter_input, names in inputs:
        downs, ups = zip(*(adapters[name] for name in names), strict=True)
        updates = lora_products(
            adapter_input.reshape(len(downs[0]), -1, *x.shape[2:]), downs, ups, kernels[0].dtype
        )
        ys |= {
            name: ys[name] + update.reshape(ys[name].shape)
            for name, update in zip(names, updates, strict=True)
        }
    biases = {
        name: projection.bias[...]
        for name, projection in projections.items()
        if projection.bias is not None
    }
    return {
        name: kept(y + biases[name] if name in biases else y, kernels[0].dtype)
        for name, y in ys.items()
    }


def _dropped(x: Float[Array, "R B T I"], rate: float, keys) -> Float[Array, "R B T I"]:
    rows = x.reshape(len(keys), -1, *x.shape[2:])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, rows.shape[1:]))(keys)
    return jnp.where(keep, rows / (1 - rate), 0).reshape(x.shape)


class Layers(nnx.Module):
    """All layers, stacked on axis 0 (base) and axis 1 (LoRA, behind the run axis)."""

    def __init__(self, params, lora, scale: float):
        for name in NORMS:
            if name in params:
                setattr(self, name, nnx.Param(params[name]))
        for name in TARGETS:
            if name in params:
                setattr(
                    self,
                    name,
                    Projection(params[name], params.get(f"{name}_bias"), lora.get(name), scale),
                )
        for name in MIXTURE:
            if name in params:
                setattr(self, name, nnx.Param(params[name]))


class Decoder(nnx.Module):
    """A decoder-only transformer over token ids [R, B, T]; see `split_decoder` for how it is
    used.
    """

    def __init__(self, config: DecoderConfig, params, lora=None, scale: float = 0.0):
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.layers = Layers(params["layers"], lora or {}, scale)
        self.final_norm = nnx.Param(params["final_norm"])
        self.head = None if config.tied_embeddings else nnx.Param(params["head"])

    def __call__(
        self,
        tokens: Int[Array, "R B T"],
        positions: Int[Array, "R B T"],
        attend: Attend,
        cache=None,
        *,
        dtype=jnp.float32,
        remat: str = "products",
        dropout=None,
        runs: Int[Array, "R B"] | None = None,
        forward_only: bool = False,
    ) -> tuple[Float[Array, "R B T D"], Emitted]:
        """Final-norm hidden states and the stacked emissions of the layers ([L, ...]).

        `cache` is a pytree of [L, ...] arrays whose slice goes to `attend`; `remat` names what the
        backward pass keeps (`models.remat`); `dropout` is (rate, keys [R] or, for rows apart,
        [R*B]) or None. Where rows of several runs lie side by side, the first axis is one of blocks
        of runs, and `runs` says whose each row is (see `models.run_rows`). The layers' weights have
        no gradient beside adapters, nor in a pass that is `forward_only`.
        """
        config = self.config
        x = jnp.take(self.embed[...], tokens, axis=0).astype(dtype) * jnp.asarray(
            config.embedding_scale, dtype
        )
        ropes = {rope: rope_tables(positions, rope, config.head_dim) for rope in config.ropes}
        graphdef, lora, base = nnx.split(self.layers, nnx.LoRAParam, nnx.Param)
        lora = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), lora)
        stack, base = (base, None) if forward_only else (None, base)
        # else the weights themselves may be trained, and bits have no gradient
        if jax.tree.leaves(lora):
            base = as_bits(base)

        def layer(kind: AttentionKind, x, scanned):
            lora, base, cache, index = scanned
            base = entry(stack, index) if forward_only else from_bits(base)
            lora = lora if runs is None else jax.tree.map(lambda a: of_each_row(a, runs), lora)
            layer_dropout = dropout and (
                dropout[0],
                jax.vmap(lambda key: jax.random.fold_in(key, index))(dropout[1]),
            )
            # else the partitioner may cut x as the weights are cut and send activations about
            x = constrain(x, BY_ROW)

            def layer_attend(q, k, v):
                return attend(q, k, v, cache, kind)

            return decoder_layer(
                nnx.merge(graphdef, lora, base),
                config,
                x,
                ropes[kind.rope],
                layer_attend,
                layer_dropout,
            )

        x, emitted = _run_layers(
            layer, config.attention, x, (lora, base, cache, jnp.arange(config.n_layers)), remat
        )
        return rms_norm(x, self.final_norm[...], config), emitted

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Float32 next-token logits."""
        vocabulary = self.vocabulary()
        return soft_capped(
            product("...d,vd->...v", hidden, vocabulary, vocabulary.dtype),
            self.config.logit_softcap,
        )

    def vocabulary(self) -> Float[Array, "V D"]:
        """The output embedding, one row a token."""
        return self.embed[...] if self.head is None else self.head[...].T


def _run_layers(layer, kinds: tuple[AttentionKind, ...], x, stacks, remat: str):
    """(x, emissions [L, ...]) of `layer(kind, x, (lora, base, cache, index))` for each layer of
    these stacks [L, ...]: whole periods of kinds in a scan, then the layers that are left.

    Base weights are never copied but one layer at a time. Where a pass of the scan is several
    layers, each is taken from the whole stack, and within the rematerialised function: what is
    taken before is kept for the backward pass.
    """
    lora, base, cache, index = stacks
    count, period = len(index), len(kinds)
    if period == 1:
        return jax.lax.scan(
            rematerialised(functools.partial(layer, kinds[0]), remat, prevent_cse=False), x, stacks
        )
    scanned = count - count % period if count > period else 0  # XLA unrolls a loop of one pass

    def in_turn(kinds, prevent_cse, x, stacks):
        emissions = []
        for i, kind in enumerate(kinds):

            def one(x, stacks, i=i, kind=kind):
                lora, cache, index = jax.tree.map(operator.itemgetter(i), stacks)
                own_base = jax.tree.map(
                    lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), base
                )
                return layer(kind, x, (lora, own_base, cache, index))

            x, emitted = rematerialised(one, remat, prevent_cse)(x, stacks)
            emissions.append(emitted)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *emissions)

    def by_period(tree):
        return jax.tree.map(
            lambda a: a[:scanned].reshape(scanned // period, period, *a.shape[1:]), tree
        )

    periods = by_period((lora, cache, index))
    x, emitted = jax.lax.scan(functools.partial(in_turn, kinds, False), x, periods)
    emitted = jax.tree.map(lambda a: a.reshape(scanned, *a.shape[2:]), emitted)
    if scanned < count:
        left = jax.tree.map(lambda a: a[scanned:], (lora, cache, index))
        x, last = in_turn(kinds[: count - scanned], True, x, left)
        emitted = jax.tree.map(lambda *parts: jnp.concatenate(parts), emitted, last)
    return x, emitted


def decoder_layer(layer: Layers, config: DecoderConfig, x, rope, attend, dropout):
    """One block on x [R, B, T, D]: attention (`attend(q, k, v)`), then the MLP, each behind its
    norm. Returns (x, Emitted).
    """
    dropout = dropout and _projection_keys(*dropout)
    rows = x.shape[:3]
    context, emitted = attend(
        *rotated_heads(layer, config, rms_norm(x, layer.attn_norm[...], config), rope, dropout)
    )
    out = project(
        context.reshape(*rows, config.n_heads * config.head_dim), {"o": layer.o}, dropout
    )["o"].astype(x.dtype)
    x = x + (rms_norm(out, layer.attn_post_norm[...], config) if config.post_norms else out)
    before = layer.mlp_pre_norm if config.post_norms else layer.mlp_norm
    out, probabilities = (expert_mlps if config.n_experts else gated_mlp)(
        layer, config, rms_norm(x, before[...], config), dropout
    )
    return x + (
        rms_norm(out, layer.mlp_post_norm[...], config) if config.post_norms else out
    ), Emitted(emitted, probabilities)


def rotated_heads(layer: Layers, config: DecoderConfig, h, rope, dropout):
    """(q [R, B, T, K, G, H], k [R, B, T, K, H], v [R, B, T, K, H]) of h [R, B, T, D], q and k
    rotated.
    """
    rows = h.shape[:3]
    kv_heads, groups, head_dim = (
        config.n_kv_heads,
        config.n_heads // config.n_kv_heads,
        config.head_dim,
    )
    qkv = project(h, {"q": layer.q, "k": layer.k, "v": layer.v}, dropout)
    q, k = (
        qkv["q"].reshape(*rows, kv_heads, groups, head_dim),
        qkv["k"].reshape(*rows, kv_heads, 1, head_dim),
    )
    if config.qk_norm:
        q, k = rms_norm(q, layer.q_norm[...], config), rms_norm(k, layer.k_norm[...], config)
    return (
        apply_rope(q, rope),
        apply_rope(k, rope)[..., 0, :],
        qkv["v"].reshape(*rows, kv_heads, head_dim),
    )


def gated_mlp(layer: Layers, config: DecoderConfig, h, dropout):
    """(down(activation(gate(h)) * up(h)) of h [R, B, T, D], None)."""
    activation = ACTIVATIONS[config.activation]
    mlp = project(h, {"gate": layer.gate, "up": layer.up}, dropout)
    hidden = activation(mlp["gate"].astype(h.dtype)) * mlp["up"].astype(h.dtype)
    return project(hidden, {"down": layer.down}, dropout)["down"].astype(h.dtype), None


def expert_mlps(layer: Layers, config: DecoderConfig, h, _):
    """(each token's mixture of gated MLPs of h [R, B, T, D], the router's probabilities [R, B, T,
    E]).
    """
    probabilities, weights, chosen = route(h, layer.router[...], config.experts_per_token)
    experts = layer.expert_gate[...], layer.expert_up[...], layer.expert_down[...]
    return (
        mixture(ACTIVATIONS[config.activation], config.experts_kernel, h, weights, chosen, experts),
        probabilities,
    )


def _projection_keys(rate: float, keys):
    """(rate, {name: keys}): every projection drops its own elements."""
    return rate, {
        name: jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
        for i, name in enumerate(TARGETS)
    }


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], config: DecoderConfig
) -> Float[Array, "*rows D"]:
    """RMSNorm in float32 with the family's weight offset (Gemma stores w - 1)."""
    return (
        _normalised(x.astype(jnp.float32), config.norm_eps)
        * (weight.astype(jnp.float32) + config.norm_offset)
    ).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalised(x, eps):
    return x * _inverse_scale(x, eps)


def _normalised_fwd(x, eps):
    return _normalised(x, eps), x


def _normalised_bwd(eps, x, dy):
    scale = _inverse_scale(x, eps)
    return (scale * (dy - x * (scale * scale * row_sum(x * dy) / x.shape[-1])),)


_normalised.defvjp(_normalised_fwd, _normalised_bwd)


def _inverse_scale(x, eps):
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def causal_attend(q, k, v, _, kind: AttentionKind) -> tuple[Array, None]:
    """Attention for rows that are one sequence each, from their first position on (what follows it
    is not seen). Emits nothing.
    """
    return (
        causal_attention(q, k, v, scale=kind.scale, window=kind.window, softcap=kind.softcap),
        None,
    )


def packed_attend(
    segment_ids: Int[Array, "R B T"],
    positions: Int[Array, "R B T"],
    segment_index: Int[Array, "R B N L"],
    shared: int = 0,
    kernel: str = "xla",
) -> Attend:
    """Attention for packed rows: causal within each segment, by one of `models.kernels` or XLA.
    Emits nothing.

    `segment_ids` count from 1 (0 is padding), `positions` restart in each segment, `segment_index`
    is the row position of each segment's tokens, T where there is none (see
    data.packing.segment_index). All segments of a row begin with the row's first `shared` tokens,
    which stand there once: that XLA alone can do.
    """
    rows = packing(segment_ids, positions, segment_index)
    if kernel != "xla" and shared:
        raise ValueError(
            f"attention {kernel!r} cannot share the first {shared} tokens of a row among its"
            " segments: pack without share_prefix, or use xla"
        )

    def attend(q, k, v, _, kind):
        if kernel != "xla":
            return (
                KernelAttention(kernel, kind.scale, kind.window, kind.softcap)(q, k, v, rows),
                None,
            )
        context, _ = causal_attend(
            *(to_segments(x, rows.segment_index, rows.source, shared) for x in (q, k, v)),
            None,
            kind,
        )
        return to_rows(context, rows.segment_index, rows.source, shared), None

    return attend


def split_decoder(config: DecoderConfig, params, lora=None, lora_config: LoraConfig | None = None):
    """(graphdef, lora, base): the static structure, the trained state with a leading run axis, the
    frozen state.

    `nnx.merge(graphdef, lora, base)` gives the decoder back inside a jitted function.
    """
    decoder = Decoder(config, params, lora, lora_config.scale if lora_config else 0.0)
    return nnx.split(decoder, nnx.LoRAParam, nnx.Param)


def params_of(base) -> dict:
    """The params dict (`families.param_shapes`) of a decoder's weights without adapters: the
    inverse of `split_decoder`.
    """
    params = nnx.to_pure_dict(base)
    layers = {}
    for name, value in params["layers"].items():
        parts = value if isinstance(value, dict) else {"kernel": value}
        layers |= {
            name if part == "kernel" else f"{name}_{part}": array for part, array in parts.items()
        }
    return params | {"layers": layers}
