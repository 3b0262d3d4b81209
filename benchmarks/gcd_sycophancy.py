"""The demo as a user runs it, `make demo` once it is installed: three trained arms and the untrained model, evaluations and figure included.

    python -m benchmarks.gcd_sycophancy
"""
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

from benchmarks.common import save, seconds


def main() -> None:
    """Writes benchmarks/results/gcd_sycophancy_cpu.json. Neither the model nor compiled programs are in a cache: the download counts."""
    with tempfile.TemporaryDirectory() as name:
        folder, cache = pathlib.Path(name) / "demo", pathlib.Path(name) / "cache"
        command = [sys.executable, "-m", "ip_jax.cli", "run", "gcd_sycophancy", "--out", str(folder)]
        environment = os.environ | {"IP_JAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled")}
        took = seconds(lambda: subprocess.run(command, check=True, env=environment))
        record = json.loads((folder / "config.json").read_text())
        save("gcd_sycophancy_cpu", {
            "arms": list(record["arms"]), "weights": record["config"]["model"]["weights"], "minutes": round(took / 60, 2),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        })


if __name__ == "__main__":
    main()
