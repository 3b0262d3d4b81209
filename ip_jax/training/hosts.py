"""Several processes, one program: how they find each other, who writes, how they agree, and which
part of an array each places.

Every process runs the same Python on the same inputs. Process 0 alone reads and writes the results
folder (all write checkpoints), judges and prints; what it finds or decides there reaches the others
through `by_first`. With one process each function does the obvious.
"""

import dataclasses
import functools
import pickle
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

T = TypeVar("T")
PATIENCE = 300  # seconds; the machines of one job start minutes apart
_LEAVING = 60  # seconds that a process waits at its end for the others, which may have failed


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Who takes part: process `process` of `processes`, which meet at `coordinator` ("HOST:PORT",
    where process 0 listens).

    All None: jax finds the three in the environment (Cloud TPU, GKE, SLURM, Open MPI).
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def find_cluster(given: Cluster, automatic: bool, environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that the command line (`given`, `automatic`), or else the environment, asks for;
    None for a single process.

    The environment asks by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID together,
    as a SLURM step of several tasks, or as a TPU slice of several hosts on GKE. Raises ValueError
    where one of the three is missing or wrong.
    """
    if given == Cluster() and "JAX_COORDINATOR_ADDRESS" in environment:
        numbers = [
            int(value) if (value := environment.get(name, "")).isdigit() else None
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        ]
        given = Cluster(environment["JAX_COORDINATOR_ADDRESS"], *numbers)
    if given != Cluster():
        return _checked(given)
    slurm = int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    tpu = (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )
    return Cluster() if automatic or slurm or tpu else None


def _checked(cluster: Cluster) -> Cluster:
    if None in dataclasses.astuple(cluster):
        raise ValueError(
            "several processes need all of --coordinator HOST:PORT, --processes N and --process I "
            "(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment)"
        )
    _address(cluster.coordinator)
    if not 0 <= cluster.process < cluster.processes:
        raise ValueError(
            f"process {cluster.process} of {cluster.processes} does not exist: processes are"
            f" numbered 0 to {cluster.processes - 1}"
        )
    return cluster


def start(cluster: Cluster, patience: float = PATIENCE) -> None:
    """Joins the cluster; to be called before anything is computed.

    A coordinator that is named is looked for with a plain socket first, for `patience` seconds: jax
    would abort the whole process. Raises OSError, one sentence, where it cannot be reached (or, in
    process 0, cannot listen), ValueError where jax finds no cluster.
    """
    if cluster.coordinator and cluster.process == 0:
        _check_listening(cluster.coordinator)
    elif cluster.coordinator:
        _wait_for_coordinator(cluster, patience)
    # its handler of SIGTERM would take the place of stopping.Sigterm
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            initialization_timeout=int(patience),
            shutdown_timeout_seconds=_LEAVING,
            cluster_detection_method="deactivate" if cluster.coordinator else None,
        )
    except ValueError as error:
        raise ValueError(
            f"jax finds no cluster in the environment ({error}): say --coordinator HOST:PORT"
            " --processes N --process I"
        ) from error


def _address(coordinator: str) -> tuple[str, int]:
    host, colon, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"the coordinator {coordinator!r} must read HOST:PORT, with a port from 1 to 65535"
        )
    return host.strip("[]"), int(port)


def _check_listening(coordinator: str) -> None:
    """jax listens at this port of every interface of this machine."""
    try:
        with socket.create_server(("", _address(coordinator)[1])):
            pass
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen at the port of the coordinator {coordinator}"
            f" ({error.strerror}): choose another port, the same for all processes"
        ) from error


def _wait_for_coordinator(cluster: Cluster, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection(_address(cluster.coordinator), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(
                    f"process {cluster.process} of {cluster.processes} cannot reach the coordinator"
                    f" at {cluster.coordinator} ({error}) after {patience:.0f} s: process 0 has to"
                    " run there, and the port has to be open between the machines"
                ) from error
        time.sleep(min(1.0, patience / 10))


def several() -> bool:
    """Whether this program runs as more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not several() or jax.process_index() == 0


def label() -> str:
    """ " (process I of N)" where there are several, for what any of them may print."""
    return f" (process {jax.process_index()} of {jax.process_count()})" if several() else ""


def by_first(function: Callable[[], T]) -> T:
    """What `function` returns in process 0, in every process; the others do not call it. It has to
    pickle.

    All processes call this at the same place. ValueError and OSError are raised in every process,
    so that all end alike.
    """
    if not several():
        return function()
    failure, outcome = None, (None, None)
    if is_first():
        try:
            outcome = None, function()
        except (ValueError, OSError) as error:
            failure = error
            outcome = (OSError if isinstance(error, OSError) else ValueError)(str(error)), None
    error, result = pickle.loads(_from_first(pickle.dumps(outcome)))
    if failure or error:
        raise failure or error
    return result


def _from_first(data: bytes) -> bytes:
    """Process 0's `data`. Its length is rounded up to a power of two, so that few programs are
    compiled.
    """
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.zeros(1 << (size - 1).bit_length(), np.uint8)
    if is_first():
        buffer[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:size].tobytes()


def check_alike(text: str, what: str) -> None:
    """Raises ValueError in every process if `text` is not the same in all of them."""
    if several() and anywhere(by_first(lambda: text) != text):
        raise ValueError(
            f"the processes of this run differ in {what}: all need the same command, code, data and"
            " environment"
        )


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process. All call this at the same place."""
    return bool(ask(flag))


def ask(flag: bool, after: Any = None) -> bool | jax.Array:
    """As `anywhere`, without waiting: bool() of what is returned waits for the answer. All call
    this at the same place.

    `after`: arrays that are still being computed. Accelerators queue the question behind them. On
    CPUs it waits for them, because XLA:CPU starts programs in any order, and the collectives of two
    would block each other across processes.
    """
    if not several():
        return flag
    if jax.default_backend() == "cpu":
        jax.block_until_ready(after)
    mesh, any_of = _vote()
    flags = np.full(mesh.size, flag)  # of which this process places its own devices'
    with jax.set_mesh(mesh):
        return any_of(
            jax.make_array_from_callback(
                flags.shape, NamedSharding(mesh, PartitionSpec("device")), flags.__getitem__
            )
        )


@functools.cache
def _vote() -> tuple[Mesh, Callable]:
    mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
    return mesh, jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))


def place(tree: Any, shardings: Any) -> Any:
    """`tree` as arrays of these shardings (one for each leaf, or one for all).

    Of what is the same in every process, each places its own part; what is spread over them already
    is moved.
    """
    if not several():
        return jax.device_put(tree, shardings)
    each = jax.tree.map(lambda _: shardings, tree) if isinstance(shardings, Sharding) else shardings
    return jax.tree.map(_place_array, tree, each)


def _place_array(x: np.ndarray | jax.Array, sharding: Sharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)


def fetch(tree: Any) -> Any:
    """`tree` as numpy arrays, whole in every process. All call this at the same place."""
    if not several():
        return jax.device_get(tree)
    return jax.tree.map(_fetch_array, tree)


def _fetch_array(x: jax.Array) -> np.ndarray:
    here = x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x) if here else multihost_utils.process_allgather(x, tiled=True)
