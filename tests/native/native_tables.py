"""The extension under test, the tables that it takes, and numpy references for what it does."""

import importlib.util
import itertools
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

GUARD = 64
FILL = 0xA5
DTYPES = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
SANITIZED = os.environ.get("CKPTENGINE_NATIVE_BUILD")

# Under the sanitizers each example costs several times as much; the seeds differ from run to run anyway.
settings.register_profile("native", deadline=None, max_examples=40 if SANITIZED else 250)
examples = settings.get_profile("native")


def _extension() -> Any:
    """Return the installed extension, or the build that CKPTENGINE_NATIVE_BUILD names."""
    if SANITIZED is None:
        import ckptengine._native as _native

        return _native
    spec = importlib.util.spec_from_file_location("ckptengine._native", SANITIZED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ckptengine._native"] = module
    spec.loader.exec_module(module)
    return module


native = _extension()


def random_bytes(seed: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def memory_of(array: np.ndarray) -> tuple[int, int]:
    """Return the lowest address and the size of the memory that an array is a view of."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner.ctypes.data, owner.nbytes


@st.composite
def strided(draw: st.DrawFn, *, broadcast: bool = True, least: int = 1, most: int = 9) -> np.ndarray:
    """Draw an array with any strides: steps, negative steps, permuted axes, zero strides."""
    itemsize = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(least, most), max_size=4))
    base = random_bytes(draw(st.integers(0, 2**32)), int(np.prod(shape, dtype=int)) * itemsize)
    array = base.view(DTYPES[itemsize]).reshape(shape)
    keys = []
    for length in shape:
        step = draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2]))
        start = draw(st.integers(0, length - 1)) if draw(st.booleans()) and length else None
        keys.append(slice(start, None, step))
    array = array[(*keys, ...)]
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    if broadcast and draw(st.integers(0, 3)) == 0:
        array = np.broadcast_to(array, (draw(st.integers(1, 4)), *array.shape))
    return array


@dataclass
class PackOp:
    """One op of pack: where it goes, its dense shape, and the array that fills its leading corner."""

    position: int
    dense_shape: tuple[int, ...]
    source: np.ndarray
    address: int | None = None

    @property
    def itemsize(self) -> int:
        return self.source.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.dense_shape, dtype=int)) * self.itemsize

    def dense(self) -> bytes:
        array = np.zeros(self.dense_shape, self.source.dtype)
        array[tuple(slice(0, n) for n in self.source.shape)] = self.source
        return array.tobytes()

    def row(self, crc_index: int) -> list[int]:
        low, nbytes = memory_of(self.source)
        address = self.source.ctypes.data if self.address is None else self.address
        head = [self.position, self.nbytes, crc_index, self.itemsize, self.source.ndim, address, low, nbytes]
        return [*head, *self.dense_shape, *self.source.shape, *self.source.strides]


@dataclass
class ScatterOp:
    """One op of scatter: where its dense array lies, and the array that its sub-box goes to."""

    position: int
    dense_shape: tuple[int, ...]
    offset: tuple[int, ...]
    target: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.dense_shape, dtype=int)) * self.target.dtype.itemsize

    def expected(self, file: np.ndarray) -> np.ndarray:
        dense = np.frombuffer(file[self.position : self.position + self.nbytes].tobytes(), self.target.dtype)
        keys = tuple(slice(o, o + n) for o, n in zip(self.offset, self.target.shape, strict=True))
        return dense.reshape(self.dense_shape)[keys]

    def row(self) -> list[int]:
        low, nbytes = memory_of(self.target)
        head = [self.position, self.nbytes, self.target.dtype.itemsize, self.target.ndim]
        memory = [self.target.ctypes.data, low, nbytes]
        return [*head, *memory, *self.dense_shape, *self.offset, *self.target.shape, *self.target.strides]


def table(rows: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat vector of some ops and the index of where each begins."""
    flat: list[int] = []
    index = [0]
    for row in rows:
        flat += row
        index.append(len(flat))
    return np.array(flat, np.int64), np.array(index, np.int64)


def piece_bounds(position: int, nbytes: int, block: int) -> list[tuple[int, int]]:
    """Return the pieces of [position, position + nbytes), cut at multiples of block."""
    cuts = [position, *range((position // block + 1) * block, position + nbytes, block), position + nbytes]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def pack_table(ops: Sequence[PackOp], block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ops, index and a CRC table for pack, each op's CRCs one after the other."""
    rows, count = [], 0
    for op in ops:
        rows.append(op.row(count))
        count += len(piece_bounds(op.position, op.nbytes, block))
    return *table(rows), np.zeros(count, np.uint32)


def block_crcs(file: np.ndarray, block: int) -> np.ndarray:
    data = file.tobytes()
    return np.array([zlib.crc32(data[i : i + block]) for i in range(0, len(data), block)], np.uint32)


def aligned(nbytes: int, offset: int = 0) -> np.ndarray:
    """Return zeroed memory that starts `offset` bytes after a multiple of 4096."""
    memory = np.zeros(nbytes + offset + 4096, np.uint8)
    start = -memory.ctypes.data % 4096 + offset
    return memory[start : start + nbytes]
