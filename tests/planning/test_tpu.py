"""Compiling for TPUs that are not there. Needs libtpu (pip install "jax[tpu]"); minutes."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"')]


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
