"""FLOPs of splash attention in compiled TPU programs, by formula: its kernels
(jax.experimental.pallas.ops.tpu.splash_attention) carry no cost estimate. Dims: B rows, N heads, T
positions, H head dim; n x n blocks make a row's scores.
"""

import re
from collections.abc import Sequence

Dims = tuple[int, ...]
# of a block: scores and context; scores, dV, dP and dK; scores, dP and dQ
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
_NAME = re.compile(r"splash_mha_(fwd|dkv|dq)")


def splash_flops(label: str, operands: Sequence[Dims]) -> float | None:
    """Of one call, two for a multiply-add; None for another kernel. `label`: the text that holds
    its name.

    The first operands say which block comes next, [1, n, w] or [1, w, n]: a line of blocks visits
    those up to the diagonal, but no more than w of them, which is n without a window. Of
    completions that share a prompt that is too many: forward and in dq only the last line of each
    visits w, and in dkv w is n, because all queries see the prompt's keys (14 and 82 % for four
    completions as long as their prompt). Behind them come the queries, [B, N, T, H], or [N, T, H]
    of a single row.
    """
    found = _NAME.search(label)
    if not found:
        return None
    widest, blocks = sorted(operands[0][1:])
    queries = next(
        dims
        for dims in operands
        if len(dims) in (3, 4) and (len(dims) == 4 or sorted(dims[1:]) != [widest, blocks])
    )
    rows, heads, length, head_dim = queries if len(queries) == 4 else (1, *queries)
    visited = sum(min(i + 1, widest) for i in range(blocks))
    return (
        _PRODUCTS[found.group(1)]
        * 2.0
        * rows
        * heads
        * visited
        * (length // blocks) ** 2
        * head_dim
    )
