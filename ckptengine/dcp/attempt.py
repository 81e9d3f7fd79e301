"""One attempt to commit a checkpoint in the stages of torch's planner: begun, written by each rank, finished."""

from __future__ import annotations

import errno
import functools
import logging
import secrets
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ckptengine.archive.image import BLOCK_NBYTES, Image, plan_image
from ckptengine.archive.layout_file import encode_layout
from ckptengine.archive.names import archive_name
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.tail import build_tail
from ckptengine.catalog.commit import attempt_directory, publish
from ckptengine.catalog.lease import Lease, is_leased
from ckptengine.catalog.listing import attempt_of, committed, manifest_name, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.comm.keyvalue import poll
from ckptengine.dcp.items import Values, differing, merged
from ckptengine.errors import CheckpointError, SaveFailedError, StorageError
from ckptengine.layout.assign import Assigned
from ckptengine.layout.merge import merge
from ckptengine.layout.rank_rows import PackedRows
from ckptengine.lifecycle import Living
from ckptengine.save.archive import record_of
from ckptengine.save.aside import Aside
from ckptengine.save.attempt import Committed
from ckptengine.save.planner import rows_of
from ckptengine.save.single import single_checkpoint
from ckptengine.save.values import StoredValues
from ckptengine.schema.leaf import ArrayLeaf
from ckptengine.snapshot.feed import Feed
from ckptengine.snapshot.pack import Checksums, CopyTable
from ckptengine.snapshot.snapshotter import Snapshotter, on_same_devices
from ckptengine.storage.base import ArchiveWriter, Storage, join

__all__ = [
    "Attempt",
    "Begun",
    "Part",
    "Place",
    "attempt_under_way",
    "begin_archive",
    "check_free",
    "check_no_other",
    "new_attempt",
]

_TORCHS, _TORCHS_DATA = ".metadata", ".distcp"  # torch/distributed/checkpoint/filesystem.py

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class Place:
    """What the coordinator tells a rank: which attempt this is, as whose archive it writes, and each tensor's grid."""

    attempt: str
    rank: int
    grids: Mapping[str, tuple[int, ...] | None]


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank tells the coordinator of its archive; `record` is None where the coordinator has yet to end its own.

    `rows` are encoded `RankRows`.
    """

    attempt: str
    rank: int
    record: ArchiveRecord | None
    rows: bytes
    values: Values


@dataclass(slots=True)
class Begun:
    """An archive of which all is written but the tail, which waits for the other ranks' values."""

    archive: ArchiveWriter
    image: Image
    checksums: Checksums

    def end(self, values: StoredValues, rank: int) -> ArchiveRecord:
        """Write the tail, make the archive durable, and return its record."""
        tail = build_tail(self.image, values.entries(rank), self.checksums.entries, self.checksums.blocks)
        with _memory() as snapshotter:
            self.archive.write(snapshotter.tail(tail), len(tail), self.image.fixed_nbytes)
            self.archive.finish()
        return record_of(self.image, tail)


class Attempt:
    """The coordinator's side of one attempt, from its claim to its manifest. What is not committed leaves nothing."""

    def __init__(self, storage: Storage, metadata: Mapping[str, Any], world_size: int, name: str) -> None:
        self._storage, self._metadata, self._world_size = storage, dict(metadata), world_size
        self._target = single_checkpoint(storage, metadata)
        storage.create()
        self.generation = self._target.owner.claim()
        self.name = name
        self._directory = attempt_directory("", self.name)
        storage.make_directory(self._directory)
        self._committed = False
        self._held = ExitStack()
        self._held.enter_context(Lease(storage, self._directory))

    def commit(self, parts: Sequence[Part], own: Begun) -> Manifest:
        """Publish what all ranks have written, and delete what it replaces; raises `SaveFailedError`.

        `own` is the coordinator's archive, which gets everybody's values.
        """
        by_rank = sorted(parts, key=lambda part: part.rank)
        if [part.rank for part in by_rank] != list(range(self._world_size)):
            raise SaveFailedError(
                f"{self._storage.location()} was not committed: the results of ranks "
                f"{[part.rank for part in by_rank]} came, those of 0 to {self._world_size - 1} were expected"
            )
        others_of = {part.attempt for part in by_rank} - {self.name}
        if others_of:
            raise SaveFailedError(
                f"{self._storage.location()} was not committed: ranks have written attempt {min(others_of)}, not "
                f"{self.name}: the writer was given to another save before this one had ended; give each its own"
            )
        layout, layout_record = encode_layout(merge([PackedRows.decode(part.rows) for part in by_rank]))
        self._storage.write_bytes(join(self._directory, layout_record.name), layout)
        first = own.end(merged([part.values for part in by_rank]), 0)
        others = [part.record for part in by_rank[1:] if part.record is not None]
        manifest = Manifest(
            step=None,
            generation=self.generation,
            parent=None,
            attempt=self.name,
            world_size=self._world_size,
            block_nbytes=BLOCK_NBYTES,
            archives=(first, *others),
            layout=layout_record,
            metadata=self._metadata,
        )
        publish(self._storage, "", manifest)
        names = differing([part.values for part in by_rank])
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            _log.warning(
                "%s: %s%s: the ranks have different values, of which one rank's is kept, as torch keeps it: give each "
                "rank's a name of its own",
                self._storage.location(),
                ", ".join(names[:8]),
                more,
            )
        self._committed = True
        self._held.close()
        self._target.owner.committed(Committed(self._target.directory, self.generation, self.name, manifest))
        return manifest

    def give_up(self) -> None:
        """Delete what an attempt that was not committed has left; one that was is left as it is."""
        if self._committed:
            return
        self._held.close()
        try:
            if not self._storage.exists(manifest_name(self.generation)):
                self._storage.delete_tree(self._directory)
        except CheckpointError as problem:
            _log.warning("%s: what the failed save left is deleted later: %s", self._storage.location(), problem)


