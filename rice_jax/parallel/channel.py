"""The line between the processes of a run: one TCP connection from each to process 0, open as long as the run.

At the start it is the roll call: who is there, and whether all are of one mind. Later it carries decisions, small and
seldom, and the end: a process that fails says why, one that is killed falls silent, and either way the others hear it
within the second, whatever collective they wait in. jax's own service would abort them after its heartbeat's timeout
with a stack trace, and names neither who is missing nor why. (It lives in process 0: when that one is killed, either of
the two may end the others first.)

Messages are lines of JSON. To process 0: a hello, then {"value": X}, {"failed": TEXT} or {"finished": true}. From it:
a verdict, then {"values": [X of every process]}, {"end": TEXT, "of": PROCESS} or {"finished": true}.
"""

import contextlib
import dataclasses
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

HELLO_BYTES = 1 << 20  # at most: whatever else speaks to the port is not read for ever
HELLO_SECONDS = 5.0  # of silence, from whoever has connected
LOOK_SECONDS = 0.1  # how often the roll call counts those that came
NOBODY = -1  # of whom an end is when no process failed
HUNG_UP = "it ended, or its roll call was over before this one came (started late, or one too many?)"
SILENCE_SECONDS = 30  # of a host without power or network, until its connection counts as lost


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among `count`; process 0 listens at `address`, HOST:PORT."""

    address: str
    count: int
    process: int

    @property
    def target(self) -> tuple[str, int]:
        """Host and port. ValueError: the address is none."""
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"the address of process 0: found {self.address!r}, needs HOST:PORT, such as node-0:8476.")
        return host.strip("[]"), int(port)


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a process says first."""

    process: int
    count: int
    host: str
    pid: int
    facts: dict[str, Any]  # what must be the same everywhere
    failed: str | None  # why it cannot take part

    @classmethod
    def read(cls, text: bytes) -> "Hello | None":
        """None: not ours, as of a port scanner or a health check."""
        try:
            hello = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        numbers = all(isinstance(number, int) for number in (hello.process, hello.count, hello.pid))
        words = isinstance(hello.host, str) and isinstance(hello.failed, str | None)
        return hello if numbers and words and isinstance(hello.facts, dict) else None

    @property
    def name(self) -> str:
        return f"process {self.process} of {self.count} (pid {self.pid} on {self.host})"


# --- whether all are of one mind --------------------------------------------------------------------------------------


