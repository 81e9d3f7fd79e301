"""A checkpoint of another library, open for reading as one of ours is; nothing but sizes can be verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from ckptengine.archive.reader import Archive
from ckptengine.errors import CheckpointDamagedError
from ckptengine.foreign.blob import Blobs
from ckptengine.foreign.description import Description, Order
from ckptengine.layout.rows import LeafRecord
from ckptengine.layout.tiling import Int64s
from ckptengine.schema.path import Path
from ckptengine.state.saved import Saved, SavedLeaf
from ckptengine.storage.base import StorageView

__all__ = ["ForeignCheckpoint", "ForeignRows"]


class ForeignRows:
    """The layout of a foreign checkpoint; where a serialized tensor's elements lie is looked up for what is asked."""

    def __init__(self, description: Description, blobs: Blobs) -> None:
        self._description, self._table, self._blobs = description, description.table, blobs
        self._found: dict[int, tuple[int, Order | None]] = {}

    @property
    def leaves(self) -> tuple[LeafRecord, ...]:
        """All leaves, sorted by path."""
        return self._table.leaves

    @property
    def index(self) -> Mapping[tuple[Path, int | None], int]:
        """The place in `leaves` of each path, with None."""
        return self._table.index

    def boxes(self, leaf: int) -> tuple[Int64s, Int64s]:
        """Return offsets and lengths, int64 [rows, ndim], of all rows of a leaf."""
        return self._table.boxes(leaf)

    def places(self, rows: Int64s, nbytes: Int64s) -> tuple[Int64s, Int64s]:
        """Return file and position of the elements of these rows; raises `CheckpointDamagedError` naming the file."""
        files, positions = self._table.places(rows, nbytes)
        blobs = self._description.blobs
        if blobs is None:
            return files, positions
        self._look_up([row for row in dict.fromkeys(rows.tolist()) if row not in self._found and blobs[row]], blobs)
        found = [self._found[row][0] if row in self._found else None for row in rows.tolist()]
        pairs = zip(positions.tolist(), found, strict=True)
        return files, np.array([at if place is None else place for at, place in pairs], np.int64)

    def orders(self, rows: Int64s) -> Sequence[Order | None] | None:
        """Return the order in which the elements of each row are stored, where it is not C order."""
        orders = self._description.orders
        if not orders and not any(order for _, order in self._found.values()):
            return None
        return [self._found[row][1] if row in self._found else orders.get(row) for row in rows.tolist()]

    def _look_up(self, wanted: list[int], blobs: Int64s) -> None:
        """Find where serialized tensors have their elements, several at a time; `blobs` are their bytes by row."""
        if not wanted:
            return
        table = self._table
        starts = np.array([leaf.rows[0] for leaf in table.leaves], np.int64)
        numbers = np.searchsorted(starts, wanted, side="right") - 1
        requests = []
        boxes: dict[int, Int64s] = {}
        for row, number in zip(wanted, numbers.tolist(), strict=True):
            # Leaves without elements have no rows: the last that begins here is the one that has this one.
            leaf = table.leaves[number]
            if number not in boxes:
                boxes[number] = table.boxes(number)[1]
            shape = tuple(boxes[number][row - leaf.rows[0]].tolist())
            place = int(table.archive[row]), int(table.position[row]), int(blobs[row])
            requests.append((*place, leaf.name, leaf.dtype, shape))
        for row, found in zip(wanted, self._blobs.find(requests), strict=True):
            self._found[row] = found


class ForeignCheckpoint:
    """A foreign checkpoint in a storage. `location` is what the user has named: a file or a directory."""

    step = None
    generation = 0
    world_size = 1

    def __init__(self, storage: StorageView, description: Description, location: str) -> None:
        self.storage, self.description, self.location = storage, description, location
        self._archives: dict[int, Archive] = {}

    @cached_property
    def rows(self) -> ForeignRows:
        """Which box of which leaf lies where."""
        return ForeignRows(self.description, Blobs(self.storage, self.description.files))

    def archive(self, number: int) -> Archive:
        """Return a file; raises `CheckpointDamagedError` where it has another size than when it was described."""
        if number not in self._archives:
            file = self.description.files[number]
            size = self.storage.size(file.name)
            if size != file.nbytes:
                found = "it is gone" if size is None else f"it has {size} bytes now"
                raise CheckpointDamagedError(
                    f"{self.storage.location(file.name)}: {file.nbytes} bytes when its header was read, {found}"
                )
            self._archives[number] = Archive(self.storage, file.name, file.nbytes, None, {}, b"")
        return self._archives[number]

    @cached_property
    def saved(self) -> Saved:
        """What it holds, in the words of the state."""
        description = self.description
        return Saved(
            world_size=1,
            leaves={
                leaf.path: SavedLeaf(leaf.dtype, leaf.shape, leaf.placement, leaf.container)
                for leaf in description.table.leaves
            },
            values=description.values,
            aliases=description.aliases,
            containers=description.containers,
            rank_leaves=({},),
            rank_values=({},),
            rank_containers=({},),
            rank_outlines=(None,),
            flat=description.flat,
            unread=description.unread,
        )
