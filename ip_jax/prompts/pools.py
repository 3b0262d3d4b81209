"""Pools of paraphrases: one instruction in many wordings, a wording drawn for each example."""

from collections.abc import Sequence

from etils import epath

from ip_jax.prompts.places import Place, put
from ip_jax.prompts.transforms import Paraphrases, PromptError


def read_pool(path: epath.PathLike, n: int | None = None) -> list[str]:
    """The first `n` paraphrases of a text file that has one on each line, or all of them; empty
    lines are skipped.

    Raises PromptError for a file that cannot be read or that holds none or fewer than `n`, and for
    an `n` below 1.
    """
    try:
        content = epath.Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"the pool of paraphrases {path} cannot be read: {reason}") from error
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    return _first(lines, n, f"the file {path}")


def pool_from(lines: Sequence[str], n: int | None, place: Place) -> Paraphrases:
    """The op that puts one of the first `n` lines (of all where `n` is None) at a place, drawn by
    the seed and the example's id alone. Raises PromptError as `read_pool`.
    """
    return Paraphrases(tuple(put(place, line) for line in _first(lines, n, "the pool")))


def _first(lines: Sequence[str], n: int | None, what: str) -> list[str]:
    if n is not None and n < 1:
        raise PromptError(f"{n} paraphrases of {what} were asked for: it must be at least 1")
    if not lines:
        raise PromptError(
            f"{what} holds no paraphrase: it must hold at least one, one on each line"
        )
    if n is not None and n > len(lines):
        raise PromptError(
            f"{n} paraphrases of {what} were asked for, and it holds {len(lines)}: ask for at most"
            " as many"
        )
    return list(lines[:n])
