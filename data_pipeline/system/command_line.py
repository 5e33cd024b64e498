"""What this package's commands share: help, --workers, and the exit status of what can go wrong."""

import argparse
import concurrent.futures.process
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.faults import BadInputError, FailedError, WrongUseError
from data_pipeline.system.processes import cores

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, default=cores(), metavar="N", help=f"processes ({cores()})")


def positive(text: str) -> int:
    count = number(int, text, "a whole number")
    if count < 1:
        raise argparse.ArgumentTypeError(f"found {text}, needs at least 1")
    return count


def number(kind: Callable[[str], Any], text: str, needed: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, needs {needed}") from None


def exit_status(job: Callable[[], object], *, output: Path, kept: str) -> int:
    """Runs the job: 0 done, 1 failed (or it returns False), 2 wrong use; one message on stderr says what.

    kept: what the same command finds done already.
    """
    again = f"run the same command again: {kept}."
    try:
        return 1 if job() is False else 0
    except WrongUseError as err:
        print(err, file=sys.stderr)
        return 2
    except (FailedError, BadInputError) as err:
        print(err, file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on: {kept}.", file=sys.stderr)
    except concurrent.futures.process.BrokenProcessPool:
        print(
            "A worker process died (killed, or out of memory); where memory was short take fewer --workers, and "
            f"{again}", file=sys.stderr,
        )  # fmt: skip
    except OSError as err:
        if err.errno in NO_SPACE:
            print(f"{output}: no space left on the device ({err}); free some and {again}", file=sys.stderr)
        else:
            print(f"{err}; mend it and {again}", file=sys.stderr)
    return 1
