"""The mask of splash attention for rows in which completions share a prompt. A module of its own,
so that nobody on a CPU waits for Pallas.
"""

import dataclasses

import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash


@dataclasses.dataclass(frozen=True)
class SharedPromptMask(splash.Mask):
    """[T, T]: a row of `slots` prompt positions, then completions of `length` positions each.
    Causal, and a completion sees the prompt and itself.

    Splash asks for it block by block; it keeps each kind of partial block once, and visits no empty
    one.
    """

    positions: int
    slots: int
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, keys)."""
        return self.positions, self.positions

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        query, key = (
            np.arange(self.positions)[block[0], None],
            np.arange(self.positions)[None, block[1]],
        )

        def completion(place):
            return (place - self.slots) // self.length

        return (key <= query) & ((key < self.slots) | (completion(key) == completion(query)))
