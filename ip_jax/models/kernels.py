"""Attention of packed rows, and of completions behind a prompt that they share, by the kernels of
accelerators, behind one switch; XLA's paths stand in attention.py and grouped.py.

| kernel | on | what keeps segments apart | cannot | |---|---|---|---| | splash | TPU | segment ids
(jax.experimental.pallas.ops.tpu.splash_attention) | packed rows of no multiple of 128, windows
behind a shared prompt | | cudnn | NVIDIA GPU | each segment is a sequence of its own
(jax.nn.dot_product_attention) | soft caps, float32 | | pallas | GPU | segment ids
(jax.experimental.pallas.ops.gpu.attention) | windows, soft caps, heads over 128, rows as splash,
shared prompts |

A kernel is chosen before anything is traced (`choose_attention`), from the mesh's devices:
`jax.default_backend()` says cpu while a program is compiled for a TPU elsewhere. Kernels see whole
rows of single devices: on a mesh they run in `shard_map`, rows over (run, data), heads over tensor.
Dims: R runs, B rows, T positions of a row, N segments of a row, L positions of a segment, K kv
heads, G query heads of one kv head, H head dim; of a row with a shared prompt X prompt positions, S
completions of C positions, T = X + S * C.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ip_jax.models.attention import to_rows, to_segments
from ip_jax.models.placement import BY_ROW, fitting
from ip_jax.models.remat import ATTENTION

PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "pallas": "gpu"}
DTYPES = {
    "splash": ("bfloat16", "float32"),
    "cudnn": ("bfloat16", "float16"),
    "pallas": ("bfloat16", "float16", "float32"),
}
AUTOMATIC = {"tpu": "splash", "gpu": "cudnn"}  # what "auto" tries on each platform before XLA
ROW_QUANTUM = 128  # row lengths that splash and pallas take are multiples of this
LARGEST_BLOCK = 512  # of splash, in positions
# behind a shared prompt cudnn's sequences have lengths that are multiples of this: odd ones it
# refuses in training
SEQUENCE_QUANTUM = 8


class Packing(NamedTuple):
    """Which segment each position of packed rows belongs to, and the way to segments and back."""

    segment_ids: Int[Array, "R B T"]  # from 1; 0 is padding
    # the row position of each segment's tokens, T where there is none
    segment_index: Int[Array, "R B N L"]
    source: Int[Array, "R B T"]  # its inverse, n * L + l; N * L on padding


def packing(
    segment_ids: Int[Array, "R B T"],
    positions: Int[Array, "R B T"],
    segment_index: Int[Array, "R B N L"],
) -> Packing:
    """The Packing of rows whose `positions` restart in each segment (see
    data.packing.segment_index).
    """
    segments, length = segment_index.shape[-2:]
    return Packing(
        segment_ids,
        segment_index,
        jnp.where(segment_ids > 0, (segment_ids - 1) * length + positions, segments * length),
    )


@flax.struct.dataclass
class SharedPrompt:
    """Rows of `slots` (X) prompt positions, of which the first `length` count, and of `samples` (S)
    completions (`models.grouped`).
    """

    length: Int[Array, "R B"]
    slots: int = flax.struct.field(pytree_node=False)
    samples: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """What a kernel is asked for: shapes, and how scores are made (see `KernelAttention`)."""

    dtype: str
    row_length: int
    kv_heads: int
    groups: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    tensor: int = 1  # devices that the heads are cut over
    shared_prompt: bool = False  # rows are SharedPrompt: then they may have any length


def choose_attention(wanted: str, device: jax.Device, case: AttentionCase) -> str:
    """The kernel to use on the devices of a mesh, of which `device` is one: "splash", "cudnn",
    "pallas" or "xla".

    "auto" is the platform's kernel, or "xla" where it cannot do the case. Raises ValueError, saying
    why, for a named kernel that cannot.
    """
    if wanted == "auto":
        kernel = AUTOMATIC.get(device.platform)
        return "xla" if kernel is None or refusal(kernel, case, device) else kernel
    if wanted != "xla" and (reason := refusal(wanted, case, device)):
        raise ValueError(reason)
    return wanted


def refusal(kernel: str, case: AttentionCase, device: jax.Device | None = None) -> str | None:
    """Why a kernel cannot do the case (on this kind of device), in one sentence; None where it
    can.
    """
    if kernel not in PLATFORMS:
        return f"attention {kernel!r} is unknown: it is one of auto, xla, {', '.join(PLATFORMS)}"
    if device is not None and device.platform != PLATFORMS[kernel]:
        return (
            f"attention {kernel!r} runs on a {PLATFORMS[kernel].upper()}, and the mesh is made of"
            f" {device.platform.upper()} devices"
        )
    if _head_axes(case.kv_heads, case.groups, case.tensor) is None:
        heads = f"{case.kv_heads} kv heads with {case.groups} query heads each"
        return (
            f"attention {kernel!r} needs heads that divide over the mesh: {heads} do not over"
            f" tensor={case.tensor}"
        )
    dtypes = DTYPES[kernel]
    if case.dtype not in dtypes:
        return f"attention {kernel!r} works in {' or '.join(dtypes)}, not in {case.dtype}"
    if case.shared_prompt and kernel == "pallas":
        return "attention 'pallas' cannot share a prompt among completions: use xla or cudnn"
    if case.shared_prompt and kernel == "splash" and case.window is not None:
        return (
            "attention 'splash' has no sliding window over completions that share a prompt: use xla"
        )
    if kernel != "cudnn" and not case.shared_prompt and case.row_length % ROW_QUANTUM:
        return (
            f"attention {kernel!r} needs row lengths that are multiples of {ROW_QUANTUM}, not"
            f" {case.row_length}"
        )
    if kernel != "splash" and case.softcap is not None:
        return f"attention {kernel!r} has no soft cap of scores: use xla"
    if kernel == "pallas" and case.window is not None:
        return "attention 'pallas' has no sliding window: use xla or cudnn"
    most = _most_head_dim(kernel, device)
    if case.head_dim % 8 or case.head_dim > most:
        return (
            f"attention {kernel!r} takes head dims that are multiples of 8 up to {most} here, not"
            f" {case.head_dim}"
        )
    return None


def _most_head_dim(kernel: str, device: jax.Device | None) -> int:
    """cuDNN's limit rises from 128 to 256 with Hopper (compute capability 9)."""
    # an abstract device, for which one plans, has none
    capability = getattr(device, "compute_capability", None)
    if kernel == "cudnn" and capability is not None and int(capability.split(".")[0]) < 9:
        return 128
    return 128 if kernel == "pallas" else 256


