"""The rows of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ip_jax.data.sources import Example


@dataclass(frozen=True)
class StudyData:
    """`training`: kind -> rows, equally many; `evaluation`: set -> rows; `provenance`: where they
    are from, for captions.
    """

    training: Mapping[str, Sequence[Example]]
    evaluation: Mapping[str, Sequence[Example]]
    provenance: str
