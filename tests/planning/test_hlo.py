"""FLOPs, traffic and collectives of compiled programs, against XLA's own count of loopless ones and
hand computations.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ip_jax.planning.hlo import parse, program_cost
from ip_jax.training.sharding import make_mesh

L, N = 7, 16


def cost_of(function, *shapes, **options):
    return program_cost(jax.jit(function, **options).lower(*shapes).compile().as_text())


def array(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def unrolled(x, weights):
    for i in range(weights.shape[0]):
        x = jnp.tanh(x @ weights[i])
    return x


def test_a_loop_costs_as_much_as_its_body_written_out():
    shapes = array(5, N), array(L, N, N)
    assert cost_of(scanned, *shapes).flops == cost_of(unrolled, *shapes).flops == L * 2 * 5 * N * N


def test_loops_within_loops_multiply():
    def twice(x, weights):
        return jax.lax.scan(lambda x, _: (scanned(x, weights), None), x, length=3)[0]

    assert cost_of(twice, array(5, N), array(L, N, N)).flops == 3 * L * 2 * 5 * N * N


def test_gradients_of_a_scan_are_counted_as_those_of_the_unrolled_one():
    shapes = array(5, N), array(L, N, N)

    def loss(function):
        return jax.grad(lambda x, w: function(x, w).sum(), argnums=(0, 1))

    assert cost_of(loss(scanned), *shapes).flops == pytest.approx(
        cost_of(loss(unrolled), *shapes).flops, rel=1e-6
    )


def test_a_loop_whose_end_depends_on_the_data_counts_once_and_a_branch_by_the_dearest():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ w, x)

    assert cost_of(until, array(5, N), array(N, N)).flops == 2 * 5 * N * N

    def either(x, w, which):
        return jax.lax.cond(which[0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    assert cost_of(either, array(5, N), array(N, N), array(1)).flops == 2 * 2 * 5 * N * N


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1,), padding="SAME"),
        dict(window_strides=(2,), padding="VALID"),
        dict(window_strides=(1,), padding=[(3, 1)], lhs_dilation=(3,)),
        dict(window_strides=(1,), padding=[(2, 2)], rhs_dilation=(2,)),
        dict(window_strides=(1,), padding="SAME", feature_group_count=2),
    ],
    ids=["same", "strided", "holes", "dilated", "groups"],
)
def test_convolutions_are_counted_as_xla_counts_them(options):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=("NWC", "WIO", "NWC"), **options
        )

    compiled = (
        jax.jit(convolve)
        .lower(array(2, 24, 8), array(3, 8 // options.get("feature_group_count", 1), 6))
        .compile()
    )
    assert program_cost(compiled.as_text()).flops == compiled.cost_analysis()["flops"]


def test_collectives_in_a_loop_and_the_bytes_that_a_ring_sends():
    mesh = make_mesh(data=8)

    def place(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def sums(x, weights):  # contracted over a sharded dimension: an all-reduce a turn
        return jax.lax.scan(
            lambda x, w: (jax.lax.with_sharding_constraint(x @ w, place()), None), x, weights
        )[0]

    cost = cost_of(
        sums, array(4, 64, sharding=place()), array(L, 64, 64, sharding=place(None, "data"))
    )
    assert cost.collectives["all-reduce"].count == L
    assert cost.collectives["all-reduce"].moved == pytest.approx(L * 2 * (4 * 64 * 4) * 7 / 8)
    gathered = cost_of(
        lambda x: x * 2, array(64, 64, sharding=place("data")), out_shardings=place()
    )
    assert gathered.collectives["all-gather"].count == 1 and gathered.moved == pytest.approx(
        64 * 64 * 4 * 7 / 8
    )


TEXT = """
HloModule m, is_scheduled=true

