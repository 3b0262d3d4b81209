"""What was sampled, and how it is laid out for an update: the swap of prompts happens here, and
completion tokens pass it verbatim.

Dims: R runs, Q groups (one task each) of a run's iteration, G completions of a group, C completion
slots, X prompt slots, M micro-batches, B rows of a micro-batch, S completions of a row.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Samples:
    """The completions of one iteration, as token ids. What lies behind a completion's end is 0
    everywhere.
    """

    tokens: Int[Array, "R Q G C"]  # the stop token included
    length: Int[Array, "R Q G"]
    # the sampler's, at the sampling temperature, untruncated, under the generation prompt (of
    # guided samples the guided distribution's)
    log_probs: Float[Array, "R Q G C"]

    @property
    def mask(self) -> Bool[Array, "R Q G C"]:
        """True on the completions' tokens."""
        return jnp.arange(self.tokens.shape[-1]) < self.length[..., None]


@flax.struct.dataclass
class Prompts:
    """What groups are sampled or trained under, right-padded: one prompt a group, or Q * G of them,
    one a completion.
    """

    tokens: Int[Array, "R Q X"]
    length: Int[Array, "R Q"]


@flax.struct.dataclass
class Signal:
    """What an update says of each completion token, or with M, B and S of each token of the rows.

    `weight` sums the tokens of a run up to its loss; it is 0 on padding. `old_log_probs` is what an
    estimator compares with, for `ratio_noise` the logarithm of its noise. `reference_log_probs` is
    the untrained model's.
    """

    advantage: Float[Array, "R Q G C"]
    weight: Float[Array, "R Q G C"]
    old_log_probs: Float[Array, "R Q G C"]
    reference_log_probs: Float[Array, "R Q G C"]


@flax.struct.dataclass
class Rows:
    """Rows of an update: a prompt stands once, and its S completions share it."""

    prompt: Int[Array, "M R B X"]
    prompt_length: Int[Array, "M R B"]
    tokens: Int[Array, "M R B S C"]
    length: Int[Array, "M R B S"]
    temperature: Float[Array, "M R B"]
    signal: Signal | None  # leaves [M, R, B, S, C]; None for rows that are only scored


def lay_out(
    prompts: Prompts,
    samples: Samples,
    temperature: Float[Array, " R"],
    signal: Signal | None,
    micro_batches: int,
    samples_per_row: int | None = None,
) -> Rows:
    """Rows of `samples` under `prompts`, in order; the last ones may be empty. `samples_per_row`
    (None: a whole group) divides a group.

    With one prompt a completion, each has a row of its own.
    """
    runs, groups = prompts.length.shape
    of_group = samples.length.shape[1] * samples.length.shape[2] // groups
    in_row = min(samples_per_row or of_group, of_group)
    copies = of_group // in_row
    count = groups * copies
    rows = -(-count // micro_batches)

    def fold(x, *dims):
        x = x.reshape(runs, count, *dims)
        x = jnp.pad(x, [(0, 0), (0, micro_batches * rows - count)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(runs, micro_batches, rows, *dims), 1, 0)

    def by_row(x):
        return fold(x, in_row, *x.shape[3:])

    def repeated(x):
        return jnp.repeat(x, copies, axis=1)

    return Rows(
        prompt=fold(repeated(prompts.tokens), prompts.tokens.shape[-1]),
        prompt_length=fold(repeated(prompts.length)),
        tokens=by_row(samples.tokens),
        length=by_row(samples.length),
        temperature=jnp.broadcast_to(temperature[:, None], (micro_batches, runs, rows)),
        signal=jax.tree.map(by_row, signal),
    )


def to_samples(
    values: Float[Array, "M R B S C"], groups: int, of_group: int
) -> Float[Array, "R Q G C"]:
    """What was found for the tokens of rows, in the places of their samples: the inverse of
    `lay_out`.
    """
    runs, slots = values.shape[1], values.shape[-1]
    return (
        jnp.moveaxis(values, 0, 1)
        .reshape(runs, -1, slots)[:, : groups * of_group]
        .reshape(runs, groups, of_group, slots)
    )


def micro_batches_of(
    rows: int, tokens_of_row: int, runs: int, tokens_per_micro_batch: int, multiple: int = 1
) -> int:
    """How many micro-batches hold `rows` rows of each run, when R * B * T may be
    `tokens_per_micro_batch` and `multiple` divides B where it can.
    """
    fitting = max(1, tokens_per_micro_batch // (runs * tokens_of_row) // multiple) * multiple
    return -(-rows // fitting)
