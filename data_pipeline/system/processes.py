"""Worker processes: how many may run, and how they end with their parent."""

import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from pathlib import Path

POLL_SECONDS = 1.0


class WorkerDiedError(RuntimeError):
    """A worker process ended although its parent needs it; the message says why and what to do."""


def cores() -> int:
    """Returns the number of cores that this process may use, at least 1.

    These are the cores it is bound to, or, if that is fewer, the CPU time that its container may take, rounded up.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, cpu_quota())))


def cpu_quota(proc: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Returns the number of CPUs whose time this process's control groups may take; infinity without a limit.

    Each group above limits those below. proc: lists the process's groups. cgroups: the folder of both versions' files.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return math.inf  # no Linux
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own group as the root, whatever path the line has.
        for mount in (cgroups / controllers, cgroups / "cpu") if controllers else (cgroups, cgroups / "unified"):
            group = mount / path.strip("/")
            quotas += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return min(quotas)


def _quota(group: Path) -> float:
    """Returns the quota of one control group, of version 2 (cpu.max) or 1 (cpu.cfs_quota_us), infinity without one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf  # "max", or no such file


def end_with_parent() -> None:
    """Starts a thread that ends this child of multiprocessing, with status 1, when its parent ends, also by kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # The sentinel fires at once, unless another child that the parent forked still has it open; hence getppid().
        while os.getppid() == parent.pid and not multiprocessing.connection.wait([parent.sentinel], POLL_SECONDS):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def death_of_worker(exit_code: int, shared: int) -> str:
    """Returns why a worker of the input ended, from its exit code (negative: a signal), and what to do, as one line.

    shared: the bytes of shared memory that all workers need.
    """
    if exit_code >= 0:
        return (
            f"a worker process of the input was terminated unexpectedly with exit code {exit_code}; correct what its "
            "own message above says, or set data.workers=0."
        )
    name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
    why = "something ended it; run the same command again, and end only its main process"
    if name == "SIGBUS":
        room = shutil.disk_usage("/dev/shm").total / 1e6 if os.path.isdir("/dev/shm") else 0
        why = (
            f"shared memory is full; /dev/shm has {room:,.0f} MB, and the workers need about {shared / 1e6:,.0f} MB "
            f"there. Give the container more (docker run --shm-size={-(-shared // 10**9)}g; on Kubernetes an emptyDir "
            "of medium Memory at /dev/shm), or set data.workers=0, which decodes with data.threads alone"
        )
    elif name == "SIGKILL":
        why = (
            "most often the system does this when memory is short; lower data.workers, data.threads or "
            "data.cache_bytes, or give the job more memory"
        )
    elif name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"):
        why = "a library crashed; run the same command again with PYTHONFAULTHANDLER=1, which prints where"
    return f"a worker process of the input was killed by {name}: {why}."
