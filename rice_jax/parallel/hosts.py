"""Runs a command in several processes: starts all together, ends all together, and shares decisions among them.

The same command runs on every host, and all processes take every step together. So a decision that depends on a disk
must come from process 0 (`ask_first`), which is also the only one that writes. With one process nothing here does
anything.
"""

import argparse
import atexit
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed

import configs
import data_pipeline
from data_pipeline.system.paths import parse_path
from data_pipeline.system.streams import LastingStream
from rice_jax import errors
from rice_jax.config import PER_HOST, Config, flatten
from rice_jax.parallel.channel import Channel, Coordinator, Facts, disagreement, end_process
from rice_jax.parallel.cluster import ProcessInfo, find_process, slurm_local_devices
from rice_jax.parallel.devices import find_devices

PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax", "orbax-checkpoint", "grain",
    "numpy", "pillow",
)  # fmt: skip
SETTINGS = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")  # of jax, that change its results
NOT_TOGETHER = "the processes wait for different decisions; call what decides (rice_jax.load) in all. Which, on which"

_channel: Channel | None = None  # None: one process
_numbers = itertools.count(1)  # of decisions


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several hosts",
        "The same command on each, the workdir on a file system that all share. On Kubernetes, SLURM and TPU pods "
        "(launch/) the environment says what the first three say.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens; PORT and PORT + 1 must be free there"
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="the number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="the number of this process, 0 to N - 1")
    group.add_argument("--wait", type=_seconds, default=45.0, metavar="SECONDS", help="for all to start (default: 45)")
    about = "with any content; read unless RICE_JAX_SECRET is set"
    group.add_argument("--secret-file", type=parse_path, metavar="FILE", help=about)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:  # NaN would never be over; an operating system's timers take no more
        raise argparse.ArgumentTypeError(f"found {text}, needs seconds, more than 0 and less than a million.")
    return seconds


def run(
    main: Callable[[Any], None], arguments: Any, facts: Callable[[Any], Facts], *, stops_together: bool = False
) -> None:
    """Runs a command, together with the other processes if there are any. All end when one fails.

    facts: returns what must be equal on all processes beside the code; it needs no device. stops_together: `main` uses
    jax's preemption service, so that SIGTERM does not end a process. Raises SystemExit: 2 for impossible flags, 1 for
    ValueError and OSError, 130 for KeyboardInterrupt, and that of `main`; other exceptions pass.
    """
    jax.config.update("jax_enable_preemption_service", stops_together)
    try:
        info = find_process(arguments)
    except ValueError as error:
        errors.fail(str(error), status=2)
    if info is None:
        errors.run(main, arguments, long=True)
        return

    def run_joined(arguments: Any) -> None:
        stop = None
        try:
            channel = join(info, facts, arguments)
            try:
                main(arguments)
            except SystemExit as error:  # of all processes together, as after a signal
                stop = error
            _exchange("the end of the command", None)
            channel.leave()
        except BaseException as error:
            if _channel is not None:
                _channel.leave(errors.reason(error))
                # Runs before jax's own function, which would wait for the others.
                atexit.register(end_process, errors.status(error))
            raise
        if stop is not None:
            raise stop

    errors.run(run_joined, arguments, long=True, alone=False)


def join(info: ProcessInfo, facts: Callable[[Any], Facts], arguments: Any) -> Channel:
    """Runs the start-up check and starts jax's service. Returns the channel to the others.

    If a process is missing, cannot start or was started with other facts or devices, all raise the same ValueError.
    Raises ValueError also for an empty or another secret, a port or process 0 that cannot be reached and a host name
    that cannot be looked up, and OSError if the secret file cannot be read.
    """
    global _channel
    file, known, failed = arguments.secret_file, code(), None
    given = os.fsencode(os.environ.get("RICE_JAX_SECRET", "")).strip()
    secret = given or (file.read_bytes().strip() if file else b"")  # bytes, as of /dev/urandom, may be no text
    if file and not secret:
        raise ValueError(f"{file}: is empty, needs a secret, such as a line of random letters.")
    try:
        known |= facts(arguments)
    except (ValueError, OSError) as error:
        failed = errors.reason(error)  # all processes report it
    if info.process == 0:
        Coordinator(info, secret, arguments.wait)
    _channel = Channel(info, secret, arguments.wait, known, failed)
    # gloo, with which CPUs communicate, writes about its connections to descriptor 1: stdout is Python's alone.
    sys.stdout.flush()
    python_only = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, buffering=1)
    sys.stdout = LastingStream(python_only, "stdout")
    os.dup2(2, 1)
    jax.distributed.initialize(
        _channel.service,
        info.count,
        info.process,
        local_device_ids=slurm_local_devices(),
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        heartbeat_timeout_seconds=45,  # until a frozen process ends all others
        shutdown_timeout_seconds=60,
        coordinator_bind_address=None if secret else _channel.service,  # None: all interfaces
    )
    _start_backend()
    _check_numbers(info)
    agree({"devices": jax.local_device_count()})
    return _channel


