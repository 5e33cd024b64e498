"""The channel between the processes of a run: a TCP connection from each to process 0, open as long as the run.

At the start process 0 waits for all processes and compares what they were started with: the start-up check. Later it
notices at once when a process fails or is killed, and all others end with the reason. jax's own service would need half
a minute, end them with a stack trace, and name neither a missing process nor a cause. (It lives in process 0. When that
one is killed, either of the two may end the others first.)
"""

import contextlib
import dataclasses
import errno
import hmac
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import numpy as np

from rice_jax.errors import warn
from rice_jax.parallel.cluster import ProcessInfo

JOIN_SECONDS = 5.0  # until process 0 drops a connection that says nothing
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a vanished host is noticed after 30 s
KILLED = "killed (kill -9, out of memory?), or its host is gone. The same command on every host continues the run."
SAME_SECRET = "give all processes the same RICE_JAX_SECRET or --secret-file"
NOT_ALIKE = "the processes were not started alike; give all the same command, code and data. What differs, on which"

Facts = dict[str, Any]  # what must be equal on all processes, each by its name


@dataclasses.dataclass(frozen=True)
class JoinRequest:
    process: int
    count: int
    name: str
    facts: Facts
    failed: str | None  # why this process cannot take part


class Coordinator:
    """Process 0's end of all connections: it runs the start-up check, and later ends all processes when one fails."""

    def __init__(self, info: ProcessInfo, secret: bytes, wait_seconds: float) -> None:
        """Listens, in a thread. Raises ValueError if the address is no HOST:PORT or its port cannot be opened."""
        self._info, self._secret, self._wait = info, secret, wait_seconds
        self._joined: queue.SimpleQueue[tuple[JoinRequest, Connection]] = queue.SimpleQueue()
        self._server = _open_server(info, secret, "process 0 listens")
        # jax's service opens it when all have come. Until then it is kept, so that no other program takes it.
        self._service = _open_server(info.service, secret, "jax's own service listens")
        if not secret:
            warn(
                f"no secret: process 0 listens at {self._server.getsockname()[0]} only, and admits any process that "
                f"comes there; {SAME_SECRET}."
            )
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        """Admits processes until all have come, starts them or says why not, and reports the first one that fails."""
        deadline = time.monotonic() + self._wait
        self._server.settimeout(0.1)
        with self._server:
            while self._joined.qsize() < self._info.count and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    # A thread for each, so that a silent connection delays nobody.
                    threading.Thread(target=self._admit, args=self._server.accept()[:1], daemon=True).start()
        members = [self._joined.get() for _ in range(self._joined.qsize())]
        members.sort(key=lambda member: member[0].process)
        connections = [connection for _, connection in reversed(members)]  # process 0 last: its end ends this thread
        fault = self._fault([request for request, _ in members])
        self._service.close()
        _send(fault or self._info.service.target[1], *connections)
        running = {connection: request.name for request, connection in members}
        while running and not fault:
            ready = wait(list(running))
            connection = next(connection for connection in running if connection in ready)
            name, reason = running.pop(connection), KILLED
            with contextlib.suppress(OSError, EOFError):
                reason = json.loads(connection.recv_bytes())
            if reason is not None:
                fault = f"{name}: {reason}"
                _send(fault, *connections)

    def _admit(self, accepted: socket.socket) -> None:
        connection = _connection(accepted)
        with contextlib.suppress(OSError, EOFError):
            if _same_secret(connection, self._secret, b"coordinator", b"process", JOIN_SECONDS):
                self._joined.put((JoinRequest(**json.loads(_receive(connection, JOIN_SECONDS))), connection))

    def _fault(self, requests: list[JoinRequest]) -> str:
        """Returns the reason why the processes cannot start, "" if they can."""
        numbers, count = [request.process for request in requests], self._info.count
        odd = [r.name for r in requests if r.count != count or r.process >= count or numbers.count(r.process) > 1]
        missing = sorted(set(range(count)) - set(numbers))
        failed = [f"{request.name}: {request.failed}" for request in requests if request.failed is not None]
        if odd:
            return f"found {' and '.join(odd)}; give each of {count} processes its own number, and all the same count."
        if missing:
            return (
                f"{len(missing)} of {count} processes did not come within {self._wait:.0f} s: {ranges(missing)}. There "
                f"are: {'; '.join(request.name for request in requests) or 'none'}. Look at the missing ones' own "
                f"output, and whether they reach {self._info.address}; --wait waits longer."
            )
        return "\n".join(failed) or disagreement([request.facts for request in requests])


