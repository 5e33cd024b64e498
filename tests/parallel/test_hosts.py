"""Several processes as one run: the roll call in threads, everything that ends a process with real ones on loopback."""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from data_pipeline.convert import Options, convert
from rice_jax import evaluate, train
from rice_jax.parallel import hosts
from rice_jax.parallel.channel import Hello, Hub, Line, Place
from tests.test_train import lines_of, smoke_config

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


# --- where a process stands -------------------------------------------------------------------------------------------


def place_of(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], *flags: str) -> Place | None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_", "TPU_", "MEGASCALE_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    return hosts.find_place(parser.parse_args(flags))


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[3,5-8],login", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "rice-host-0-0.rice:8476", "JAX_NUM_PROCESSES": "4"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (COORDINATOR | {"JAX_PROCESS_ID": "2"}, Place("rice-host-0-0.rice:8476", 4, 2)),
        (COORDINATOR | {"JOB_COMPLETION_INDEX": "3"}, Place("rice-host-0-0.rice:8476", 4, 3)),
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # a pod of some other Job
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, Place("n3:20007", 4, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # an interactive shell in the allocation
        (SLURM | {"SLURM_PROCID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}, Place("a:8476", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),  # one TPU host
        (
            {
                "TPU_WORKER_HOSTNAMES": "c,d", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a:8080",
            },
            Place("a:8476", 4, 3),
        ),
    ],
)  # fmt: skip
def test_the_environment_says_the_place_and_a_lone_process_never_asks_the_network(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: Place | None
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(hosts, "_is_tpu_vm", lambda: False)
    assert place_of(monkeypatch, environment) == place


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--coordinator", "here:1", "--num-processes", "2", "--process-id", "0")
    assert place_of(monkeypatch, SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, *flags) == Place("here:1", 2, 0)
    assert place_of(monkeypatch, {}, "--coordinator", "here:1", "--num-processes", "1", "--process-id", "0") is None


@pytest.mark.parametrize("triples", [True, False])
def test_a_worker_of_a_tpu_vm_slice_asks_its_metadata(monkeypatch: pytest.MonkeyPatch, triples: bool) -> None:
    endpoints = "w0:1:10.0.0.5,w1:2:10.0.0.6" if triples else "10.0.0.5,10.0.0.6"
    monkeypatch.setattr(hosts, "_is_tpu_vm", lambda: True)
    monkeypatch.setattr(
        hosts, "_metadata", {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}.__getitem__
    )
    assert place_of(monkeypatch, {}) == Place("10.0.0.5:8476", 2, 1)


def test_half_a_place_is_refused_and_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--process-id: not given, though --coordinator, --num-processes"):
        place_of(monkeypatch, {}, "--coordinator", "here:1", "--num-processes", "2")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID: not given"):
        place_of(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "left:over"})
    with pytest.raises(ValueError, match="process 2 of 2: needs a number from 0"):
        place_of(monkeypatch, {}, "--coordinator", "here:1", "--num-processes", "2", "--process-id", "2")
    with pytest.raises(ValueError, match="found 'here', needs HOST:PORT"):
        place_of(monkeypatch, {}, "--coordinator", "here", "--num-processes", "2", "--process-id", "0")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[001-016],x", "n001"), ("r[1-2]n[03,5]-ib,x", "r1n03-ib"), ("", "")],
)
def test_the_first_node_of_slurms_lists(nodes: str, first: str) -> None:
    assert hosts.first_node(nodes) == first


# --- the roll call ----------------------------------------------------------------------------------------------------


def call_roll(
    *facts: dict[str, Any], count: int | None = None, numbers: list[int] | None = None, failed: str | None = None,
    wait: float = 60.0,
) -> list[Line | str]:  # fmt: skip
    """One thread a process; what each got: its line, or why it has none. `failed` is the last one's."""
    count, address = count or len(facts), f"localhost:{free_port()}"
    Hub(Place(address, count, 0), wait_seconds=wait)

    def answer(number: int, known: dict[str, Any], last: bool) -> Line | str:
        place = Place(address, count, number)
        hello = Hello(number, count, f"host{number}", 40 + number, known, failed if last else None)
        try:
            return Line(place, hello, wait_seconds=wait)
        except ValueError as error:
            return str(error)

    numbers = numbers or list(range(len(facts)))
    with ThreadPoolExecutor(len(facts)) as pool:
        lasts = [i == len(facts) - 1 for i in range(len(facts))]
        return list(pool.map(answer, numbers, facts, lasts))


