"""Which process of how many is this, and where is process 0? What launchers say, and the meeting.

Slurm, Open MPI, torchrun, Kubernetes or a shell loop start the processes; jax's own runtime connects
them. Nothing here imports jax before `join`.
"""

import importlib.util
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_jax.config import ConfigError
from nanochat_jax.processes import EXIT_LOST, PeerError, first_line

PORTS = 61440  # the upper 4096, from which the number of a job chooses one, as jax does


@dataclass(frozen=True)
class Cluster:
    """This process's place among the processes of a run.

    source: what said so. coordinator: host:port of process 0; "" if Kubernetes is to be asked. count:
    processes; 0 as before. index: this one's number. devices: the devices of the machine that are this
    process's; () = all that are visible. bind: where process 0 listens; "" = on all interfaces.
    join_timeout: seconds to wait for the others at the start. heartbeat_timeout: seconds after which a
    silent process counts as lost.
    """

    source: str
    coordinator: str
    count: int
    index: int
    devices: tuple[int, ...] = ()
    bind: str = ""
    join_timeout: int = 300
    heartbeat_timeout: int = 60

    def __str__(self) -> str:
        where = f"process 0 at {self.coordinator}" if self.coordinator else "process 0, as Kubernetes says"
        own = f", device {','.join(map(str, self.devices))} of this machine" if self.devices else ""
        return (
            f"process {self.index} of {self.count or 'several'} ({self.source}){own}: waiting up to "
            f"{self.join_timeout} s for {where}; --distributed=off would run this process alone"
        )


def detect(
    environment: Mapping[str, str], given: Mapping[str, Any], distributed: str = "auto"
) -> Cluster | None:
    """Find out whether this process is one of several.

    Args: environment: os.environ. given: the flags coordinator ("" = not given), num_processes (0),
    process_id (-1), join_timeout, heartbeat_timeout. distributed: auto; off = this process alone;
    on = there must be several.
    Returns: the place, or None for a process alone. What flags and JAX_COORDINATOR_ADDRESS,
    NANOCHAT_JAX_NUM_PROCESSES, NANOCHAT_JAX_PROCESS_ID say goes before what launchers say.
    Raises: ConfigError if only a part is known, or a value is impossible.
    """
    if distributed == "off":
        return None
    said = _said(environment, given)
    launcher, found = next(
        ((name, got) for name, read in LAUNCHERS.items() if (got := read(environment))), ("", {})
    )
    parts = found | said
    source = " and ".join(filter(None, [launcher, "flags or variables" if said else ""]))
    if launcher == "Kubernetes" and not said:
        return _ask_kubernetes(parts["index"], given)
    if distributed == "on" and parts.get("count", 1) < 2:
        raise ConfigError(
            f"--distributed=on, but {source or 'no launcher and no flag'} tells of more than one process"
        )
    if not parts or parts.get("count") == 1:
        return None
    if missing := [flag for name, flag in PLACES.items() if name not in parts]:
        raise ConfigError(
            f"by {source} this is one of several processes, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} unknown; give what is missing, or --distributed=off"
        )
    if not 0 <= parts["index"] < parts["count"]:
        raise ConfigError(f"--process_id must be in 0..{parts['count'] - 1}, got {parts['index']} ({source})")
    if not re.fullmatch(r".+:\d+", parts["coordinator"]):
        raise ConfigError(f"--coordinator must be host:port, got '{parts['coordinator']}' ({source})")
    # On one machine others need not be able to connect: the service asks for no password.
    local = parts["coordinator"].rpartition(":")[0] in ("localhost", "127.0.0.1")
    bind = parts["coordinator"] if local and "JAX_COORDINATOR_BIND_ADDRESS" not in environment else ""
    return Cluster(
        source, parts["coordinator"], parts["count"], parts["index"], _devices(environment, parts), bind,
        given["join_timeout"], given["heartbeat_timeout"],
    )  # fmt: skip


PLACES = {"coordinator": "--coordinator", "count": "--num_processes", "index": "--process_id"}


