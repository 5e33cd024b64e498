"""What watches a run: signals, a loop that stands still, memory."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rice_jax.training import guards


def program(text: str, *, seconds: float = 60) -> tuple[int, str]:
    """A Python program's exit status and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True, text=True, timeout=seconds, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_signal_is_a_wish_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = guards.Stop()
    with stop.listening():
        assert not stop.agreed(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(2) and stop.status == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_elsewhere_than_in_the_main_thread_signals_stay_as_they_are() -> None:
    def inside() -> None:
        with guards.Stop().listening() as stop:
            answers.append(stop.agreed(1))

    answers: list[bool] = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_signal_within_at_once_is_raised_there() -> None:
    stop = guards.Stop()
    with stop.listening():
        with pytest.raises(guards.StoppedError), stop.at_once():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(guards.StoppedError), stop.at_once():
            raise AssertionError("the wish is known, nothing is begun")
    assert stop.status == 130


def test_a_second_signal_ends_the_process_even_where_no_handler_runs() -> None:
    """The main thread is in C, as in a collective that hangs."""
    status, said = program("""
        import ctypes, os, signal, threading, time
        from rice_jax.training import guards
        stop = guards.Stop()
        def twice():
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(guards.ECHO_SECONDS + 0.5)
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
    assert status == 143 and "the signal once more ends" in said and "came to its end" not in said


def test_a_signal_that_comes_twice_at_once_is_one_wish() -> None:
    """As timeout(1) sends it: to the process and to its group."""
    status, said = program("""
        import os, signal, time
        from rice_jax.training import guards
        stop = guards.Stop()
        with stop.listening():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
        print("came to its end", stop.received)
    """)
    assert status == 0 and "came to its end 2" in said and said.count("the signal once more ends") == 1


def until(capfd: pytest.CaptureFixture[str], text: str) -> str:
    """What was said on stderr up to the text, which a busy machine may let come late."""
    said, deadline = "", time.monotonic() + 60
    while text not in said:
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
        said += capfd.readouterr().err
    return said


def test_a_wait_that_lasts_is_reported_once_and_what_has_no_name_never(capfd: pytest.CaptureFixture[str]) -> None:
    with guards.Watch(0.2, ends=False) as watch:
        watch.waits_for("", 3)
        time.sleep(0.5)
        assert capfd.readouterr().err == ""
        watch.waits_for("device", 4)
        told = until(capfd, "test_guards.py")
        time.sleep(0.5)
    told += capfd.readouterr().err
    assert told.count("waits for the device for") == 1 and "after update 4" in told and "collective" in told
    assert "test_guards.py" in told  # the stack


def test_zero_seconds_watch_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with guards.Watch(0.0, ends=True) as watch:
        watch.waits_for("input", 1)
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_a_run_that_stands_still_ends_where_that_is_the_policy() -> None:
    status, said = program("""
        import time
        from rice_jax.training import guards
        with guards.Watch(0.3, ends=True) as watch:
            watch.waits_for("input", 7)
            time.sleep(30)
    """)
    assert status == 1
    assert "waits for the input for" in said and "still waiting for the input" in said and "Current thread" in said


def test_memory_near_its_limit_is_told_once_with_figures(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    held = guards.resident_bytes()
    assert 2**26 < held < guards.memory_limit()
    monkeypatch.setattr(guards, "resident_bytes", lambda: held)
    monkeypatch.setattr(guards, "memory_limit", lambda: int(held * 1.05))
    monkeypatch.setattr(guards, "LOOK_SECONDS", 0.05)
    with guards.Watch(0.0, ends=False):
        told = until(capfd, "warning: memory:")
        time.sleep(0.3)
    told += capfd.readouterr().err
    assert told.count("warning: memory:") == 1 and f"of {held * 1.05 / 2**30:.1f}" in told


def test_the_limit_is_the_smallest_that_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(guards, "_memory_files", lambda: [tmp_path / "none", tmp_path / "two", tmp_path / "gone"])
    assert guards.memory_limit() == 123456
    monkeypatch.setattr(guards, "_memory_files", lambda: [tmp_path / "none"])
    assert guards.memory_limit() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_children_count() -> None:
    status, said = program("""
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
    assert status == 0, said
