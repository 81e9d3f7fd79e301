"""Reads the records of a lane order: each lane's files from front to back, one open file per lane."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.data.lanes import Lanes
from ckptengine.data.readers import Reader
from ckptengine.data.shards import Shards
from ckptengine.errors import StorageError

__all__ = ["RecordReader"]


@dataclass(slots=True)
class _Open:
    """A lane's open file: its number, its records from `next` on."""

    file: int
    records: Iterator[Any]
    next: int

    def close(self) -> None:
        close = getattr(self.records, "close", None)
        if close is not None:
            close()


class RecordReader:
    """Reads records by their positions in an epoch. In each process that it comes to it opens files of its own."""

    def __init__(self, shards: Shards, order: Lanes, reader: Reader) -> None:
        self._shards, self._order, self._reader = shards, order, reader
        self._open: dict[int, _Open] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, epoch: int, positions: NDArray[np.int64]) -> list[Any]:
        """Return the records at positions of an epoch, one-dimensional int64, in their order.

        A lane goes on in its open file where the record lies ahead there, and opens the file anew otherwise. Raises
        `StorageError` naming the file where it is gone, another size, or more or fewer records than counted.
        """
        self._enter_process()
        lanes, files, numbers = self._order.places(epoch, positions)
        cuts = np.flatnonzero((np.diff(lanes) != 0) | (np.diff(files) != 0) | (np.diff(numbers) != 1)) + 1
        records: list[Any] = []
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(lanes)], strict=True):
            if begin < end:
                records += self._read_run(int(lanes[begin]), int(files[begin]), int(numbers[begin]), end - begin)
        return records

    def close(self) -> None:
        """Close all files."""
        for current in self._open.values():
            current.close()
        self._open.clear()

    def _enter_process(self) -> None:
        """Forget files that were opened before a fork: both processes would move one position in them."""
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()

    def _read_run(self, lane: int, file: int, start: int, length: int) -> list[Any]:
        current = self._at(lane, file, start)  # not kept while it is read: after an error its place is unknown
        records = list(itertools.islice(current.records, length))
        current.next += len(records)
        if len(records) < length:
            raise self._ended(file, current.next)
        if current.next < self._shards.counts[file]:
            self._open[lane] = current
            return records
        if next(current.records, _NOTHING) is not _NOTHING:
            raise self._differs(file, self._found(file, "more"))
        current.close()
        return records

    def _at(self, lane: int, file: int, start: int) -> _Open:
        """Return a lane's file with a record as its next: the open one if that lies ahead in it; taken from `_open`."""
        current = self._open.pop(lane, None)
        if current is not None and (current.file != file or current.next > start):
            current.close()
            current = None
        if current is None:
            self._shards.check(file)
            opened = self._reader.open(self._shards.paths[file], start, self._shards.marks[file])
            return _Open(file, opened, start)
        ahead = start - current.next
        skip = getattr(current.records, "skip", None)
        if ahead and skip is not None:
            skip(ahead)
        elif ahead:
            passed = sum(1 for _ in itertools.islice(current.records, ahead))
            if passed < ahead:
                raise self._ended(file, current.next + passed)
        current.next = start
        return current

    def _ended(self, file: int, number: int) -> StorageError:
        return self._differs(file, self._found(file, f"none from record {number} on"))

    def _found(self, file: int, else_text: str) -> str:
        """Return how many records a file has, in words; or what was seen where counting anew finds no difference."""
        found = self._reader.count(self._shards.paths[file]).records
        return else_text if found == self._shards.counts[file] else str(found)

    def _differs(self, file: int, found: str) -> StorageError:
        return StorageError(
            errno.ESTALE,
            f"{self._shards.paths[file]}: {self._shards.counts[file]} records expected, as counted or given, {found} "
            "found: the file is not the one that was counted, or the count is that of another reader. Count the shards "
            "anew (Shards.count) and begin a new epoch with them, or restore the file",
        )


_NOTHING = object()
