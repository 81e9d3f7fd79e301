"""What lies in a run and in a checkpoint, and whether it is whole; no state is filled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptengine.archive.layout_file import StoredRows
from ckptengine.archive.reader import Archive, open_archive
from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog import listing
from ckptengine.catalog.naming import open_checkpoint
from ckptengine.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from ckptengine.foreign.checkpoint import ForeignCheckpoint
from ckptengine.load.checkpoint import Checkpoint, Opened
from ckptengine.load.choose import newest_or_foreign
from ckptengine.load.describe import describe as saved_of
from ckptengine.schema.path import Path, dotted
from ckptengine.storage.base import Storage, join

__all__ = [
    "CheckpointDescription",
    "CheckpointSummary",
    "LeafSummary",
    "Problem",
    "describe",
    "list_run",
    "verify",
]


_STEP_NBYTES = 16 << 20
"""Bytes that are verified between two reports of progress."""


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """One manifest of a run.

    `path` is the checkpoint's directory, as given with the run, `step` and `generation` are from the names.
    `parent` is the (generation, step) that this life of the run was restored from, None for a fresh start;
    `nbytes` the size of all files together; `created` is UTC, ISO 8601. `newest` marks the one that `restore`
    tries first, of those whose manifest is sound. `problem` says why a manifest can't be used; then the
    fields that it would give are None. `linked` says that a symbolic link leads there: nothing deletes it.
    `metrics` are what the training gave with the save.
    """

    path: str
    step: int | None
    generation: int
    parent: tuple[int, int] | None
    world_size: int | None
    nbytes: int | None
    created: str | None
    newest: bool
    problem: str | None
    linked: bool = False
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeafSummary:
    """One array of a checkpoint.

    `dtype` is a logical name of `ckptengine.schema.dtypes`; `shape` the global shape; `nbytes` the bytes of
    its elements; `placement` is `replicated`, `whole`, `sharded` or `per_rank`; `archives` the ranks whose
    archives hold a part of it, in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    placement: str
    archives: tuple[int, ...]
    rank: int | None


