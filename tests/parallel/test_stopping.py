"""A signal to one of several processes during an evaluation: all stop before the same batch."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.parallel.test_hosts import UPDATES, Processes, losses, succeed, words

ENDLESS = """
from rice_jax import train

evaluate_split = train.evaluate_split

def endless(encoder, split):
    while True:
        evaluate_split(encoder, split)
        print("evaluated", flush=True)

train.evaluate_split = endless
train.command()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_stops_an_evaluation_of_several_processes(converted: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    run = tmp_path / "run"
    command = words(converted, run, "eval_every=5")
    with Processes(tmp_path, "endless", [command] * 2) as processes:
        processes.until(lambda: (tmp_path / "out0").read_text().count("evaluated") > 1)
        processes.signal(1, number)
        sent = time.monotonic()
        ended = processes.ended(100)
    assert time.monotonic() - sent < 60
    assert [end.status for end in ended] == [128 + signal.SIGTERM, 128 + number], ended
    assert "stopped at step 5; the same command goes on" in ended[0].out
    assert not re.search("Traceback", ended[0].error + ended[1].error)
    succeed(tmp_path, "rice_jax.train", [command])
    assert len(losses(run)) == UPDATES
