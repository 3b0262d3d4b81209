"""Two real processes over the loopback interface, four fake devices each: they train and sample as
one, stop as one, and any number of processes goes on.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from tiny_experiment import make_tokenizer, write_model

from ip_jax.studies.gcd_sycophancy import generate
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

STEPS = 14
CONFIG = f"""
import dataclasses

from configs.gcd_sycophancy import ClaimCounts, DataSpec, EvalConfig, LoraConfig, ModelConfig
from configs.gcd_sycophancy import STUDY as GCD
from configs.gcd_sycophancy import Schedule, SftConfig, SupervisedPreset

PRESETS = {{
    "tiny": SupervisedPreset(
        model=ModelConfig(name="MODEL", weights="float32"),
        arms=("untrained", "neutral", "ip_behave"),
        data=DataSpec(
            rows=24, work="without", claims=ClaimCounts(wrong=3, right=2, asked=1),
            max_new_tokens_solving=8,
        ),
        sft=SftConfig(
            steps={STEPS}, batch_size=4, learning_rate=1e-3,
            schedule=Schedule("linear", warmup=2, total={STEPS}),
            # no dropout: its bits follow the packing, and that follows the devices
            lora=LoraConfig(rank=2, alpha=4, targets=("q", "down")), checkpoint_every=2,
        ),
        evaluation=EvalConfig(
            full_steps=(0, {STEPS}), max_new_tokens=6, slots=4,
        ),
    )
}}
STUDY = dataclasses.replace(GCD, presets=PRESETS)
"""
LAUNCHER = """
import sys
import configs.gcd_sycophancy, ip_jax.cli.run, ip_jax.lab.run, ip_jax.report.draw
from ip_jax.cli import main
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""


