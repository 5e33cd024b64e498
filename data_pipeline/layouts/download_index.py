"""The index of a download: where the pictures that are looked up are, in files that all workers map."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.faults import Fault
from data_pipeline.layouts.img2dataset import ABSENT, PLACE, STORED, Download, scan_shard
from data_pipeline.layouts.listing import RunTasks


class Index:
    """An index of the wanted names of one download. Picklable, since it maps its arrays from files in `folder`."""

    def __init__(self, download: Download, folder: Path) -> None:
        self.download = download
        name = download.folder.replace("/", "-")
        self.hashes_file, self.places_file = folder / f"{name}.hashes.npy", folder / f"{name}.places.npy"
        self.complete = True  # every shard's table was read, so that a name which is not listed was never downloaded
        self.listed = self.failed = 0  # numbers of all downloads
        self.faults: list[Fault] = []  # of shards
        self._save(np.zeros(0, np.uint64), np.zeros(0, PLACE))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("hashes", "places")}

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        return np.load(self.hashes_file, mmap_mode="r")

    @cached_property
    def places(self) -> NDArray[np.void]:
        return np.load(self.places_file, mmap_mode="r")

    def add(self, hashes: NDArray[np.uint64], run: RunTasks) -> None:
        """Looks up new hashes in every shard; sets counts, `complete` and `faults`. Raises as `scan_shard` does."""
        wanted = np.setdiff1d(hashes, self.hashes)
        if not len(wanted):
            return
        wanted_file = self.hashes_file.with_suffix(".wanted.npy")
        np.save(wanted_file, wanted)
        places = np.zeros(len(wanted), PLACE)
        self.listed = self.failed = 0
        shards = range(len(self.download.shards))
        tasks = ((self.download, number, wanted_file) for number in shards)
        for scan in run(scan_shard, tasks, f"{self.download.folder}: shards", total=len(shards), unit="shard"):
            # Of a name that was downloaded twice, in this shard or two, a success counts: so successes come last.
            last = np.argsort(scan.places["state"] == STORED, kind="stable")
            at, found = np.searchsorted(wanted, scan.hashes[last]), scan.places[last]
            better = (places["state"][at] != STORED) | (found["state"] == STORED)
            places[at[better]] = found[better]
            self.listed, self.failed = self.listed + scan.listed, self.failed + scan.failed
            self.complete &= scan.has_table
            self.faults += [fault for fault in scan.faults if fault not in self.faults]
        all_hashes, all_places = np.concatenate([self.hashes, wanted]), np.concatenate([self.places, places])
        order = np.argsort(all_hashes)
        self._save(all_hashes[order], all_places[order])

    def _save(self, hashes: NDArray[np.uint64], places: NDArray[np.void]) -> None:
        for name, values, path in (("hashes", hashes, self.hashes_file), ("places", places, self.places_file)):
            self.__dict__.pop(name, None)
            path.unlink(missing_ok=True)  # and not overwritten, since the old file may still be mapped
            np.save(path, values)

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.void]:
        """Returns the PLACE of each name, by its hash. The state is ABSENT for names not indexed or in no shard."""
        if not len(self.hashes):
            return np.zeros(len(hashes), PLACE)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        found = np.array(self.places[at])
        found["state"][self.hashes[at] != hashes] = ABSENT
        return found
