"""Guards of a run: signals, waits that last too long, memory near its limit."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import pytest

from rice_jax.training import guards


def program(text: str, *, seconds: float = 60) -> tuple[int, str]:
    """Runs a Python program; returns its exit status and its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True, text=True, timeout=seconds, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_signal_stops_the_run_after_a_step_and_the_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = guards.Stop()
    with stop.listening():
        assert not stop.agreed()
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() and stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_signal_handlers_stay_as_they_are() -> None:
    def inside() -> None:
        with guards.Stop().listening() as stop:
            answers.append(stop.agreed())

    answers: list[bool] = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_signal_interrupts_what_is_interruptible() -> None:
    stop = guards.Stop()
    with stop.listening():
        with pytest.raises(guards.StoppedError), stop.interruptible():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(guards.StoppedError), stop.interruptible():
            raise AssertionError("a signal has come before, so nothing may begin")
    assert stop.received == signal.SIGINT


def test_a_second_signal_ends_the_process_even_where_no_handler_runs() -> None:
    """The main thread is in C, as in a collective that hangs."""
    status, output = program("""
        import ctypes, os, signal, threading, time
        from rice_jax.training import guards
        stop = guards.Stop()
        def twice():
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(guards.DUPLICATE_SECONDS + 0.5)
            while not stop.received:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        with stop.listening():
            threading.Thread(target=twice, daemon=True).start()
            end = time.monotonic() + 30
            while time.monotonic() < end:
                ctypes.CDLL(None).sleep(30)
        print("came to its end")
    """)
    assert status == 143 and "a second SIGTERM ends it" in output and "came to its end" not in output


def test_the_same_signal_twice_within_a_second_is_one() -> None:
    """timeout(1) sends it so: to the process and to its group."""
    status, output = program("""
        import os, signal, time
        from rice_jax.training import guards
        stop = guards.Stop()
        with stop.listening():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
        print("came to its end", stop.received)
    """)
    assert status == 0 and "came to its end 2" in output and output.count("a second SIGINT ends it") == 1


def until(capfd: pytest.CaptureFixture[str], text: str) -> str:
    """Waits until stderr contains the text, which may be late on a busy machine; returns stderr so far."""
    output, deadline = "", time.monotonic() + 60
    while text not in output:
        assert time.monotonic() < deadline, output
        time.sleep(0.02)
        output += capfd.readouterr().err
    return output


def test_a_long_wait_is_reported_once_and_a_pause_never(capfd: pytest.CaptureFixture[str]) -> None:
    with guards.Watch(0.2, ends=False) as watch:
        watch.pause()
        time.sleep(0.5)
        assert capfd.readouterr().err == ""
        watch.waits_for("device", 4)
        output = until(capfd, "test_guards.py")
        time.sleep(0.5)
    output += capfd.readouterr().err
    assert (
        output.count("s for the device, after") == 1 and "after update 4" in output and "look at the device" in output
    )
    assert "test_guards.py" in output  # the stack


def test_of_several_processes_one_that_hangs_is_the_first_suspect(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    guards.Watch(60.0, ends=True)._report(("device", 4, 0.0), 60.0)
    assert "in a collective; check every host. The run ends in 60 s" in capfd.readouterr().err


def test_with_zero_seconds_no_wait_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    with guards.Watch(0.0, ends=True) as watch:
        watch.waits_for("input", 1)
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_a_process_that_waits_twice_as_long_ends_if_configured() -> None:
    status, output = program("""
        import time
        from rice_jax.training import guards
        with guards.Watch(0.3, ends=True) as watch:
            watch.waits_for("input", 7)
            time.sleep(30)
    """)
    assert status == 1
    assert "s for the input, after" in output and "still waiting for the input" in output and "Current thread" in output


def test_memory_near_its_limit_is_reported_once_with_figures(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    held = guards.resident_bytes()
    assert 2**26 < held < guards.memory_limit()
    monkeypatch.setattr(guards, "resident_bytes", lambda: held)
    monkeypatch.setattr(guards, "memory_limit", lambda: int(held * 1.05))
    monkeypatch.setattr(guards, "CHECK_SECONDS", 0.05)
    with guards.Watch(0.0, ends=False):
        output = until(capfd, "warning: memory:")
        time.sleep(0.3)
    output += capfd.readouterr().err
    assert output.count("warning: memory:") == 1 and f"of {held * 1.05 / 2**30:.1f}" in output


def test_the_memory_limit_is_the_smallest_that_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(guards, "_memory_files", lambda: [tmp_path / "none", tmp_path / "two", tmp_path / "gone"])
    assert guards.memory_limit() == 123456
    monkeypatch.setattr(guards, "_memory_files", lambda: [tmp_path / "none"])
    assert guards.memory_limit() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_memory_of_children_counts() -> None:
    status, output = program("""
        import subprocess, sys
        from rice_jax.training import guards
        before = guards.resident_bytes()
        child = subprocess.Popen(
            [sys.executable, "-c", "x = b'1' * 200_000_000; print(1, flush=True); input()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        assert child.stdout.readline()
        assert guards.resident_bytes() - before > 150_000_000
        child.communicate(b"\\n")
    """)
    assert status == 0, output


@pytest.mark.parametrize("number", guards.SIGNALS)
def test_every_signal_to_stop_is_a_wish(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """SLURM sends SIGUSR1 first, and SIGTERM later, when the run is still saving."""
    stop = guards.Stop()
    with stop.listening():
        signal.raise_signal(number)
        output = until(capfd, f"{number.name}: the run stops after this step and saves")
        other = signal.SIGTERM if number != signal.SIGTERM else signal.SIGINT
        time.sleep(guards.DUPLICATE_SECONDS + 0.2)
        signal.raise_signal(other)
        assert stop.agreed() and stop.received == number
        time.sleep(0.2)
    assert (output + capfd.readouterr().err).count("\n") == 1
