"""Finds which process this is, of how many: by flags, else by the variables of Kubernetes, SLURM or a TPU pod."""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import urllib.request
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """One process among `count`. Process 0 listens at `address`, HOST:PORT, and jax's own service at PORT + 1."""

    address: str
    count: int
    process: int

    @property
    def target(self) -> tuple[str, int]:
        """Host, without brackets, and port. Raises ValueError for an address of another form."""
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise _bad_address(self.address)
        return host.strip("[]"), int(port)

    @property
    def service(self) -> "ProcessInfo":
        """This process with the address of jax's service in place of process 0's: the same host, the next port."""
        host, _, port = self.address.rpartition(":")
        return dataclasses.replace(self, address=f"{host}:{int(port) + 1}")


def find_process(arguments: argparse.Namespace) -> ProcessInfo | None:
    """Returns this process, or None when it is the only one.

    Raises ValueError if only some of the three values are given, one is impossible, or the address is not HOST:PORT.
    """
    names = ("--coordinator", "--num-processes", "--process-id")
    flags = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    info = _complete(names, flags) or _of_variables() or _of_slurm() or _of_tpu_pod()
    if info is None:
        return None
    if not 0 <= info.process < info.count:
        raise ValueError(
            f"process {info.process} of {info.count}: needs a number from 0 to N - 1, where N is the number of "
            "processes; start them as --process-id (or JAX_PROCESS_ID) 0, 1, 2 and so on."
        )
    if info.target[1] == 65535:  # jax's service needs the next one
        raise _bad_address(info.address)
    return info if info.count > 1 else None


def _bad_address(address: str) -> ValueError:
    return ValueError(
        f"the address of process 0 (--coordinator, or JAX_COORDINATOR_ADDRESS): found {address!r}, needs HOST:PORT "
        "with a port from 1 to 65534, because PORT + 1 is used, too; give one such as node-0:8476."
    )


def _of_variables() -> ProcessInfo | None:
    """Returns what launch/kubernetes.yaml sets, None if nothing. Raises ValueError if incomplete or no integer."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, process = (os.environ.get(name) or None for name in names)
    if address or count:
        process = process or os.environ.get("JOB_COMPLETION_INDEX")
    return _complete(names, (address, count, process))


def _complete(names: tuple[str, str, str], values: tuple[Any, Any, Any]) -> ProcessInfo | None:
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing and len(missing) < len(names):
        there = ", ".join(name for name in names if name not in missing)
        verb = "is" if len(missing) == 2 else "are"
        raise ValueError(f"{', '.join(missing)}: not given, though {there} {verb}; give all three, or none.")
    return None if missing else ProcessInfo(values[0], _integer(names[1], values[1]), _integer(names[2], values[2]))


def _integer(name: str, text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: found {text!r}, needs an integer; correct or unset it.") from None


def _variable(name: str, default: int = 0) -> int:
    return _integer(name, os.environ.get(name) or default)


def _of_slurm() -> ProcessInfo | None:
    """Returns a SLURM step's process (of 1 in a shell), None outside one. Raises ValueError for no integer."""
    e = os.environ
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= e.keys():
        return None
    # Each step has its own two ports, so that two may run on one host.
    port = 20000 + 2 * ((_variable("SLURM_JOB_ID") + _variable("SLURM_STEP_ID")) % 5000)
    address = f"{first_node(e['SLURM_STEP_NODELIST'])}:{port}"
    return ProcessInfo(address, _variable("SLURM_STEP_NUM_TASKS", 1), _variable("SLURM_PROCID"))


def slurm_local_devices() -> list[int] | None:
    """Returns the GPUs of a SLURM task that shares its node with other tasks, as numbers among the GPUs that it sees.

    Tasks that all see the same GPUs get equal shares of them, by SLURM_LOCALID. None: the task takes all that it sees,
    because it is alone on its node, SLURM has bound GPUs to each task, or JAX_LOCAL_DEVICE_IDS names them. Raises
    ValueError if a variable holds no integer.
    """
    e = os.environ
    if "SLURM_LOCALID" not in e or "JAX_LOCAL_DEVICE_IDS" in e:
        return None
    tasks = _tasks_by_node(e.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node, local = _variable("SLURM_NODEID"), _variable("SLURM_LOCALID")
    here = tasks[node] if node < len(tasks) else 1
    visible = e.get("CUDA_VISIBLE_DEVICES", e.get("ROCR_VISIBLE_DEVICES"))
    if here < 2:
        return None
    if visible is None:
        return [local]  # SLURM does not know the GPUs: one for each task, as jax's own detection has it
    seen = len([name for name in visible.split(",") if name])
    bound = seen * here <= _variable("SLURM_GPUS_ON_NODE")  # all tasks together see no GPU twice
    share = seen // here
    return None if bound or not share else list(range(local * share, (local + 1) * share))


def _tasks_by_node(text: str) -> list[int]:
    """Returns the tasks of each node: [2, 2, 1] for '2(x2),1'. Raises ValueError if it is of another form."""
    tasks, name = list[int](), "SLURM_STEP_TASKS_PER_NODE"
    for part in filter(None, text.split(",")):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [_integer(name, count)] * _integer(name, times or 1)
    return tasks


def first_node(nodes: str) -> str:
    """Returns the first name: 'node007' for 'node[007,009-12],other', '' for ''."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group() if first else "")


def _of_tpu_pod() -> ProcessInfo | None:
    """Returns what GKE or a TPU VM's metadata say, None for under 2 workers. Raises ValueError for no integer."""
    e = os.environ
    workers = e.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    names = [endpoint.split(":")[-1] for endpoint in workers.split(",") if endpoint]  # of NAME or NAME:ID:ADDRESS
    slices, this_slice = _variable("MEGASCALE_NUM_SLICES", 1), _variable("MEGASCALE_SLICE_ID")
    if not names or len(names) * slices < 2:
        return None
    first = e.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).split(":")[0]
    worker = _integer("TPU_WORKER_ID", e.get("TPU_WORKER_ID") or _metadata("agent-worker-number"))
    return ProcessInfo(f"{first}:8476", len(names) * slices, this_slice * len(names) + worker)


def _is_tpu_vm() -> bool:
    """Returns whether this machine has TPU chips, libtpu and no setting against them. No other asks the network."""
    if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
        return False  # Colab and Kaggle set it: their one TPU host has no metadata server
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0] in ("", "tpu")
    return wanted and any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))


def _metadata(name: str) -> str:
    """Returns an attribute of a TPU VM from Google's metadata server; "" elsewhere, or without an answer in 3 s."""
    if not _is_tpu_vm():
        return ""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=3) as answer:
        return str(answer.read().decode())
    return ""
