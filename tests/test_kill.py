"""A real process is killed twenty times, stopped by SIGTERM and by Ctrl-C; the same command then
ends bit for bit as if nothing had been.

The kills are timed by what can be seen from outside: the results folder and the lines that the
command prints.
"""

import contextlib
import dataclasses
import json
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from tiny_experiment import make_tokenizer, write_model
from watched_process import Process, launch

from ip_jax.studies.gcd_sycophancy import generate
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

pytestmark = pytest.mark.slow

STEPS, LOOKS = 36, tuple(range(3, 37, 3))
CONFIG = f"""
import dataclasses

from configs.gcd_sycophancy import ClaimCounts, DataSpec, EvalConfig, LoraConfig, ModelConfig
from configs.gcd_sycophancy import STUDY as GCD
from configs.gcd_sycophancy import Schedule, SftConfig, SupervisedPreset

PRESETS = {{
    "tiny": SupervisedPreset(
        model=ModelConfig(name="MODEL", weights="float32"),
        arms=("untrained", "neutral", "ip_behave"),
        data=DataSpec(rows=24, work="without", claims=ClaimCounts(wrong=6, right=4, asked=2)),
        sft=SftConfig(
            steps={STEPS}, batch_size=4, learning_rate=1e-3,
            schedule=Schedule("linear", warmup=2, total={STEPS}),
            lora=LoraConfig(rank=2, alpha=4, dropout=0.1, targets=("q", "down")),
            checkpoint_every=1,
        ),
        evaluation=EvalConfig(full_steps=(0, *{LOOKS}), max_new_tokens=16, slots=4),
    )
}}
STUDY = dataclasses.replace(GCD, presets=PRESETS)
"""
# Imports take longest: they are done before the command is given, while another process still runs.
# An ignored interrupt is inherited, as from a shell that starts the tests in the background; here
# interrupts count.
LAUNCHER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import configs.gcd_sycophancy, ip_jax.cli.run, ip_jax.lab.run, ip_jax.report.draw
from ip_jax.cli import main
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Where the command runs, and the command."""

    root: Path
    folder: Path

    def launch(self) -> Process:
        return launch(
            [LAUNCHER, "run", str(self.root / "tiny.py"), "--out", str(self.folder)], self.root
        )

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return sorted(
            int(path.name) for path in self.folder.glob("checkpoints/*/*") if path.name.isdigit()
        )

    def writing(self) -> dict[int, int]:
        """Checkpoints that are being written, or were when a process was killed: inode of the
        temporary folder -> step.
        """
        found = {}
        for path in self.folder.glob("checkpoints/*/*tmp*"):
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                found[path.stat().st_ino] = int(path.name.partition(".")[0])
        return found

    def half_looked_at(self) -> set[int]:
        """Steps of which some evaluations are on the disk and some are not."""
        return {look for look in LOOKS if 0 < self.looked_at(look) < 4}

    def looked_at(self, step: int) -> int:
        """How many of the four evaluations of a step are on the disk."""
        return len(list(self.folder.glob(f"transcripts/*-step{step:06d}-*.parquet")))

    def results(self) -> dict[str, bytes]:
        """What must not depend on any kill."""
        names = [
            "*/*/adapter.safetensors",
            "*/*/run.json",
            "*/*/metrics.jsonl",
            "transcripts/*",
            "transcripts.parquet",
            "table.csv",
            "config.json",
        ]
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for name in names
            for path in self.folder.glob(name)
        }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Workplace:
    root = tmp_path_factory.mktemp("kill")
    rows = generate.generate_training(
        100, "user_right", "without", 1, generate.has_allowed_gcd, lambda messages: 0
    )
    texts = (
        *(message["content"] for row in rows for message in row["messages"]),
        BOOK.find("gcd/behave").text,
    )
    (root / "model").mkdir()
    write_model(root / "model", tokenizer=make_tokenizer(texts, 600))
    (root / "tiny.py").write_text(CONFIG.replace("MODEL", str(root / "model")))
    workplace = Workplace(root, root / "undisturbed")
    process = workplace.launch()
    process.go()
    assert process.popen.wait(timeout=600) == 0, process.said()
    return workplace


@pytest.fixture
def workplace(undisturbed, request) -> Workplace:
    return dataclasses.replace(undisturbed, folder=undisturbed.root / request.node.name)


def assert_ends_alike(workplace: Workplace, undisturbed: Workplace, process: Process) -> None:
    process.go()
    assert process.popen.wait(timeout=600) == 0, process.said()
    ours, expected = workplace.results(), undisturbed.results()
    assert ours.keys() == expected.keys() and len(expected) > 8 + 4 * len(LOOKS)
    assert [name for name in expected if ours[name] != expected[name]] == []
    for path in workplace.folder.glob("runs/*/metrics.jsonl"):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(
            range(STEPS)
        )


def kill_at(kind: str, workplace: Workplace, process: Process, rng: random.Random) -> str:
    """Gives the command, kills at a moment of this kind, and says where the process was by what it
    left behind.
    """
    done, half, tmp = (
        max(workplace.saved(), default=0),
        workplace.half_looked_at(),
        workplace.writing(),
    )
    process.go()
    if kind == "random":
        time.sleep(rng.uniform(0, 4))
    elif kind == "untrained":
        process.wait_for((workplace.folder / "transcripts" / "untrained.json").exists)
        time.sleep(rng.uniform(0, 0.2))
    elif kind == "checkpoint":
        wanted = done + rng.randint(1, 2)
        process.wait_for(
            lambda: any(
                step >= wanted for inode, step in workplace.writing().items() if inode not in tmp
            )
        )
        time.sleep(rng.choice([0, 0.002, 0.005]))
    elif kind == "evaluation":
        step = next(look for look in LOOKS if look >= done and workplace.looked_at(look) == 0)
        process.wait_for(lambda: workplace.looked_at(step) > 0)
        time.sleep(rng.uniform(0, 0.02))
    elif kind == "resumed":
        process.wait_for(lambda: "going on from the checkpoint of step" in process.said())
        time.sleep(rng.uniform(0, 0.5))
    assert process.stop() == -signal.SIGKILL, process.said()
    resumed = re.search(r"checkpoint of step (\d+)", process.said())
    if workplace.writing().keys() - tmp:
        return "inside a checkpoint write"
    if workplace.half_looked_at() - half:
        return "inside an evaluation"
    if resumed and max(workplace.saved()) == int(resumed[1]):
        return "in the first step after a resume"
    return "elsewhere"


def test_killed_twenty_times_it_ends_as_if_nothing_had_been(workplace, undisturbed):
    rng = random.Random(20)
    kinds = ["checkpoint"] * 5 + ["evaluation"] * 4 + ["resumed"] * 4 + ["random"] * 4
    rng.shuffle(kinds)
    places = []
    process = workplace.launch()
    for kind in ["untrained", "checkpoint", "evaluation", *kinds]:
        following = workplace.launch()
        places.append((kind, kill_at(kind, workplace, process, rng)))
        process = following
    assert_ends_alike(workplace, undisturbed, process)
    count = Counter(place for _, place in places)
    assert count.total() == 20
    assert (
        min(
            count[place]
            for place in (
                "inside a checkpoint write",
                "inside an evaluation",
                "in the first step after a resume",
            )
        )
        >= 2
    ), places
    print(places)


def test_sigterm_and_ctrl_c_save_and_say_so(workplace, undisturbed):
    process, following = workplace.launch(), workplace.launch()
    process.go()
    process.wait_for(lambda: max(workplace.saved(), default=0) >= 4)
    assert process.stop(signal.SIGTERM) == 143
    assert re.search(
        r"stopped by SIGTERM(, step (\d+) is saved| in the evaluation of step \d+, step (\d+) is"
        r" saved): the same command goes on from there\n$",
        process.said(),
    )

    process, following = following, workplace.launch()
    process.go()
    step = next(
        look for look in LOOKS if look >= max(workplace.saved()) and workplace.looked_at(look) < 4
    )
    process.wait_for(lambda: workplace.looked_at(step) > 0)
    assert process.stop(signal.SIGTERM) == 143
    assert (
        f"stopped by SIGTERM in the evaluation of step {step}, step {step} is saved: the same"
        " command goes on from there" in process.said()
    )
    assert workplace.saved()[-1] == step and not workplace.writing()

    process, following = following, workplace.launch()
    process.go()
    process.wait_for(lambda: max(workplace.saved()) >= step + 1)
    assert process.stop(signal.SIGINT) == 130
    assert process.said().endswith("stopped: the same command goes on from the last checkpoint\n")
    assert_ends_alike(workplace, undisturbed, following)
    assert int(re.search(r"going on from the checkpoint of step (\d+)", following.said())[1]) > step
