"""The compiled half of the sampler: slots on the device, prefill of a few prompts, decoding until a
refill pays.

A slot group is one prompt with its G rows. The prompt's keys and values are kept once for the
group; each row has a ring of its own. All rows write ring column (clock mod C) at the same step,
whenever they started: a row needs at most C columns (its last prompt token and its new tokens but
the last), and keys carry their rotary position, so the order of columns is free. Dims: R runs, P
groups, G rows of one group, S prompt positions, C ring columns, L layers, K kv heads, J query heads
of one kv head, H head dim, Q prompts of one prefill, X positions of the prefix that all prompts
share.

In a guided program every group 2 p is sampled from, and group 2 p + 1 is its guide: the same rows
behind another prompt, which are fed the tokens that are chosen from both. Neighbours, so that they
lie on one device.
"""

import dataclasses
import functools
import operator

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ip_jax.models.decoder import decoder_layer, rms_norm
from ip_jax.models.families import Rope
from ip_jax.models.placement import BY_ROW, EVERYWHERE, FSDP, VOCABULARY, constrain, each_its_rows
from ip_jax.models.rope import Tables, rope_tables
from ip_jax.sampling.attention import prompt_attend, token_attend
from ip_jax.sampling.randomness import choose_tokens, row_keys, token_uniforms
from ip_jax.training.sharding import whole_layer


@dataclasses.dataclass(frozen=True)
class SlotShape:
    """The static sizes of one decoding program."""

    runs: int
    groups: int
    rows: int  # of one group
    prompt: int  # positions of the prompt cache
    ring: int  # columns of a row's own cache
    guided: bool = False  # each group has a guide behind it, which `groups` does not count

    @property
    def copies(self) -> int:
        """Device groups of a group."""
        return 2 if self.guided else 1


@flax.struct.dataclass
class Slots:
    """Everything that changes while decoding. Rows that hold nothing are `finished`."""

    clock: Int[Array, ""]  # decoding steps made so far
    # one array a layer; keys transposed, so that products stream along memory
    prompt_k: tuple[Float[Array, "R P K H S"], ...]
    prompt_v: tuple[Float[Array, "R P K S H"], ...]
    own_k: tuple[Float[Array, "R P G K H C"], ...]
    own_v: tuple[Float[Array, "R P G K C H"], ...]
    prompt_length: Int[Array, "R P"]
    started: Int[Array, "R P"]  # the clock at a group's first step
    token: Int[Array, "R P G"]  # to be fed next
    finished: Bool[Array, "R P G"]
    made: Int[Array, "R P G"]  # tokens so far
    limit: Int[Array, "R P G"]
    temperature: Float[Array, "R P G"]
    top_p: Float[Array, "R P G"]
    keys: Int[Array, "R P G 2"]
    tokens: Int[Array, "R P G C"]  # chosen at the step that wrote this column
    log_probs: Float[Array, "R P G C"]
    guidance: Float[Array, "R P G"] | None  # None: no group has a guide


@flax.struct.dataclass
class Refill:
    """Up to Q new groups for each run. `group` is where a prompt goes; P (out of range) for an
    entry that is not there.
    """

    group: Int[Array, "R Q"]
    # without the prefix that all share and without the last token, right-padded
    prompt: Int[Array, "R Q T"]
    token: Int[Array, "R Q"]  # the last prompt token, left to the first decoding step
    length: Int[Array, "R Q"]  # of the whole prompt
    limit: Int[Array, "R Q G"]  # 0 for a row that is not there
    temperature: Float[Array, "R Q G"]
    top_p: Float[Array, "R Q G"]
    seed: Int[Array, "R Q G"]
    example_id: Int[Array, "R Q G"]
    sample_id: Int[Array, "R Q G"]
    guidance: Float[Array, "R Q G"] | None = None  # in a guided program


