"""Compiling for TPUs that are not there. Needs libtpu (pip install "jax[tpu]"); minutes."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"')]


def test_loops_of_a_tpu_program_cost_as_much_as_written_out():
    from jax.sharding import NamedSharding, PartitionSpec
    from test_hlo import L, array, cost_of, scanned, unrolled

    from ip_jax.planning.chips import read_topology

    mesh = read_topology("v5e:2x2").mesh(1, 4, 1)
    rows, cut = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec(None, "data"))
    shapes = array(512, 256, sharding=rows), array(L, 256, 256, sharding=cut)
    in_loop, written_out = cost_of(scanned, *shapes, out_shardings=rows), cost_of(unrolled, *shapes, out_shardings=rows)
    assert in_loop.flops == written_out.flops == L * 2 * 512 * 256 * 256 / 4
    assert in_loop.open_loops == 0 and in_loop.collectives["all-gather"].count == L
    assert in_loop.moved == L * 256 * 256 * 2 * 3 / 4, "each layer's weights are gathered, as the bfloat16 that products take by default"


def test_a_program_that_is_too_large_is_a_result_with_the_compilers_numbers():
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from ip_jax.planning.chips import read_topology
    from ip_jax.planning.programs import TooLarge, compile_lowered

    place = NamedSharding(read_topology("v5e:1x1").mesh(1, 1, 1), PartitionSpec())
    column = jax.ShapeDtypeStruct((100_000, 1), jnp.float32, sharding=place)
    found = compile_lowered(lambda: jax.jit(lambda x: x @ x.T).lower(column))
    assert isinstance(found, TooLarge) and found.needed > 4e10 and 15.5 < found.allowed / 2**30 <= 16


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_a_7b_lora_step_fits(topology, tmp_path):
    command = [sys.executable, "-m", "ip_jax.cli", "plan", "sft_shapes", "--preset", "qwen2-7b", "--topology", topology, "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["fits"], record["needed"]
    step = record["phases"][0]
    assert step["compile_seconds"] > 0 and step["cost"]["collectives"]["all-gather"]["count"] > 0
    chips = record["devices"]
    assert record["memory"]["training"]["weights"] == pytest.approx(2 * 7_615_616_512 / chips, rel=1e-3)
    layers, down = 28 * 233_046_016, 28 * 18944 * 3584
    expected = (4 * layers + 2 * (layers - down)) * record["tokens_per_step"] / chips  # forward, backward, and the forward pass again
    assert expected < step["cost"]["flops"] < 1.3 * expected, "attention, the vocabulary and the adapters come on top"
