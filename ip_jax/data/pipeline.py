"""The Grain pipeline: source -> order of a seed -> prompt transform -> tokens and mask -> the
packed batch of a step.

Data order is a pure function of (seed, global step): nothing but the step number has to be stored
to resume.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Int

from ip_jax.data.packing import (
    CPU_ROWS,
    PackedShape,
    RowRules,
    pack_step,
    plan_shapes,
    shared_prefix,
)
from ip_jax.data.sources import Example
from ip_jax.prompts.chat import Rendered, render_conversation
from ip_jax.prompts.transforms import Transform


@dataclasses.dataclass(frozen=True)
class RunSource:
    """What one run reads: its arm's examples and training prompt, in the order of its seed. Arms of
    one seed share the order.
    """

    name: str
    examples: Sequence[Example]
    transform: Transform
    seed: int


Render = Callable[[Sequence[Mapping[str, str]]], Rendered]


def renderer(
    tokenizer, train_on: str = "last", encode_apart: bool = False, close_with_eos: bool = False
) -> Render:
    """`render_conversation` with a memory: a conversation that many runs and epochs read is
    rendered once.
    """

    @functools.cache
    def render(turns: tuple[tuple[str, str], ...]) -> Rendered:
        messages = [{"role": role, "content": content} for role, content in turns]
        return render_conversation(tokenizer, messages, train_on, encode_apart, close_with_eos)

    return lambda messages: render(
        tuple((message["role"], message["content"]) for message in messages)
    )


def run_dataset(source: RunSource, render: Render) -> grain.MapDataset:
    """Element i is the i-th rendered example of an endless, reshuffled pass over the source, read
    by index.
    """
    order = grain.MapDataset.range(len(source.examples)).seed(source.seed).shuffle().repeat()
    return order.map(lambda index: _read(source, int(index), render))


def _read(source: RunSource, index: int, render: Render) -> Rendered:
    return render(source.transform(source.examples[index], source.seed)["messages"])


def fitting_examples(
    sources: Sequence[RunSource], render: Render, max_length: int, drop_long: bool
) -> tuple[list[RunSource], list[int]]:
    """(sources, indices of the dropped examples). Every example must fit `max_length` tokens in
    every run that reads it.

    Arms stay paired: an index that is too long for one run is dropped from all. Raises ValueError
    with the run, the index and the length of the first example that is too long unless `drop_long`,
    and for runs without examples or with unequally many.
    """
    counts = {len(source.examples): source.name for source in sources}
    if len(counts) > 1:
        raise ValueError(
            "runs are paired by the index of an example, and these read unequally many:"
            f" {', '.join(f'{name} {n}' for n, name in counts.items())}"
        )
    too_long: set[int] = set()
    for source in sources:
        for index in range(len(source.examples)):
            length = len(_read(source, index, render).token_ids)
            if length > max_length and not drop_long:
                raise ValueError(
                    f"run {source.name}: example {index} ({source.examples[index]['id']}) has"
                    f" {length} tokens, and max_length is {max_length}: raise max_length or set"
                    " drop_long to leave such examples out"
                )
            if length > max_length:
                too_long.add(index)
    kept = [
        [example for index, example in enumerate(source.examples) if index not in too_long]
        for source in sources
    ]
    if not all(kept):
        raise ValueError(
            f"there is no training example of at most max_length = {max_length} tokens"
        )
    return [
        dataclasses.replace(source, examples=examples)
        for source, examples in zip(sources, kept, strict=True)
    ], sorted(too_long)


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Packed batches of a program's runs by global step."""

    datasets: tuple[grain.MapDataset, ...]
    batch_size: int
    shapes: tuple[PackedShape, ...]  # of the micro-batches of every step
    shared: int  # tokens with which all examples of a run begin: a row holds them once
    lengths: Int[np.ndarray, "steps R N"]  # of each example

    def __call__(self, step: int) -> tuple[tuple[dict[str, np.ndarray], ...], float]:
        """(arrays of a training.state.Batch for each shape, real / padded tokens) of one step."""
        return pack_step(
            [_examples_of_step(dataset, step, self.batch_size) for dataset in self.datasets],
            self.shapes,
        )


def batch_reader(
    sources: Sequence[RunSource],
    render: Render,
    batch_size: int,
    steps: int,
    tokens_per_micro_batch: int,
    rules: RowRules = CPU_ROWS,
) -> BatchReader:
    """Plans the packing of all steps of all runs (see `plan_shapes`) and returns the reader of
    their batches.
    """
    datasets = tuple(run_dataset(source, render) for source in sources)
    batches = [
        [_examples_of_step(dataset, step, batch_size) for dataset in datasets]
        for step in range(steps)
    ]
    lengths = np.array([[[len(e.token_ids) for e in run] for run in step] for step in batches])
    responses = np.array(
        [[[e.response_mask.sum() for e in run] for run in step] for step in batches]
    )
    shared = (
        min(
            shared_prefix([example for step in batches for example in step[run]])
            for run in range(len(datasets))
        )
        if rules.share_prefix
        else 0
    )
    shapes = plan_shapes(lengths, responses, tokens_per_micro_batch, rules, shared)
    return BatchReader(datasets, batch_size, shapes, shared, lengths)


def _examples_of_step(dataset: grain.MapDataset, step: int, batch_size: int) -> list[Rendered]:
    return [dataset[step * batch_size + i] for i in range(batch_size)]