def _said(environment: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the user says in flags, or else in variables; only what is given."""
    said: dict[str, Any] = {}
    if address := given["coordinator"] or environment.get("JAX_COORDINATOR_ADDRESS", ""):
        said["coordinator"] = address
    if count := given["num_processes"] or _number(environment, "NANOCHAT_JAX_NUM_PROCESSES", 0):
        said["count"] = count
    index = given["process_id"]
    if (index := _number(environment, "NANOCHAT_JAX_PROCESS_ID", -1) if index < 0 else index) >= 0:
        said["index"] = index
    return said


def _number(environment: Mapping[str, str], name: str, absent: int) -> int:
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{name} must be a number, got '{text}'")
    return int(text) if text else absent


def _torchrun(env: Mapping[str, str]) -> dict[str, Any]:
    """torchrun, and all who set its four variables."""
    if not all(name in env for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")):
        return {}
    # torchrun itself listens on MASTER_PORT.
    port = _number(env, "MASTER_PORT", 0) + ("TORCHELASTIC_RUN_ID" in env)
    return {
        "coordinator": f"{env['MASTER_ADDR']}:{_number(env, 'JAX_COORDINATOR_PORT', port)}",
        "count": _number(env, "WORLD_SIZE", 1), "index": _number(env, "RANK", 0),
        "local": _number(env, "LOCAL_RANK", 0), "beside": _number(env, "LOCAL_WORLD_SIZE", 1),
    }  # fmt: skip


def _open_mpi(env: Mapping[str, str]) -> dict[str, Any]:
    if "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        return {}
    size = _number(env, "OMPI_COMM_WORLD_SIZE", 1)
    found: dict[str, Any] = {
        "count": size, "index": _number(env, "OMPI_COMM_WORLD_RANK", 0),
        "local": _number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
        "beside": _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", size),
    }  # fmt: skip
    # Open MPI 4 names its head node; 5 does not, and needs --coordinator.
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    if address := re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://(\[[^,\]]+))", uri):
        job = int(address[1]) // 4096
        host = address[2] or f"{address[3]}]"
        found["coordinator"] = f"{host}:{_number(env, 'JAX_COORDINATOR_PORT', PORTS + job % 4096)}"
    return found


def _slurm(env: Mapping[str, str]) -> dict[str, Any]:
    """A task of srun. The shell of an allocation has no SLURM_STEP_NODELIST and is alone."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in env for name in names):
        return {}
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    # The first node of "node001", "node001,other", "node[001-004],other", "node[001,007]".
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", env["SLURM_STEP_NODELIST"])
    host = "".join(part or "" for part in first.groups()) if first else ""
    port = _number(env, "JAX_COORDINATOR_PORT", PORTS + _number(env, "SLURM_JOB_ID", 0) % 4096)
    here = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return {
        "coordinator": f"{host}:{port}", "count": _number(env, tasks, 1),
        "index": _number(env, "SLURM_PROCID", 0), "local": _number(env, "SLURM_LOCALID", 0),
        "beside": int(here[0]) if here else 0,
    }  # fmt: skip


def _kubernetes(env: Mapping[str, str]) -> dict[str, Any]:
    """A pod of an indexed Job or a JobSet; how many there are stands in no variable."""
    if "KUBERNETES_SERVICE_HOST" not in env or "JOB_COMPLETION_INDEX" not in env:
        return {}
    return {"index": _number(env, "JOB_COMPLETION_INDEX", 0)}


# In this order: torchrun may run under srun, and mpirun inside a Slurm allocation.
LAUNCHERS = {"torchrun": _torchrun, "Open MPI": _open_mpi, "Slurm": _slurm, "Kubernetes": _kubernetes}


def _ask_kubernetes(index: int, given: Mapping[str, Any]) -> Cluster:
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "this is a pod of an indexed Kubernetes Job: set JAX_COORDINATOR_ADDRESS and "
            "NANOCHAT_JAX_NUM_PROCESSES as docs/launch/jobset.yaml does, or install the package "
            "'kubernetes' so that its API can be asked, or say --distributed=off if the pods are runs of their own"
        )
    return Cluster("Kubernetes", "", 0, index, (), "", given["join_timeout"], given["heartbeat_timeout"])


def _devices(environment: Mapping[str, str], parts: dict[str, Any]) -> tuple[int, ...]:
    """One device for each process of a machine, where a launcher started several there."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    bound = visible and "," not in visible  # the launcher has given this process one device
    if "local" not in parts or parts["beside"] == 1 or bound or "JAX_LOCAL_DEVICE_IDS" in environment:
        return ()
    return (parts["local"],)


def join(cluster: Cluster) -> None:
    """Meet the other processes; from then on jax.devices() are those of all. Before any use of jax.

    If they do not come in time, this ends the process with a message: where jax notices that, it aborts.
    Raises: PeerError if jax cannot start its service or client.
    """
    import jax

    missed = (
        f"process {cluster.index}: error: the {cluster.count or ''} processes did not meet at "
        f"{cluster.coordinator or 'the address of process 0'} within {cluster.join_timeout} s; does process 0 run "
        "there, can every machine reach that port, and does every process number exist once?\n"
    )
    deadline = threading.Timer(cluster.join_timeout, _give_up, [missed])
    deadline.daemon = True
    deadline.start()
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator or None,
            num_processes=cluster.count or None,
            process_id=cluster.index if cluster.coordinator else None,
            local_device_ids=cluster.devices or None,
            cluster_detection_method="deactivate" if cluster.coordinator else "k8s",
            initialization_timeout=cluster.join_timeout + 30,  # of jax; ours comes first
            heartbeat_timeout_seconds=cluster.heartbeat_timeout,
            shutdown_timeout_seconds=cluster.heartbeat_timeout,
            coordinator_bind_address=cluster.bind or None,
        )
    except (RuntimeError, ValueError) as error:
        raise PeerError(f"jax.distributed.initialize failed: {first_line(error)}") from error
    finally:
        deadline.cancel()


def _give_up(sentence: str) -> None:
    os.write(2, sentence.encode())
    os._exit(EXIT_LOST)