class Channel:
    """This process's connection to process 0. A thread ends this process as soon as another one has failed."""

    def __init__(
        self, info: ProcessInfo, secret: bytes, wait_seconds: float, facts: Facts, failed: str | None = None
    ) -> None:
        """Connects to process 0 and waits for its start-up check. failed: why this one cannot take part; it ends all.

        Raises ValueError if process 0 does not answer, has another secret or refuses this process, or the check fails.
        """
        self.info, self._leaving = info, False
        self._connection, answer = _connect(info, wait_seconds), None
        name = f"process {info.process} of {info.count} (pid {os.getpid()} on {socket.gethostname()})"
        limit = wait_seconds + 10  # process 0 may have started later
        with contextlib.suppress(OSError, EOFError):
            if not _same_secret(self._connection, secret, b"process", b"coordinator", limit):
                raise ValueError(f"process 0 at {info.address} has another secret; {SAME_SECRET}.")
            _send(dataclasses.asdict(JoinRequest(info.process, info.count, name, facts, failed)), self._connection)
            answer = json.loads(_receive(self._connection, limit))
        if not isinstance(answer, int):
            raise ValueError(
                answer
                or f"process 0 at {info.address} does not admit this process: it ended, or its start-up check was over "
                "before this one came (started late, or one too many?); look at its own output, and start all again."
            )
        self.service = info.service.address
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def leave(self, reason: str | None = None) -> None:
        """Tells the others that this process ends: at once when its work is done, or after 2 s why it failed."""
        # The cause of a broken collective is often another process. Its reason comes first, and ends this one.
        time.sleep(2.0 if reason else 0.0)
        self._leaving = True
        _send(reason, self._connection)
        self._listener.join(5.0 if reason else 0.0)  # process 0 must not end before all have the reason

    def _listen(self) -> None:
        reason = f"process 0 of {self.info.count} ({self.info.address}): {KILLED}"
        with contextlib.suppress(OSError, EOFError):
            reason = json.loads(self._connection.recv_bytes())
        if not self._leaving:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            # jax's service lives in process 0, and aborts with a stack trace every process that outlives it.
            time.sleep(0.5 if self.info.process == 0 else 0.0)
            end_process(1)


def _open_server(info: ProcessInfo, secret: bytes, who: str) -> socket.socket:
    """Returns a socket that listens at the address, with a secret at all addresses. Raises ValueError if it cannot."""
    host, port = info.target
    dual = bool(secret) and socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.getaddrinfo(host, port)[0][0]
        return socket.create_server(("" if secret else host, port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        do = f"start process 0 on the host that {info.address} names, or name this host"
        if error.errno == errno.EADDRINUSE:
            do = "end what uses it (an earlier run?), or give another port"
        elif error.errno == errno.EACCES:
            do = "give a port of 1024 or more"
        raise ValueError(
            f"port {port} of this host, where {who}, cannot be opened ({error.strerror}); {do}."
        ) from error


def _connect(info: ProcessInfo, wait_seconds: float) -> Connection:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return _connection(socket.create_connection(info.target, timeout=max(0.1, deadline - time.monotonic())))
        except OSError as error:
            if time.monotonic() > deadline - 0.5:
                raise ValueError(
                    f"process 0 of {info.count} does not answer at {info.address} after {wait_seconds:.0f} s "
                    f"({error.strerror or error}); look at its own output, and whether this host "
                    f"({socket.gethostname()}) reaches that address. --wait waits longer."
                ) from error
            time.sleep(0.2)


def _connection(connected: socket.socket) -> Connection:
    """Returns a connection that carries messages, and that the kernel closes when the other host has vanished."""
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all of them
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connected.detach())


def _same_secret(connection: Connection, secret: bytes, own: bytes, other: bytes, seconds: float) -> bool:
    """Returns whether both have the same secret. Raises TimeoutError after `seconds`, EOFError or OSError if cut."""
    nonces = {own: secrets.token_bytes(32)}
    connection.send_bytes(nonces[own])
    nonces[other] = _receive(connection, seconds)
    text = nonces[b"coordinator"] + nonces[b"process"]
    connection.send_bytes(hmac.digest(secret, own + text, "sha256"))
    return hmac.compare_digest(_receive(connection, seconds), hmac.digest(secret, other + text, "sha256"))


def _receive(connection: Connection, seconds: float) -> bytes:
    if not connection.poll(seconds):
        raise TimeoutError
    return connection.recv_bytes(1 << 20)


def _send(message: Any, *connections: Connection) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):  # its process has ended, as the next read will show
            connection.send_bytes(json.dumps(message).encode())


def ranges(numbers: list[int]) -> str:
    """Returns '0, 2-5' for [0, 2, 3, 4, 5]: ascending, at least one."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def disagreement(facts: Sequence[Facts], start: str = NOT_ALIKE, *, shown: int = 20) -> str:
    """Returns an error with a line a fact that differs, 'jax: 0.10.2 on 0, 2-3; 0.12.0 on 1', up to `shown`, or ""."""
    lines = []
    for name in sorted({name for known in facts for name in known}):
        holders: dict[str, list[int]] = {}
        for process, known in enumerate(facts):
            holders.setdefault(json.dumps(known[name]) if name in known else "none", []).append(process)
        if len(holders) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value[:100]} on {ranges(on)}" for value, on in holders.items()))
    more = [f"and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n  ".join([f"{start}:", *lines[:shown], *more]) if lines else ""


def end_process(status: int) -> NoReturn:
    """Flushes stdout and stderr and ends this process at once: jax's barrier at exit would wait for those gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
