"""The copy: what each chunk of an image is filled from, as tables for the C code that outlive a save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

import ckptengine._native as _native
from ckptengine.archive.image import BLOCK_NBYTES, Chunk, Image
from ckptengine.errors import StateError
from ckptengine.layout.tiling import strides_of
from ckptengine.native.tables import CopyPlan, Row, copy_row
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part
from ckptengine.schema.path import Path, dotted
from ckptengine.snapshot.devices import DeviceChunk, DeviceChunks
from ckptengine.snapshot.threads import copy_threads

__all__ = ["Checksums", "CopyTable", "Rows"]


class Checksums:
    """CRC32s of an image that is being filled, uint32, 1-D: of pieces, of entries, of blocks of the fixed region."""

    def __init__(self, image: Image) -> None:
        self.pieces = np.zeros(image.pieces, np.uint32)
        self.entries = np.zeros(len(image.chunks), np.uint32)
        self.blocks = np.zeros(image.blocks, np.uint32)


class Rows(Enum):
    """Which chunks: copied at once, or until the optimizer's next step, or from where the CPU can't address them."""

    NOW = "now"
    FENCED = "fenced"
    DEVICE = "device"


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


class CopyTable:
    """What an image is filled from. It holds addresses: it is good for as long as `move` is told what has moved.

    `leaves` are the state's, in its order; `numbers` leads from the leaf numbers of the image's chunks to theirs. With
    `overlap`, what only an optimizer's step changes is left to `fill(..., Rows.FENCED)`. What lies on devices is begun
    by `begin` and `begin_fenced`, is there after `wait`, and is checksummed by `fill(..., Rows.DEVICE)`.
    """

    def __init__(self, image: Image, leaves: Sequence[ArrayLeaf], numbers: Sequence[int], overlap: bool) -> None:
        self.image = image
        self._itemsizes = [DTYPES[leaf.dtype].itemsize for leaf in leaves]
        self._dtypes = [DTYPES[leaf.dtype].numpy for leaf in leaves]
        self._paths = [leaf.path for leaf in leaves]
        self._pieces: list[int] = image.extents[:, 2].tolist()
        self._places: dict[int, list[int]] = {}  # the chunks of each leaf
        self._devices = DeviceChunks(image)
        rows: dict[Rows, dict[int, Row]] = {kind: {} for kind in Rows}
        for place, chunk in enumerate(image.chunks):
            number = numbers[chunk.leaf]
            self._places.setdefault(number, []).append(place)
            fenced = overlap and leaves[number].fenced
            row = self._row(place, number, leaves[number].parts, fenced)
            kind = Rows.DEVICE if place in self._devices else Rows.FENCED if fenced else Rows.NOW
            rows[kind][place] = row
        self._operations = {kind: _Operations.of(some) for kind, some in rows.items()}

    @property
    def has_devices(self) -> bool:
        """Whether there is memory that the CPU can't address."""
        return bool(self._operations[Rows.DEVICE].of_chunk)

    @property
    def has_fenced(self) -> bool:
        """Whether anything is left until an optimizer's next step."""
        return bool(self._operations[Rows.FENCED].of_chunk) or self._devices.has_fenced

    def move(self, moved: Mapping[int, tuple[Part, ...]], held: Mapping[int, Any]) -> None:
        """Take other memory for some leaves, by their numbers in the state; their boxes are as before.

        `held` has what owns the memory of those on devices that are where they were.
        """
        places = self._places
        self._devices.hold({place: owner for number, owner in held.items() for place in places.get(number, ())})
        for number, parts in moved.items():
            for place in self._places.get(number, ()):
                row = self._row(place, number, parts, self._devices.is_fenced(place))
                for operations in self._operations.values():
                    if place in operations.of_chunk:
                        operations.replace(place, row)

    def mark(self) -> None:
        """Have what is copied next follow what devices have been given so far by this thread; another one may copy."""
        self._devices.mark()

    def begin(self, address: int, timeout: float) -> None:
        """Begin to bring over what the CPU can't address, to its place in an image at an address.

        What can't wait is there when the call returns; what is fenced waits for `begin_fenced`, which any thread may
        call, and takes it as it is now. Raises `DeviceError`, also where a device does not answer for some seconds.
        """
        self._devices.begin(address, timeout)
        for place in self._devices.take_redirected():  # by a snapshot in windows
            self._operations[Rows.DEVICE].set_source(place, 0, 0)

    def begin_fenced(self, timeout: float) -> None:
        """Begin to bring over what is fenced, and else may be beside the device's work; raises as `begin` does."""
        self._devices.begin_fenced(timeout)

    @property
    def under_way(self) -> bool:
        """Whether devices may still be copying: Ctrl-C has ended the waits for what was begun."""
        return self._devices.under_way

    def wait(self, timeout: float) -> None:
        """Return when all that was begun is there; raises as `begin` does."""
        self._devices.wait(timeout)

    def fill(self, rows: Rows, address: int, checksums: Checksums, begin: int = 0, end: int = -1) -> None:
        """Copy some rows of a window of the image to where its byte `begin` lies, and checksum their pieces.

        The window `[begin, end)` is cut as `_native.pack` has it; -1 is the image's end.
        """
        operations = self._operations[rows]
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

    def fill_window(self, address: int, checksums: Checksums, begin: int, end: int, timeout: float) -> None:
        """Copy all of a window of the image, and checksum it; what lies on devices through memory of its own.

        Raises `DeviceError`, also where a device has not copied a chunk within some seconds.
        """
        for place, memory in self._devices.stage(begin, end, timeout):
            self._operations[Rows.DEVICE].set_source(place, memory.ctypes.data, memory.nbytes)
        for rows in Rows:
            self.fill(rows, address, checksums, begin, end)

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
        self._devices.release()

    def _row(self, place: int, number: int, parts: Sequence[Part], fenced: bool) -> Row:
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
        device = DeviceChunk(self._paths[number], box, part.box.shape, self._dtypes[number], fenced)
        self._devices.add(place, device, part.memory)
        strides = [stride * itemsize for stride in strides_of(box.shape)]
        return copy_row(*head, (0, 0, 0), chunk.dense_shape, box.shape, strides)


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