@dataclass(frozen=True, slots=True)
class CheckpointDescription:
    """One checkpoint.

    `leaves` are its arrays, sorted by name. `values` are the replicated plain values and `rank_values` those of each
    rank, by dotted name. `metadata` is the user's. `format` tells of another library's, whose files are `files`: it has
    no step, generation or ranks, the leaves' `archives` are numbers of its files, and `unread` says by name what of it
    is neither an array nor a plain value.
    """

    path: str
    step: int | None
    generation: int
    parent: tuple[int, int] | None
    world_size: int
    nbytes: int
    created: str
    metadata: dict[str, Any]
    metrics: dict[str, float | None]
    leaves: tuple[LeafSummary, ...]
    values: dict[str, Any]
    rank_values: dict[int, dict[str, Any]]
    format: str = "ckptengine"
    files: tuple[str, ...] = ()
    unread: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage: `nbytes` bytes of `file` from `position` on (both None: the whole file).

    `leaves` are the names of the arrays with bytes there; `message` says what was expected and what was
    found.
    """

    file: str
    position: int | None
    nbytes: int | None
    leaves: tuple[str, ...]
    message: str


def list_run(path: str | os.PathLike[str]) -> list[CheckpointSummary]:
    """Return the committed checkpoints of a run or of a checkpoint directory, the newest last.

    Raises `CheckpointNotFoundError` where there is none, `StorageError` where the place can't be read.
    """
    storage = open_checkpoint(path)
    sound = (item for item in listing.lineage(storage) if not isinstance(item, listing.Problem))
    newest = next(sound, None)
    return [_summary(storage, entry, newest is not None and entry == newest[0]) for entry in _committed(storage)]


def describe(path: str | os.PathLike[str]) -> CheckpointDescription:
    """Return what the newest checkpoint of a run holds, or that of a checkpoint directory, or another library's.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError` naming the file, `FormatVersionError`,
    `ForeignFormatError` for what another library wrote and is not read.
    """
    return newest_or_foreign(open_checkpoint(path), _described)


def _described(checkpoint: Opened) -> CheckpointDescription:
    if isinstance(checkpoint, ForeignCheckpoint):
        return _described_foreign(checkpoint)
    manifest, rows = checkpoint.manifest, checkpoint.rows
    saved = saved_of(checkpoint)
    leaves = []
    for number, record in enumerate(rows.leaves):
        archives = tuple(np.unique(rows.places_of(number)[0]).tolist())
        nbytes = record.itemsize * int(np.prod(record.shape, dtype=object))
        leaves.append(
            LeafSummary(record.name, record.dtype, record.shape, nbytes, record.placement.value, archives, record.rank)
        )
    return CheckpointDescription(
        path=checkpoint.location,
        step=manifest.step,
        generation=manifest.generation,
        parent=manifest.parent,
        world_size=manifest.world_size,
        nbytes=sum(record.nbytes for record in _records(checkpoint)),
        created=manifest.created,
        metadata=dict(manifest.metadata),
        metrics=dict(manifest.metrics),
        leaves=tuple(sorted(leaves, key=lambda leaf: leaf.name)),
        values=_named(saved.values),
        rank_values={rank: _named(values) for rank, values in enumerate(saved.rank_values)},
    )


def _described_foreign(checkpoint: ForeignCheckpoint) -> CheckpointDescription:
    """Return what a checkpoint of another library holds; its files are numbered in the order of `files`."""
    description, table = checkpoint.description, checkpoint.description.table
    same: dict[Path, list[Path]] = {}
    for path, first in description.aliases.items():
        same.setdefault(first, []).append(path)
    leaves = []
    for record in table.leaves:
        files = tuple(np.unique(table.archive[slice(*record.rows)]).tolist())
        nbytes = record.itemsize * int(np.prod(record.shape, dtype=object))
        leaves += [
            LeafSummary(dotted(path), record.dtype, record.shape, nbytes, record.placement.value, files, None)
            for path in (record.path, *same.get(record.path, ()))
        ]
    return CheckpointDescription(
        path=checkpoint.location,
        step=None,
        generation=0,
        parent=None,
        world_size=1,
        nbytes=sum(file.nbytes for file in description.files),
        created="",
        metadata=dict(description.metadata),
        metrics={},
        leaves=tuple(sorted(leaves, key=lambda leaf: leaf.name)),
        values=_named(description.values),
        rank_values={},
        format=description.format,
        files=tuple(file.name for file in description.files),
        unread={dotted(path): what for path, what in description.unread.items()},
    )


def verify(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Compare every byte of a checkpoint directory, or of all checkpoints of a run, with the checksums.

    `progress` is called with the bytes that are done and those that there are. Returns the damage, in the
    order of steps and files; empty where all is well.

    Raises `CheckpointNotFoundError` where there is no checkpoint, `FormatVersionError` for one of a newer
    format, `StorageError` where the storage fails.
    """
    storage = open_checkpoint(path)
    problems: list[Problem] = []
    checkpoints = []
    for entry in _committed(storage):
        try:
            checkpoints.append(Checkpoint(storage, entry.directory, listing.read_manifest(storage, entry)))
        except CheckpointDamagedError as error:
            problems.append(Problem(storage.location(entry.manifest), None, None, (), str(error)))
    total = sum(record.nbytes for checkpoint in checkpoints for record in _records(checkpoint))
    done = 0
    for checkpoint in checkpoints:
        found: list[Problem] = []
        for nbytes in _verify(checkpoint, found):
            if progress is not None:
                progress(min(total, done + nbytes), total)
        done += sum(record.nbytes for record in _records(checkpoint))
        manifest = join(checkpoint.directory, listing.manifest_name(checkpoint.manifest.generation))
        # What a writer has deleted meanwhile is no damage.
        if not found or storage.size(manifest) is not None:
            problems += found
    return problems


