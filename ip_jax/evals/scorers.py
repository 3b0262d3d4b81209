"""What a scorer is, and the one that needs no code: a regular expression.

A scorer is a function of an example and a completion that gives columns: {name: bool, number, text
or None}. One that works on many completions at once (a judge that is a model, `evals.judges`) has
`score_all` beside.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SCORE_ERROR = "score_error"  # the column that says why a completion has no verdict
Scorer = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


@dataclass(frozen=True)
class Matches:
    """Whether `pattern` is found in the completion, as the column `name`. Raises ValueError for a
    pattern that is no regular expression.
    """

    name: str
    pattern: str

    def __post_init__(self):
        try:
            _compiled(self.pattern)
        except re.error as error:
            raise ValueError(
                f"the pattern of {self.name} is no regular expression ({error}): {self.pattern!r}"
            ) from error

    def __call__(self, example: Mapping[str, Any], completion: str) -> dict[str, bool]:
        """A pure function of the completion."""
        return {self.name: bool(_compiled(self.pattern).search(completion))}


@dataclass(frozen=True)
class All:
    """The columns of several scorers together."""

    scorers: tuple[Scorer, ...]

    def __call__(self, example: Mapping[str, Any], completion: str) -> dict[str, Any]:
        """Raises ValueError for a column that two of them give."""
        found: dict[str, Any] = {}
        for scorer in self.scorers:
            columns = scorer(example, completion)
            twice = found.keys() & columns.keys()
            if twice:
                raise ValueError(f"two scorers give the column {sorted(twice)[0]!r}")
            found |= columns
        return found


@functools.cache
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(pattern, re.DOTALL)
