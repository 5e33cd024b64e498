"""Faults of a source, each with its place, what was found, what is needed and what to do; and errors of commands."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a source. `str` of it is its line in faults.txt: "FILE line N (SUBJECT): DETAIL".

    Control characters, which a file's name may have, are escaped there, so that it is one line.
    """

    reason: str  # its kind, by which reports count faults
    file: str  # relative to the source folder
    detail: str  # "found X, needs Y; do Z."
    line: int = 0  # from 1; 0: the fault is of no line
    subject: str = ""  # "clip ID", "image ID" or the like

    def __str__(self) -> str:
        line = f" line {self.line}" if self.line else ""
        subject = f" ({self.subject})" if self.subject else ""
        text = f"{self.file}{line}{subject}: {self.detail}"
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda control: repr(control[0])[1:-1], text)


class BadInputError(ValueError):
    """A part of the source that cannot be used. A caller that knows the clip or image makes it a Fault by `at`."""

    def __init__(self, reason: str, detail: str, file: str | None = None) -> None:
        super().__init__(reason, detail, file)  # all of them: a worker process sends the error by these arguments
        self.reason = reason
        self.detail = detail
        self.file = file  # at fault, relative to the source folder; None: the file that the caller reads

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}" if self.file else self.detail

    def at(self, file: str, line: int = 0, subject: str = "") -> Fault:
        """Returns the error as a fault of line `line` of `file`, the list that the caller reads.

        If the error names another file, the fault is in that one, with line 0. Its detail then names `file` and `line`,
        unless the error's file is in a folder called `file`.
        """
        if self.file is not None and self.file != file:
            named = "" if self.file.startswith(f"{file}/") else f" (named by {file}{f' line {line}' if line else ''})"
            return Fault(self.reason, self.file, self.detail + named, subject=subject)
        return Fault(self.reason, file, self.detail, line, subject)


def counted(number: int, noun: str, nouns: str = "") -> str:
    """Returns "1 fault", "2 faults" and so on, with commas between thousands. nouns: the plural if it is no NOUNs."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


class WrongUseError(ValueError):
    """A command cannot start with these arguments or this source: exit status 2."""


class FailedError(Exception):
    """The work of a command failed; the message says why: exit status 1."""
