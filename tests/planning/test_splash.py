"""FLOPs of splash attention's kernels against the kernel's own list of the blocks that it
visits.
"""

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from ip_jax.models.prompt_mask import SharedPromptMask
from ip_jax.planning.splash import splash_flops

ROWS, HEADS, HEAD_DIM = 3, 6, 64


@pytest.mark.parametrize(
    "length, block, window",
    [(2048, 512, None), (1024, 128, 200), (1024, 128, 129), (1024, 256, 1), (512, 512, None)],
    ids=str,
)
def test_products_over_the_blocks_that_the_kernel_visits(length, block, window):
    shape = length, length
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    names = "block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq".split()
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * HEADS),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
    )
    queries = ROWS, HEADS, length, HEAD_DIM
    for name, products, info in (
        ("fwd", 2, kernel.fwd_mask_info),
        ("dkv", 4, kernel.dkv_mask_info),
        ("dq", 3, kernel.dq_mask_info),
    ):
        visited = np.count_nonzero(np.asarray(info.block_mask))
        found = splash_flops(
            f"splash_mha_{name}_segmented.3", [info.data_next.shape, info.block_mask.shape, queries]
        )
        assert found == products * 2 * ROWS * HEADS * visited * block**2 * HEAD_DIM, name
        of_one_row = splash_flops(
            f"splash_mha_{name}_segmented.3",
            [info.data_next.shape, info.block_mask.shape, queries[1:]],
        )
        assert of_one_row == found / ROWS, "XLA leaves its dim out"


def test_behind_a_shared_prompt_blocks_too_many_are_counted():
    """66 of 15 x 15 blocks hold something. Lines of a completion's first block are counted like its
    last (75), and where lines are keys, as in dkv, the prompt's are seen by all queries, so that
    the whole triangle counts (120).
    """
    mask = SharedPromptMask(7680, 1536, 1536)
    names = "block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq".split()
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * HEADS),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, 512)),
    )
    info = kernel.fwd_mask_info
    assert np.count_nonzero(
        np.asarray(info.block_mask)
    ) == 66 and info.partial_mask_blocks.shape == (1, 512, 512)
    for name, products, info, counted in (
        ("fwd", 2, kernel.fwd_mask_info, 75),
        ("dkv", 4, kernel.dkv_mask_info, 120),
        ("dq", 3, kernel.dq_mask_info, 75),
    ):
        assert np.count_nonzero(np.asarray(info.block_mask)) == 66
        found = splash_flops(
            f"splash_mha_{name}_segmented.1",
            [info.data_next.shape, info.block_mask.shape, (HEADS, 7680, HEAD_DIM)],
        )
        assert found == products * 2 * HEADS * counted * 512**2 * HEAD_DIM, name


def test_another_kernel_is_not_counted():
    assert splash_flops("ragged-dot-none.1", [(1, 4, 4)]) is None