def _head_axes(kv_heads: int, groups: int, tensor: int) -> tuple[str | None, str | None] | None:
    """The mesh axes of (K, G): kv heads are cut where they divide, else the query heads of each;
    None where neither does.
    """
    if kv_heads % tensor == 0:
        return "tensor", None
    return (None, "tensor") if groups % tensor == 0 else None


@dataclasses.dataclass(frozen=True)
class KernelAttention:
    """Causal attention within each segment of packed rows, or of each completion and the prompt
    before it, by one kernel: scores s = cap(scale q k), cap(x) = c tanh(x / c) for a soft cap c.

    `window` w: a position sees itself and the w - 1 before it. `interpret` runs the Pallas kernels'
    meaning on any device (tests).
    """

    kernel: str
    scale: float
    window: int | None = None
    softcap: float | None = None
    interpret: bool = False

    def __call__(
        self,
        q: Float[Array, "R B T K G H"],
        k: Float[Array, "R B T K H"],
        v: Float[Array, "R B T K H"],
        rows: Packing | SharedPrompt,
    ) -> Float[Array, "R B T K G H"]:
        """The context in q's dtype, on padding zero (packed rows) or without meaning (a prompt's).
        On the mesh in context, if there is one, R and B lie on run and data, where these divide
        them.

        Raises ValueError where the kernel cannot express what is asked for.
        """
        mesh = jax.sharding.get_abstract_mesh()
        tensor = 1 if mesh.empty else mesh.shape["tensor"]
        shared = isinstance(rows, SharedPrompt)
        case = AttentionCase(q.dtype.name, *q.shape[2:], self.window, self.softcap, tensor, shared)
        if reason := refusal(self.kernel, case):
            raise ValueError(reason)
        packed, behind_prompt = (
            {"splash": _splash, "cudnn": _cudnn, "pallas": _pallas},
            {"splash": _splash_behind_prompt, "cudnn": _cudnn_behind_prompt},
        )
        attend = functools.partial((behind_prompt if shared else packed)[self.kernel], self)
        if not mesh.empty:
            kv_axis, group_axis = _head_axes(case.kv_heads, case.groups, tensor)
            by_row = fitting(mesh.shape, BY_ROW, q.shape)
            of_q, of_kv = (
                PartitionSpec(*by_row, None, kv_axis, group_axis),
                PartitionSpec(*by_row, None, kv_axis),
            )
            # pallas_call has no vma
            attend = jax.shard_map(
                attend, in_specs=(of_q, of_kv, of_kv, by_row), out_specs=of_q, check_vma=False
            )
        return attend(q, k, v, rows)


def _splash(this: KernelAttention, q, k, v, rows: Packing):
    """The mask is causal over rows, computed in the kernel; blocks above the diagonal or behind the
    window are not visited.
    """
    # Imported here, so that nobody on a CPU waits for Pallas.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = q.shape[2], q.shape[2]
    mask = (
        splash.CausalMask(shape)
        if this.window is None
        else splash.LocalMask(shape, (this.window - 1, 0), 0)
    )
    return _without_padding(_splash_rows(this, mask, q, k, v, rows.segment_ids), rows)