@functools.partial(jax.jit, static_argnames=("graphdef", "shape", "dtype"))
def start_slots(
    graphdef, lora, base, prefix: Int[Array, " X"], *, shape: SlotShape, dtype: str
) -> Slots:
    """Slots that hold nothing but, in every group, the keys and values of the tokens with which all
    prompts begin.
    """
    decoder = nnx.merge(graphdef, lora, base)
    kv, size, layers = decoder.config.n_kv_heads, decoder.config.head_dim, decoder.config.n_layers
    groups = shape.runs, shape.groups * shape.copies
    rows = *groups, shape.rows

    def zeros(*dims):
        return tuple(jnp.zeros(dims, dtype) for _ in range(layers))

    prompt_k, prompt_v = (
        zeros(*groups, kv, size, shape.prompt),
        zeros(*groups, kv, shape.prompt, size),
    )
    if length := len(prefix):
        tokens = jnp.broadcast_to(prefix, (shape.runs, 1, length))
        nothing = (
            jnp.zeros((layers, shape.runs, 1, kv, size, 0), dtype),
            jnp.zeros((layers, shape.runs, 1, kv, 0, size), dtype),
        )
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        _, emitted = decoder(
            tokens,
            positions,
            prompt_attend(dtype),
            nothing,
            dtype=jnp.dtype(dtype),
            forward_only=True,
        )
        k, v = emitted.attention
        prompt_k = tuple(
            cache.at[..., :length].set(new) for cache, new in zip(prompt_k, k, strict=True)
        )
        prompt_v = tuple(
            cache.at[..., :length, :].set(new) for cache, new in zip(prompt_v, v, strict=True)
        )
    slots = Slots(
        clock=jnp.zeros((), jnp.int32),
        prompt_k=prompt_k,
        prompt_v=prompt_v,
        own_k=zeros(*rows, kv, size, shape.ring),
        own_v=zeros(*rows, kv, shape.ring, size),
        prompt_length=jnp.ones(groups, jnp.int32),
        started=jnp.zeros(groups, jnp.int32),
        token=jnp.zeros(rows, jnp.int32),
        finished=jnp.ones(rows, bool),
        made=jnp.zeros(rows, jnp.int32),
        limit=jnp.zeros(rows, jnp.int32),
        temperature=jnp.zeros(rows),
        top_p=jnp.ones(rows),
        keys=jnp.zeros((*rows, 2), jnp.uint32),
        tokens=jnp.zeros((*rows, shape.ring), jnp.int32),
        log_probs=jnp.zeros((*rows, shape.ring)),
        guidance=jnp.zeros(rows) if shape.guided else None,
    )
    return _pinned(slots)


def _pinned(slots: Slots) -> Slots:
    """Slots with runs and groups spread over the mesh in context, and the caches' kv heads over its
    axis tensor.
    """

    def by_row(x):
        return constrain(x, BY_ROW) if x.ndim else x

    prompt, own = (
        (lambda x: constrain(x, (*BY_ROW, "tensor"))),
        (lambda x: constrain(x, (*BY_ROW, None, "tensor"))),
    )
    caches = {"prompt_k": prompt, "prompt_v": prompt, "own_k": own, "own_v": own}
    fields = {field.name: getattr(slots, field.name) for field in dataclasses.fields(slots)}
    return Slots(
        **{name: jax.tree.map(caches.get(name, by_row), value) for name, value in fields.items()}
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "whole"))
def separate_layers(graphdef, lora, base, *, whole: bool = False) -> tuple:
    """Each layer's (lora, base) states as arrays of their own: slices of stacked weights would be
    copied again at every token.

    `whole`: on a mesh they are gathered here, once (`training.sharding.whole_layer`); else they lie
    as the base does, and each token gathers them.
    """
    _, lora, base = _split_layers(nnx.merge(graphdef, lora, base))
    count = jax.tree.leaves(base)[0].shape[0]
    lora = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), lora)
    layers = [jax.tree.map(operator.itemgetter(i), (lora, base)) for i in range(count)]
    return tuple((lora, whole_layer(base) if whole else base) for lora, base in layers)


