"""How the records of one shard file are read, from any record on."""

from __future__ import annotations

import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ckptengine.schema.type_name import describe_type

__all__ = ["BinaryRows", "Calling", "Counted", "JsonLines", "Lines", "NpyRows", "Reader"]

MARK_STRIDE = 4096
"""Records between two remembered places of a text file: what a restart reads at most to find its line."""
_BLOCK_NBYTES = 1 << 20
_NEWLINE = 10
_FEW_LINES = 1024  # skipped one by one, which keeps the buffer; more are counted block by block


@dataclass(frozen=True, slots=True)
class Counted:
    """What a reader found out about a file: how many records it has, and marks that help to find one of them.

    What a mark is, is the reader's own business; it must be an int.
    """

    records: int
    marks: tuple[int, ...] = ()


class Reader(ABC):
    """Reads one kind of file. Instances are given to loader workers, so they must be picklable under `spawn`.

    The iterator that `open` returns may have a method `skip(n)` which passes n records by; without one they are
    read and dropped.
    """

    @property
    def name(self) -> str:
        """What tells readers apart that count the records of one file differently."""
        return describe_type(self)

    @abstractmethod
    def open(self, path: str, start: int, marks: Sequence[int] = ()) -> Iterator[Any]:
        """Return the file's records from number `start` (from 0) on; `marks` are those that `count` found."""

    def count(self, path: str) -> Counted:
        """Return how many records a file has; this one reads them all."""
        return Counted(sum(1 for _ in self.open(path, 0)))


class Calling(Reader):
    """A plain function `read(path, start)` that returns an iterator of records, or is a generator of them."""

    def __init__(self, read: Callable[[str, int], Iterator[Any]]) -> None:
        self._read = read

    @property
    def name(self) -> str:
        """Module and name of the function, or of its class."""
        qualified = getattr(self._read, "__qualname__", None)
        return describe_type(self._read) if qualified is None else f"{self._read.__module__}.{qualified}"

    def open(self, path: str, start: int, marks: Sequence[int] = ()) -> Iterator[Any]:
        """Return what the function returns."""
        return iter(self._read(path, start))


class Lines(Reader):
    r"""Lines of text: a record is a line without its end (`\n` or `\r\n`), as str, or what `parse(line: bytes)` gives.

    An empty line is a record too, and so is a last line without an end. Lines that are passed by are only counted:
    neither decoded nor parsed.
    """

    def __init__(self, parse: Callable[[bytes], Any] | None = None) -> None:
        self._parse = parse or _decode

    def open(self, path: str, start: int, marks: Sequence[int] = ()) -> Iterator[Any]:
        """Return the lines from one on: from the last mark before it, lines are counted."""
        mark = min(start // MARK_STRIDE, len(marks))
        file = open(path, "rb")  # noqa: SIM115 - the iterator closes it
        file.seek(marks[mark - 1] if mark else 0)
        lines = _LineIterator(path, file, mark * MARK_STRIDE, self._parse)
        lines.skip(start - mark * MARK_STRIDE)
        return lines

    def count(self, path: str) -> Counted:
        """Return the number of lines, and where every 4096th begins."""
        lines, offset, last = 0, 0, _NEWLINE
        marks: list[int] = []
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_NBYTES):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE)
                wanted = np.arange((-lines - 1) % MARK_STRIDE, len(ends), MARK_STRIDE)
                marks += (offset + ends[wanted] + 1).tolist()
                lines, offset, last = lines + len(ends), offset + len(block), block[-1]
        return Counted(lines + (last != _NEWLINE), tuple(marks))


class JsonLines(Lines):
    """Lines of JSON: a record is the parsed value of a line."""

    def __init__(self) -> None:
        super().__init__(_json)


def _decode(line: bytes) -> str:
    return line.decode()


def _json(line: bytes) -> Any:
    return json.loads(line.decode())  # given bytes, json would guess their encoding anew for each line


class _LineIterator(Iterator[Any]):
    """Lines of an open file."""

    def __init__(self, path: str, file: BinaryIO, number: int, parse: Callable[[bytes], Any]) -> None:
        self._path, self._file, self._number, self._parse = path, file, number, parse

    def __next__(self) -> Any:
        line = b"" if self._file.closed else self._file.readline()
        if not line:
            self.close()
            raise StopIteration
        number, self._number = self._number, self._number + 1
        try:
            return self._parse(line.removesuffix(b"\n").removesuffix(b"\r"))
        except ValueError as error:
            raise ValueError(f"{self._path}: line {number + 1} can't be parsed: {error}") from error

    def skip(self, lines: int) -> None:
        """Pass lines by; fewer where the file ends."""
        self._number += lines
        while lines >= _FEW_LINES:
            start, block = self._file.tell(), self._file.read(_BLOCK_NBYTES)
            if not block:
                return
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE)
            if len(ends) > lines:
                self._file.seek(start + int(ends[lines - 1]) + 1)
                return
            lines -= len(ends)
        for _ in itertools.islice(self._file, lines):
            pass

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NpyRows(Reader):
    """A `.npy` file: a record is one item of the first dimension, an array of its own memory."""

    def open(self, path: str, start: int, marks: Sequence[int] = ()) -> Iterator[Any]:
        """Return the rows from one on."""
        return _Rows(np.load(path, mmap_mode="r", allow_pickle=False), start)

    def count(self, path: str) -> Counted:
        """Return the first dimension's length, from the file's header."""
        return Counted(len(np.load(path, mmap_mode="r", allow_pickle=False)))


class BinaryRows(Reader):
    """Records of one size, one after the other: each an array of this dtype and shape; `offset` bytes come before."""

    def __init__(self, dtype: Any, shape: Sequence[int] = (), offset: int = 0) -> None:
        self._dtype, self._shape, self._offset = np.dtype(dtype), tuple(shape), offset
        self._nbytes = self._dtype.itemsize * int(np.prod(self._shape, dtype=np.int64))
        if self._nbytes <= 0 or offset < 0:
            raise ValueError(f"records of dtype {dtype} and shape {self._shape} after {offset} bytes: none can be read")

    @property
    def name(self) -> str:
        """The class, and what a record is."""
        return f"{super().name}({self._dtype}, {self._shape}, {self._offset})"

    def open(self, path: str, start: int, marks: Sequence[int] = ()) -> Iterator[Any]:
        """Return the records from one on."""
        records = self.count(path).records
        if records == 0:
            return iter(())
        return _Rows(np.memmap(path, self._dtype, "r", self._offset, (records, *self._shape)), start)

    def count(self, path: str) -> Counted:
        """Return the number of records, from the file's size; raises `ValueError` where a part of one is left over."""
        nbytes = os.path.getsize(path)
        records, rest = divmod(nbytes - self._offset, self._nbytes)
        if rest or records < 0:
            raise ValueError(
                f"{path}: {nbytes} bytes are not {self._offset} and a multiple of {self._nbytes}, the size of a record "
                f"of dtype {self._dtype} and shape {self._shape}; the file is of another kind, or not complete"
            )
        return Counted(records)


class _Rows(Iterator[Any]):
    """Rows of a mapped array, copied one by one."""

    def __init__(self, rows: np.ndarray[Any, Any], number: int) -> None:
        self._rows, self._number = rows, number

    def __next__(self) -> Any:
        if self._number >= len(self._rows):
            raise StopIteration
        row = np.array(self._rows[self._number])
        self._number += 1
        return row

    def skip(self, rows: int) -> None:
        """Pass rows by."""
        self._number += rows
