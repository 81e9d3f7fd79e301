"""The copy: what each chunk of an image is filled from, as tables for the C code that outlive a save."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptengine._native as _native
from ckptengine.archive.image import BLOCK_NBYTES, Chunk, Image
from ckptengine.errors import StateError
from ckptengine.layout.tiling import strides_of
from ckptengine.native.tables import CopyPlan, Row, copy_row
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, DeviceMemory, HostMemory, Part
from ckptengine.schema.path import Path, dotted
from ckptengine.snapshot.threads import copy_threads

__all__ = ["Checksums", "CopyTable"]


class Checksums:
    """CRC32s of an image that is being filled, uint32, 1-D: of pieces, of entries, of blocks of the fixed region."""

    def __init__(self, image: Image) -> None:
        self.pieces = np.zeros(image.pieces, np.uint32)
        self.entries = np.zeros(len(image.chunks), np.uint32)
        self.blocks = np.zeros(image.blocks, np.uint32)


@dataclass(frozen=True, slots=True)
class _Operations:
    """The copies of some chunks: `of_chunk` leads from each to its row in the plan."""

    plan: CopyPlan
    of_chunk: dict[int, int]

    @classmethod
    def of(cls, rows: Mapping[int, Row]) -> _Operations:
        return cls(CopyPlan.of(rows.values()), {chunk: number for number, chunk in enumerate(rows)})

    def replace(self, chunk: int, row: Row) -> None:
        self.plan.replace(self.of_chunk[chunk], row)

    def set_source(self, chunk: int, address: int, nbytes: int) -> None:
        self.plan.set_source(self.of_chunk[chunk], address, nbytes)


@dataclass(frozen=True, slots=True)
class _DeviceChunk:
    """A chunk whose bytes the CPU can't address: the part that holds it, and its box within that."""

    part: Part
    box: Box
    dtype: np.dtype[Any]

    def begin(self, target: NDArray[Any], beside: bool) -> Callable[[], None]:
        """Begin to copy the box to an array of its shape; return what waits for the end of that."""
        memory = self.part.memory
        assert isinstance(memory, DeviceMemory)
        if self.box.shape == self.part.box.shape:
            return memory.begin_copy(target, beside)
        whole = np.empty(self.part.box.shape, self.dtype)
        wait = memory.begin_copy(whole, beside)

        def cut() -> None:
            wait()
            target[...] = whole[tuple(slice(o, o + n) for o, n in zip(self.box.offset, self.box.shape, strict=True))]

        return cut


