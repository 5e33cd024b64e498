"""What is wrong with the source, said once: which file and line, whose, what was found, what is needed, what to do."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the source. `reason` is its kind, by which the report counts."""

    reason: str
    file: str  # relative to the source folder
    detail: str  # "found X, needs Y; do Z."
    line: int = 0  # from 1; 0: not of a line
    subject: str = ""  # "clip ID" or "image ID"

    def __str__(self) -> str:
        line = f" line {self.line}" if self.line else ""
        subject = f" ({self.subject})" if self.subject else ""
        return f"{self.file}{line}{subject}: {self.detail}"


class BadInputError(ValueError):
    """A part of the source that cannot be used; whoever knows where it stands catches it and makes it a Fault."""

    def __init__(self, reason: str, detail: str, file: str | None = None) -> None:
        super().__init__(reason, detail, file)  # all of them, or it could not leave a worker
        self.reason = reason
        self.detail = detail
        self.file = file  # None: where the caller stands

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}" if self.file else self.detail

    def at(self, file: str, line: int = 0, subject: str = "") -> Fault:
        if self.file is not None and self.file != file:  # the picture is at fault, the line only names it
            named = "" if self.file.startswith(f"{file}/") else f" (named by {file}{f' line {line}' if line else ''})"
            return Fault(self.reason, self.file, self.detail + named, subject=subject)
        return Fault(self.reason, file, self.detail, line, subject)


class WrongUseError(ValueError):
    """The command cannot begin as it was given: exit status 2."""


class FailedError(Exception):
    """The command's work failed, and the message says all: exit status 1."""
