"""The demo as a user runs it, `make demo` once it is installed: three trained arms and the
untrained model, evaluations and figure included.

python -m benchmarks.gcd_sycophancy
"""

import json
import pathlib
import tempfile

from benchmarks.common import command, save


def main() -> None:
    """Writes benchmarks/results/gcd_sycophancy_cpu.json. Neither the model nor compiled programs
    are in a cache: the download counts.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, cache = pathlib.Path(name) / "demo", pathlib.Path(name) / "cache"
        measured = command(
            "gcd_sycophancy",
            folder,
            {"IP_JAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled")},
        )
        record = json.loads((folder / "config.json").read_text())
        save(
            "gcd_sycophancy_cpu",
            {
                "arms": list(record["arms"]),
                "weights": record["config"]["model"]["weights"],
                **measured,
            },
        )


if __name__ == "__main__":
    main()