def test_all_hear_what_each_says_in_order_and_end_together() -> None:
    lines = call_roll({"jax": 1}, {"jax": 1}, {"jax": 1})
    assert len({one.service for one in lines if isinstance(one, Line)}) == 1

    def take_part(number: int) -> list[list[Any]]:
        one = lines[number]
        assert isinstance(one, Line)
        heard = [one.gather([number, round]) for round in range(50)]
        one.finish()
        return heard

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(take_part, range(3)))
    assert results == [[[[number, round] for number in range(3)] for round in range(50)]] * 3


def test_a_missing_process_is_named_to_those_that_came() -> None:
    for text in call_roll({}, {}, count=4, wait=3.0):
        assert isinstance(text, str) and text.startswith("2 of 4 processes did not come within 3 s: 2-3. There are: ")
        assert "process 1 of 4 (pid 41 on host1)" in text


def test_without_process_0_its_address_is_named() -> None:
    address = f"localhost:{free_port()}"
    with pytest.raises(ValueError, match=rf"process 0 of 2 does not answer at {address} after 1 s"):
        Line(Place(address, 2, 1), Hello(1, 2, "host1", 41, {}, None), wait_seconds=0.7)


def test_what_differs_is_named_with_the_processes_that_have_it() -> None:
    one, other = {"code of a.py": "12", "config.seed": 1}, {"code of a.py": "13", "config.seed": 1, "extra": 0}
    texts = call_roll(one, one, other, one)
    assert len(set(map(str, texts))) == 1
    assert '\n  code of a.py: "12" on 0-1, 3; "13" on 2\n  extra: none on 0-1, 3; 0 on 2' in str(texts[0])


def test_a_process_that_cannot_start_tells_all_why() -> None:
    texts = call_roll({}, {}, failed="data: found nothing")
    assert texts == ["process 1 of 2 (pid 41 on host1): data: found nothing"] * 2


def test_the_same_number_twice_is_refused() -> None:
    texts = call_roll({}, {}, {}, numbers=[0, 1, 1])
    assert any("process 1 of 3 (pid 41 on host1) and as process 1 of 3" in str(text) for text in texts)
    assert not any(isinstance(text, Line) for text in texts)


def test_a_taken_port_and_strangers_on_it() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of this host, where process 0 listens, cannot be had"):
            Hub(Place(f"localhost:{port}", 2, 0), wait_seconds=1.0)
    place = Place(f"localhost:{free_port()}", 1, 0)
    Hub(place, wait_seconds=60.0)
    of_another_type = {"process": "0", "count": 1, "host": "", "pid": 0, "facts": {}, "failed": None}
    words = (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"process": 0}\n', b"[1]\n", b"[" * 100_000 + b"\n")
    for word in (*words, json.dumps(of_another_type).encode() + b"\n"):
        with socket.create_connection(place.target) as stranger:
            stranger.sendall(word)
    with socket.create_connection(place.target), socket.create_connection(place.target) as slow:  # they say nothing
        slow.sendall(b'{"process"')
        begun = time.monotonic()
        Line(place, Hello(0, 1, "host0", 40, {}, None), wait_seconds=60.0).finish()
        assert time.monotonic() - begun < 30


def test_a_reset_during_the_roll_call_is_an_error_of_ours() -> None:
    with socket.create_server(("localhost", 0)) as server:
        place = Place(f"localhost:{server.getsockname()[1]}", 2, 1)

        def reset() -> None:
            connection, _ = server.accept()
            connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        threading.Thread(target=reset, daemon=True).start()
        with pytest.raises(ValueError, match="hung up: it ended, or its roll call"):
            Line(place, Hello(1, 2, "host1", 41, {}, None), wait_seconds=60.0)


