"""The leak grid: every run under every evaluation prompt on every evaluation set, as rows of the
transcripts table.

A cell is one (run, step, evaluation set, evaluation prompt). It becomes one Parquet part file,
whole or absent, so that what has been evaluated is never evaluated again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from ip_jax.data.sources import Example
from ip_jax.evals.judges import Judge
from ip_jax.evals.scorers import SCORE_ERROR, Scorer
from ip_jax.prompts.chat import completion_text, render_prompt
from ip_jax.prompts.transforms import Transform
from ip_jax.sampling.sampler import Completion, Request

_TYPES = (
    dict.fromkeys(
        (
            "experiment",
            "arm",
            "eval_set",
            "eval_prompt",
            "example_id",
            "prompt",
            "completion",
            SCORE_ERROR,
        ),
        pa.string(),
    )
    | dict.fromkeys(("seed", "step", "examples_seen", "n_tokens"), pa.int64())
    | dict.fromkeys(("own_prompt", "ended"), pa.bool_())
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run's evaluation under one prompt. `own_prompt`: the prompt that this run was trained
    with is put back.
    """

    arm: str
    seed: int
    step: int
    examples_seen: int
    eval_set: str
    eval_prompt: str
    own_prompt: bool
    transform: Transform

    @property
    def part(self) -> str:
        """The name of the cell's part file."""
        prompt = self.eval_prompt.replace("/", "_")
        return f"{self.arm}-s{self.seed}-step{self.step:06d}-{self.eval_set}-{prompt}.parquet"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are drawn (see sampling.Request); temperature 0 is greedy. An example's own
    `max_new_tokens` goes first.
    """

    max_new_tokens: int
    temperature: float
    top_p: float


def prompted(example: Example, transform: Transform, seed: int) -> Example:
    """The evaluation example as it is asked under a prompt, without any gold answer."""
    messages = list(example["messages"])
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return transform({**example, "messages": messages}, seed)


def requests_for(
    cell: Cell,
    examples: Sequence[Example],
    tokenizer,
    example_id: Callable[[str], int],
    decoding: Decoding,
) -> list[Request]:
    """One sampling request for each example of the cell."""
    return [
        Request(
            prompt_ids=np.asarray(
                render_prompt(tokenizer, prompted(example, cell.transform, cell.seed)["messages"])
            ),
            example_id=example_id(example["id"]),
            seed=cell.seed,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_new_tokens=example.get("max_new_tokens", decoding.max_new_tokens),
        )
        for example in examples
    ]


def scored(scorer: Scorer, example: Mapping[str, Any], completion: str) -> dict[str, Any]:
    """What a scorer says of a completion. Whatever it raises costs this row alone: it then has no
    verdict, and SCORE_ERROR says why.
    """
    try:
        found = scorer(example, completion)
    except Exception as error:
        return {SCORE_ERROR: f"{type(error).__name__}: {error}"}
    if not isinstance(found, Mapping):
        return {SCORE_ERROR: f"the scorer returned {type(found).__name__} and no dict"}
    return dict(found)


def scored_all(
    scorer: Scorer, examples: Sequence[Mapping[str, Any]], completions: Sequence[str]
) -> list[dict[str, Any]]:
    """What a scorer says of each completion; a judge is asked for all of them at once. Raises
    JudgeError where a judge is no longer reached: what it has said is in its cache.
    """
    if isinstance(scorer, Judge):
        return scorer.score_all(examples, completions)
    pairs = zip(examples, completions, strict=True)
    return [scored(scorer, example, completion) for example, completion in pairs]


def rows_of(
    experiment: str,
    cell: Cell,
    examples: Sequence[Example],
    completions: Sequence[Completion],
    tokenizer,
    columns: Sequence[str],
) -> list[dict]:
    """The cell's rows of the transcripts table, without verdicts: what was asked and what was
    answered. `columns` of an example are kept.
    """
    rows = []
    for example, completion in zip(examples, completions, strict=True):
        text = completion_text(tokenizer, completion.token_ids, completion.ended)
        user_turns = [
            m["content"]
            for m in prompted(example, cell.transform, cell.seed)["messages"]
            if m["role"] == "user"
        ]
        rows.append(
            {
                "experiment": experiment,
                "arm": cell.arm,
                "seed": cell.seed,
                "step": cell.step,
                "examples_seen": cell.examples_seen,
                "eval_set": cell.eval_set,
                "eval_prompt": cell.eval_prompt,
                "own_prompt": cell.own_prompt,
                "example_id": example["id"],
                **{name: example.get(name) for name in columns},
                "prompt": user_turns[0],
                "completion": text,
                "n_tokens": len(completion.token_ids),
                "ended": bool(completion.ended),
            }
        )
    return rows


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as a table. Columns of the study have the types of their values; a value that a row
    lacks is null. Raises ValueError, which names the column, for values of different types.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            arrays[name] = pa.array(values, _TYPES.get(name))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            raise ValueError(
                f"the column {name!r} of the transcripts holds {' and '.join(kinds)}: a scorer"
                " gives a column one type, bool, number or text"
            ) from error
    return pa.table(arrays)


def parquet_writer(table: pa.Table) -> Callable:
    """A function that writes the table as Parquet into a binary file."""
    return lambda file: pq.write_table(table, file)


def merge_parts(folder: epath.Path) -> pa.Table:
    """All part files of a folder as one table, in the order of their names. Raises
    FileNotFoundError where there is none.
    """
    parts = sorted(folder.glob("*.parquet"))
    if not parts:
        raise FileNotFoundError(f"{folder} holds no transcripts yet: run the experiment first")
    # a column may be null all through a part, and whole numbers in one and fractions in another
    return pa.concat_tables([read_part(path) for path in parts], promote_options="permissive")


def read_part(path: epath.Path) -> pa.Table:
    """One part file."""
    # by epath: pyarrow has credentials of its own for object stores
    return pq.read_table(pa.BufferReader(path.read_bytes()))
