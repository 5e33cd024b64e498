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

def endless(encoder, split, **options):
    while True:
        evaluate_split(encoder, split, **options)
        print("evaluated", flush=True)

train.evaluate_split = endless
train.command()
"""


AGREE = """
import argparse, time
from rice_jax.parallel import hosts
from rice_jax.training import guards

def main(_):
    stop, number = guards.Stop(), 0
    with stop.listening():
        try:
            while True:
                number += 1
                hosts.gather(None)  # as an update or a batch, which all take together
                stop.check()
                if number == 20:
                    print("twenty", flush=True)
        except guards.StoppedError:
            print("stopped", hosts.gather(number), stop.received, flush=True)

parser = argparse.ArgumentParser()
hosts.add_flags(parser)
hosts.run(main, parser.parse_args(), lambda arguments: {}, stops_together=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_all_processes_agree_on_the_place_to_stop(tmp_path: Path, number: int) -> None:
    (tmp_path / "agree.py").write_text(AGREE)
    with Processes(tmp_path, "agree", [[], []]) as processes:
        processes.until(lambda: "twenty" in (tmp_path / "out0").read_text())
        processes.signal(1, number)
        ended = processes.ended(60)
    assert [end.status for end in ended] == [0, 0], ended
    place = re.search(r"stopped \[(\d+), (\d+)\] 15", ended[0].out)
    assert place is not None and place[1] == place[2] and int(place[1]) >= 20, ended


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_stops_an_evaluation_of_several_processes(converted: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    run = tmp_path / "run"
    command = words(converted, run, "eval_every=5")
    with Processes(tmp_path, "endless", [command] * 2) as processes:
        processes.until(lambda: (tmp_path / "out0").read_text().count("evaluated") > 1, 400)
        processes.signal(1, number)
        sent = time.monotonic()
        ended = processes.ended(100)
    assert time.monotonic() - sent < 60
    assert [end.status for end in ended] == [128 + signal.SIGTERM, 128 + number], ended
    assert "stopped at step 5; the same command goes on" in ended[0].out
    assert not re.search("Traceback", ended[0].error + ended[1].error)
    succeed(tmp_path, "rice_jax.train", [command])
    assert len(losses(run)) == UPDATES
