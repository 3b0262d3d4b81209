"""A real process that is watched by what it says and leaves, and stopped by a signal."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Process:
    """One start of the command."""

    popen: subprocess.Popen
    log: Path

    def go(self) -> None:
        self.wait_for(lambda: "ready" in self.said())
        self.popen.stdin.write(b"\n")
        self.popen.stdin.flush()

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, moment: Callable[[], object]) -> None:
        deadline = time.monotonic() + 300
        while not moment():
            assert self.popen.poll() is None, f"the process ended before its time:\n{self.said()}"
            assert time.monotonic() < deadline, f"the moment did not come:\n{self.said()}"
            time.sleep(0.001)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(timeout=300)


def launch(arguments: list[str], root: Path) -> Process:
    """`python -c *arguments` in `root`, with a cache there, its output in the next NNN.log. It
    waits for `Process.go` where it reads a line.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "IP_JAX_DATA_DIR")
    }
    environment |= {
        "IP_JAX_CACHE": str(root / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(root / "cache" / "compiled"),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    log = root / f"{len(list(root.glob('*.log'))):03d}.log"
    with open(log, "wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-c", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=environment,
        )
    return Process(started, log)
