"""The files of a stream: what they are called, how many records each has, and whether they are still the same."""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ckptengine.data.readers import Calling, Counted, Lines, Reader
from ckptengine.errors import StateError, StorageError

__all__ = ["Shards", "as_reader"]

_CACHE_VERSION = 1


def as_reader(read: Reader | Callable[[str, int], Iterator[Any]] | None) -> Reader:
    """Return a reader as it is, a function `(path, start) -> records` wrapped, `Lines` for None."""
    if read is None:
        return Lines()
    if isinstance(read, Reader):
        return read
    if callable(read):
        return Calling(read)
    raise TypeError(f"a reader is a ckptengine.data.readers.Reader or a function (path, start), not {read!r}")


@dataclass(frozen=True)
class Shards:
    """List the files of a stream, in the order that numbers their records: sample 0 is record 0 of the first file.

    Make it with `Shards.count` or `Shards.given`. `counts` are numbers of records. `nbytes` are the files' sizes in
    bytes when they were counted; None for a path that is not a local file, whose size is not compared. `marks` are the
    reader's own, to find records quickly.
    """

    paths: tuple[str, ...]
    counts: tuple[int, ...]
    nbytes: tuple[int | None, ...]
    marks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("no shards: give at least one file (does the pattern match any file?)")
        if len(self.counts) != len(self.paths):
            raise ValueError(f"{len(self.counts)} counts for {len(self.paths)} shards: give one for each, in order")
        if len(self.nbytes) != len(self.paths) or len(self.marks) != len(self.paths):
            raise ValueError("sizes and marks must be one for each shard; make Shards by Shards.given or Shards.count")
        for path, count in zip(self.paths, self.counts, strict=True):
            if count < 0:
                raise ValueError(f"{path}: a count of {count} records; give the number of records from 0 on")

    @staticmethod
    def given(paths: Iterable[str | os.PathLike[str]], counts: Iterable[int]) -> Shards:
        """Return shards whose numbers of records are known. Raises `StorageError` if a file does not exist."""
        names = _names(paths)
        numbers = tuple(operator.index(count) for count in counts)
        return Shards(names, numbers, tuple(map(_nbytes, names)), ((),) * len(names))

    @staticmethod
    def count(
        paths: Iterable[str | os.PathLike[str]],
        read: Reader | Callable[[str, int], Iterator[Any]] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> Shards:
        """Count the records of each file and return the shards. Reads whole files, except with `NpyRows`, `BinaryRows`.

        `cache` names a JSON file that stores counts by path, size and time of the last change: the same reader does not
        read unchanged files again. It is replaced as a whole, so several processes may use it at a time. Raises
        `StorageError` if a file can't be read, `StateError` if `cache` is another kind of file.
        """
        names, reader = _names(paths), as_reader(read)
        known = _read_cache(cache, reader.name)
        entries: dict[str, list[Any]] = {}
        for path in dict.fromkeys(names):
            key = _stamp(path)
            entry = known.get(path)
            if entry is None or key is None or entry[:2] != key:
                counted = _count(reader, path)
                entry = [*(key or (None, None)), counted.records, list(counted.marks)]
            entries[path] = entry
        if cache is not None and any(known.get(path) != entry for path, entry in entries.items()):
            _write_cache(cache, reader.name, {**known, **entries})
        found = [entries[path] for path in names]
        return Shards(names, tuple(e[2] for e in found), tuple(e[0] for e in found), tuple(tuple(e[3]) for e in found))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files' names, relative to the folder that holds all: a moved data set is the same."""
        folder = os.path.dirname(self.paths[0])
        if len(self.paths) > 1 and not any("://" in path for path in self.paths):
            folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in self.paths])
            names = [os.path.relpath(os.path.abspath(path), folder) for path in self.paths]
        else:
            names = [os.path.basename(path) if len(self.paths) == 1 else path for path in self.paths]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def check(self, number: int) -> None:
        """Raise `StorageError` where a file is gone, or has another size than when it was counted."""
        expected = self.nbytes[number]
        if expected is None:
            return
        found = _nbytes(self.paths[number])
        if found != expected:
            raise StorageError(
                errno.ESTALE,
                f"{self.paths[number]} has {found} bytes, {expected} when its records were counted: a shard must stay "
                "as it is while a run uses it. Restore the file; or count anew and begin a new epoch with the new data",
            )


def _names(paths: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"shards are a list of files, not one path: [{os.fspath(paths)!r}]")
    return tuple(os.fspath(path) for path in paths)


def _nbytes(path: str) -> int | None:
    if "://" in path:
        return None
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise StorageError(
            error.errno, f"{path}: the shard can't be read ({error.strerror}); has the data set been moved?"
        ) from error


def _stamp(path: str) -> list[int] | None:
    nbytes = _nbytes(path)
    return None if nbytes is None else [nbytes, os.stat(path).st_mtime_ns]


def _count(reader: Reader, path: str) -> Counted:
    try:
        return reader.count(path)
    except OSError as error:
        raise StorageError(error.errno, f"{path}: counting its records failed: {error}") from error


def _read_cache(cache: str | os.PathLike[str] | None, reader: str) -> dict[str, list[Any]]:
    if cache is None or not os.path.exists(cache):
        return {}
    try:
        data = json.loads(Path(cache).read_text())
        if (data["version"], data["reader"]) != (_CACHE_VERSION, reader):
            return {}
        entries: dict[str, list[Any]] = data["shards"]
        if all(_is_entry(entry) for entry in entries.values()):
            return entries
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise StateError(
        f"{os.fspath(cache)} is no cache of record counts of this version; delete it, or name another file"
    )


def _is_entry(entry: Any) -> bool:
    if type(entry) is not list or len(entry) != 4 or type(entry[3]) is not list:
        return False
    numbers: Sequence[Any] = [*entry[:3], *entry[3]]
    return all(type(number) is int and number >= 0 for number in numbers if number is not None)


def _write_cache(cache: str | os.PathLike[str], reader: str, entries: dict[str, list[Any]]) -> None:
    folder = os.path.dirname(os.fspath(cache)) or "."
    text = json.dumps({"version": _CACHE_VERSION, "reader": reader, "shards": entries})
    try:
        os.makedirs(folder, exist_ok=True)
        part = f"{os.fspath(cache)}.{os.getpid()}-{secrets.token_hex(4)}"
        with open(part, "x") as file:
            file.write(text)
        os.replace(part, cache)
    except OSError as error:
        raise StorageError(error.errno, f"{os.fspath(cache)}: the counts can't be written there: {error}") from error
