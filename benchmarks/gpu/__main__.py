"""Every GPU benchmark against its target and its peer, in at most ten minutes on one H100 or H200:
a table, and one JSON file each.

    python -m benchmarks.gpu [--tiny] [--only NAME ...]

Each measurement has a process of its own, so that all memory is given back; one that fails is a row
with its sentence.
"""

import argparse
import pathlib
import re
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, result_in_own_process, save
from benchmarks.gpu.model import card
from benchmarks.gpu.rows import BENCHMARKS
from benchmarks.gpu.sizes import FULL, TINY

LIMIT_S = 590.0  # of everything
ONE_LIMIT_S = 200.0  # of one measurement


def main() -> int:
    """0 where every row has its number and its peer's, else 1; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="try the same code with tiny shapes, on any device; results go to a temporary folder",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        help="some of the benchmarks",
    )
    arguments = parser.parse_args()
    sizes, folder = (TINY, pathlib.Path(tempfile.mkdtemp())) if arguments.tiny else (FULL, RESULTS)
    end = time.monotonic() + LIMIT_S

    def run(measure, *of, **environment):
        left = min(ONE_LIMIT_S, end - time.monotonic())
        return (
            result_in_own_process(measure, *of, limit_s=left, environment=environment)
            if left > 0
            else {"error": "no time was left for it"}
        )

    found = run(card, sizes)
    if "error" in found:
        sys.stderr.write(found["error"] + "\n")
        return 2
    console, rows = Console(), {}
    for name in arguments.only:
        for row_name, row in BENCHMARKS[name](run, sizes):
            rows[row_name] = row
            if "error" not in row:  # a number that is there from an earlier day stays
                save(
                    f"{row_name}_{_file_name(found['device'])}",
                    row | {"card": found},
                    [found["device"]],
                    folder,
                )
    trial = "a trial of the code, whose numbers mean nothing: " if arguments.tiny else ""
    console.print(_table(rows, f"{trial}{found['device']}, results in {folder}"))
    for row_name, row in rows.items():
        console.print(
            *(
                f"{row_name}: {row[key]}"
                for key in ("error", "peer_error", "from_cache_error")
                if key in row
            ),
            sep="\n",
            end="",
            markup=False,
        )
    return int(any("error" in key for row in rows.values() for key in row))


def _table(rows: dict[str, dict], title: str) -> Table:
    table = Table("benchmark", "number", "target", "peer", "ratio", "target of ratio", title=title)
    for name, row in rows.items():
        number = f"{row['measured']} {row['unit']}" if row.get("measured") is not None else "-"
        target = row.get("target") or "-"
        for further in ("of_roofline", "of_overlapped_roofline", "from_cache", "share"):
            value = row.get(further, row.get(f"{further}_s"))
            if value is not None:
                number, target = (
                    f"{number}\n{value} {further.replace('_', ' ')}",
                    f"{target}\n{row[f'{further}_target'] or '-'}",
                )
        table.add_row(
            name,
            number,
            target,
            *(str(row.get(key) or "-") for key in ("peer", "ratio", "ratio_target")),
        )
    return table


def _file_name(device: str) -> str:
    return re.sub(r"\W+", "_", device.lower())


if __name__ == "__main__":
    sys.exit(main())
