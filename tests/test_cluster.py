"""What launchers leave in the environment, what flags say against it, and what is not enough."""

import dataclasses
import os
import signal
import types

import pytest

from nanochat_jax import cluster, flags, parallel, processes
from nanochat_jax.config import Config, ConfigError, MeshConfig
from nanochat_jax.train import program

NOTHING = {name: flag.default for name, flag in flags.PROCESS_FLAGS.items()}
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[007-009],other", "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
TORCH = {
    "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
OURS = {
    "JAX_COORDINATOR_ADDRESS": "a-0.a:1234",
    "NANOCHAT_JAX_NUM_PROCESSES": "4",
    "NANOCHAT_JAX_PROCESS_ID": "0",
}


def find(environment, distributed="auto", **given):
    return cluster.detect(environment, NOTHING | given, distributed)


@pytest.mark.parametrize(
    ("environment", "given", "want"),
    [
        (SLURM, {}, ("Slurm", "gpu007:61441", 8, 5, (1,))),
        (SLURM | {"SLURM_STEP_NODELIST": "one,two"}, {}, ("Slurm", "one:61441", 8, 5, (1,))),
        (SLURM | {"SLURM_STEP_NODELIST": "n[3,7-9]"}, {}, ("Slurm", "n3:61441", 8, 5, (1,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, {}, ("Slurm", "gpu007:61441", 8, 5, ())),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, {}, ("Slurm", "gpu007:61441", 8, 5, ())),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}, ("Slurm", "gpu007:61441", 8, 5, (1,))),
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, {}, ("Slurm", "gpu007:77", 8, 5, (1,))),
        (OMPI, {}, ("Open MPI", "10.96.0.1:62624", 4, 3, (1,))),
        (SLURM | OMPI, {}, ("Open MPI", "10.96.0.1:62624", 4, 3, (1,))),
        (
            OMPI | {"OMPI_MCA_orte_hnp_uri": ""}, {"coordinator": "h:5"},
            ("Open MPI and flags or variables", "h:5", 4, 3, (1,)),
        ),
        (TORCH, {}, ("torchrun", "head:29500", 2, 1, ())),
        (SLURM | TORCH, {}, ("torchrun", "head:29500", 2, 1, ())),
        (TORCH | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, {}, ("torchrun", "head:29501", 2, 1, (0,))),
        (OURS, {}, ("flags or variables", "a-0.a:1234", 4, 0, ())),
        (OURS, {"process_id": 3, "num_processes": 6}, ("flags or variables", "a-0.a:1234", 6, 3, ())),
        (
            POD, {"coordinator": "j-0.j:1", "num_processes": 3},
            ("Kubernetes and flags or variables", "j-0.j:1", 3, 2, ()),
        ),
    ],
)  # fmt: skip
def test_places(environment, given, want):
    place = find(environment, **given)
    assert (place.source, place.coordinator, place.count, place.index, place.devices) == want
    assert f"process {want[3]} of {want[2]}" in str(place) and "waiting up to 300 s" in str(place)


def test_ports_and_hosts_are_those_of_jax(monkeypatch):
    """jax's own detection is the oracle."""
    from jax._src.clusters import ompi_cluster, slurm_cluster

    for env, theirs in ((SLURM, slurm_cluster.SlurmCluster), (OMPI, ompi_cluster.OmpiCluster)):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert theirs.is_env_present()
        assert find(env).coordinator == theirs.get_coordinator_address(300, None)
        assert find(env).index == theirs.get_process_id()


@pytest.mark.parametrize(
    ("environment", "distributed"),
    [
        ({}, "auto"), (SLURM, "off"), (POD, "off"), (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, "auto"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, "auto"),  # the shell of an allocation
        ({"WORLD_SIZE": "4"}, "auto"), ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "auto"),
    ],
)  # fmt: skip
def test_alone(environment, distributed):
    assert find(environment, distributed) is None