def _split_layers(decoder):
    return nnx.split(decoder.layers, nnx.LoRAParam, nnx.Param)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "prefix", "dtype"), donate_argnames="slots"
)
def prefill(
    graphdef, lora, base, slots: Slots, refill: Refill, *, prefix: int, dtype: str
) -> Slots:
    """Slots with the refill's prompts in their groups, behind the `prefix` positions that are
    already there.
    """
    refill = jax.tree.map(lambda x: constrain(x, BY_ROW), refill)
    end = prefix + refill.prompt.shape[-1]
    shared = (
        jnp.stack([x[:, :1, :, :, :prefix] for x in slots.prompt_k]),
        jnp.stack([x[:, :1, :, :prefix] for x in slots.prompt_v]),
    )
    positions = jnp.broadcast_to(jnp.arange(prefix, end), refill.prompt.shape)
    decoder = nnx.merge(graphdef, lora, base)
    _, emitted = decoder(
        refill.prompt,
        positions,
        prompt_attend(slots.prompt_k[0].dtype),
        shared,
        dtype=jnp.dtype(dtype),
        forward_only=True,
    )
    new_k, new_v = emitted.attention
    run = jnp.arange(refill.group.shape[0])[:, None]

    def place(old, new):
        return old.at[run, refill.group].set(new, mode="drop")

    slots = slots.replace(
        prompt_k=tuple(
            old.at[run, refill.group, :, :, prefix:end].set(new, mode="drop")
            for old, new in zip(slots.prompt_k, new_k, strict=True)
        ),
        prompt_v=tuple(
            old.at[run, refill.group, :, prefix:end].set(new, mode="drop")
            for old, new in zip(slots.prompt_v, new_v, strict=True)
        ),
        prompt_length=place(slots.prompt_length, refill.length),
        started=place(slots.started, jnp.broadcast_to(slots.clock, refill.group.shape)),
        token=place(slots.token, jnp.broadcast_to(refill.token[..., None], refill.limit.shape)),
        finished=place(slots.finished, refill.limit < 1),
        made=place(slots.made, jnp.zeros_like(refill.limit)),
        limit=place(slots.limit, refill.limit),
        temperature=place(slots.temperature, refill.temperature),
        top_p=place(slots.top_p, refill.top_p),
        keys=place(slots.keys, row_keys(refill.seed, refill.example_id, refill.sample_id)),
        guidance=None if slots.guidance is None else place(slots.guidance, refill.guidance),
    )
    return _pinned(slots)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "dtype", "candidates"), donate_argnames="slots"
)
def decode(
    graphdef,
    lora,
    base,
    layers,
    slots: Slots,
    wanted: Int[Array, " R"],
    stop_ids: Int[Array, " E"],
    *,
    dtype: str,
    candidates: int,
) -> Slots:
    """Decodes until every row has finished, or until each run has as many free groups as it wants
    (0: it wants none; a guide is no group here).

    A row finishes with any of `stop_ids` or at its limit.
    """

    def working(slots: Slots):
        free = jnp.all(_sampled(slots, slots.finished), axis=-1).sum(axis=-1)
        refill_pays = jnp.any(wanted > 0) & jnp.all(free >= wanted)
        return ~jnp.all(slots.finished) & ~refill_pays

    positions = jnp.arange(slots.prompt_k[0].shape[-1] + slots.tokens.shape[-1])
    config = nnx.merge(graphdef, lora, base).config
    # once, else XLA makes them again in every layer
    ropes = {rope: rope_tables(positions, rope, config.head_dim) for rope in config.ropes}

    def step(slots: Slots):
        return decode_step(
            nnx.merge(graphdef, lora, base),
            layers,
            slots,
            ropes,
            stop_ids,
            jnp.dtype(dtype),
            candidates,
        )

    return _pinned(jax.lax.while_loop(working, step, slots))