%body (p: f32[100,8]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (w: f32[100,8], i: s32[]) -> f32[1,8] {
  %w = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %near = f32[1,8]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%body
  %sum = f32[1,8]{1,0} add(%near, %near)
  ROOT %far = f32[1,8]{1,0} custom-call(%sum), custom_call_target="tpu_custom_call"
}
"""


def test_traffic_counts_the_slice_that_is_read_and_not_what_lies_in_fast_memory():
    cost = program_cost(TEXT)
    row, index = 8 * 4, 4
    # the slice into fast memory; the sum out of it; the kernel's operand and result
    assert cost.traffic == (row + index) + row + 2 * row
    assert cost.opaque == 1 and cost.flops == 0
    told = TEXT.replace(
        '"tpu_custom_call"',
        '"tpu_custom_call", backend_config={"cost_estimate":{"flops":123,"bytes":4}}',
    )
    assert program_cost(told).flops == 123 and program_cost(told).opaque == 0


TPU_LOOP = """
HloModule m, is_scheduled=true

%start (p: f32[8,16]) -> (f32[8,16], f32[64,16]) {
  %p = f32[8,16]{1,0} parameter(0)
  %all-gather.1 = f32[64,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %c = (f32[8,16]{1,0}, f32[64,16]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%during (p: f32[8,16], a: f32[4,4], b: f32[4,4]) -> f32[4,4] {
  %p = f32[8,16]{1,0} parameter(0)
  %a = f32[4,4]{1,0} parameter(1)
  %b = f32[4,4]{1,0} parameter(2)
  %all-gather.2 = f32[64,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %d = f32[4,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (t: (s32[], f32[8,16], f32[4,4])) -> (s32[], f32[8,16], f32[4,4]) {
  %t = (s32[], f32[8,16]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%t), index=1
  %y = f32[4,4]{1,0} get-tuple-element(%t), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %f = (f32[8,16]{1,0}, f32[64,16]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %g = f32[4,4]{1,0} fusion(%x, %y, %y), kind=kOutput, calls=%during
  ROOT %r = (s32[], f32[8,16]{1,0}, f32[4,4]{1,0}) tuple(%next, %x, %g)
}

%condition (t: (s32[], f32[8,16], f32[4,4])) -> pred[] {
  %t = (s32[], f32[8,16]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %end = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[8,16], y: f32[4,4]) -> f32[4,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[4,4]{1,0} parameter(1)
  %one = s32[] constant(1)
  %first = s32[] copy(%one)
  %tuple = (s32[], f32[8,16]{1,0}, f32[4,4]{1,0}) tuple(%first, %x, %y)
  %loop = (s32[], f32[8,16]{1,0}, f32[4,4]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %result = f32[4,4]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_tpu_loops_by_their_condition_and_asynchronous_collectives_once():
    cost = program_cost(TPU_LOOP)
    turns = 4  # 1, 3, 5, 7
    assert cost.flops == turns * 2 * 4 * 4 * 4 and cost.open_loops == 0
    assert (
        cost.collectives["all-gather"].count == turns and cost.moved == turns * 64 * 16 * 4 * 7 / 8
    )
    by_data = TPU_LOOP.replace(
        "%end = s32[] constant(9)", "%end = s32[] get-tuple-element(%t), index=0"
    )
    assert (
        program_cost(by_data).open_loops == 1 and program_cost(by_data).flops == cost.flops / turns
    )
    assert program_cost(by_data, open_turns=turns) == dataclasses.replace(cost, open_loops=1)


SCATTERED = """
HloModule m, is_scheduled=true

%all-reduce-scatter (p: f32[64,16]) -> f32[8,16] {
  %p = f32[64,16]{1,0} parameter(0)
  %all-reduce.1 = f32[64,16]{1,0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8]
  %at = s32[] constant(0)
  ROOT %slice = f32[8,16]{1,0} dynamic-slice(%all-reduce.1, %at, %at), dynamic_slice_sizes={8,16}
}

ENTRY %main (x: f32[64,16]) -> f32[64,16] {
  %x = f32[64,16]{1,0} parameter(0)
  %part = f32[8,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %whole = f32[64,16]{1,0} all-gather(%part), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %again = f32[512,16]{1,0} all-gather(%whole), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
}
"""


def test_an_all_reduce_of_which_a_part_is_kept_scatters_and_collectives_of_one_channel_are_several():
    """As XLA:TPU writes what `shard_map` sends: all of it on channel 1."""
    found = program_cost(SCATTERED).collectives
    assert set(found) == {"reduce-scatter", "all-gather"} and found["all-gather"].count == 2
    assert found["reduce-scatter"].moved == 64 * 16 * 4 * 7 / 8
    assert found["all-gather"].moved == (1 + 8) * 64 * 16 * 4 * 7 / 8


KERNEL = """
HloModule m, is_scheduled=true

ENTRY %main (next: s8[1,4,4], q: bf16[2,6,2048,128], k: bf16[2,3,2048,128]) -> bf16[2,6,2048,128] {
  %next = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[2,6,2048,128]{3,2,1,0} parameter(1)
  %k = bf16[2,3,2048,128]{3,2,1,0} parameter(2)
  %call = (f32[2,512,128]{2,1,0}, bf16[2,6,2048,128]{3,2,1,0}) custom-call(%next, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/splash_mha_fwd_segmented_residuals/pallas_call"}, backend_config={"custom_call_config":{"body":"x"}}
  ROOT %out = bf16[2,6,2048,128]{3,2,1,0} get-tuple-element(%call), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/pallas_call"}
}
"""


def test_splash_attention_is_counted_block_by_block_and_its_metadata_may_break_lines():
    cost = program_cost(KERNEL)
    assert cost.flops == 2 * 2 * (2 * 6) * 10 * 512**2 * 128 and cost.opaque == 0, (
        "two products; of 4 x 4 blocks 10 lie on or below the diagonal"
    )
    assert program_cost(KERNEL.replace("splash_mha_fwd", "another")).opaque == 1


def test_a_text_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("module @jit_f { }")


def test_the_traffic_of_a_product_is_its_operands_and_its_result():
    cost = cost_of(lambda a, b: a @ b, array(32, 64), array(64, 48))
    assert cost.traffic == 4 * (32 * 64 + 64 * 48 + 32 * 48)
    assert cost.flops == 2 * np.prod([32, 64, 48])
