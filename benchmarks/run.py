"""All benchmarks, one after another, each in a process of its own: `make bench`. Results go to
benchmarks/results/.
"""

import subprocess
import sys

for name in (
    "sft",
    "sampling",
    "rollouts",
    "mixture",
    "quantisation",
    "toy",
    "gcd_sycophancy",
    "gcd_approval",
):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