def new_attempt() -> str:
    """Return an attempt's id, which no other has."""
    return f"{secrets.token_hex(6)}-1"


def check_free(storage: Storage, overwrite: bool) -> None:
    """Raise `StorageError` (EEXIST) where another format's checkpoint lies, or without `overwrite` one of ours."""
    if any(name == _TORCHS or name.endswith(_TORCHS_DATA) for name in storage.list()):
        raise StorageError(
            errno.EEXIST,
            f"{storage.location()} holds a checkpoint of torch's own format, which would lie beside this one: save to "
            "another path, or delete it first",
        )
    if not overwrite and committed(storage):
        raise StorageError(
            errno.EEXIST, f"{storage.location()} holds a checkpoint: save to another path, or with overwrite=True"
        )


def check_no_other(storage: Storage) -> None:
    """Raise `StorageError` (EEXIST) where ranks would save below a checkpoint of all ranks: loads would take that."""
    if committed(storage):
        raise StorageError(
            errno.EEXIST,
            f"{storage.location()} holds a checkpoint that was saved with collectives, which a load would take in the "
            "place of this one: save to another path, or delete it first",
        )


def attempt_under_way(storage: Storage, timeout: float, ended: Collection[str]) -> str:
    """Return the one attempt that a living writer has begun in a storage; raises `SaveFailedError` after `timeout`.

    `ended` are those in which this rank has already taken part: one that failed may still lie there.
    """

    def look() -> bytes | None:
        names = [(attempt_of(name), name) for name in storage.list()]
        living = [attempt for attempt, name in names if attempt is not None and is_leased(storage, name)]
        unpublished = set(living).difference(ended) - {
            read_manifest(storage, entry).attempt for entry in committed(storage)
        }
        return unpublished.pop().encode() if len(unpublished) == 1 else None

    found = poll(look, timeout)
    if found is None:
        raise SaveFailedError(
            f"{storage.location()}: the attempt that the coordinator has begun was not found within {timeout:g} s: "
            "this rank does not see what the coordinator writes, or several save here at once"
        )
    return found.decode()


def begin_archive(
    storage: Storage,
    place: Place,
    assigned: Sequence[Assigned],
    leaves: Sequence[ArrayLeaf],
    timeout: float,
    held: ExitStack,
) -> tuple[Begun, bytes]:
    """Write this rank's arrays, through the C copy path; return the archive without its tail, and the encoded rows.

    `held` closes the archive; one that has not ended by then is removed.
    """
    image = plan_image(archive_name(place.rank), place.rank, assigned)
    numbers = {leaf.path: number for number, leaf in enumerate(leaves)}
    table = CopyTable(image, leaves, [numbers[one.path] for one in assigned], overlap=False)
    deadline = time.monotonic() + timeout
    checksums, feed = Checksums(image), Feed[None](deadline)
    name = join(attempt_directory("", place.attempt), image.name)
    with _memory() as snapshotter:
        whole = snapshotter.reserve(image, timeout)
        archive = held.enter_context(storage.create_archive(name, image.fixed_nbytes))
        snapshotter.mark(table, whole)

        def copy() -> None:
            left = max(0.0, 0.9 * (deadline - time.monotonic()))  # the feed would say less of a device
            try:
                if whole:
                    snapshotter.fill(table, checksums, left)
                    snapshotter.complete(table, checksums, feed)
                else:
                    snapshotter.stream(table, checksums, feed, left)
                feed.finish(None)
            except BaseException as problem:
                feed.fail(problem)

        copying = Aside(on_same_devices(copy))
        try:
            for window in feed:
                archive.write(window.address, window.end - window.begin, window.begin)
        finally:
            feed.give_up()
            copying.settle()
            table.release()
    rows = rows_of(image, list(assigned), place.rank).encode()
    return Begun(archive, image, checksums), rows


class _Memory:
    """The memory that this process's saves go through, reused from one to the next; one save at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.snapshotter = Snapshotter()

    def __enter__(self) -> Snapshotter:
        self.lock.acquire()
        return self.snapshotter

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def after_fork(self) -> None:
        """Forget the parent's memory, in a forked process."""
        self.lock = threading.Lock()
        self.snapshotter.abandon()
        self.snapshotter = Snapshotter()


_living: Living[_Memory] = Living(forked=_Memory.after_fork)


@functools.cache
def _memory() -> _Memory:
    memory = _Memory()
    _living.add(memory)
    return memory
