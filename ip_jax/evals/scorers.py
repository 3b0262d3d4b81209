"""What a scorer is."""

from collections.abc import Callable, Mapping
from typing import Any

Scorer = Callable[[Mapping[str, Any], str], Mapping[str, Any]]
"""(example, completion) -> {column: bool, number or text}."""