def _check_numbers(info: ProcessInfo) -> None:
    """Raises ValueError unless jax gives this process the number and the count that it was started with.

    On TPUs jax takes both from the runtime. Orbax goes by jax's number, and `is_first` by ours.
    """
    if (jax.process_index(), jax.process_count()) != (info.process, info.count):
        raise ValueError(
            f"this process was started as number {info.process} of {info.count}, but its devices make it number "
            f"{jax.process_index()} of {jax.process_count()} for jax; number the processes as the devices are, on a "
            "TPU by TPU_WORKER_ID, or leave --process-id and JAX_PROCESS_ID away there."
        )


def _start_backend() -> None:
    """Starts jax's backend. Raises find_devices' errors, and ValueError if this host's own name is unknown to it."""
    try:
        find_devices()
    except (RuntimeError, ValueError) as error:
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None)
        except (OSError, UnicodeError) as unknown:
            if "'cpu'" in str(error):  # gloo needs the name, and does not say so
                raise ValueError(
                    f"this host's own name, {name}, cannot be looked up ({unknown}), and without it jax's CPU backend "
                    f"does not start ({str(error)[:200]}); add the name to /etc/hosts."
                ) from error
        raise


def is_first() -> bool:
    """Returns whether this is process 0, or the only one: it writes files and prints."""
    return _channel is None or _channel.info.process == 0


def gather(value: Any) -> list[Any]:
    """Returns all processes' values (JSON) in order. Raises ValueError unless all joined and call it at one place."""
    if _channel is None and jax.process_count() > 1:
        raise ValueError("several processes that rice_jax did not join; start them as docs/training.md says.")
    caller = sys._getframe()
    while caller.f_globals["__name__"] == __name__ and caller.f_back is not None:
        caller = caller.f_back
    return _exchange(f"{caller.f_globals['__name__']}.{caller.f_code.co_qualname}:{caller.f_lineno}", value)


def _exchange(decision: str, value: Any) -> list[Any]:
    """Returns all processes' values, by jax's store. Raises its errors, and ValueError if `decision` differs."""
    if _channel is None:
        return [value]
    number, info = next(_numbers), _channel.info
    store: Any = distributed.global_state.client
    folder = f"rice_jax/decision/{number}"
    answer: Future[list[Any]] = Future()

    def get(name: str | int) -> str:
        return str(store.blocking_key_value_get(f"{folder}/{name}", 2**31 - 1))  # ms: 24 days, the longest it takes

    def exchange() -> None:
        try:
            store.key_value_set(f"{folder}/{info.process}", json.dumps([decision, value]))
            if info.process == 0:
                store.key_value_set(f"{folder}/all", f"[{','.join(get(process) for process in range(info.count))}]")
            given = json.loads(get("all"))
            if store.key_value_increment(f"{folder}/read", 1) == info.count:  # all have read the answer
                store.key_value_delete(folder)
            answer.set_result(given)
        except Exception as error:
            answer.set_exception(error)

    # A thread, because jax's client cannot be interrupted. (Many short waits would fill the service's memory.)
    threading.Thread(target=exchange, daemon=True).start()
    given = answer.result()
    if mixed := disagreement([{f"decision {number}": decision} for decision, _ in given], NOT_TOGETHER):
        raise ValueError(mixed)
    return [value for _, value in given]


def ask_first(question: Callable[[], Any]) -> Any:
    """Returns process 0's answer (JSON) on every process. Raises ValueError if they do not all ask at one place."""
    return gather(question() if is_first() else None)[0]


def agree(facts: Mapping[str, Any]) -> None:
    """Raises ValueError on every process, naming the facts that are not equal on all, and who has which."""
    if fault := disagreement(gather(dict(facts))):
        raise ValueError(fault)


def check_shared(folder: Path) -> None:
    """Makes a folder, in process 0 (there OSError if it cannot). Raises ValueError in all if one does not see it."""
    token = folder / f".shared-{ask_first(lambda: secrets.token_hex(16))}"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    gather(None)
    seen = gather(token.exists())
    if is_first():
        token.unlink()
    if not all(seen):
        raise ValueError(
            f"{folder}: process {seen.index(False)} does not see what process 0 writes there ({seen.count(False)} of "
            f"{len(seen)} do not); give a folder on a file system that all hosts share."
        )


def code() -> Facts:
    """Returns {name: text} of what decides a run beside config and data: versions, SETTINGS, hashes of our sources."""
    facts = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    facts |= {name: os.environ.get(name, "") for name in SETTINGS}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    for folder in (Path(configs.__path__[0]), Path(data_pipeline.__path__[0]), Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            name = f"code of {path.relative_to(folder.parent)}"
            facts[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return facts


def of_config(config: Config) -> Facts:
    """Returns {"--config.data.path": value} of a config's fields, without those that may differ between hosts."""
    return {f"--config.{name}": value for name, value in flatten(config).items() if name not in PER_HOST}