def start(arguments: list[str], root: Path, name: str, devices: int, flags: str = "") -> "Process":
    environment = {key: value for key, value in os.environ.items() if key != "IP_JAX_DATA_DIR"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
        ),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "IP_JAX_CACHE": str(root / "cache"),
    }
    with open(root / f"{name}.log", "wb") as output:
        popen = subprocess.Popen(
            [sys.executable, "-c", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=environment,
        )
    return Process(popen, root / f"{name}.log")


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Process:
    popen: subprocess.Popen
    log: Path

    def go(self) -> None:
        self.popen.stdin.write(b"\n")
        self.popen.stdin.flush()

    def said(self) -> str:
        """What it printed, without what XLA and its collectives log."""
        return "\n".join(
            line
            for line in self.log.read_text().splitlines()
            if line and "Gloo" not in line and "peer ranks" not in line
        )

    def ends(self, within: float = 200) -> int:
        return self.popen.wait(timeout=within)


@dataclasses.dataclass(frozen=True)
class Workplace:
    root: Path
    folder: Path

    def launch(self, name: str, devices: int, *arguments: str) -> Process:
        command = [
            LAUNCHER,
            "run",
            str(self.root / "tiny.py"),
            "--out",
            str(self.folder),
            *arguments,
        ]
        return start(command, self.root, name, devices)

    def launch_two(self, name: str) -> list[Process]:
        meeting = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process")
        return [self.launch(f"{name}{i}", 4, *meeting, str(i)) for i in range(2)]

    def saved(self) -> list[int]:
        return sorted(
            int(path.name) for path in self.folder.glob("checkpoints/*/*") if path.name.isdigit()
        )

    def wait_for_step(self, step: int, processes: list[Process]) -> None:
        deadline = time.monotonic() + 200
        while max(self.saved(), default=0) < step:
            assert time.monotonic() < deadline and all(p.popen.poll() is None for p in processes), (
                "\n\n".join(p.said() for p in processes)
            )
            time.sleep(0.005)

    def losses(self, run: str) -> list[float]:
        rows = [
            json.loads(line)
            for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        ]
        assert [row["step"] for row in rows] == list(range(STEPS))
        return [row["loss"] for row in rows]

    def transcripts(self) -> list[dict]:
        return pq.read_table(self.folder / "transcripts.parquet").to_pylist()


@pytest.fixture
def workplace(tmp_path) -> Workplace:
    rows = generate.generate_training(
        100, "user_right", "without", 1, generate.has_allowed_gcd, lambda messages: 0
    )
    texts = (
        *(message["content"] for row in rows for message in row["messages"]),
        BOOK.find("gcd/behave").text,
    )
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", tokenizer=make_tokenizer(texts, 600))
    (tmp_path / "tiny.py").write_text(CONFIG.replace("MODEL", str(tmp_path / "model")))
    return Workplace(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_two_processes_are_killed_and_one_goes_on_as_if_it_had_been_alone(workplace):
    """Killed both, one told to stop, then finished by one process with two devices; beside it one
    that was alone from the start, with one.
    """
    alone = dataclasses.replace(workplace, folder=workplace.root / "alone")
    first, reference = workplace.launch_two("first"), alone.launch("reference", 1)
    for process in [*first, reference]:
        process.go()
    workplace.wait_for_step(4, first)
    for process in first:
        process.popen.kill()
    assert [process.ends() for process in first] == [-signal.SIGKILL] * 2
    assert not first[1].said().startswith("ready\nresults"), "process 0 alone prints"

    second, last = workplace.launch_two("second"), workplace.launch("last", 2)
    for process in second:
        process.go()
    workplace.wait_for_step(6, second)
    second[1].popen.send_signal(signal.SIGTERM)
    assert [process.ends() for process in second] == [143, 143], "\n\n".join(
        p.said() for p in second
    )
    stopped = re.search(
        r"going on from the checkpoint of step (\d+)[\s\S]*stopped by SIGTERM, step (\d+) is saved:"
        r" the same command goes on from there$",
        second[0].said(),
    )
    assert stopped and int(stopped[1]) >= 4 and int(stopped[2]) == workplace.saved()[-1] < STEPS
    assert second[1].said() == "ready"

    last.go()
    assert last.ends() == 0, last.said()
    assert f"going on from the checkpoint of step {stopped[2]}" in last.said()
    assert reference.ends() == 0, reference.said()
    for run in ("neutral-s0", "ip_behave-s0"):
        np.testing.assert_allclose(workplace.losses(run), alone.losses(run), rtol=1e-5)
        ours, theirs = (
            load_file(where.folder / "runs" / run / "adapter.safetensors")
            for where in (workplace, alone)
        )
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5)
    assert workplace.transcripts() == alone.transcripts()
    sessions = json.loads((workplace.folder / "environment.json").read_text())["sessions"]
    assert [session["processes"] for session in sessions] == [1]


REINFORCED = """
import sys
model, folder, *where = sys.argv[1:]
from ip_jax.training import hosts
if where:
    hosts.start(hosts.Cluster(where[0], 2, int(where[1])), patience=60)
from etils import epath
from rich.console import Console
from tiny_reinforced import make
from ip_jax.lab.display import Display
from ip_jax.lab.reinforced.run import run_reinforced

run_reinforced(make(model), epath.Path(folder), Display(Console(quiet=not hosts.is_first())))
"""


def rollouts(folder: Path) -> list[dict]:
    paths = sorted(folder.glob("rollouts/*/step*.parquet"))
    assert len(paths) == 4
    return pa.concat_tables([pq.read_table(path) for path in paths]).to_pylist()


@pytest.mark.slow
def test_two_processes_reinforce_as_one(tmp_path):
    """The same rollouts, verdicts and tables, log-probabilities and weights but for the rounding of
    other matrix shapes; the first process alone grades, writes and prints.
    """
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    # most of the time goes into compiling
    at, flags = f"127.0.0.1:{free_port()}", "--xla_backend_optimization_level=0"
    arguments = [REINFORCED, str(tmp_path / "model")]
    both = [
        start([*arguments, str(tmp_path / "two"), at, str(i)], tmp_path, f"p{i}", 2, flags)
        for i in range(2)
    ]
    alone = start([*arguments, str(tmp_path / "one")], tmp_path, "alone", 1, flags)
    assert [process.ends(within=500) for process in (*both, alone)] == [0, 0, 0], "\n\n".join(
        process.said() for process in (*both, alone)
    )
    assert both[1].said() == "" and "evaluated standard, swap after 4 iterations" in both[0].said()

    close = {"log_probs": 1e-5, "advantage": 1e-6, "gate_weight": 0}
    ours, theirs = rollouts(tmp_path / "two"), rollouts(tmp_path / "one")
    assert [{name: value for name, value in row.items() if name not in close} for row in ours] == [
        {name: value for name, value in row.items() if name not in close} for row in theirs
    ]
    for name, tolerance in close.items():
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine[name], other[name], atol=tolerance, rtol=0)
    for run in ("standard-s0", "swap-s0"):
        mine, other = (
            load_file(tmp_path / where / "runs" / run / "adapter.safetensors")
            for where in ("two", "one")
        )
        for name in other:
            assert np.abs(other[name]).max() > 1e-3
            np.testing.assert_allclose(mine[name], other[name], atol=5e-6)
    for table in ("final", "transcripts"):
        mine, other = (
            pq.read_table(tmp_path / where / f"{table}.parquet") for where in ("two", "one")
        )
        assert mine.equals(other), table
    mine, other = (pq.read_table(tmp_path / where / "curves.parquet") for where in ("two", "one"))
    for name in mine.column_names:
        if pa.types.is_floating(mine.schema.field(name).type):
            np.testing.assert_allclose(
                mine[name].to_numpy(), other[name].to_numpy(), atol=1e-4, err_msg=name
            )
        else:
            assert mine[name].equals(other[name]), name