def decode_step(
    decoder,
    layers,
    slots: Slots,
    ropes: dict[Rope, Tables],
    stop_ids: Int[Array, " E"],
    dtype,
    candidates: int,
) -> Slots:
    """Feeds every row its token, chooses the next. `ropes` holds the tables of all positions.
    Finished rows are computed and kept as they are.
    """
    runs, groups, rows = slots.token.shape
    age = slots.clock - slots.started
    position = jnp.broadcast_to((slots.prompt_length - 1 + age)[..., None], slots.token.shape)

    def in_batch(x):
        return x.reshape(runs, groups * rows, 1)

    caches = zip(slots.prompt_k, slots.prompt_v, slots.own_k, slots.own_v, strict=True)
    in_prompt = jnp.arange(slots.prompt_k[0].shape[-1]) < slots.prompt_length[..., None] - 1
    ring = slots.tokens.shape[-1]
    # steps since a column was written, 1 .. C
    columns_back = (slots.clock - 1 - jnp.arange(ring)) % ring + 1
    prompt_back = position[..., :1] - jnp.arange(slots.prompt_k[0].shape[-1])
    attend = token_attend(
        in_prompt, columns_back <= age[..., None], (prompt_back, columns_back), rows
    )
    ropes = {
        rope: jax.tree.map(operator.itemgetter(in_batch(position)), tables)
        for rope, tables in ropes.items()
    }
    hidden, emitted = _run_layers(
        decoder, layers, in_batch(slots.token), ropes, attend, caches, dtype
    )
    logits = decoder.logits(constrain(hidden[:, :, 0], EVERYWHERE))
    # Each device makes its part of the vocabulary for all rows, then gets the whole for its rows:
    # one mesh axis after the other, the last one of the cut first, else XLA gathers the head, or
    # all rows' logits.
    for axes in ((None, None, VOCABULARY), (None, None, FSDP), (None, "data", "run"), BY_ROW):
        logits = constrain(logits, axes)
    logits = logits.reshape(runs, groups, rows, -1)
    token, log_prob = _choose(slots, logits, age, candidates)
    made = jnp.where(slots.finished, slots.made, slots.made + 1)
    # A token is never negative, but that the column depends on it puts the writes behind every
    # read: without it XLA copies each ring.
    column = slots.clock % ring + (token.min() < 0)

    def write(ring, new, axis):
        return jax.lax.dynamic_update_slice_in_dim(
            ring, jnp.expand_dims(new, axis).astype(ring.dtype), column, axis
        )

    def keep(ring, new):
        return jnp.where(
            slots.finished, jax.lax.dynamic_index_in_dim(ring, column, 3, keepdims=False), new
        )

    return slots.replace(
        clock=slots.clock + 1,
        own_k=tuple(write(ring, k, 5) for ring, (k, _) in zip(slots.own_k, emitted, strict=True)),
        own_v=tuple(write(ring, v, 4) for ring, (_, v) in zip(slots.own_v, emitted, strict=True)),
        token=token,
        finished=slots.finished | jnp.isin(token, stop_ids) | (made >= slots.limit),
        made=made,
        tokens=write(slots.tokens, keep(slots.tokens, token), 3),
        log_probs=write(slots.log_probs, keep(slots.log_probs, log_prob), 3),
    )


def _choose(
    slots: Slots, logits: Float[Array, "R P G V"], age: Int[Array, "R P"], candidates: int
) -> tuple[Int[Array, "R P G"], Float[Array, "R P G"]]:
    """(token, log-probability) for each row; a guide's rows get those of its group, which are
    chosen from the logits of both.

    Classifier-free guidance of a language model (Sanchez et al. 2023, arXiv 2306.17806; gamma there
    is 1 + guidance here).
    """
    of = functools.partial(_sampled, slots)
    if slots.guidance is not None:
        weight = of(slots.guidance)[..., None]
        logits = (1 + weight) * logits[:, ::2] - weight * logits[:, 1::2]
    index = jnp.broadcast_to(of(age)[..., None], logits.shape[:-1])
    choose = functools.partial(choose_tokens, candidates=candidates)
    chosen = each_its_rows(
        choose,
        logits,
        of(slots.temperature),
        of(slots.top_p),
        token_uniforms(of(slots.keys), index),
    )
    return chosen if slots.guidance is None else tuple(jnp.repeat(x, 2, axis=1) for x in chosen)


def _sampled(slots: Slots, x: Array) -> Array:
    """Without the guides: [R, P, ...] of the groups that are sampled from."""
    return x if slots.guidance is None else x[:, ::2]


def _run_layers(decoder, layers, tokens: Int[Array, "R B T"], ropes, attend, caches, dtype):
    """Final-norm hidden states [R, B, T, D] and what `attend` emitted at each layer, as
    `Decoder.__call__` but layer by layer.
    """
    config = decoder.config
    x = jnp.take(decoder.embed[...], tokens, axis=0).astype(dtype) * jnp.asarray(
        config.embedding_scale, dtype
    )
    layer_def = _split_layers(decoder)[0]
    emitted = []
    for (lora, base), cache, kind in zip(layers, caches, config.layer_kinds, strict=True):
        layer_attend = functools.partial(attend, cache=cache, kind=kind)
        x, new = decoder_layer(
            nnx.merge(layer_def, lora, base),
            config,
            constrain(x, BY_ROW),
            ropes[kind.rope],
            layer_attend,
            None,
        )
        emitted.append(new.attention)
    return rms_norm(x, decoder.final_norm[...], config), emitted