@pytest.mark.parametrize(
    ("environment", "given", "distributed", "message"),
    [
        ({}, {}, "on", "--distributed=on, but no launcher and no flag tells of more than one process"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {}, "on", "--distributed=on, but Slurm tells of"),
        ({}, {"process_id": 1}, "auto", "but --coordinator and --num_processes are unknown"),
        ({}, {"coordinator": "h:1", "num_processes": 2}, "auto", "but --process_id is unknown"),
        (
            OMPI | {"OMPI_MCA_orte_hnp_uri": ""},
            {},
            "auto",
            "by Open MPI this is one of several processes, but",
        ),
        (OURS, {"process_id": 4}, "auto", "--process_id must be in 0..3, got 4"),
        (OURS, {"coordinator": "host"}, "auto", "--coordinator must be host:port, got 'host'"),
        (SLURM | {"SLURM_PROCID": "x"}, {}, "auto", "SLURM_PROCID must be a number, got 'x'"),
        (OURS | {"NANOCHAT_JAX_PROCESS_ID": "-1"}, {}, "auto", "NANOCHAT_JAX_PROCESS_ID must be a number"),
    ],
)
def test_half_a_place_is_an_error(environment, given, distributed, message):
    with pytest.raises(ConfigError) as caught:
        find(environment, distributed, **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_kubernetes_is_asked_only_if_it_can_be(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"set JAX_COORDINATOR_ADDRESS and .* or install the package 'kubernetes'"
    ):
        find(POD)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    place = find(POD)
    assert (place.count, place.coordinator) == (0, "") and "as Kubernetes says" in str(place)


@pytest.mark.parametrize(
    ("host", "bind"), [("localhost", "localhost:9"), ("127.0.0.1", "127.0.0.1:9"), ("h", "")]
)
def test_a_run_on_one_machine_is_not_offered_to_others(host, bind):
    given = {"coordinator": f"{host}:9", "num_processes": 2, "process_id": 0}
    assert find({}, **given).bind == bind
    assert find({"JAX_COORDINATOR_BIND_ADDRESS": "x"}, **given).bind == ""


# --- what processes do among themselves; with one process every agreement is the identity


def test_alone_all_agree(tmp_path):
    assert processes.gather(3) == [3] and processes.agreed(3) == 3 and processes.first()
    processes.alike("a thing", "ff")
    processes.require_shared(tmp_path / "absent")
    processes.together(None, KeyError("others"))
    with pytest.raises(ValueError, match="mine"):
        processes.together(ValueError("mine"), KeyError("others"))


def test_processes_that_share_rows_need_one_order(monkeypatch):
    parts = types.SimpleNamespace(mesh=parallel.mesh(MeshConfig()))
    pool = dataclasses.replace(Config().data.pool, order="completion")
    cfg = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, pool=pool))
    assert program.own_rows(cfg, parts) == (0, 1)
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert program.own_rows(Config(), parts) == (0, 1)
    with pytest.raises(ConfigError, match=r"2 processes share 1 parts of a batch because mesh\.tensor spans"):
        program.own_rows(cfg, parts)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
        (RuntimeError("NCCL operation timed out"), True), (TimeoutError("waiting for the barrier"), True),
        (ValueError("mesh needs 16 devices"), False), (KeyError("gloo"), False),
    ],
)  # fmt: skip
def test_errors_of_lost_peers_are_translated(monkeypatch, error, lost):
    def fail():
        with processes.losses_reported(lambda: "go on"):
            raise error

    with pytest.raises(type(error)):
        fail()  # alone it is what it is
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(processes.PeerError if lost else type(error)) as caught:
        fail()
    if lost:
        assert str(caught.value) == f"another process was lost ({error}); go on"
        assert caught.value.exit_code == 70


def test_an_interrupt_becomes_the_signal_that_jax_passes_on():
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("TERM"))
    try:
        with pytest.raises(KeyboardInterrupt), processes.Interrupt(several=True) as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.requested and got == ["TERM"]
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
