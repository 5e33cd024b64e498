"""Parts that the commands of data_pipeline share: every error becomes one message and an exit status."""

import concurrent.futures.process
import errno
from pathlib import Path

import pytest

from data_pipeline import convert, doctor, synthetic
from data_pipeline.faults import BadInputError, FailedError, WrongUseError
from data_pipeline.system.command_line import exit_status


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (WrongUseError("out: found other work"), 2, "out: found other work"),
        (FailedError("too many faults"), 1, "too many faults"),
        (BadInputError("bad lists", "line 3"), 1, "line 3"),
        (KeyboardInterrupt(), 1, "interrupted; to continue, run the same command again: shards are kept."),
        (
            concurrent.futures.process.BrokenProcessPool(), 1,
            "A worker process was killed, perhaps for lack of memory; use fewer --workers if so, and run the same "
            "command again: shards are kept.",
        ),
        (
            OSError(errno.EDQUOT, "Quota exceeded"), 1,
            "out: no space left on the device ([Errno 122] Quota exceeded); free some and run the same command again: "
            "shards are kept.",
        ),
        (
            OSError(errno.EIO, "Input/output error", "in/a.jpg"), 1,
            "[Errno 5] Input/output error: 'in/a.jpg'; correct the cause and run the same command again: "
            "shards are kept.",
        ),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_message_and_a_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> None:
        raise error

    assert exit_status(job, output=Path("out"), kept="shards are kept") == status
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"{message}\n")


@pytest.mark.parametrize(("result", "status"), [(None, 0), (True, 0), ({}, 0), (False, 1)])
def test_a_job_that_ends_well_or_finds_fault(result: object, status: int) -> None:
    assert exit_status(lambda: result, output=Path("out"), kept="") == status


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0, output=Path("out"), kept="")


@pytest.mark.parametrize("command", [convert, doctor, synthetic])
def test_help_tells_the_exit_status_and_workers_are_checked(
    command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, status in ((["--help"], 0), (["--workers=0"], 2), (["--workers=many"], 2)):
        with pytest.raises(SystemExit) as end:
            command.main(arguments)  # type: ignore[attr-defined]
        said = capsys.readouterr()
        assert end.value.code == status
        assert "Exit status: 0" in said.out or "--workers: found" in said.err
