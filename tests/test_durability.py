"""What survives a power cut: a file's bytes reach the disk before its name, and every file before the manifest.

The tests record each fsync and rename of a conversion, by inode, and check their order.
"""

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipeline.convert import main
from data_pipeline.format.manifest import MANIFEST
from tests.lpr_layouts import make_lpr750k


class Event(NamedTuple):
    kind: str  # "sync" or "rename"
    inode: int
    target: Path | None = None


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every later fsync and rename of this process, in order."""
    found: list[Event] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(file: int) -> None:
        fsync(file)
        found.append(Event("sync", os.fstat(file).st_ino))

    def recorded_replace(source: Path, target: Path) -> None:
        inode = os.stat(source).st_ino
        replace(source, target)
        found.append(Event("rename", inode, Path(target)))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return found


def test_a_conversion_that_has_its_manifest_has_all_of_its_bytes(events: list[Event], tmp_path: Path) -> None:
    output = tmp_path / "records"
    source = make_lpr750k(tmp_path / "source")
    assert main([f"--source={source}", f"--output={output}", "--layout=lpr750k", "--workers=1"]) == 0
    renames = {event.target: index for index, event in enumerate(events) if event.kind == "rename"}
    finished = renames[output / MANIFEST]

    def synced(inode: int, begin: int, end: int) -> bool:
        return any(event.kind == "sync" and event.inode == inode for event in events[begin:end])

    files = [path for path in output.rglob("*") if path.is_file() and path.name != "faults.txt"]
    assert len(files) > 20 and set(files) <= renames.keys()
    for path in files:
        index = renames[path]
        assert synced(path.stat().st_ino, 0, index), f"{path.name}: renamed before its bytes were on the disk"
        if path.name != MANIFEST:
            assert index < finished, f"{path.name}: written after the manifest"
            inode = path.parent.stat().st_ino
            assert synced(inode, index, finished), f"{path.name}: its name may be lost, and the manifest kept"
    assert synced(output.stat().st_ino, finished, len(events)), "the manifest's own name may be lost"
