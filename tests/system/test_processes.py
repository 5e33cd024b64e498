"""Worker processes: how many may run, by bound cores and a container's quotas, and how they end with their parent."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.system import processes
from data_pipeline.system.processes import cores, cpu_quota
from tests.proc import until_gone


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "nonsense"}, math.inf),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2),
        ("4:cpu,cpuacct:/box\n2:memory:/box\n", {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
         "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu,cpuacct:/box\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("3:cpuset:/box\n", {"cpuset/box/cpu.cfs_quota_us": "1\n"}, math.inf),
    ],
)  # fmt: skip
def test_quotas_of_control_groups_of_both_versions_are_read(
    groups: str, files: dict[str, str], quota: float, tmp_path: Path
) -> None:
    write(tmp_path / "proc", groups)
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    assert cpu_quota(tmp_path / "proc", tmp_path / "cgroup") == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(4.0, 4), (1.5, 2), (0.2, 1), (math.inf, 64)])
def test_a_pod_of_four_cpus_on_a_large_host_starts_four_workers(
    quota: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(processes, "cpu_quota", lambda: quota)
    assert cores() == expected


FAMILY = """
import multiprocessing, os, sys, time
from data_pipeline.system.processes import end_with_parent

def work(ready):
    end_with_parent()
    ready.put(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    context.Process(target=work, args=(ready,), daemon=False).start()
    worker = ready.get()
    sibling = os.fork()  # it keeps the parent's end of the worker's sentinel open
    if sibling == 0:
        time.sleep(600)
    print(worker, sibling, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork and no kill -9")
def test_a_worker_ends_with_a_killed_parent_though_a_sibling_holds_its_sentinel(tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker, sibling = map(int, parent.stdout.readline().split())
        begin = time.monotonic()
        parent.kill()
        parent.stdout.close()
        try:
            until_gone({worker}, seconds=30)
        finally:
            subprocess.run(["kill", "-9", str(sibling)], check=False)
    assert time.monotonic() - begin < 30