def test_a_host_that_does_not_know_its_own_name_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_for(backend: str) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError(f"Unable to initialize backend '{backend}'")

        monkeypatch.setattr(jax, "devices", fail)

    fail_for("cpu")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(RuntimeError, match="Unable to initialize backend 'cpu'"):
        hosts._check_devices()
    for name in ("no-such-host.invalid", 70 * "a"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        with pytest.raises(ValueError, match=rf"own name, {name}, cannot be looked up .* add the name to"):
            hosts._check_devices()
    fail_for("cuda")
    with pytest.raises(RuntimeError, match="Unable to initialize backend 'cuda'"):
        hosts._check_devices()


def test_who_waits_for_one_that_is_done_is_ended_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when rice_jax.load is called in one process alone: the answer would never come."""
    ends: list[str] = []
    monkeypatch.setattr(Line, "_end", lambda self, reason, after=0.0: ends.append(f"{self.place.process}: {reason}"))
    first, second = call_roll({}, {})
    assert isinstance(first, Line) and isinstance(second, Line)
    threading.Thread(target=first.gather, args=(1,), daemon=True).start()
    threading.Thread(target=second.finish, daemon=True).start()
    deadline = time.monotonic() + 60
    while len(ends) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {text.split(",")[0] for text in ends} >= {
        f"{number}: process 0 waits for what process 1 has to say" for number in (0, 1)
    }


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf", "soon"])
def test_a_wait_without_an_end_is_wrong_use(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--wait", seconds])
    assert end.value.code == 2 and "--wait" in capsys.readouterr().err


def test_facts_name_every_source_and_leave_out_what_may_differ() -> None:
    facts = hosts.code()
    assert {"code of rice_jax/pairs.py", "code of data_pipeline/layouts/lpr4m.py", "code of configs/rice.py"} <= set(
        facts
    )
    fields = hosts.of_config(smoke_config(Path("/somewhere")))
    assert "--config.optimizer.learning_rate" in fields and "--config.data.path" not in fields


# --- real processes ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ended:
    status: int
    out: str
    error: str
    seconds: float  # after the start


class Processes:
    """Commands on this machine, each with its part of four forced CPU devices; killed at the end, whatever happens."""

    def __init__(self, folder: Path, module: str, arguments: list[list[str]], *, wait: float = 45, of: Any = None):
        """`of`: environment of single processes."""
        try:
            socket.getaddrinfo(socket.gethostname(), None)
        except OSError:
            pytest.skip("this host cannot look up its own name, without which jax's CPU backend has no collectives")
        count, port = len(arguments), free_port()
        self._folder, self._start = folder, time.monotonic()
        flags = ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--wait", str(wait)]
        xla = f"--xla_force_host_platform_device_count={4 // count} --xla_backend_optimization_level=0"
        xla += " --xla_llvm_disable_expensive_passes=true"
        self._all = []
        for process, words in enumerate(arguments):
            with (folder / f"out{process}").open("w") as out, (folder / f"error{process}").open("w") as error:
                self._all.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *words, *flags, "--process-id", str(process)],
                        env=os.environ | {"XLA_FLAGS": xla} | (of or {}).get(process, {}),
                        stdout=out,
                        stderr=error,
                        cwd=folder,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def signal(self, process: int, number: int) -> None:
        self._all[process].send_signal(number)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and all(p.poll() is None for p in self._all), self._texts()
            time.sleep(0.005)

    def ended(self, seconds: float = 300) -> list[Ended]:
        """Waits for all; a test fails here when one is still there after `seconds`."""
        deadline = time.monotonic() + seconds
        times: dict[int, float] = {}
        while len(times) < len(self._all):
            assert time.monotonic() < deadline, self._texts()
            for number, process in enumerate(self._all):
                if number not in times and process.poll() is not None:
                    times[number] = time.monotonic() - self._start
            time.sleep(0.01)
        texts = self._texts()
        return [Ended(p.returncode, *texts[i], times[i]) for i, p in enumerate(self._all)]

    def _texts(self) -> list[tuple[str, str]]:
        names = [(self._folder / f"out{i}", self._folder / f"error{i}") for i in range(len(self._all))]
        return [(out.read_text(), error.read_text()) for out, error in names]


UPDATES = 20  # enough of them that a kill hits a run in its middle


def words(data: Path, workdir: Path, *more: str) -> list[str]:
    changes = [f"num_updates={UPDATES}", "log_every=5", "checkpoint_every=5", f"data.path={data}", *more]
    return ["--config", "smoke", "--workdir", str(workdir), *(f"--config.{change}" for change in changes)]


def says_who_was_killed(end: Ended, victim: str) -> bool:
    """By us; or, where process 0 was it, by jax's service, which lived there and aborts the others as fast as we do."""
    ours = rf"^error: process {victim} of \d+ \([^)]+\) ended without a word: killed"
    by_jax = victim == "0" and end.status == -signal.SIGABRT and "another task died" in end.error
    return bool(end.status == 1 and re.search(ours, end.error, re.M)) or by_jax


def succeed(folder: Path, module: str, arguments: list[list[str]]) -> list[Ended]:
    with Processes(folder, module, arguments) as processes:
        ended = processes.ended()
    assert [end.status for end in ended] == [0] * len(ended), ended
    return ended


@pytest.fixture(scope="module")
def pair(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run by two processes of two devices, all losses on."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = succeed(folder, "rice_jax.train", [words(converted, folder / "run")] * 2)
    assert "2 process(es)" in first.out and f"step {UPDATES}/{UPDATES}" in first.out
    assert not second.out and not re.search("step|error|warning|Traceback", second.error)
    return folder / "run"


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in lines_of(workdir) if "loss" in line]


def test_two_processes_train_as_one_does(pair: Path, converted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(tmp_path, "rice_jax.train", [words(converted, run)])
    np.testing.assert_allclose(losses(pair)[:10], losses(run)[:10], rtol=1e-5)
    ledgers = [[line["ledger"] for line in lines_of(run) if "loss" in line] for run in (pair, run)]
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) == UPDATES


def evaluate_by(count: int, run: Path, data: Path, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """metrics.json as it is, and of rankings.jsonl ranks and images; their scores are off by 1e-6 on other devices."""
    command = ["--workdir", str(run), "--data", str(data), "--score", "matching", "--output", str(folder / "out")]
    if count == 1:
        evaluate.evaluate(evaluate.parse(command))
    else:
        ended = succeed(folder, "rice_jax.evaluate", [[*command, "--json"]] * count)
        assert json.loads(ended[0].out)["queries"] == 3  # and not a word beside it, of whatever library
        assert not any(end.out for end in ended[1:])
    rankings = [json.loads(line) for line in (folder / "out" / "rankings.jsonl").read_text().splitlines()]
    for ranking in rankings:
        for name in [name for name in ranking if name.endswith("top")]:
            ranking[name] = [image for image, _ in ranking[name]]
    return (folder / "out" / "metrics.json").read_text(), rankings


def test_two_processes_evaluate_as_one_does(pair: Path, converted: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one, two = (evaluate_by(count, pair, converted, folder) for count, folder in zip((1, 2), folders, strict=True))
    assert one == two
    assert json.loads(one[0])["queries"] == len(one[1]) == 3 and one[1][0]["matching_rank"]


@pytest.mark.slow
def test_killed_with_the_other_and_gone_on(pair: Path, converted: Path, tmp_path: Path) -> None:
    """kill -9 of one ends the other at once, with the reason; the same command then gives the undisturbed run."""
    run = tmp_path / "run"
    with Processes(tmp_path, "rice_jax.train", [words(converted, run)] * 2) as processes:
        processes.until((run / "checkpoints" / "5" / "digest.json").exists)
        processes.signal(1, signal.SIGKILL)
        killed = time.monotonic()
        first, second = processes.ended(60)
    assert time.monotonic() - killed < 30 and second.status == -signal.SIGKILL
    assert says_who_was_killed(first, "1"), first
    assert len(losses(run)) < UPDATES
    succeed(tmp_path, "rice_jax.train", [words(converted, run)] * 2)
    assert lines_of(run) == lines_of(pair)


def test_what_was_not_started_alike_never_starts(converted: Path, tmp_path: Path) -> None:
    """Other code, other data and another config on one host; each is named, and all processes end."""
    for package in ("rice_jax", "data_pipeline", "configs"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "code" / "rice_jax" / "losses.py").open("a") as file:
        file.write("\n")
    data = tmp_path / "data"
    source = converted.parent / "lpr750k"
    convert(Options(layout="lpr750k", source=source, output=data, splits=("train", "val"), workers=1))
    run = tmp_path / "run"
    alike, other = words(converted, run), words(data, run, "seed=7")
    with Processes(
        tmp_path, "rice_jax.train", [alike, other], of={1: {"PYTHONPATH": str(tmp_path / "code")}}
    ) as processes:
        ended = processes.ended(60)
    assert [end.status for end in ended] == [1, 1] and not run.exists()
    for end in ended:
        assert end.error.startswith("error: the processes were not started alike; ")
        for name in ("--config.seed: 42 on 0; 7 on 1", "code of rice_jax/losses.py: ", 'data: "'):
            assert f"\n  {name}" in end.error
        assert end.error.count("\n") == 4


def test_a_host_that_does_not_come_is_told_within_the_wait(converted: Path, tmp_path: Path) -> None:
    with Processes(tmp_path, "rice_jax.train", [words(converted, tmp_path / "run")] * 2, wait=2) as processes:
        processes.signal(1, signal.SIGKILL)
        first, _ = processes.ended(60)
    assert first.status == 1 and first.seconds < 30
    assert "error: 1 of 2 processes did not come within 2 s: 1. There are: process 0 of 2" in first.error


@pytest.mark.slow
def test_a_bad_record_of_one_host_ends_both_with_its_name(converted: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(converted, data)
    shard = next(data.glob("train-clips-*.tfrecord"))
    content = bytearray(shard.read_bytes())
    content[40::64] = bytes(255 - byte for byte in content[40::64])  # in every record, so that its rows hold one
    shard.write_bytes(content)
    run = tmp_path / "run"
    with Processes(tmp_path, "rice_jax.train", [words(converted, run), words(data, run)]) as processes:
        first, second = processes.ended(100)
    assert first.status == second.status == 1
    bad = rf"clip \S+: {shard} record \d+: "
    assert re.search(rf"^error: {bad}", second.error, re.M)
    assert re.search(rf"^error: process 1 of 2 \(pid \d+ on \S+\): {bad}", first.error, re.M)


@pytest.mark.slow
def test_four_processes_train_and_evaluate_as_two_and_one(pair: Path, converted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(tmp_path, "rice_jax.train", [words(converted, run)] * 4)
    np.testing.assert_allclose(losses(run)[:10], losses(pair)[:10], rtol=1e-5)
    results = []
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        results.append(evaluate_by(count, run, converted, folder))
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
def test_parameters_split_over_hosts_and_a_change_of_their_number(pair: Path, converted: Path, tmp_path: Path) -> None:
    """fsdp over both processes, process 0 killed; then four, of which one is interrupted; then one to the end."""
    run = tmp_path / "run"
    command = words(converted, run, "mesh.data=1", "mesh.fsdp=4", "eval_every=5")
    with Processes(tmp_path, "rice_jax.train", [command] * 2) as processes:
        processes.until((run / "checkpoints" / "5" / "digest.json").exists)
        processes.signal(0, signal.SIGKILL)
        _, second = processes.ended(60)
    assert says_who_was_killed(second, "0"), second
    with Processes(tmp_path, "rice_jax.train", [command] * 4) as processes:
        processes.until((run / "checkpoints" / "10" / "digest.json").exists)
        processes.signal(2, signal.SIGINT)
        ended = processes.ended(60)
    assert {end.status for end in ended} == {128 + signal.SIGINT, 128 + signal.SIGTERM}  # the others heard of it
    assert 5 < len(losses(run)) < UPDATES and (run / "checkpoints" / str(len(losses(run)))).is_dir()
    succeed(tmp_path, "rice_jax.train", [command])
    np.testing.assert_allclose(losses(run)[:10], losses(pair)[:10], rtol=1e-5)
    assert len(losses(run)) == UPDATES


SCRIPT = """
import argparse, time, numpy as np, jax
from jax.sharding import AxisType, Mesh
from rice_jax import hosts, sharding

def main(_):
    {main}

parser = argparse.ArgumentParser()
hosts.add_flags(parser)
hosts.run(main, parser.parse_args(), lambda arguments: {{}})
"""
WAIT = """
    print(hosts.gather(jax.process_index()), flush=True)
    if not hosts.is_first():
        time.sleep(100)
    hosts.gather(None)
"""
ROWS = """
    devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(2, 2)
    mesh = Mesh(devices, sharding.BATCH, axis_types=(AxisType.Auto,) * 2)
    rows = sharding.process_rows(16, mesh)
    batch = sharding.to_global(10 * rows, mesh)
    assert [int(row) for shard in batch.addressable_shards for row in np.asarray(shard.data)] == (10 * rows).tolist()
    print(rows.tolist(), sharding.on_host(batch).tolist())
"""


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),  # which only training takes as a wish
    ],
)
def test_when_one_is_killed_the_other_ends_at_once_and_says_why(tmp_path: Path, victim: int, number: int) -> None:
    (tmp_path / "wait.py").write_text(SCRIPT.format(main=WAIT))
    with Processes(tmp_path, "wait", [[], []]) as processes:
        processes.until(lambda: all((tmp_path / f"out{i}").read_text().count("[0, 1]") for i in (0, 1)))
        processes.signal(victim, number)
        killed = time.monotonic()
        ended = processes.ended(60)
    assert time.monotonic() - killed < 30 and ended[victim].status == -number
    assert says_who_was_killed(ended[1 - victim], str(victim)), ended


@pytest.mark.slow
def test_devices_that_are_no_neighbours_in_the_batch_get_their_rows(tmp_path: Path) -> None:
    """As on a torus; the rows of a process are not contiguous."""
    (tmp_path / "rows.py").write_text(SCRIPT.format(main=ROWS))
    ended = succeed(tmp_path, "rows", [[], []])
    own = [[row for row in range(16) if row // 4 % 2 == process] for process in (0, 1)]
    assert [end.out.splitlines()[-1] for end in ended] == [f"{rows} {list(range(0, 160, 10))}" for rows in own]


# --- launch/ ----------------------------------------------------------------------------------------------------------


def test_launch_files_parse_and_are_edited_in_one_place() -> None:
    files = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix != ".md")
    assert [path.name for path in files] == ["kubernetes.yaml", "slurm.sbatch", "tpu_pod.sh"]
    for path in files:
        text = path.read_text()
        assert text.count("==== edit from here ") == text.count("==== to here ") == 1
        if path.suffix == ".yaml":
            yaml.safe_load(text)
        else:
            subprocess.run(["bash", "-n", path], check=True)


def test_sbatch_reads_all_its_directives() -> None:
    """It stops at the first line that is no comment."""
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[command:])


def shell_commands(path: Path) -> list[list[str]]:
    """Arguments of each rice_jax command in a shell file, its variables filled in, as bash splits them."""
    text = path.read_text().replace("\\\n", " ")
    settings = "\n".join(re.findall(r"^[A-Z_]+=\S+", text, re.M))
    found = re.findall(r"-m rice_jax\.train (.*?)(?:>>.*)?$", text, re.M)
    shell = [f"{settings}\nprintf '%s\\n' {arguments}" for arguments in found]
    return [
        subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
        for script in shell
    ]


def launched() -> dict[str, tuple[Any, int]]:
    """By file: the arguments of its command as train reads them, and the devices that it asks for."""
    job = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]
    pod = job["spec"]["template"]["spec"]["containers"][0]
    assert pod["command"] == ["python", "-m", "rice_jax.train"]
    found = {"kubernetes": (pod["args"], job["spec"]["parallelism"] * pod["resources"]["limits"]["google.com/tpu"])}
    for name, counts in (("slurm.sbatch", r"--(?:nodes|gpus-per-node)=(\d+)"), ("tpu_pod.sh", r"TYPE=v5litepod-(\d+)")):
        path = ROOT / "launch" / name
        (command,) = shell_commands(path)
        found[name] = command, math.prod(map(int, re.findall(counts, path.read_text())))
    return {name: (train.parse(command), devices) for name, (command, devices) in found.items()}


def test_launch_commands_are_understood_and_their_batches_divide() -> None:
    for name, (arguments, devices) in launched().items():
        config = arguments.config
        assert str(arguments.workdir).endswith("runs/rice") and config.data.path.endswith("lpr4m")
        assert config.init_from.endswith("ViT-B-32.pt") and (config.model.patch_size, config.model.width) == (32, 768)
        assert devices == {"kubernetes": 256, "slurm.sbatch": 16, "tpu_pod.sh": 256}[name]
        assert config.batch_size % devices == config.eval_batch_size % devices == 0


def test_the_jobset_numbers_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    jobset = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    environment = {e["name"]: e["value"] for e in spec["template"]["spec"]["containers"][0]["env"]}
    place = place_of(monkeypatch, environment | {"JOB_COMPLETION_INDEX": "5"})
    name = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    assert place == Place(f"{name}:8476", spec["parallelism"], 5)