def ranges(numbers: list[int]) -> str:
    """'0, 2-5' of 0, 2, 3, 4, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def differences(facts: Mapping[int, Mapping[str, Any]], *, shown: int = 20) -> list[str]:
    """A line for each fact that is not the same on all processes: 'jax: 0.10.2 on 0, 2-3; 0.12.0 on 1'."""
    lines = []
    for name in sorted({name for known in facts.values() for name in known}):
        holders: dict[str, list[int]] = {}
        for process, known in sorted(facts.items()):
            holders.setdefault(json.dumps(known[name]) if name in known else "none", []).append(process)
        if len(holders) > 1:
            values = "; ".join(f"{value[:100]} on {ranges(processes)}" for value, processes in holders.items())
            lines.append(f"{name}: {values}")
    return lines[:shown] + ([f"and {len(lines) - shown} more"] if len(lines) > shown else [])


def disagreement(facts: Mapping[int, Mapping[str, Any]]) -> str | None:
    """What differs, as the error that every process then shows."""
    lines = differences(facts)
    if not lines:
        return None
    return (
        "the processes were not started alike; give all the same command, code and data. What differs, on which "
        "processes:\n  " + "\n  ".join(lines)
    )


# --- process 0 --------------------------------------------------------------------------------------------------------


class Hub:
    """Process 0's end of all lines: it calls the roll, then passes on what is said, in threads of its own."""

    def __init__(self, place: Place, *, wait_seconds: float) -> None:
        """Raises ValueError when the port is taken."""
        _, port = place.target
        dual = socket.has_dualstack_ipv6()
        try:
            self._server = socket.create_server(
                ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
            )
        except OSError as error:
            raise ValueError(
                f"port {port} of this host, where process 0 listens, cannot be had ({error.strerror}); end what uses "
                "it (an earlier run?), or give another port."
            ) from error
        self._place, self._wait = place, wait_seconds
        self._members: dict[int, tuple[Hello, socket.socket, BinaryIO]] = {}
        self._called, self._stranger = False, ""  # the roll; who came and is none of the processes meant
        self._lock = threading.Lock()
        self._values: dict[int, Any] = {}
        self._finished: set[int] = set()
        self._ended = False
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    def _run(self) -> None:
        with self._server:
            fault = self._call_roll()
        if fault is not None:
            self._to_all({"error": fault})
            return
        with socket.socket() as free:  # for jax's own service; whoever joins hears of it here
            free.bind(("", 0))
            port = free.getsockname()[1]
        self._to_all({"service_port": port})
        for process in self._members:
            threading.Thread(target=self._attend, args=(process,), daemon=True).start()

    def _call_roll(self) -> str | None:
        """Waits until all are there; what forbids them to start, or None."""
        deadline = time.monotonic() + self._wait
        count = self._place.count
        self._server.settimeout(LOOK_SECONDS)
        while len(self._members) < count and not self._stranger and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._server.accept()
                # A thread each, so that one which says nothing keeps nobody waiting.
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()
        with self._lock:
            self._called = True
        if self._stranger:
            return self._stranger
        hellos = {process: hello for process, (hello, *_) in sorted(self._members.items())}
        missing = [process for process in range(count) if process not in hellos]
        if missing:
            return (
                f"{len(missing)} of {count} processes did not come within {self._wait:.0f} s: {ranges(missing)}. "
                f"There are: {'; '.join(hello.name for hello in hellos.values()) or 'none'}. Look at "
                f"the missing ones' own output, and whether they reach {self._place.address}; --wait waits longer."
            )
        failed = [f"{hello.name}: {hello.failed}" for hello in hellos.values() if hello.failed is not None]
        return "\n".join(failed) or disagreement({process: hello.facts for process, hello in hellos.items()})

    def _greet(self, connection: socket.socket) -> None:
        """Takes whoever says hello among the members while the roll is called."""
        connection.settimeout(HELLO_SECONDS)
        file = connection.makefile("rb")
        hello = None
        with contextlib.suppress(OSError):
            hello = Hello.read(file.readline(HELLO_BYTES))
        with self._lock:
            if hello is None or self._called:
                file.close()
                connection.close()
                return
            connection.settimeout(None)
            watch(connection)
            known = self._members.get(hello.process)
            if known is not None or hello.count != self._place.count or not 0 <= hello.process < hello.count:
                meant = f"where {self._place.count} processes are meant"
                self._stranger = (
                    f"found {hello.name} {meant if known is None else f'and as {known[0].name}'}; give every process "
                    "its own number, and all the same count."
                )
                with contextlib.suppress(OSError):
                    _send(connection, {"error": f"{hello.name} is not expected by process 0 of {self._place.count}."})
                return
            self._members[hello.process] = hello, connection, file

    def _attend(self, process: int) -> None:
        """Reads what one process says until it ends."""
        hello, _, file = self._members[process]
        with contextlib.suppress(OSError, ValueError):  # ValueError: killed in the middle of a word
            for text in file:
                self._hear(hello, json.loads(text))
        with self._lock:
            if not self._ended and process not in self._finished:
                self._end(
                    process,
                    f"{hello.name} ended without a word: killed (kill -9, out of memory?), or its host is gone. Run "
                    "the same command again on every host: it goes on from the newest checkpoint.",
                )

    def _hear(self, hello: Hello, message: dict[str, Any]) -> None:
        count = self._place.count
        with self._lock:
            if "value" in message:
                self._values[hello.process] = message["value"]
                if len(self._values) == count:
                    values = [self._values[process] for process in range(count)]
                    self._values = {}
                    self._to_all({"values": values})
            elif "failed" in message and not self._ended:
                self._end(hello.process, f"{hello.name}: {message['failed']}")
            elif "finished" in message:
                self._finished.add(hello.process)
                if len(self._finished) == count:
                    self._to_all({"finished": True})
            if self._values and self._finished and not self._ended:
                self._end(
                    NOBODY,
                    f"process {ranges(list(self._values))} waits for what process {ranges(list(self._finished))} has "
                    "to say, which is done: what asks the others (rice_jax.load, a checkpoint) must run in all.",
                )

    def _end(self, process: int, text: str) -> None:
        self._ended = True
        self._to_all({"end": text, "of": process})

    def _to_all(self, message: dict[str, Any]) -> None:
        for process in sorted(self._members, reverse=True):  # process 0 last: it may go, and this thread with it
            with contextlib.suppress(OSError):  # whoever is gone needs no word; its own thread tells the others
                _send(self._members[process][1], message)


