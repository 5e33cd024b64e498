"""Commands whose output nobody reads, or that were started without any; and signals that stop them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LONG = """
    import sys
    from data_pipeline.system.streams import lasting_output
    with lasting_output():
        for number in range(20_000):
            print("line", number, flush=True)
        print("written to stderr", file=sys.stderr)
    open("done", "w").close()
"""
SHELLS = {
    "a reader that leaves": (
        "| head -3",
        "warning: stdout cannot be written any more (Broken pipe); the work goes on.",
    ),
    "a closed stdout": (">&-", ""),
    "a full disk": ("> /dev/full", "warning: stdout cannot be written any more (No space left on device)"),
    "a descriptor to read": ("1< /dev/null", "(Bad file descriptor); the work goes on."),
    "a closed stderr": ("2>&- | head -3", ""),
    "both closed": (">&- 2>&-", ""),
    "everything closed": ("<&- >&- 2>&-", ""),
    "one reader of both that leaves": ("2>&1 | head -3", ""),
}


def shell(folder: Path, program: str, redirection: str) -> tuple[int, str]:
    """Returns the exit status of a Python program (not that of the last command of the pipe), and stderr."""
    (folder / "program.py").write_text(textwrap.dedent(program))
    line = f"set -o pipefail; {sys.executable} program.py {redirection}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", SHELLS)
def test_a_long_command_goes_on_and_says_so_once(tmp_path: Path, name: str) -> None:
    redirection, said = SHELLS[name]
    status, errors = shell(tmp_path, LONG, redirection)
    assert (tmp_path / "done").exists() and status == 0, errors
    assert said in errors and errors.count("warning") == bool(said) and "Traceback" not in errors
    if "2>" not in redirection:
        assert errors.endswith("written to stderr\n")


def test_a_file_does_not_take_the_place_of_a_closed_stdout(tmp_path: Path) -> None:
    status, _ = shell(
        tmp_path,
        """
        import os
        from data_pipeline.system.streams import lasting_output
        with lasting_output():
            with open("data", "w") as file:
                assert file.fileno() > 2
                os.write(1, b"of a library")
                print("of Python")
        """,
        ">&- 2>&-",
    )
    assert status == 0 and (tmp_path / "data").read_text() == ""


def test_text_that_the_terminal_cannot_show_is_still_an_error(tmp_path: Path) -> None:
    program = """
        import sys
        from data_pipeline.system.streams import lasting_output
        sys.stdout.reconfigure(encoding="ascii")
        with lasting_output():
            print("größer")
    """
    status, errors = shell(tmp_path, program, "")
    assert status == 1 and "UnicodeEncodeError" in errors


def test_a_short_command_ends_quietly(tmp_path: Path) -> None:
    program = """
        from rice_jax import errors
        def main(_):
            for number in range(20_000):
                print("line", number)
        errors.run(main, None)
    """
    assert shell(tmp_path, program, "| head -3") == (141, "")
    assert shell(tmp_path, program, "| cat > all") == (0, "")


def test_what_is_printed_last_counts_too(tmp_path: Path) -> None:
    """Less than a buffer, which is written when the command ends."""
    program = """
        import sys, time
        from rice_jax import errors
        def main(_):
            print("one line")
            time.sleep(1)
        errors.run(main, None, long=len(sys.argv) > 1)
    """
    assert shell(tmp_path, program, "| true") == (141, "")
    status, said = shell(tmp_path, program, "long | true")
    assert status == 0 and said.count("warning: stdout cannot be written") == 1 and said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT])
def test_a_signal_ends_a_command_with_one_line(tmp_path: Path, number: signal.Signals) -> None:
    """Also while the main thread is in C."""
    program = """
        import ctypes, sys
        from data_pipeline.system.command_line import exit_status
        def job():
            print("at work", flush=True)
            ctypes.CDLL(None).sleep(60)
        sys.exit(exit_status(job, output="out", kept="finished shards are kept"))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}; run the same command again: finished shards are kept.\n"


def test_handlers_are_restored_and_an_ignored_hangup_stays_so() -> None:
    from data_pipeline.system.signals import ended_by_signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals("go on"):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
