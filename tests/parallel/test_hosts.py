"""Runs of several processes: the start-up check in threads, and all that ends a process with real ones on loopback."""

import argparse
import base64
import contextlib
import dataclasses
import hashlib
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
from rice_jax.parallel import channel as channel_module
from rice_jax.parallel import cluster, hosts
from rice_jax.parallel.channel import Channel, Coordinator, JoinRequest
from rice_jax.parallel.cluster import ProcessInfo
from tests.test_train import lines_of, smoke_config

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """Returns a port that is free, as is the next one, for jax's service."""
    while True:
        with socket.socket() as free, socket.socket() as following, contextlib.suppress(OSError, OverflowError):
            free.bind(("", 0))
            following.bind(("", free.getsockname()[1] + 1))
            return int(free.getsockname()[1])


# --- which process this is --------------------------------------------------------------------------------------------


def found(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], *flags: str) -> ProcessInfo | None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_", "TPU_", "MEGASCALE_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    return cluster.find_process(parser.parse_args(flags))


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[3,5-8],login", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "rice-host-0-0.rice:8476", "JAX_NUM_PROCESSES": "4"}


@pytest.mark.parametrize(
    ("environment", "info"),
    [
        ({}, None),
        (COORDINATOR | {"JAX_PROCESS_ID": "2"}, ProcessInfo("rice-host-0-0.rice:8476", 4, 2)),
        (COORDINATOR | {"JOB_COMPLETION_INDEX": "3"}, ProcessInfo("rice-host-0-0.rice:8476", 4, 3)),
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # a pod of some other Job
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, ProcessInfo("n3:20014", 4, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # an interactive shell in the allocation
        (SLURM | {"SLURM_PROCID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}, ProcessInfo("a:8476", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),  # one TPU host
        (
            {
                "TPU_WORKER_HOSTNAMES": "c,d", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a:8080",
            },
            ProcessInfo("a:8476", 4, 3),
        ),
    ],
)  # fmt: skip
def test_the_environment_numbers_the_process_and_a_lone_one_never_asks_the_network(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], info: ProcessInfo | None
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(cluster, "_is_tpu_vm", lambda: False)
    assert found(monkeypatch, environment) == info


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--coordinator", "here:1", "--num-processes", "2", "--process-id", "0")
    assert found(monkeypatch, SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, *flags) == ProcessInfo("here:1", 2, 0)
    assert found(monkeypatch, {}, "--coordinator", "here:1", "--num-processes", "1", "--process-id", "0") is None


@pytest.mark.parametrize("triples", [True, False])
def test_a_worker_of_a_tpu_vm_slice_asks_its_metadata(monkeypatch: pytest.MonkeyPatch, triples: bool) -> None:
    endpoints = "w0:1:10.0.0.5,w1:2:10.0.0.6" if triples else "10.0.0.5,10.0.0.6"
    monkeypatch.setattr(cluster, "_is_tpu_vm", lambda: True)
    monkeypatch.setattr(
        cluster, "_metadata", {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}.__getitem__
    )
    assert found(monkeypatch, {}) == ProcessInfo("10.0.0.5:8476", 2, 1)


def test_flags_or_variables_that_lack_one_of_three_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--process-id: not given, though --coordinator, --num-processes are;"):
        found(monkeypatch, {}, "--coordinator", "here:1", "--num-processes", "2")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID: not given"):
        found(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "left:over"})
    with pytest.raises(ValueError, match="process 2 of 2: needs a number from 0"):
        found(monkeypatch, {}, "--coordinator", "here:1", "--num-processes", "2", "--process-id", "2")
    for address in ("here", "here:65535"):
        with pytest.raises(ValueError, match=f"--coordinator.*: found '{address}', needs HOST:PORT .* 1 to 65534"):
            found(monkeypatch, {}, "--coordinator", address, "--num-processes", "2", "--process-id", "0")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES: found 'two', needs an integer"):
        found(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[001-016],x", "n001"), ("r[1-2]n[03,5]-ib,x", "r1n03-ib"), ("", "")],
)
def test_the_first_node_of_slurms_lists(nodes: str, first: str) -> None:
    assert cluster.first_node(nodes) == first


# --- the start-up check -----------------------------------------------------------------------------------------------

SECRET = b"correct horse battery staple"
HERE = f"(pid {os.getpid()} on {socket.gethostname()})"


def start(
    *facts: dict[str, Any], count: int | None = None, numbers: list[int] | None = None, failed: str | None = None,
    wait: float = 60.0, secret: bytes = SECRET, address: str | None = None,
) -> list[Channel | str]:  # fmt: skip
    """One thread a process; returns the channel of each, or why it has none. `failed` is the last one's."""
    count, address = count or len(facts), address or f"localhost:{free_port()}"
    Coordinator(ProcessInfo(address, count, 0), secret, wait)

    def join(number: int, known: dict[str, Any], last: bool) -> Channel | str:
        try:
            return Channel(ProcessInfo(address, count, number), secret, wait, known, failed if last else None)
        except ValueError as error:
            return str(error)

    numbers = numbers or list(range(len(facts)))
    with ThreadPoolExecutor(len(facts)) as pool:
        lasts = [i == len(facts) - 1 for i in range(len(facts))]
        return list(pool.map(join, numbers, facts, lasts))


def admitted(results: list[Channel | str]) -> list[Channel]:
    channels = [result for result in results if isinstance(result, Channel)]
    assert len(channels) == len(results), results
    return channels


def test_all_processes_that_start_get_the_same_service() -> None:
    channels = admitted(start({"jax": 1}, {"jax": 1}, {"jax": 1}))
    assert len({channel.service for channel in channels}) == 1
    for channel in channels:
        channel.leave()


def test_a_missing_process_is_named_to_those_that_came() -> None:
    for text in start({}, {}, count=4, wait=3.0):
        assert isinstance(text, str) and text.startswith("2 of 4 processes did not come within 3 s: 2-3. There are: ")
        assert f"process 1 of 4 {HERE}" in text


def test_without_process_0_its_address_is_named() -> None:
    address = f"localhost:{free_port()}"
    with pytest.raises(ValueError, match=rf"process 0 of 2 does not answer at {address} after 1 s"):
        Channel(ProcessInfo(address, 2, 1), SECRET, 0.7, {})


def test_what_differs_is_named_with_the_processes_that_have_it() -> None:
    one, other = {"code of a.py": "12", "config.seed": 1}, {"code of a.py": "13", "config.seed": 1, "extra": 0}
    texts = start(one, one, other, one)
    assert len(set(map(str, texts))) == 1
    assert '\n  code of a.py: "12" on 0-1, 3; "13" on 2\n  extra: none on 0-1, 3; 0 on 2' in str(texts[0])


def test_a_process_that_cannot_start_tells_all_why() -> None:
    texts = start({}, {}, failed="data: found nothing")
    assert texts == [f"process 1 of 2 {HERE}: data: found nothing"] * 2


def test_the_same_number_twice_is_refused() -> None:
    texts = start({}, {}, {}, numbers=[0, 1, 1])
    assert texts == [f"found process 1 of 3 {HERE} and process 1 of 3 {HERE}; give each of 3 processes its own number, "
                     "and all the same count."] * 3  # fmt: skip


def test_a_taken_port_and_strangers_on_it() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of this host, where process 0 listens, cannot be opened"):
            Coordinator(ProcessInfo(f"localhost:{port}", 2, 0), SECRET, 1.0)
    with pytest.raises(ValueError, match=r"start process 0 on the host that 192.0.2.1:\d+ names, or name this host"):
        Coordinator(ProcessInfo(f"192.0.2.1:{free_port()}", 2, 0), b"", 1.0)  # an address of nobody
    info = ProcessInfo(f"localhost:{free_port()}", 1, 0)
    Coordinator(info, SECRET, 60.0)
    framed = struct.pack("!i", 32) + bytes(32)  # as our own messages are
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"", framed, framed * 2 + struct.pack("!i", 2) + b"{}", b"\xff" * 100_000):
        with socket.create_connection(info.target) as stranger, contextlib.suppress(OSError):
            stranger.sendall(text)
    with socket.create_connection(info.target), socket.create_connection(info.target) as slow:  # they say nothing
        slow.sendall(b"\0")
        begun = time.monotonic()
        Channel(info, SECRET, 60.0, {}).leave()
        assert time.monotonic() - begun < 30


def test_a_reset_during_the_start_up_check_is_an_error_of_ours() -> None:
    with socket.create_server(("localhost", 0)) as server:
        info = ProcessInfo(f"localhost:{server.getsockname()[1]}", 2, 1)

        def reset() -> None:
            connection, _ = server.accept()
            connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        threading.Thread(target=reset, daemon=True).start()
        with pytest.raises(ValueError, match="does not admit this process: it ended, or its start-up check"):
            Channel(info, SECRET, 60.0, {})


# --- the secret -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(SECRET, b"another"), (SECRET, b""), (b"", SECRET)])
def test_a_process_with_another_secret_is_refused_and_disturbs_nobody(ours: bytes, theirs: bytes) -> None:
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(start, {}, count=2, secret=ours, address=address)
        refusal = f"^process 0 at {address} has another secret; give all processes the same RICE_JAX_SECRET or --secret"
        with pytest.raises(ValueError, match=refusal):
            Channel(ProcessInfo(address, 2, 1), theirs, 60.0, {})
        second = pool.submit(Channel, ProcessInfo(address, 2, 1), ours, 60.0, {})
        assert second.result(60).service == admitted(first.result(60))[0].service


def test_who_ignores_that_the_secret_is_wrong_is_not_admitted() -> None:
    """A peer that sends its request all the same, for a number that a real process has not taken yet."""
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(start, {}, count=2, address=address, wait=3.0)
        peer = channel_module._connect(ProcessInfo(address, 2, 1), 60.0)
        assert not channel_module._same_secret(peer, b"wrong", b"process", b"coordinator", 60.0)
        channel_module._send(dataclasses.asdict(JoinRequest(1, 2, "process 1 of 2 (intruder)", {}, None)), peer)
        (text,) = first.result(60)
        assert "1 of 2 processes did not come within 3 s: 1." in str(text) and "intruder" not in str(text)


def test_process_0_must_have_the_secret_too() -> None:
    """One that listens in its place can send back what it gets; that proves nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def mirror() -> None:
            connection, _ = server.accept()
            with contextlib.suppress(OSError):
                while data := connection.recv(1000):
                    connection.sendall(data)

        threading.Thread(target=mirror, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match="has another secret"):
            Channel(ProcessInfo(address, 2, 1), SECRET, 60.0, {})


def test_the_secret_is_never_sent_and_no_proof_is_sent_twice() -> None:
    """All bytes of process 1, both ways, by a relay between it and process 0."""
    recorded: list[bytes] = []

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                recorded.append(data)
                target.sendall(data)

    def relay(server: socket.socket, address: tuple[str, int]) -> None:
        connection, _ = server.accept()
        other = socket.create_connection(address)
        for pair in ((connection, other), (other, connection)):
            threading.Thread(target=copy, args=pair, daemon=True).start()

    runs = []
    for _ in range(2):
        recorded.clear()
        address = f"127.0.0.1:{free_port()}"
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(2) as pool:
            first = pool.submit(start, {}, count=2, address=address)
            pool.submit(channel_module._connect, ProcessInfo(address, 2, 0), 60.0).result(60)  # process 0 listens
            threading.Thread(target=relay, args=(server, ProcessInfo(address, 2, 0).target), daemon=True).start()
            through = ProcessInfo(f"127.0.0.1:{server.getsockname()[1]}", 2, 1)
            second = Channel(through, SECRET, 60.0, {})
            admitted(first.result(60))
            second.leave()
        runs.append(b"".join(recorded))
    for text in runs:
        assert b"process 1 of 2" in text  # the request passed here
        for form in (SECRET, SECRET.hex().encode(), base64.b64encode(SECRET), hashlib.sha256(SECRET).digest()):
            assert form not in text and form[:8] not in text
    chunks = {runs[0][i : i + 16] for i in range(len(runs[0]) - 15)}
    same = [chunk for chunk in chunks if chunk in runs[1] and not chunk.isascii()]
    assert not same, same


def test_without_a_secret_process_0_listens_at_its_address_only_and_says_so_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for secret in (b"", SECRET):
        port = free_port()
        Coordinator(ProcessInfo(f"127.0.0.1:{port}", 2, 0), secret, 60.0)
        socket.create_connection(("127.0.0.1", port)).close()
        error = capsys.readouterr().err
        if secret:
            assert not error
            socket.create_connection(("127.0.0.2", port)).close()
        else:
            assert (
                error.startswith("warning: no secret: process 0 listens at 127.0.0.1 only") and error.count("\n") == 1
            )
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port))


def test_a_host_that_cannot_look_up_its_own_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_for(backend: str) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError(f"Unable to initialize backend '{backend}'")

        monkeypatch.setattr(jax, "devices", fail)

    fail_for("cpu")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(RuntimeError, match="Unable to initialize backend 'cpu'"):
        hosts._start_backend()
    for name in ("no-such-host.invalid", 70 * "a"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        with pytest.raises(ValueError, match=rf"own name, {name}, cannot be looked up .* add the name to"):
            hosts._start_backend()
    fail_for("cuda")
    with pytest.raises(RuntimeError, match="Unable to initialize backend 'cuda'"):
        hosts._start_backend()


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf", "soon"])
def test_a_wait_without_an_end_is_wrong_use(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--wait", seconds])
    assert end.value.code == 2 and "--wait" in capsys.readouterr().err


def test_facts_name_every_source_and_leave_out_what_may_differ() -> None:
    facts = hosts.code()
    assert {
        "code of rice_jax/losses/pairs.py",
        "code of data_pipeline/layouts/lpr4m.py",
        "code of configs/rice.py",
    } <= set(facts)
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
                        env=os.environ | {"XLA_FLAGS": xla, "RICE_JAX_SECRET": "s"} | (of or {}).get(process, {}),
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
    ours = rf"^error: process {victim} of \d+ \([^)]+\): killed"
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
    with (tmp_path / "code" / "rice_jax" / "losses" / "global_batch.py").open("a") as file:
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
        for name in ("--config.seed: 42 on 0; 7 on 1", "code of rice_jax/losses/global_batch.py: ", 'data: "'):
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
from rice_jax.parallel import hosts, mesh as sharding

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
DECISIONS = """
    from jax._src import distributed
    for number in range(20):
        assert hosts.gather([jax.process_index(), number]) == [[0, number], [1, number]]
    text = "e" * 5_000_000  # more than gRPC's usual four million bytes
    assert hosts.ask_first(lambda: text if hosts.is_first() else 1 / 0) == text
    hosts.agree({"alike": 1})
    try:
        hosts.agree({"number": jax.process_index()})
    except ValueError as error:
        assert "number: 0 on 0; 1 on 1" in str(error), error
    store, deadline = distributed.global_state.client, time.monotonic() + 10
    if hosts.is_first():
        while (keys := store.key_value_dir_get("rice_jax")) and time.monotonic() < deadline:
            time.sleep(0.01)  # the last one to read an answer deletes it
        print("keys left:", keys)
        store.key_value_set("test/looked", "")
    store.blocking_key_value_get("test/looked", 60_000)
"""
MIXED = """
    def latest_step():
        return hosts.ask_first(lambda: 7)

    def block_is_there():
        return hosts.ask_first(lambda: True)

    print(latest_step() if hosts.is_first() else block_is_there())
"""
ALONE = """
    if hosts.is_first():
        hosts.gather(1)
"""
SERVICE = """
    import socket
    def reached(host):
        try:
            socket.create_connection((host, int(hosts._channel.service.rpartition(":")[2])), timeout=5).close()
        except ConnectionRefusedError:
            return False
        return True
    hosts.gather(None)
    print(reached("localhost"), reached("127.0.0.2"))
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


def run_script(folder: Path, main: str, **options: Any) -> list[Ended]:
    (folder / "script.py").write_text(SCRIPT.format(main=main))
    with Processes(folder, "script", [[], []], **options) as processes:
        return processes.ended(60)


def test_decisions_reach_all_in_order_and_leave_nothing_in_the_store(tmp_path: Path) -> None:
    ended = run_script(tmp_path, DECISIONS)
    assert [(end.status, end.out) for end in ended] == [(0, "keys left: []\n"), (0, "")], ended


def test_different_decisions_end_all_processes_with_who_waits_for_which(tmp_path: Path) -> None:
    for end in run_script(tmp_path, MIXED):
        assert end.status == 1 and not end.out, end
        assert re.search("^error: .*the processes wait for different decisions; call ", end.error, re.M)
        place = r'"__main__\.main\.<locals>\.'
        assert re.search(rf'\d: {place}latest_step:\d+" on 0; {place}block_is_there:\d+" on 1$', end.error, re.M), end


def test_who_waits_for_one_that_is_done_ends_with_that_reason(tmp_path: Path) -> None:
    """As when rice_jax.load is called in one process alone: the answer would never come."""
    for end in run_script(tmp_path, ALONE):
        assert end.status == 1 and re.search('main:\\d+" on 0; "the end of the command" on 1$', end.error, re.M), end


def test_a_secret_from_a_file_is_that_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s\n")
    (tmp_path / "script.py").write_text(SCRIPT.format(main="print(hosts.gather(1))"))
    of = {1: {"RICE_JAX_SECRET": ""}}
    with Processes(tmp_path, "script", [[], ["--secret-file", "secret"]], of=of) as processes:
        assert [(end.status, end.out) for end in processes.ended(60)] == [(0, "[1, 1]\n")] * 2


def test_an_empty_secret_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RICE_JAX_SECRET", raising=False)
    (tmp_path / "secret").write_text("\n")
    arguments = argparse.Namespace(secret_file=tmp_path / "secret", wait=1.0)
    with pytest.raises(ValueError, match=f"{tmp_path}/secret: is empty, needs a secret"):
        hosts.join(ProcessInfo("localhost:1", 2, 1), lambda _: {}, arguments)


def test_a_secret_of_any_bytes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `head -c 32 /dev/urandom` makes them, which are no text."""
    monkeypatch.delenv("RICE_JAX_SECRET", raising=False)
    (tmp_path / "secret").write_bytes(b"\xff\xfe")
    arguments = argparse.Namespace(secret_file=tmp_path / "secret", wait=1.0)
    with pytest.raises(ValueError, match="process 0 of 2 does not answer"):
        hosts.join(ProcessInfo(f"localhost:{free_port()}", 2, 1), lambda _: {}, arguments)


@pytest.mark.slow
def test_with_a_wrong_secret_a_process_ends_with_one_line(tmp_path: Path) -> None:
    first, second = run_script(tmp_path, WAIT, wait=4, of={1: {"RICE_JAX_SECRET": "wrong"}})
    assert first.status == second.status == 1 and not first.out
    assert re.fullmatch(r"error: process 0 at \S+ has another secret; give all .*\n", second.error)
    assert re.fullmatch(r"error: 1 of 2 processes did not come within 4 s: 1\. .*\n", first.error)


@pytest.mark.parametrize("secret", ["", pytest.param("s", marks=pytest.mark.slow)])
def test_without_a_secret_jax_listens_at_the_coordinators_address_only(tmp_path: Path, secret: str) -> None:
    variables = {"RICE_JAX_SECRET": secret}
    ended = run_script(tmp_path, SERVICE, of={0: variables, 1: variables})
    assert [(end.status, end.out) for end in ended] == [(0, f"True {bool(secret)}\n")] * 2, ended
    warnings = [end.error.count("warning: no secret: process 0 listens at ") for end in ended]
    assert warnings == [0 if secret else 1, 0]


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


def test_each_launched_job_has_a_secret_of_its_own() -> None:
    """SLURM's tasks get it from the environment, a JobSet's pods from a Secret, the TPU VMs from a file."""
    files = {name: (ROOT / "launch" / name).read_text() for name in ("slurm.sbatch", "kubernetes.yaml", "tpu_pod.sh")}
    (line,) = re.findall(r"^export RICE_JAX_SECRET=.*$", files["slurm.sbatch"], re.M)
    script = ["bash", "-c", f"{line}\nprintenv RICE_JAX_SECRET"]
    made = [subprocess.run(script, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert made[0] != made[1] and len(base64.b64decode(made[0])) == 32
    assert files["slurm.sbatch"].index(line) < files["slurm.sbatch"].index("\nsrun ")
    job = yaml.safe_load(files["kubernetes.yaml"])["spec"]["replicatedJobs"][0]["template"]
    (variable,) = [e for e in job["spec"]["template"]["spec"]["containers"][0]["env"] if "valueFrom" in e]
    key = variable["valueFrom"]["secretKeyRef"]
    assert variable["name"] == "RICE_JAX_SECRET"
    assert f"kubectl create secret generic {key['name']} --from-literal={key['key']}=" in files["kubernetes.yaml"]
    (command,) = shell_commands(ROOT / "launch" / "tpu_pod.sh")
    copied = re.findall(r'scp "\$secret" "\$NAME:(\S+)"', files["tpu_pod.sh"])
    assert [name.replace("$NAME", "rice") for name in copied] == [str(train.parse(command).secret_file)]


def test_the_jobset_numbers_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    jobset = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    environment = {e["name"]: e["value"] for e in spec["template"]["spec"]["containers"][0]["env"] if "value" in e}
    info = found(monkeypatch, environment | {"JOB_COMPLETION_INDEX": "5"})
    name = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    assert info == ProcessInfo(f"{name}:8476", spec["parallelism"], 5)