# --- every process ----------------------------------------------------------------------------------------------------


class Line:
    """This process's end: after the roll call a thread listens, and ends the process when another has ended."""

    def __init__(self, place: Place, hello: Hello, *, wait_seconds: float) -> None:
        """Answers the roll call.

        Raises:
          ValueError: process 0 does not answer, a process is missing, or they were not started alike.
        """
        self.place = place
        self._connection, deadline = _connect(place, wait_seconds)
        watch(self._connection)
        self._file = self._connection.makefile("rb")
        self._connection.settimeout(max(1.0, deadline + 10 - time.monotonic()))  # its clock began when it did
        try:
            _send(self._connection, dataclasses.asdict(hello))
            verdict = json.loads(self._file.readline() or "{}")
        except TimeoutError:
            verdict = {"error": f"process 0 at {place.address} still waits for others after {wait_seconds:.0f} s."}
        except OSError:  # a reset
            verdict = {}
        if "service_port" not in verdict:
            raise ValueError(verdict.get("error", f"process 0 at {place.address} hung up: {HUNG_UP}."))
        self._connection.settimeout(None)
        self.service = f"{place.address.rpartition(':')[0]}:{verdict['service_port']}"
        self._answers: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._heard, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="line", daemon=True).start()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (JSON), in their order; all must call it, in the same order of calls."""
        _send(self._connection, {"value": value})
        return self._answers.get()

    def fail(self, reason: str, *, patience: float = 2.0) -> None:
        """Tells the others why this process ends.

        What looks like a fault of its own may be the shadow of another's end: a broken collective. So it listens first
        for `patience` seconds, in which the other reason would end it.
        """
        time.sleep(patience)
        with contextlib.suppress(OSError):
            _send(self._connection, {"failed": reason})
            self._heard.wait(5.0)  # process 0 carries the line of all: it may not go before they heard

    def finish(self) -> None:
        """Waits until all are done."""
        _send(self._connection, {"finished": True})
        self._over.wait()

    def _end(self, reason: str, *, after: float = 0.0) -> NoReturn:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        time.sleep(after)
        leave(1)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            for text in self._file:
                message = json.loads(text)
                if "values" in message:
                    self._answers.put(message["values"])
                elif "finished" in message:
                    self._over.set()
                    return
                elif message["of"] == self.place.process:
                    self._heard.set()  # its own end, of which it speaks itself
                    return
                else:
                    # jax's service lives in process 0 and aborts whoever outlives it, with a stack trace.
                    self._end(message["end"], after=0.5 if self.place.process == 0 else 0.0)
        self._end(
            f"process 0 of {self.place.count} ({self.place.address}) ended without a word: killed, or its host is "
            "gone. Run the same command again on every host: it goes on from the newest checkpoint."
        )


def _connect(place: Place, wait_seconds: float) -> tuple[socket.socket, float]:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return socket.create_connection(place.target, timeout=max(0.1, deadline - time.monotonic())), deadline
        except OSError as error:
            if time.monotonic() > deadline - 0.5:
                raise ValueError(
                    f"process 0 of {place.count} does not answer at {place.address} after {wait_seconds:.0f} s "
                    f"({error.strerror or error}); look at its own output, and whether this host "
                    f"({socket.gethostname()}) reaches that address. --wait waits longer."
                ) from error
            time.sleep(0.2)


def watch(connection: socket.socket) -> None:
    """Lets the kernel notice a host that vanished without closing its connections."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = {
        "TCP_KEEPIDLE": SILENCE_SECONDS // 3,
        "TCP_KEEPINTVL": SILENCE_SECONDS // 6,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * SILENCE_SECONDS,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def leave(status: int) -> NoReturn:
    """Ends the process at once: whoever waits in a collective, or in jax's barrier at exit, waits for the dead."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
