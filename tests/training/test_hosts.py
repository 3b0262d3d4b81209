"""Who takes part in a run, and what is said when they cannot meet. What several processes do
together: tests/test_two_processes.py.
"""

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from ip_jax import cli
from ip_jax.training import hosts
from ip_jax.training.hosts import Cluster, find_cluster
from ip_jax.training.sharding import batch_sharding, make_mesh

JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    "given, automatic, environment, expected",
    [
        (Cluster(), False, {}, None),
        (Cluster(), True, {}, Cluster()),
        (Cluster("host:1", 2, 0), False, JAX, Cluster("host:1", 2, 0)),
        (Cluster("[::1]:1", 2, 1), False, {}, Cluster("[::1]:1", 2, 1)),
        (Cluster(), False, JAX, Cluster("10.0.0.1:1234", 4, 3)),
        (Cluster(), False, {"SLURM_STEP_NUM_TASKS": "2"}, Cluster()),
        (Cluster(), False, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, None),
        (Cluster(), False, {"TPU_WORKER_HOSTNAMES": "a,b"}, Cluster()),
        (Cluster(), False, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (Cluster(), False, {"MEGASCALE_COORDINATOR_ADDRESS": "a"}, Cluster()),
    ],
)
def test_the_command_line_goes_before_the_environment(given, automatic, environment, expected):
    assert find_cluster(given, automatic, environment) == expected


@pytest.mark.parametrize(
    "given, environment, message",
    [
        (
            Cluster("host:1", 2, None),
            {},
            "several processes need all of --coordinator HOST:PORT, --processes N and --process I",
        ),
        (Cluster(None, 2, 1), {}, "need all of --coordinator"),
        (
            Cluster(),
            JAX | {"JAX_PROCESS_ID": ""},
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        ),
        (
            Cluster("host:1", 2, 2),
            {},
            "^process 2 of 2 does not exist: processes are numbered 0 to 1$",
        ),
        (Cluster("host:1", 2, -1), {}, "process -1 of 2 does not exist"),
        (
            Cluster("host", 2, 1),
            {},
            "^the coordinator 'host' must read HOST:PORT, with a port from 1 to 65535$",
        ),
        (Cluster("host:99999", 2, 1), {}, "must read HOST:PORT"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(given, environment, message):
    with pytest.raises(ValueError, match=message):
        find_cluster(given, False, environment)


def test_the_command_line_refuses_it_with_one_sentence(capsys, no_jax, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        cli.main(
            [
                "run",
                "gcd_sycophancy",
                "--out",
                str(tmp_path / "out"),
                "--coordinator",
                "host:1",
                "--processes",
                "2",
                "--process",
                "5",
            ]
        )
    assert capsys.readouterr() == (
        "",
        "ip-jax: process 5 of 2 does not exist: processes are numbered 0 to 1\n",
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def busy():
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def no_jax(monkeypatch):
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **__: pytest.fail("jax would abort the process")
    )


def test_a_coordinator_that_cannot_be_reached_is_one_sentence(no_jax, busy):
    with socket.create_server(("", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        OSError,
        match=(
            rf"^process 1 of 2 cannot reach the coordinator at 127.0.0.1:{port} \(.*refused.*\)"
            r" after 0 s: process 0 has to run there"
        ),
    ):
        hosts.start(Cluster(f"127.0.0.1:{port}", 2, 1), patience=0.2)
    with pytest.raises(
        OSError,
        match=(
            f"^process 0 cannot listen at the port of the coordinator 127.0.0.1:{busy} .*: choose"
            " another port, the same for all processes$"
        ),
    ):
        hosts.start(Cluster(f"127.0.0.1:{busy}", 2, 0))


def test_a_coordinator_that_comes_later_is_waited_for(monkeypatch, busy):
    """The first two attempts are refused."""
    attempts, connect = [], socket.create_connection

    def later(address, timeout):
        attempts.append(address)
        return connect(address if len(attempts) > 2 else ("127.0.0.1", 1), timeout)

    joined = []
    monkeypatch.setattr(socket, "create_connection", later)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *arguments, **_: joined.append(arguments)
    )
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    hosts.start(Cluster(f"127.0.0.1:{busy}", 2, 1), patience=5)
    assert joined == [(f"127.0.0.1:{busy}", 2, 1)] and attempts == [("127.0.0.1", busy)] * 3


# its name may not ask jax for devices before
@pytest.mark.parametrize(
    "out", [["--out", "nowhere/out"], []], ids=["a folder", "the default folder"]
)
def test_no_cluster_in_the_environment_is_one_sentence(out):
    """In a process of its own: jax looks around."""
    code = f"from ip_jax.cli import main; main(['run', 'gcd_sycophancy', *{out}, '--distributed'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "ip-jax: jax finds no cluster in the environment (coordinator_address should be defined.):"
        " say --coordinator HOST:PORT" in done.stderr
    )


def test_one_process_is_first_and_waits_for_nobody():
    assert not hosts.several() and hosts.is_first() and hosts.label() == ""
    assert hosts.by_first(lambda: (calls := []).append(1) or calls) == [1]
    assert hosts.ask(True) is True and hosts.anywhere(False) is False
    hosts.check_alike("anything", "config")


def test_one_process_places_and_fetches_as_jax_does():
    tree, rows = (
        {"a": np.arange(16.0).reshape(1, 2, 8), "b": np.ones((1, 2, 4, 3), np.int32)},
        batch_sharding(make_mesh(run=2, data=4)),
    )
    placed = hosts.place(tree, rows)
    assert all(
        placed[name].sharding.is_equivalent_to(rows, tree[name].ndim)
        and np.array_equal(placed[name], tree[name])
        for name in tree
    )
    assert all(
        isinstance(x, np.ndarray) and np.array_equal(x, tree[name])
        for name, x in hosts.fetch(placed).items()
    )
