"""Paths as a user gives them: `~` is the home folder; no path, and the address of an object store, are refused."""

import os
import re
import sys
from pathlib import Path

# "gs://bucket", what Path makes of it, "gs:/bucket", and with a name that only a store has also "gs:bucket". One letter
# is a drive of Windows, "me@host:/data" another machine.
STORES = "abfss?|az|azure|b2|cos|dbfs|file|ftps?|gcs|gs|hdfs|hf|https?|memory|oss|r2|s3[an]?|sftp|ssh|viewfs|wasbs?"
ADDRESS = re.compile(rf"\s*([A-Za-z][A-Za-z0-9+.:@_-]+(?=:/)|(?:{STORES})(?=:)):", re.IGNORECASE)


def expand(path: str | os.PathLike[str]) -> str:
    """Returns the path as text, with a leading `~` or `~USER` replaced by that home folder; all else is unchanged.

    Raises ValueError for an empty path, for the address of an object store or server (gs://, s3://, file:// and so on,
    also with one slash or none), and for a user that this machine does not have.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(
            "a path is empty, as that of a shell variable that is not set; give the path. (The current folder is `.`)"
        )
    if address := ADDRESS.match(text):
        raise ValueError(
            f"{text}: found an address ({address[1]}:), needs a path of this machine; mount or copy what is there, and "
            f"give its path here. (A folder of that name: ./{text.strip()})"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{text}: found no such user here; give the whole path. (A folder of that name: ./{text})")
    return expanded


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns expand(path) as a Path. Raises ValueError as `expand` does."""
    return Path(expand(path))


def parse_path(text: str) -> Path:
    """Returns local_path(text), for an option. Where that refuses it, prints one line and raises SystemExit(2)."""
    try:
        return local_path(text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
