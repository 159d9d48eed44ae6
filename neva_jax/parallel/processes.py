"""Which processes make a run, and their start.

What is said of them may come from flags, from environment variables, or from the launcher that started the processes:

    --coordinator HOST:PORT | JAX_COORDINATOR_ADDRESS      where process 0 listens
    --processes N           | JAX_NUM_PROCESSES            how many there are
    --process I             | JAX_PROCESS_ID               which one this is, from 0
    --local-devices 0,1     | JAX_LOCAL_DEVICE_IDS         GPUs of the machine that this one uses
    mpirun (Open MPI)       OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, …
    srun (SLURM)            SLURM_STEP_NUM_TASKS, SLURM_PROCID, …

What is said by flag or variable holds, and the launcher says the rest. A shell inside an allocation, or a batch script,
is no step of several tasks: a command there is one process. (JAX's own detection goes by SLURM_NTASKS, which such a
shell may have too, and would wait for processes that nobody starts; and it gives one GPU to each process, also where a
node has one process alone.) The address comes from JAX's detection.
"""

import argparse
import ctypes
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import jax

from neva_jax.config import Config, walk
from neva_jax.configfile import to_dict
from neva_jax.errors import UserError, ending
from neva_jax.parallel.peers import ALONE, LOCAL, Peers, Star, leave, split_address

START_TIMEOUT = 300.0  # seconds
FLAGS = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
    "local_devices": "JAX_LOCAL_DEVICE_IDS",
}


OF_A_MACHINE = ("data.cache", "data.workers")  # keys that may differ from process to process


@dataclass(frozen=True)
class Cluster:
    """This process among those of its run.

    coordinator: host:port of process 0; None: JAX's detection of `launcher` says it.
    local_devices: numbers of the GPUs that this process uses; (): all that it sees.
    """

    coordinator: str | None
    count: int
    index: int
    local_devices: tuple[int, ...] = ()
    launcher: str | None = None  # ompi, slurm


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that may run as several processes."""
    group = parser.add_argument_group("several processes (docs/parallelism.md); under srun and mpirun they are found")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", metavar="N", help="how many there are")
    group.add_argument("--process", metavar="I", help="which one this is, from 0")
    group.add_argument("--local-devices", metavar="0,1", help="GPUs of this machine that this process uses")
    group.add_argument(
        "--start-timeout", type=float, default=START_TIMEOUT, metavar="SECONDS", help="until a missing one is given up"
    )


def find_cluster(options: argparse.Namespace, environment: Mapping[str, str]) -> Cluster | None:
    """What flags, environment variables and the launcher say; None: this process is alone.

    Raises:
      UserError: settings that are incomplete or contradict each other, with their names and values.
    """
    given = {name: _given(name, options, environment) for name in FLAGS}
    count, index = (_number(given[name]) for name in ("processes", "process"))
    launched = _launched(environment) if count is None or index is None else None
    for value, name, theirs in ((count, "processes", "count"), (index, "process", "index")):
        if launched is not None and value is not None and value != getattr(launched, theirs):
            raise UserError(
                f"{_said(given[name])}, but {launched.launcher} says {getattr(launched, theirs)}; give "
                "both --processes and --process, or neither"
            )
    if launched is not None:
        count, index = launched.count, launched.index
    address, devices = (None if given[name] is None else given[name][1] for name in ("coordinator", "local_devices"))
    said = ", ".join(_said(one) for one in given.values() if one is not None)
    if count is None and index is None and address is None:
        if devices is not None:
            raise UserError(
                f"{said}: is for one of several processes; CUDA_VISIBLE_DEVICES hides GPUs from a single one"
            )
        return None
    lacking = {"coordinator": address or launched, "processes": count, "process": index}
    if missing := [f"--{name} (or {FLAGS[name]})" for name, value in lacking.items() if value is None]:
        raise UserError(f"{said}: several processes also need {' and '.join(missing)}")
    if not 0 <= index < count:
        raise UserError(f"{said or launched.launcher}: process {index} of {count}; it must lie in 0 … {count - 1}")
    if address is not None:
        try:
            split_address(address)
        except ValueError:
            raise UserError(f"{_said(given['coordinator'])}: must be host:port, as in node01:41000") from None
    if devices is not None and not re.fullmatch(r"\d+(,\d+)*", devices):
        raise UserError(f"{_said(given['local_devices'])}: must be numbers of GPUs, as in 0,1")
    if count == 1:
        return None
    if devices is not None:
        own = tuple(map(int, devices.split(",")))
    else:
        own = () if launched is None else launched.local_devices
    return Cluster(address, count, index, own, None if launched is None else launched.launcher)


def _given(name: str, options: argparse.Namespace, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """(name of the flag or variable, its value); raises UserError where both are there and differ."""
    flag, variable = f"--{name.replace('_', '-')}", FLAGS[name]
    by_flag, by_variable = getattr(options, name), environment.get(variable) or None
    if by_flag is not None and by_variable is not None and by_flag != by_variable:
        raise UserError(f"{flag} {by_flag} and {variable}={by_variable} contradict each other; give one of them")
    if by_flag is not None:
        return flag, by_flag
    return None if by_variable is None else (variable, by_variable)


def _said(given: tuple[str, str]) -> str:
    name, value = given
    return f"{name} {value}" if name.startswith("--") else f"{name}={value}"


def _number(given: tuple[str, str] | None) -> int | None:
    if given is None:
        return None
    try:
        return int(given[1])
    except ValueError:
        raise UserError(f"{_said(given)}: must be a whole number") from None


def _launched(environment: Mapping[str, str]) -> Cluster | None:
    """What Open MPI or SLURM says. Open MPI first: mpirun inside a SLURM job is itself started as a step."""

    def number(name: str) -> int:
        try:
            return int(environment[name])
        except KeyError:
            raise UserError(
                f"{name} is not set, which {launcher} sets for each process; give --processes and --process"
            ) from None
        except ValueError:
            raise UserError(f"{name}={environment[name]}: must be a whole number") from None

    if "OMPI_COMM_WORLD_SIZE" in environment:
        launcher = "ompi"
        count, index = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_RANK")
        local, here = number("OMPI_COMM_WORLD_LOCAL_RANK"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
    elif "SLURM_STEP_NODELIST" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        launcher = "slurm"
        count, index = number("SLURM_STEP_NUM_TASKS"), number("SLURM_PROCID")
        local, here = number("SLURM_LOCALID"), _tasks_here(environment, number("SLURM_NODEID"))
    else:
        return None
    return Cluster(None, count, index, _share(local, here, environment.get("CUDA_VISIBLE_DEVICES")), launcher)


def _tasks_here(environment: Mapping[str, str], node: int) -> int:
    """Tasks of a step on its `node`-th node: SLURM_STEP_TASKS_PER_NODE is like 8(x2),4."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text}: must be numbers as in 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={text} has {len(counts)} nodes")
    return counts[node]


