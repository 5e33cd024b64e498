"""What a process of several takes: its GPUs, its port for jax's service, its number; and arrays from all of them."""

import logging
import socket
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rice_jax.parallel import cluster, hosts
from rice_jax.parallel.channel import Channel, Coordinator
from rice_jax.parallel.cluster import ProcessInfo
from rice_jax.parallel.mesh import P, replicate
from tests import official
from tests.parallel.test_hosts import SECRET, free_port

# --- the GPUs of a SLURM task -----------------------------------------------------------------------------------------

EIGHT = "0,1,2,3,4,5,6,7"


def slurm(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[int] | None:
    for name in ("LOCALID", "NODEID", "STEP_TASKS_PER_NODE", "GPUS_ON_NODE"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return cluster.slurm_local_devices()


@pytest.mark.parametrize(
    ("tasks", "node", "local", "visible", "on_node", "devices"),
    [
        ("8(x2)", 1, 3, EIGHT, 8, [3]),  # a task for each GPU, all of which each task sees
        ("1(x2)", 1, 0, EIGHT, 8, None),  # a task a node: all its GPUs
        ("2(x2)", 0, 1, EIGHT, 8, [4, 5, 6, 7]),
        ("1,4", 1, 2, "0,1,2,3", 4, [2]),
        ("1,4", 0, 0, "0,1,2,3", 4, None),
        ("8(x2)", 0, 3, "3", 8, None),  # --gpus-per-task=1: SLURM shows each task its own
        ("2(x2)", 0, 1, "0,1,2,3", 8, None),  # --gpus-per-task=4
        ("4", 0, 3, "0,1,2,3", 8, [3]),  # a step with half of the job's GPUs
        ("8", 0, 5, None, None, [5]),  # SLURM was not told of GPUs
        ("4", 0, 3, "0,1", 2, None),  # more tasks than GPUs: jax says so
    ],
)
def test_tasks_of_a_node_share_the_gpus_that_they_all_see(
    monkeypatch: pytest.MonkeyPatch,
    tasks: str,
    node: int,
    local: int,
    visible: str | None,
    on_node: int | None,
    devices: list[int] | None,
) -> None:
    given = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    given |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    given |= {} if on_node is None else {"SLURM_GPUS_ON_NODE": str(on_node)}
    assert slurm(monkeypatch, **given) == devices


def test_outside_slurm_or_with_jaxs_own_variable_a_process_takes_what_that_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert slurm(monkeypatch, CUDA_VISIBLE_DEVICES=EIGHT) is None
    given = {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": EIGHT}
    assert slurm(monkeypatch, **given) == [1]
    assert slurm(monkeypatch, **given, JAX_LOCAL_DEVICE_IDS="7") is None


def test_variables_of_slurm_that_hold_no_number_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE: found 'many', needs an integer"):
        slurm(monkeypatch, SLURM_LOCALID="0", SLURM_STEP_TASKS_PER_NODE="many")


# --- the number of a process, and the port of jax's service -----------------------------------------------------------


def test_a_process_that_jax_numbers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    hosts._check_numbers(ProcessInfo("here:1", 4, 2))
    for number, count in ((1, 4), (2, 8)):
        with pytest.raises(ValueError, match=f"number {number} of {count}, but its devices make it number 2 of 4"):
            hosts._check_numbers(ProcessInfo("here:1", count, number))


def test_jaxs_service_listens_at_the_next_port() -> None:
    port = free_port()
    info = ProcessInfo(f"localhost:{port}", 1, 0)
    Coordinator(info, SECRET, 60.0)
    channel = Channel(info, SECRET, 60.0, {})
    assert channel.service == f"localhost:{port + 1}"
    with socket.create_server(("localhost", port + 1)):  # free for jax once all have come
        channel.leave()


def test_a_taken_next_port_is_named_at_the_start() -> None:
    port = free_port()
    with (
        socket.create_server(("", port + 1)),
        pytest.raises(ValueError, match=f"port {port + 1} of this host, where jax's own service listens, cannot be"),
    ):
        Coordinator(ProcessInfo(f"localhost:{port}", 2, 0), SECRET, 1.0)


def test_the_last_port_has_no_next_one() -> None:
    with pytest.raises(ValueError, match=r"found 'node:65536', needs HOST:PORT"):
        _ = ProcessInfo("node:65535", 2, 0).service.target


# --- arrays from all processes ----------------------------------------------------------------------------------------


def test_copying_arrays_to_all_devices_compiles_once_a_shape(caplog: pytest.LogCaptureFixture) -> None:
    mesh = official.mesh_of(2, 4)
    arrays: list[Any] = [
        jax.device_put(jnp.arange(16.0).reshape(2, 8) + k, NamedSharding(mesh, P(None, "fsdp"))) for k in range(3)
    ]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        copies = [replicate(x, mesh) for x in arrays]
    assert all(copy.is_fully_replicated for copy in copies)
    np.testing.assert_array_equal(copies[2], arrays[2])
    assert sum("Finished XLA compilation" in record.getMessage() for record in caplog.records) == 1
