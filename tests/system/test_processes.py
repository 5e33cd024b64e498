"""Worker processes end with their parent, however it ends."""

import subprocess
import sys
import time

import pytest

from tests.proc import until_gone

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
def test_a_worker_ends_with_a_killed_parent_though_a_sibling_holds_its_sentinel(tmp_path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
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