def _share(local: int, here: int, visible: str | None) -> tuple[int, ...]:
    """GPUs of the `local`-th of the `here` processes of a machine; (): all that it sees.

    Where the launcher has bound one GPU to each, every process sees a single one.
    """
    seen = None if visible is None else len([name for name in visible.split(",") if name.strip()])
    if here == 1 or (seen is not None and seen < here):
        return ()
    each = 1 if seen is None else seen // here
    return tuple(range(local * each, (local + 1) * each))


@contextmanager
def connected(options: argparse.Namespace, devices: bool = True) -> Iterator[Peers]:
    """The processes of a command, for as long as it runs; before any device is touched.

    When the block ends in an error, here or in another process, all processes say so and end with the same status.

    Args:
      options: flags of `add_process_arguments`.
      devices: whether all devices make one JAX, or each process has its own.

    Raises:
      UserError: as `find_cluster`; process 0 cannot listen.
      WorkerError: process 0 cannot be reached.
    """
    cluster = find_cluster(options, os.environ)
    if cluster is None:
        yield ALONE
        return
    address = cluster.coordinator or _detected_address(cluster.launcher)
    star = Star(address, cluster.index, cluster.count, options.start_timeout)
    if not star.first:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print, too; errors go to stderr
    try:
        if devices:
            _start_jax(star, address, cluster, options.start_timeout)
        elif cluster.local_devices:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, cluster.local_devices)))
        yield star
        star.exchange("end")
        if devices:
            jax.distributed.shutdown()
    except BaseException as error:
        status, message = ending(error)
        if status == 1:
            star.cause()  # a collective ends in an error when another process is gone
        star.fail(status, message)
        leave(star.index, status, message)
    star.close()


def same_configuration(peers: Peers, config: Config) -> None:
    """All processes were started alike; from here on `guard.peer_timeout` holds.

    Raises:
      UserError: a key whose values differ, with both.
    """
    peers.timeout = config.guard.peer_timeout
    values = peers.exchange(to_dict(config))
    for name, _ in walk():
        for index, other in enumerate(values):
            theirs, ours = (reduce(getitem, name.split("."), one) for one in (other, values[0]))
            if theirs != ours and name not in OF_A_MACHINE:
                raise UserError(f"{name}={theirs} in process {index}, but {ours} in process 0: start all alike")


def _detected_address(launcher: str) -> str:
    from jax._src import clusters

    found: Any = {"ompi": clusters.OmpiCluster, "slurm": clusters.SlurmCluster}[launcher]
    try:
        if found.is_env_present():
            return found.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
        reason = "JAX does not find it in the environment"
    except (RuntimeError, ValueError) as error:
        reason = str(error)
    raise UserError(
        f"{launcher} does not say where process 0 runs ({reason}): give --coordinator HOST:PORT or "
        f"{FLAGS['coordinator']}"
    )


def _start_jax(star: Star, address: str, cluster: Cluster, start_timeout: float) -> None:
    """JAX's own service gets a port of its own, from process 0."""
    host, _ = split_address(address)
    port = star.exchange(_free_port() if star.first else None)[0]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A silent process is told by `Star`; JAX only aborts.
    jax.distributed.initialize(
        f"{f'[{host}]' if ':' in host else host}:{port}",
        num_processes=cluster.count,
        process_id=cluster.index,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(start_timeout)),
        heartbeat_timeout_seconds=3600,
        coordinator_bind_address=f"127.0.0.1:{port}" if host in LOCAL else None,
    )
    _delay_abort()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def _delay_abort() -> None:
    """JAX aborts a process at once when process 0 is gone, in C++: a handler, sleep(SIGABRT), makes that six seconds.

    By then `Star` has said which process has died, and has ended this one.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
