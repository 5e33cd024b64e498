"""Several processes as one run: where this one stands among them, whether all were started alike, who decides.

The same command runs on every host. Its place comes from flags, else from the environment (Kubernetes, SLURM, a TPU
pod); without either there is one process, and nothing here does anything. All processes take every step together, so
what one reads from a disk and acts upon must come from process 0 (`ask_first`), which is also the only one that writes.
"""

import argparse
import atexit
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import socket
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

import configs
import data_pipeline
from rice_jax import errors
from rice_jax.config import flat
from rice_jax.errors import fail, reason, status
from rice_jax.parallel.channel import Hello, Hub, Line, Place, disagreement, leave

PORT = 8476  # of process 0, where neither flags nor environment name one
WAIT_SECONDS = 45.0
HEARTBEAT_SECONDS = 45  # of jax's own service, which notices a process that is there and does nothing any more
PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax", "orbax-checkpoint", "grain",
    "numpy", "pillow",
)  # fmt: skip
SETTINGS = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")  # of jax, that change what it computes
MAY_DIFFER = ("data.path", "data.threads", "data.workers", "data.cache_bytes")  # between hosts; the data must not

_line: Line | None = None  # None: one process


# --- a command on several hosts ---------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several hosts",
        "The same command on each, the workdir on a file system that all share. On Kubernetes, SLURM and TPU pods "
        "(launch/) the environment says what these say.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; a port that is free there")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="this one's number, 0 to N - 1")
    group.add_argument(
        "--wait", type=_seconds, default=WAIT_SECONDS, metavar="SECONDS", help="for the others to come (default: 45)"
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < threading.TIMEOUT_MAX:  # NaN would never be over
        raise argparse.ArgumentTypeError(f"found {text}, needs seconds, more than 0.")
    return seconds


def run(
    main: Callable[[Any], None],
    arguments: argparse.Namespace,
    facts: Callable[[Any], dict[str, Any]],
    *,
    stops_together: bool = False,
) -> None:
    """Runs a command, joined to the other processes where there are some; all of them end when one does.

    Args:
      facts: of the arguments, what must be the same everywhere beside the code; read without a device.
      stops_together: whether `main` asks jax's preemption service, which keeps SIGTERM from ending a process.
    """
    jax.config.update("jax_enable_preemption_service", stops_together)
    try:
        place = find_place(arguments)
    except ValueError as error:
        fail(str(error), status=2)

    def joined(arguments: argparse.Namespace) -> None:
        try:
            if place is not None:
                join(place, facts, arguments)
            main(arguments)
        except SystemExit:  # an end that all came to, as after a signal
            _finish()
            raise
        except BaseException as error:
            _fail(error)
            raise
        _finish()

    errors.run(joined, arguments)


def join(place: Place, facts: Callable[[Any], dict[str, Any]], arguments: Any) -> None:
    """Answers the roll call and starts jax's own service.

    Raises:
      ValueError: a process is missing or could not start, or they were not started alike. All raise the same.
    """
    global _line
    failed = None
    known = code()
    try:
        known |= facts(arguments)
    except (ValueError, OSError) as error:
        failed = reason(error)  # the others hear of it too
    if place.process == 0:
        Hub(place, wait_seconds=arguments.wait)
    hello = Hello(place.process, place.count, socket.gethostname(), os.getpid(), known, failed)
    _line = Line(place, hello, wait_seconds=arguments.wait)
    _keep_stdout()
    jax.distributed.initialize(
        _line.service,
        place.count,
        place.process,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=60,
    )
    _check_devices()


def _keep_stdout() -> None:
    """Leaves stdout to what Python prints: gloo, by which CPUs talk, writes its connections to descriptor 1 itself."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, buffering=1)
    os.dup2(2, 1)


def _check_devices() -> None:
    try:
        devices = jax.devices()
    except RuntimeError as error:
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None)
        except (OSError, UnicodeError) as unknown:
            if "'cpu'" not in str(error):
                raise error from None
            raise ValueError(  # gloo, by which CPUs talk, looks itself up, and does not say so
                f"this host's own name, {name}, cannot be looked up ({unknown}), and without it jax's CPU "
                f"backend does not start ({str(error)[:200]}); add the name to /etc/hosts."
            ) from error
        raise
    counts = [0] * jax.process_count()
    for device in devices:
        counts[device.process_index] += 1
    if len(set(counts)) > 1:
        raise ValueError(
            f"devices of the processes: found {', '.join(f'{n} on {i}' for i, n in enumerate(counts))}; give every "
            "process the same number."
        )


def _fail(error: BaseException) -> None:
    if _line is not None:
        _line.fail(reason(error))
        # Runs before jax's own end, which would wait for the others.
        atexit.register(leave, status(error))


def _finish() -> None:
    if _line is not None:
        _line.finish()


# --- one mind ---------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process writes and speaks."""
    return _line is None or _line.place.process == 0


def gather(value: Any) -> list[Any]:
    """Every process's value (JSON), in their order. All must call it; it waits for the slowest."""
    if _line is not None:
        return _line.gather(value)
    if jax.process_count() > 1:
        raise ValueError("several processes that rice_jax did not join; start them as docs/training.md says.")
    return [value]


def ask_first(question: Callable[[], Any]) -> Any:
    """What process 0 finds (JSON), on every process: two that read the same disk may read different things."""
    return gather(question() if is_first() else None)[0]


def agree(facts: Mapping[str, Any]) -> None:
    """Raises ValueError on every process, naming what is not the same on all, and where."""
    fault = disagreement(dict(enumerate(gather(dict(facts)))))
    if fault is not None:
        raise ValueError(fault)


def check_shared(folder: Path) -> None:
    """Makes a folder; ValueError when it is not the same folder on every process."""
    if _line is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    token = folder / f".shared-{ask_first(lambda: uuid.uuid4().hex)}"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    gather(None)
    seen = gather(token.exists())
    if is_first():
        token.unlink()
    if not all(seen):
        blind = [process for process, sees in enumerate(seen) if not sees]
        raise ValueError(
            f"{folder}: process {blind[0]} does not see what process 0 writes there ({len(blind)} of {len(seen)} do "
            "not); give a folder on a file system that all hosts share."
        )


def code() -> dict[str, Any]:
    """What decides a run beside config and data: our sources, each with its hash, and versions of what they use."""
    facts: dict[str, Any] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    facts |= {name: os.environ.get(name, "") for name in SETTINGS}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    for folder in (Path(configs.__path__[0]), Path(data_pipeline.__path__[0]), Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            name = f"code of {path.relative_to(folder.parent)}"
            facts[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return facts


def of_config(config: Any) -> dict[str, Any]:
    """A config's fields as facts, without those that may differ between hosts."""
    fields = flat(config).items()
    return {f"--config.{name}": value for name, value in fields if name not in MAY_DIFFER}


# --- where this process stands ----------------------------------------------------------------------------------------


def find_place(arguments: argparse.Namespace) -> Place | None:
    """This process's place by flags, else by the environment; None: there is one process.

    Raises:
      ValueError: flags or variables that say only half, or what cannot be.
    """
    place = _of_flags(arguments)
    for source in (_of_environment, _of_slurm, _of_tpu_pod):
        place = place or source()
    if place is None:
        return None
    if place.count < 1 or not 0 <= place.process < place.count:
        raise ValueError(f"process {place.process} of {place.count}: needs a number from 0 to N - 1.")
    _ = place.target
    return place if place.count > 1 else None


def _of_flags(arguments: argparse.Namespace) -> Place | None:
    given = {
        "--coordinator": arguments.coordinator,
        "--num-processes": arguments.num_processes,
        "--process-id": arguments.process_id,
    }
    return _complete(given, "give all three, or none")


def _of_environment() -> Place | None:
    """Variables that launch/kubernetes.yaml sets; the number of the pod in an Indexed Job is Kubernetes' own."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, process = (os.environ.get(name) or None for name in names)
    process = process or (os.environ.get("JOB_COMPLETION_INDEX") if address or count else None)
    return _complete(dict(zip(names, (address, count, process), strict=True)), "set all three, or unset them")


def _complete(given: dict[str, Any], do: str) -> Place | None:
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        there = [name for name in given if name not in missing]
        raise ValueError(f"{', '.join(missing)}: not given, though {', '.join(there)} is; {do}.")
    address, count, process = given.values()
    return Place(address, _whole(count), _whole(process))


def _whole(text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"number of processes, or of this one: found {text!r}, needs a whole number.") from None


def _of_slurm() -> Place | None:
    """A step of several tasks. Not the allocation's variables: an interactive shell in one has them, and is alone."""
    e = os.environ
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= e.keys():
        return None
    count = _whole(e.get("SLURM_STEP_NUM_TASKS", 1))
    port = 20000 + (_whole(e["SLURM_JOB_ID"]) + _whole(e.get("SLURM_STEP_ID", 0))) % 10000  # no two steps of one host
    return Place(f"{first_node(e['SLURM_STEP_NODELIST'])}:{port}", count, _whole(e["SLURM_PROCID"]))


def first_node(nodes: str) -> str:
    """'node007' of 'node[007,009-12],other'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group() if first else "")


def _of_tpu_pod() -> Place | None:
    """A slice of several workers: on Kubernetes by what GKE sets, on a TPU VM by its metadata server."""
    e = os.environ
    workers, worker = e.get("TPU_WORKER_HOSTNAMES", ""), e.get("TPU_WORKER_ID", "")
    if not workers and _is_tpu_vm():
        workers, worker = (_metadata(name) for name in ("worker-network-endpoints", "agent-worker-number"))
    # An endpoint is a name, or name:id:address.
    names = [endpoint.split(":")[-1] for endpoint in workers.split(",") if endpoint]
    slices, this_slice = _whole(e.get("MEGASCALE_NUM_SLICES") or 1), _whole(e.get("MEGASCALE_SLICE_ID") or 0)
    if not names or len(names) * slices < 2:
        return None
    first = e.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).split(":")[0]
    return Place(f"{first}:{PORT}", len(names) * slices, this_slice * len(names) + _whole(worker))


def _is_tpu_vm() -> bool:
    """A machine with TPU chips of its own; any other, a laptop or a GPU, is never asked over the network."""
    if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
        return False  # Colab and Kaggle set it: their one TPU host has no such server
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0] in ("", "tpu")
    return wanted and any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))


def _metadata(name: str) -> str:
    """An attribute that Google's metadata server holds of this machine; empty when there is none."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
