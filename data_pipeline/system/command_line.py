"""Parts that this package's commands share: help, --workers, and errors as messages with an exit status."""

import argparse
import concurrent.futures.process
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.faults import BadInputError, FailedError, WrongUseError
from data_pipeline.format.manifest import SPLITS
from data_pipeline.system.processes import cores
from data_pipeline.system.signals import ended_by_signals
from data_pipeline.system.streams import lasting_output

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """Returns a parser for the command `prog` with `doc` as its help. Options cannot be abbreviated."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog, description=doc, formatter_class=formatter, allow_abbrev=False)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds --workers N, an int of at least 1, by default one per core; parsing another value raises SystemExit."""
    parser.add_argument("--workers", type=parse_count, default=cores(), metavar="N", help=f"processes ({cores()})")


def parse_count(text: str) -> int:
    """Returns the whole number in `text`, an int. Raises ArgumentTypeError if it is none or less than 1."""
    count = parse_number(int, text, "a whole number")
    if count < 1:
        raise argparse.ArgumentTypeError(f"found {text}, needs at least 1")
    return count


def parse_number(kind: Callable[[str], Any], text: str, needed: str) -> Any:
    """Returns kind(text). Raises ArgumentTypeError that says what is `needed` where kind raises ValueError."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, needs {needed}") from None


def parse_splits(text: str) -> tuple[str, ...]:
    """Returns the names of splits in `text`, separated by commas. Raises ArgumentTypeError if one is no split."""
    names = tuple(text.split(","))
    if not set(names) <= set(SPLITS):
        raise argparse.ArgumentTypeError(f"found {text!r}, needs names of {','.join(SPLITS)}")
    return names


def exit_status(job: Callable[[], object], *, output: Path, kept: str) -> int:
    """Runs the job of a command and returns its exit status: 0 done, 1 failed or `job` returned False, 2 wrong use.

    WrongUseError (2), FailedError, BadInputError, OSError, Ctrl-C and the death of a worker (1) become one message on
    stderr. So does a signal to stop, which ends the process at once. Other exceptions pass. When stdout cannot be
    written any more, the job goes on. kept: a clause for the message that says which work the next run finds done.
    """
    again = f"run the same command again: {kept}."
    with lasting_output(), ended_by_signals(again):
        return _exit_status(job, output, again)


def _exit_status(job: Callable[[], object], output: Path, again: str) -> int:
    try:
        return 1 if job() is False else 0
    except WrongUseError as err:
        print(err, file=sys.stderr)
        return 2
    except (FailedError, BadInputError) as err:
        print(err, file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; to continue, {again}", file=sys.stderr)
    except concurrent.futures.process.BrokenProcessPool:
        cause = "A worker process was killed, perhaps for lack of memory"
        print(f"{cause}; use fewer --workers if so, and {again}", file=sys.stderr)
    except OSError as err:
        if err.errno in NO_SPACE:
            print(f"{output}: no space left on the device ({err}); free some and {again}", file=sys.stderr)
        else:
            print(f"{err}; correct the cause and {again}", file=sys.stderr)
    return 1
