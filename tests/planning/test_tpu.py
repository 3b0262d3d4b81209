"""Compiling for TPUs that are not there. Needs libtpu (pip install "jax[tpu]"); minutes: `make
test-tpu`.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"'
    ),
]


def test_loops_of_a_tpu_program_cost_as_much_as_written_out():
    from jax.sharding import NamedSharding, PartitionSpec
    from test_hlo import L, array, cost_of, scanned, unrolled

    from ip_jax.planning.chips import read_topology

    mesh = read_topology("v5e:2x2").mesh(1, 4, 1)
    rows, cut = (
        NamedSharding(mesh, PartitionSpec("data")),
        NamedSharding(mesh, PartitionSpec(None, "data")),
    )
    shapes = array(512, 256, sharding=rows), array(L, 256, 256, sharding=cut)
    in_loop, written_out = (
        cost_of(scanned, *shapes, out_shardings=rows),
        cost_of(unrolled, *shapes, out_shardings=rows),
    )
    assert in_loop.flops == written_out.flops == L * 2 * 512 * 256 * 256 / 4
    assert in_loop.open_loops == 0 and in_loop.collectives["all-gather"].count == L
    assert in_loop.moved == L * 256 * 256 * 2 * 3 / 4, (
        "each layer's weights are gathered, as the bfloat16 that products take by default"
    )


def test_a_program_that_is_too_large_is_a_result_with_the_compilers_numbers():
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from ip_jax.planning.chips import read_topology
    from ip_jax.planning.programs import TooLarge, compile_lowered

    place = NamedSharding(read_topology("v5e:1x1").mesh(1, 1, 1), PartitionSpec())
    column = jax.ShapeDtypeStruct((100_000, 1), jnp.float32, sharding=place)
    found = compile_lowered(lambda: jax.jit(lambda x: x @ x.T).lower(column))
    assert (
        isinstance(found, TooLarge) and found.needed > 4e10 and 15.5 < found.allowed / 2**30 <= 16
    )


def test_splash_attention_of_a_compiled_program_is_counted_forward_and_backward():
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from test_hlo import cost_of

    from ip_jax.models.kernels import KernelAttention, Packing
    from ip_jax.planning.chips import read_topology

    place = NamedSharding(read_topology("v5e:1x1").mesh(1, 1, 1), PartitionSpec())
    rows, length, kv_heads, groups, head_dim = 2, 1536, 2, 3, 128

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, rows, *shape), dtype, sharding=place)

    ids = array(length, dtype=jnp.int32)
    index = array(1, length, dtype=jnp.int32)
    kv = array(length, kv_heads, head_dim)

    def gradients(q, k, v, ids, index):
        attend = KernelAttention("splash", 1.0, window=200)
        return jax.grad(
            lambda *qkv: attend(*qkv, Packing(ids, index, ids)).astype(jnp.float32).sum(),
            argnums=(0, 1, 2),
        )(q, k, v)

    cost = cost_of(gradients, array(length, kv_heads, groups, head_dim), kv, kv, ids, index)
    visited = 1 + 2 + 2  # of 3 x 3 blocks of 512 positions
    assert (
        cost.flops == (2 + 4 + 3) * 2 * rows * kv_heads * groups * visited * 512**2 * head_dim
        and cost.opaque == 0
    )


def test_decoding_sends_what_formulas_say():
    """In bfloat16, but for the sums over tensor."""
    import dataclasses

    from test_programs import CONFIG, sampling_on, work

    from ip_jax.planning import formulas, programs
    from ip_jax.planning.chips import read_topology
    from ip_jax.planning.hlo import program_cost

    mesh = read_topology("v5e:2x4").mesh(1, 4, 2)
    planned = work(
        mesh,
        dataclasses.replace(
            CONFIG, vocab_size=2048, d_model=1024, d_ff=2048, n_layers=2, n_kv_heads=4, head_dim=128
        ),
    )
    sampled = sampling_on(mesh, "bfloat16")
    sent = program_cost(
        programs.lower_sampler(planned, sampled).decode.compile().as_text()
    ).collectives
    told = formulas.decode_cost(
        planned.sizes, sampled, programs.initial(planned).state.trained
    ).collectives
    assert told["all-gather"].moved == pytest.approx(sent["all-gather"].moved, rel=0.02)
    looked_up = 2 * 2 * 1024 * 32 * 7 / 8  # embeddings, which are summed too
    assert told["all-reduce"].moved + looked_up == pytest.approx(sent["all-reduce"].moved, rel=0.05)


def planned(tmp_path, *arguments, config: str = "sft_shapes") -> dict:
    """The record of a plan, made by a process of its own."""
    path = tmp_path / "plan.json"
    command = [sys.executable, "-m", "ip_jax.cli", "plan", config, *arguments, "--json", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_a_7b_lora_step_fits(topology, tmp_path):
    record = planned(tmp_path, "--preset", "qwen2-7b", "--topology", topology)
    assert record["fits"], record["needed"]
    step, chips = record["phases"][0], record["devices"]
    assert step["compile_seconds"] > 0 and step["cost"]["collectives"]["all-gather"]["count"] > 0
    assert step["cost"]["opaque"] == step["cost"]["open_loops"] == 0
    assert record["memory"]["training"]["weights"] == pytest.approx(
        2 * 7_615_616_512 / chips, rel=1e-3
    )
    layers, down = 28 * 233_046_016, 28 * 18944 * 3584
    # forward, backward, and the forward pass again
    expected = (4 * layers + 2 * (layers - down)) * record["tokens_per_step"] / chips
    assert expected < step["cost"]["flops"] < 1.3 * expected, (
        "attention, the vocabulary and the adapters come on top"
    )


def test_the_mixtral_lora_step_fits(tmp_path):
    """The training step alone. The mesh cuts axes of the torus 4x4x4 in two."""
    mesh = "--mesh.run", "2", "--mesh.tensor", "8"
    record = planned(
        tmp_path,
        "--preset",
        "mixtral-8x7b",
        "--topology",
        "v5p:4x4x4",
        *mesh,
        "--questions.sweeps",
        "0",
    )
    assert record["fits"], record["needed"]
    assert record["mesh"] == {"run": 2, "data": 4, "tensor": 8}
    assert record["memory"]["training"]["weights"] == pytest.approx(
        2 * 46_702_792_704 / 64, rel=5e-3
    )
    cost = record["phases"][0]["cost"]
    assert cost["opaque"] == 0 and cost["open_loops"] == 2 * 32, (
        "over blocks of tokens, in each layer forward and backward"
    )
    # of the two experts that a token is sent to
    attention, expert_map = 32 * 2 * (4096 * 4096 + 4096 * 1024), 32 * 2 * 4096 * 14336
    # gate and up are made again, down is not
    expected = (6 * attention + (4 * 3 + 2 * 2) * expert_map) * record["tokens_per_step"] / 64
    assert expected < cost["flops"] < 1.1 * expected, (
        "attention, the vocabulary and the adapters come on top"
    )


def test_the_reference_pass_of_reinforcement_learning_has_the_flops_that_one_expects():
    """Of Qwen3-4B: rows of a prompt and four completions, 1536 tokens each, 15 x 15 blocks of 512.
    The formula takes a line of blocks to visit those up to the diagonal, at most the six of a
    completion's last line: 75, where 66 are visited.
    """
    from configs.rl_shapes import PRESETS
    from ip_jax.planning import reinforced_programs
    from ip_jax.planning.chips import read_topology
    from ip_jax.planning.command import subject_of
    from ip_jax.planning.programs import Compiled, compile_lowered

    topology, subject = read_topology("v5e:4x4"), subject_of(PRESETS["qwen3-4b"], None, "tpu", None)
    (program,) = subject.work_on(subject.mesh_on(topology), None).programs
    found = compile_lowered(
        lambda: reinforced_programs.lower_score(program, "reference_generation")
    )
    assert isinstance(found, Compiled) and found.memory.peak < topology.chip.memory / 2
    layers, rows = 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728), 64
    products = 2 * layers * rows * 5 * 1536 + 2 * 151936 * 2560 * rows * 4 * 1536
    attention = 4 * 4096 * 36 * rows * 75 * 512**2
    assert (
        1 <= found.cost.flops * 16 / (products + attention) < 1.01
        and found.cost.opaque == found.cost.open_loops == 0
    )