class CopyTable:
    """What an image is filled from. It holds addresses: it is good for as long as `move` is told what has moved.

    `leaves` are the state's, in its order; `numbers` leads from the leaf numbers of the image's chunks to theirs. With
    `overlap`, what only an optimizer's step changes is left to `fill(..., fenced=True)`.
    """

    def __init__(self, image: Image, leaves: Sequence[ArrayLeaf], numbers: Sequence[int], overlap: bool) -> None:
        self.image = image
        self._itemsizes = [DTYPES[leaf.dtype].itemsize for leaf in leaves]
        self._dtypes = [DTYPES[leaf.dtype].numpy for leaf in leaves]
        self._paths = [leaf.path for leaf in leaves]
        self._pieces: list[int] = image.extents[:, 2].tolist()
        self._places: dict[int, list[int]] = {}  # the chunks of each leaf
        self._devices: dict[int, _DeviceChunk] = {}
        self._staged: dict[int, NDArray[Any]] = {}
        self._waits: list[Callable[[], None]] = []
        rows: tuple[dict[int, Row], dict[int, Row]] = ({}, {})
        for place, chunk in enumerate(image.chunks):
            number = numbers[chunk.leaf]
            self._places.setdefault(number, []).append(place)
            rows[overlap and leaves[number].fenced][place] = self._row(place, number, leaves[number].parts)
        self._operations = (_Operations.of(rows[False]), _Operations.of(rows[True]))

    @property
    def has_devices(self) -> bool:
        """Whether there is memory that the CPU can't address."""
        return bool(self._devices)

    @property
    def has_fenced(self) -> bool:
        """Whether anything is left to `fill(..., fenced=True)`."""
        return bool(self._operations[True].of_chunk)

    def move(self, moved: Mapping[int, tuple[Part, ...]]) -> None:
        """Take other memory for some leaves, by their numbers in the state; their boxes are as before."""
        for number, parts in moved.items():
            for place in self._places.get(number, ()):
                operations = self._operations[place in self._operations[True].of_chunk]
                operations.replace(place, self._row(place, number, parts))

    def fill(self, address: int, checksums: Checksums, begin: int = 0, end: int = -1, *, fenced: bool = False) -> None:
        """Copy a window of the image to where its byte `begin` lies, and checksum its pieces.

        The window `[begin, end)` is cut as `_native.pack` has it; -1 is the image's end.
        """
        operations = self._operations[fenced]
        whole = begin == 0 and end in (-1, self.image.fixed_nbytes)
        if whole and not fenced:
            self._begin_devices(address)
        elif not whole and not fenced:
            self._stage_devices(begin, end)
        if whole and fenced:
            self._wait()
        if operations.of_chunk:
            _native.pack(
                address,
                self.image.fixed_nbytes,
                operations.plan.ops,
                operations.plan.index,
                BLOCK_NBYTES,
                checksums.pieces,
                copy_threads(),
                None,
                begin,
                end,
            )

    def seal(self, address: int, checksums: Checksums, begin: int = 0, end: int = -1) -> None:
        """Turn the CRCs of a window's pieces into those of entries and blocks, and put them into the image."""
        _native.seal(
            address,
            self.image.fixed_nbytes,
            self.image.extents,
            BLOCK_NBYTES,
            checksums.pieces,
            checksums.entries,
            checksums.blocks,
            copy_threads(),
            begin,
            end,
        )

    def release(self) -> None:
        """Let go of devices' memory: the table outlives the save, the tensors need not."""
        self._devices.clear()
        self._staged.clear()
        self._waits.clear()

    def _row(self, place: int, number: int, parts: Sequence[Part]) -> Row:
        """Return the copy of a chunk."""
        chunk = self.image.chunks[place]
        part, box = _source(chunk, parts, self._paths[number])
        itemsize = self._itemsizes[number]
        head = (chunk.position, chunk.nbytes, self._pieces[place], itemsize)
        if isinstance(part.memory, HostMemory):
            memory = part.memory
            address = memory.address + sum(o * s for o, s in zip(box.offset, memory.strides, strict=True))
            source = (address, memory.low, memory.nbytes)
            return copy_row(*head, source, chunk.dense_shape, box.shape, memory.strides)
        self._devices[place] = _DeviceChunk(part, box, self._dtypes[number])
        strides = [stride * itemsize for stride in strides_of(box.shape)]
        return copy_row(*head, (0, 0, 0), chunk.dense_shape, box.shape, strides)

    def _begin_devices(self, address: int) -> None:
        """Begin to bring over what the CPU can't address, and wait for what is not fenced.

        It goes to its place, where `_native.pack` only checksums it.
        """
        waits: tuple[list[Callable[[], None]], list[Callable[[], None]]] = ([], [])
        try:
            for place, device in self._devices.items():
                chunk, fenced = self.image.chunks[place], place in self._operations[True].of_chunk
                self._operations[fenced].set_source(place, 0, 0)
                waits[fenced].append(device.begin(_dense(address + chunk.position, chunk, device), beside=fenced))
            for wait in waits[False]:
                wait()
        except BaseException:
            # The others still write into this memory, which the failed save gives to the next one, or back.
            for wait in (*waits[False], *waits[True]):
                with contextlib.suppress(Exception):
                    wait()
            raise
        self._waits = waits[True]

    def _wait(self) -> None:
        waits, self._waits = self._waits, []
        failure: Exception | None = None
        for wait in waits:  # all of them: see `_begin_devices`
            try:
                wait()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _stage_devices(self, begin: int, end: int) -> None:
        """Bring over what the CPU can't address of a window, to memory of its own for as long as windows need it."""
        for place, device in self._devices.items():
            chunk = self.image.chunks[place]
            if chunk.position >= end or chunk.position + chunk.nbytes <= begin:
                continue
            staged = self._staged.get(place)
            if staged is None:
                staged = self._staged[place] = np.empty(device.box.shape, device.dtype)
                device.begin(staged, beside=False)()
            operations = self._operations[place in self._operations[True].of_chunk]
            operations.set_source(place, staged.ctypes.data, staged.nbytes)
        self._staged = {
            place: staged
            for place, staged in self._staged.items()
            if self.image.chunks[place].position + self.image.chunks[place].nbytes > begin
        }


def _dense(address: int, chunk: Chunk, device: _DeviceChunk) -> NDArray[Any]:
    """Return the corner of a chunk's place in memory that its box fills; the rest of the place becomes zero."""
    memory = (ctypes.c_uint8 * chunk.nbytes).from_address(address)
    dense: NDArray[Any] = np.frombuffer(memory, device.dtype).reshape(chunk.dense_shape)
    # As many indices as there are dimensions give a copy where there are none: the view of a scalar needs the dots.
    inside: Any = (*(slice(0, length) for length in device.box.shape), ...)
    corner: NDArray[Any] = dense[inside]
    if corner.size != dense.size:
        dense[...] = 0
    return corner


def _source(chunk: Chunk, parts: Sequence[Part], path: Path) -> tuple[Part, Box]:
    """Return the part of a leaf that holds a chunk, and the chunk's box within it."""
    for part in parts:
        if part.box == chunk.box:
            return part, Box((0,) * len(chunk.box.shape), chunk.box.shape)
        start = tuple(c - p for c, p in zip(chunk.box.offset, part.box.offset, strict=True))
        if all(
            s >= 0 and s + length <= have
            for s, length, have in zip(start, chunk.box.shape, part.box.shape, strict=True)
        ):
            return part, Box(start, chunk.box.shape)
    raise StateError(f"{dotted(path)}: no memory of this rank holds its planned box {chunk.box}")