def _verify(checkpoint: Checkpoint, problems: list[Problem]) -> Iterator[int]:
    """Verify one checkpoint: yield how many of its bytes are done, add what is damaged to `problems`."""
    storage, done = checkpoint.storage, 0
    rows: StoredRows | None = None
    for rank, record in enumerate(_records(checkpoint), start=-1):
        damaged = False
        file = storage.location(checkpoint.file(record.name))
        for item in _verify_file(checkpoint, record):
            if isinstance(item, int):
                yield done + item
                continue
            damaged = True
            start, stop, message = item
            leaves = () if rows is None else _leaves_at(rows, rank, start, stop)
            problems.append(Problem(file, start, stop - start, leaves, message))
        if rank < 0 and not damaged:
            try:
                checkpoint.rows.check()
                rows = checkpoint.rows
            except CheckpointDamagedError as error:
                problems.append(Problem(file, None, None, (), str(error)))
        done += record.nbytes
        yield done


def _committed(storage: Storage) -> list[listing.Entry]:
    entries = sorted(listing.committed(storage), key=lambda entry: entry.order)
    if not entries:
        raise CheckpointNotFoundError(f"{storage.location()}: no committed checkpoint")
    return entries


def _summary(storage: Storage, entry: listing.Entry, newest: bool) -> CheckpointSummary:
    path = storage.location(entry.directory)
    linked = storage.is_linked(entry.manifest)
    try:
        manifest = listing.read_manifest(storage, entry)
    except CheckpointError as error:
        problem = str(error)
        return CheckpointSummary(path, entry.step, entry.generation, None, None, None, None, False, problem, linked)
    nbytes = sum(record.nbytes for record in (manifest.layout, *manifest.archives))
    return CheckpointSummary(
        path,
        manifest.step,
        manifest.generation,
        manifest.parent,
        manifest.world_size,
        nbytes,
        manifest.created,
        newest,
        None,
        linked,
        manifest.metrics,
    )


def _records(checkpoint: Checkpoint) -> tuple[ArchiveRecord, ...]:
    """Return the layout file's record, then those of the ranks."""
    return checkpoint.manifest.layout, *checkpoint.manifest.archives


def _named(values: Any) -> dict[str, Any]:
    return {dotted(path): value for path, value in sorted(values.items(), key=lambda item: dotted(item[0]))}


def _leaves_at(rows: StoredRows, rank: int, start: int, stop: int) -> tuple[str, ...]:
    """Return the names of the leaves that have bytes of an archive between two positions."""
    names: dict[Path, str] = {}
    for number, leaf in enumerate(rows.leaves):
        archive, position, nbytes = rows.places_of(number)
        if ((archive == rank) & (position < stop) & (position + nbytes > start)).any():
            names[leaf.path] = leaf.name
    return tuple(names.values())


def _verify_file(checkpoint: Checkpoint, record: ArchiveRecord) -> Iterator[int | tuple[int, int, str]]:
    """Yield how many bytes of a file are verified, and each damaged range: start, stop, message."""
    storage, name = checkpoint.storage, checkpoint.file(record.name)
    try:
        archive = open_archive(storage, name, record)
    except CheckpointDamagedError as error:
        size = storage.size(name)
        whole = size != record.nbytes
        # Without its tail a file has no checksums: nothing in it can be trusted.
        yield 0 if whole else record.tail_position, record.nbytes, str(error)
        return
    for start, stop in _damaged_blocks(archive):
        if start == stop:
            yield stop
        else:
            yield start, stop, archive.damage(start, stop)


def _damaged_blocks(archive: Archive) -> Iterator[tuple[int, int]]:
    """Yield damaged ranges of the fixed region, neighbours joined, and between them (n, n): n bytes are done."""
    pending: tuple[int, int] | None = None
    position = 0
    while position < archive.fixed_nbytes:
        end = min(position + _STEP_NBYTES, archive.fixed_nbytes)
        block = archive.damaged(position, end - position)
        if block is None:
            position = end
        else:
            start, position = block
            if pending is not None and pending[1] != start:
                yield pending
                pending = None
            pending = (start if pending is None else pending[0], position)
        yield position, position
    if pending is not None:
        yield pending