def _splash_rows(this: KernelAttention, mask, q, k, v, segment_ids: Int[Array, "R B T"]):
    """Positions of one segment see one another as far as `mask` lets them."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q.shape[2], q.shape[3] * q.shape[4]
    block = max(b for b in range(ROW_QUANTUM, LARGEST_BLOCK + 1, ROW_QUANTUM) if length % b == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=this.softcap,
        residual_checkpoint_name=ATTENTION,
        interpret=this.interpret,
    )

    def one_row(q, k, v, ids):  # [N or K, T, H]
        return kernel(q, k, v, splash.SegmentIds(ids, ids))

    q = q * jnp.asarray(this.scale, q.dtype)
    by_head = [jnp.swapaxes(_by_row(x), 1, 2) for x in (q, k, v)]
    out = jax.vmap(one_row)(*by_head, _by_row(segment_ids))
    return jnp.swapaxes(out, 1, 2).reshape(q.shape)


def _splash_behind_prompt(this: KernelAttention, q, k, v, rows: SharedPrompt):
    """The mask tells completions apart; what pads a prompt, and the row up to whole blocks (of
    LARGEST_BLOCK where it is longer), is another segment.
    """
    from ip_jax.models.prompt_mask import SharedPromptMask

    length = q.shape[2]
    pad = -length % (LARGEST_BLOCK if length > LARGEST_BLOCK else ROW_QUANTUM)
    q, k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3)) for x in (q, k, v))
    place = jnp.arange(length + pad)
    counts = (place < rows.length[..., None]) | ((place >= rows.slots) & (place < length))
    mask = SharedPromptMask(length + pad, rows.slots, (length - rows.slots) // rows.samples)
    return _splash_rows(this, mask, q, k, v, counts.astype(jnp.int32))[:, :, :length]


def _cudnn(this: KernelAttention, q, k, v, rows: Packing):
    """Segments become sequences: what pads their ends is behind every real query, so the causal
    mask alone hides it.
    """
    # [R, B * N, L, ...]
    segments = [to_segments(x, rows.segment_index, rows.source, 0) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(
        *map(_by_row, segments),
        scale=this.scale,
        is_causal=True,
        implementation="cudnn",
        local_window_size=None if this.window is None else (this.window - 1, 0),
    )
    return to_rows(out.reshape(segments[0].shape), rows.segment_index, rows.source, 0)


def _cudnn_behind_prompt(this: KernelAttention, q, k, v, rows: SharedPrompt):
    """Each completion becomes a sequence with a copy of its prompt right before it: what pads the
    prompt lies behind both, hidden by causality.

    They are written and read in slices: the gradient adds up what copies of a prompt got, in order.
    The prompt's own context is that of the first sequence.
    """
    slots, samples = rows.slots, rows.samples
    length = (q.shape[2] - slots) // samples
    start = jnp.broadcast_to(rows.length[..., None], (*rows.length.shape, samples))

    def over_rows(function):
        return jax.vmap(jax.vmap(jax.vmap(function)))

    def sequences(x: Float[Array, "R B T ..."]) -> Float[Array, "R B S L ..."]:
        prompt = jnp.broadcast_to(
            x[:, :, None, :slots], (*x.shape[:2], samples, slots, *x.shape[3:])
        )
        room = jnp.pad(
            prompt,
            [(0, 0)] * 3
            + [(0, length + -(slots + length) % SEQUENCE_QUANTUM)]
            + [(0, 0)] * (x.ndim - 3),
        )
        completions = x[:, :, slots:].reshape(*x.shape[:2], samples, length, *x.shape[3:])
        return over_rows(lambda to, new, at: jax.lax.dynamic_update_slice_in_dim(to, new, at, 0))(
            room, completions, start
        )

    split = [sequences(x) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(
        *(_by_row(x.reshape(x.shape[0], -1, *x.shape[3:])) for x in split),
        scale=this.scale,
        is_causal=True,
        implementation="cudnn",
        local_window_size=None if this.window is None else (this.window - 1, 0),
    ).reshape(split[0].shape)
    completions = over_rows(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, length, 0))(
        out, start
    )
    return jnp.concatenate(
        [out[:, :, 0, :slots], completions.reshape(*q.shape[:2], -1, *q.shape[3:])], axis=2
    )


def _pallas(this: KernelAttention, q, k, v, rows: Packing):
    """The kernel has one kv head for each query head, so they are repeated."""
    # Imported here, because it warns when it is imported: deprecated since jax 0.11.
    from jax.experimental.pallas.ops.gpu.attention import mha

    k, v = (jnp.repeat(_by_row(x), q.shape[4], axis=2) for x in (k, v))
    out = mha(
        _by_row(q),
        k,
        v,
        _by_row(rows.segment_ids),
        sm_scale=this.scale,
        causal=True,
        interpret=this.interpret,
    )
    return _without_padding(out.reshape(q.shape), rows)


def _by_row(x):
    """[R, B, T, ...] -> [R * B, T, ...], with the heads [K, G] of queries as one axis."""
    return x.reshape(
        x.shape[0] * x.shape[1], x.shape[2], *((-1, x.shape[-1]) if x.ndim > 3 else ())
    )


def _without_padding(context, rows: Packing):
    return jnp.where(rows.segment_ids[..., None, None, None] > 0, context, 0)
