"""FLOPs, traffic and collectives of compiled programs, against XLA's own count of loopless ones and hand computations."""
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
    loss = lambda function: jax.grad(lambda x, w: function(x, w).sum(), argnums=(0, 1))  # noqa: E731
    assert cost_of(loss(scanned), *shapes).flops == pytest.approx(cost_of(loss(unrolled), *shapes).flops, rel=1e-6)


def test_a_loop_whose_end_depends_on_the_data_counts_once_and_a_branch_by_the_dearest():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ w, x)

    assert cost_of(until, array(5, N), array(N, N)).flops == 2 * 5 * N * N

    def either(x, w, which):
        return jax.lax.cond(which[0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    assert cost_of(either, array(5, N), array(N, N), array(1)).flops == 2 * 2 * 5 * N * N


@pytest.mark.parametrize("options", [
    dict(window_strides=(1,), padding="SAME"), dict(window_strides=(2,), padding="VALID"), dict(window_strides=(1,), padding=[(3, 1)], lhs_dilation=(3,)),
    dict(window_strides=(1,), padding=[(2, 2)], rhs_dilation=(2,)), dict(window_strides=(1,), padding="SAME", feature_group_count=2),
], ids=["same", "strided", "holes", "dilated", "groups"])  # fmt: skip
def test_convolutions_are_counted_as_xla_counts_them(options):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NWC", "WIO", "NWC"), **options)

    compiled = jax.jit(convolve).lower(array(2, 24, 8), array(3, 8 // options.get("feature_group_count", 1), 6)).compile()
    assert program_cost(compiled.as_text()).flops == compiled.cost_analysis()["flops"]


def test_collectives_in_a_loop_and_the_bytes_that_a_ring_sends():
    mesh = make_mesh(data=8)
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731

    def sums(x, weights):  # contracted over a sharded dimension: an all-reduce a turn
        return jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(x @ w, place()), None), x, weights)[0]

    cost = cost_of(sums, array(4, 64, sharding=place()), array(L, 64, 64, sharding=place(None, "data")))
    assert cost.collectives["all-reduce"].count == L
    assert cost.collectives["all-reduce"].moved == pytest.approx(L * 2 * (4 * 64 * 4) * 7 / 8)
    gathered = cost_of(lambda x: x * 2, array(64, 64, sharding=place("data")), out_shardings=place())
    assert gathered.collectives["all-gather"].count == 1 and gathered.moved == pytest.approx(64 * 64 * 4 * 7 / 8)


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
    assert cost.traffic == (row + index) + row + 2 * row  # the slice into fast memory; the sum out of it; the kernel's operand and result
    assert cost.opaque == 1 and cost.flops == 0
    told = TEXT.replace('"tpu_custom_call"', '"tpu_custom_call", backend_config={"cost_estimate":{"flops":123,"bytes":4}}')
    assert program_cost(told).flops == 123 and program_cost(told).opaque == 0


def test_a_text_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("module @jit_f { }")


def test_the_traffic_of_a_product_is_its_operands_and_its_result():
    cost = cost_of(lambda a, b: a @ b, array(32, 64), array(64, 48))
    assert cost.traffic == 4 * (32 * 64 + 64 * 48 + 32 * 48)
    assert cost.flops == 2 * np.prod([32, 64, 48])