PRIMITIVES = """
import sys
process, port = int(sys.argv[1]), sys.argv[2]
from ip_jax.training import hosts, stopping
hosts.start(hosts.Cluster(f"127.0.0.1:{port}", 2, process), patience=60)
import os, signal
import jax, numpy as np
from ip_jax.training.sharding import batch_sharding, make_mesh, replicated

devices = (jax.device_count(), jax.local_device_count())
print(hosts.several(), hosts.is_first(), hosts.label(), *devices)
calls = []
found = hosts.by_first(lambda: calls.append(process) or {"long": "x" * 5000, "from": process})
print(found["from"], calls)
for error in (FileNotFoundError(2, "gone", "file"), UnicodeDecodeError("utf-8", b"", 0, 1, "bad")):
    try:
        hosts.by_first(lambda: (_ for _ in ()).throw(error))
    except (OSError, ValueError) as met:
        print(isinstance(met, OSError), str(met) == str(error))
hosts.check_alike("same", "config")
try:
    hosts.check_alike(f"other {process}", "config")
except ValueError as met:
    print(met)
print([hosts.anywhere(flag) for flag in (False, process == 0, process == 1, True)])
whole = np.arange(2 * 3 * 8.0).reshape(2, 3, 8)[None]
mesh = make_mesh(run=2, tensor=4)
tree = hosts.place({"a": whole, "b": whole[..., :2]}, batch_sharding(mesh))
shapes = {s.data.shape for s in tree["a"].addressable_shards}
placed = tree["a"].sharding.is_equivalent_to(batch_sharding(mesh), 4)
print(placed, shapes, tree["a"].is_fully_addressable)
sizes = (("a", 8), ("b", 2))
print(all(np.array_equal(hosts.fetch(tree)[name], whole[..., :size]) for name, size in sizes))
print(hosts.fetch(hosts.place(np.arange(3), replicated(mesh))).tolist())
moved = hosts.place(tree, batch_sharding(make_mesh(tensor=8)))
print(moved["a"].sharding.is_fully_replicated, np.array_equal(hosts.fetch(moved)["a"], whole))
with stopping.Sigterm() as stop:
    answers = []
    for step in range(4):
        if (process, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        answers.append(stop.agreed(tree))
    print(answers)
    stopping.heed()
    try:
        with stop.at_once("at once"):
            print("not reached")
    except stopping.Interrupted as met:
        print(met.message)
with stopping.Sigterm("outer"):
    stopping.heed()
    if process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    with stopping.Sigterm() as inner:  # knows what came before it was opened
        print(hosts.anywhere(inner.asked))
    try:
        stopping.heed()
        print("not reached")
    except stopping.Interrupted as met:
        print(met.message)
"""


def test_processes_agree_share_and_place_their_parts(tmp_path):
    """Every primitive of `hosts` and `stopping` in both processes, against what is written here."""
    port = free_port()
    processes = [start([PRIMITIVES, str(i), str(port)], tmp_path, f"p{i}", 4) for i in range(2)]
    assert [process.ends() for process in processes] == [0, 0], "\n\n".join(
        process.said() for process in processes
    )
    for i, process in enumerate(processes):
        assert process.said().splitlines() == [
            f"True {i == 0}  (process {i} of 2) 8 4",
            f"0 {[0] if i == 0 else []}",
            "True True",
            "False True",
            (
                "the processes of this run differ in config: all need the same command, code, data"
                " and environment"
            ),
            "[False, True, True, True]",
            "True {(1, 1, 3, 8)} False",
            "True",
            "[0, 1, 2]",
            "True True",
            "[False, False, True, True]",
            "at once",
            "True",
            "outer",
        ]
