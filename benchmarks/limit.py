"""The limit: what the machine needs for the bytes alone, with no checksums, names or structure.

Saving is a plain copy by several threads into memory that is warm, then one new `O_DIRECT` file and fsync; loading is
`O_DIRECT` reads into that memory, then the copy back. Nothing of ckptengine is used.
"""

import contextlib
import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.state import State, nbytes

ALIGNMENT = 4096
REQUEST = 8 << 20
"""Bytes of a read or write; four are in flight. Larger and more did not help."""

_HUGE_PAGE = 2 << 20

Piece = tuple[int, int, int]
"""Address in the memory, address in a tensor, bytes."""

Way = tuple[Callable[[], None], Callable[[], None]]
"""What copies in, and what copies out."""


def warm_memory(size: int) -> memoryview:
    """Return memory of this many bytes, in huge pages where the system has them, all of it touched.

    From other memory `O_DIRECT` writes take up to three times as long.
    """
    memory = mmap.mmap(-1, size + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    whole.zero_()
    return memoryview(memory)[start : start + size]


def shares(pieces: Iterable[Piece], parts: int) -> list[list[Piece]]:
    """Split a copy into this many of equal bytes; pieces are cut where a share ends."""
    pieces = list(pieces)
    each = -(-sum(size for _, _, size in pieces) // parts)
    result: list[list[Piece]] = [[] for _ in range(parts)]
    done = 0
    for ours, theirs, size in pieces:
        offset = 0
        while offset < size:
            part = (done + offset) // each
            length = min(size - offset, (part + 1) * each - done - offset)
            result[part].append((ours + offset, theirs + offset, length))
            offset += length
        done += size
    return result


class Copier:
    """Copies a state to and from memory in the fastest plain way that this machine has.

    Tried are torch's own threads, and `memmove` (which releases the GIL) on one thread and on as many as there are
    cores. Which is fastest differs: torch's threads wait for each other after every tensor, one thread may do where
    the memory is the limit, and the neighbours of a virtual machine matter.
    """

    def __init__(self, memory: memoryview, state: State, tries: int = 3) -> None:
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        pieces, position = [], 0
        for tensor in state.values():
            place = self._bytes[position : position + tensor.nbytes]
            self._tensors.append((place, tensor.view(-1).view(torch.uint8)))
            pieces.append((place.data_ptr(), tensor.data_ptr(), tensor.nbytes))
            position += tensor.nbytes
        cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(cores)
        self.ways: dict[str, Way] = {"torch": (self._torch_in, self._torch_out)}
        for threads in sorted({1, cores}):
            self.ways[f"memmove, threads: {threads}"] = self._memmove(shares(pieces, threads))
        seconds = {name: [self._timed(copy_in) for _ in range(tries)] for name, (copy_in, _) in self.ways.items()}
        self.way = min(seconds, key=lambda name: statistics.median(seconds[name]))
        """The fastest way, in words."""
        self.copy_in, self.copy_out = self.ways[self.way]

    def close(self) -> None:
        self._pool.shutdown()
        self._tensors.clear()

    @staticmethod
    def _timed(copy: Callable[[], None]) -> float:
        began = time.perf_counter()
        copy()
        return time.perf_counter() - began

    def _torch_in(self) -> None:
        for place, tensor in self._tensors:
            place.copy_(tensor)

    def _torch_out(self) -> None:
        for place, tensor in self._tensors:
            tensor.copy_(place)

    def _memmove(self, parts: list[list[Piece]]) -> Way:
        def copy(part: list[Piece]) -> None:
            for target, source, size in part:
                ctypes.memmove(target, source, size)

        back = [[(theirs, ours, size) for ours, theirs, size in part] for part in parts]
        return lambda: _drain(self._pool.map(copy, parts)), lambda: _drain(self._pool.map(copy, back))


class Limit:
    """As a system: see `benchmarks.systems`."""

    name = "limit: memcpy, O_DIRECT"
    syncs = "fsync of the file and its directory"

    def __init__(self, folder: Path, state: State) -> None:
        self.path = folder / "limit"
        self.size = -(-nbytes(state) // ALIGNMENT) * ALIGNMENT
        self._memory = warm_memory(self.size)
        self.copier = Copier(self._memory, state)
        self._pool = ThreadPoolExecutor(4)

    def save(self, state: State) -> tuple[float, float]:
        began = time.perf_counter()
        self.copier.copy_in()
        stall = time.perf_counter() - began
        self.path.mkdir()
        fd = os.open(self.path / "bytes", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        os.posix_fallocate(fd, 0, self.size)
        self._transfer(lambda view, position: os.pwrite(fd, view, position))
        os.fsync(fd)
        os.close(fd)
        directory = os.open(self.path, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        return stall, time.perf_counter() - began

    def load(self, state: State) -> None:
        fd = os.open(self.path / "bytes", os.O_RDONLY | os.O_DIRECT)
        self._transfer(lambda view, position: os.preadv(fd, [view], position))
        os.close(fd)
        self.copier.copy_out()

    def close(self) -> None:
        self.copier.close()
        self._pool.shutdown()

    def _transfer(self, move: Callable[[memoryview, int], int]) -> None:
        view = memoryview(self._memory)

        def request(position: int) -> None:
            end = min(position + REQUEST, self.size)
            while position < end:
                position += move(view[position:end], position)

        _drain(self._pool.map(request, range(0, self.size, REQUEST)))


def _drain(results: Iterable[None]) -> None:
    """Wait for all, and raise what one raised."""
    for _ in results:
        pass
