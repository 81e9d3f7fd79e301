"""Copying a committed checkpoint from one storage to another: its archives, verified on their way, then its commit."""

from __future__ import annotations

import errno
from collections.abc import Callable

from ckptengine.archive.image import ALIGNMENT, BLOCK_NBYTES
from ckptengine.archive.reader import Archive, open_archive
from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory, check_file
from ckptengine.catalog.listing import MAX_CLAIM_NBYTES, claim_name, claimed_generations, manifest_name
from ckptengine.catalog.manifest import MAX_MANIFEST_NBYTES, Manifest
from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.snapshot.arena import Arena
from ckptengine.storage.base import ArchiveWriter, Storage, StorageView, join
from ckptengine.storage.parallel import in_parallel
from ckptengine.tiers.mend import is_split
from ckptengine.tiers.pace import Pace

__all__ = ["WINDOW_NBYTES", "check_same_run", "copy_archive", "copy_commit", "is_committed"]

WINDOW_NBYTES = 64 << 20
"""Bytes that are read, and then written, at once; a copy has two such windows in memory, and its archive's tail."""
_LEAST_WINDOW_NBYTES = 4 << 20
_LOOKS = 8  # files that are looked up at once
_ELSEWHERE = "give each run a place of its own"


def copy_archive(
    source: StorageView,
    target: Storage,
    name: str,
    record: ArchiveRecord,
    *,
    pace: Pace | None = None,
    progress: Callable[[int], None] | None = None,
    found: Callable[[int], None] | None = None,
) -> int:
    """Copy one archive, file `name` in both storages, verified block by block; return the bytes that were moved.

    Those are 0 where the target has the file with its size: it appears under its name only when it is whole, and
    nobody else writes into an attempt's directory. Until the commit the caller holds a `Lease` there, or a sweep takes
    it for what a dead attempt has left. `progress` is called with the bytes of each piece that has come, `found` with
    all of them where the file was there; without it that is `progress` as well.

    Raises `CheckpointDamagedError` naming the source's file, of which then nothing stays in the target; `StorageError`.
    """
    report = progress or (lambda nbytes: None)
    if target.size(name) == record.nbytes:
        (found or report)(record.nbytes)
        return 0
    archive = open_archive(source, name, record)
    if record.nbytes % ALIGNMENT:
        raise CheckpointDamagedError(f"{archive.location}: {record.nbytes} bytes are not a multiple of {ALIGNMENT}")
    arena = Arena()
    try:
        window = _window_nbytes(record, pace)
        _reserve(arena, 2 * window, archive)
        with target.create_archive(name, record.nbytes, write_nbytes=window) as writer:
            _copy_fixed(archive, writer, arena, window, pace, report)
            _copy_tail(archive, writer, arena, pace, report)
            writer.finish()
    finally:
        arena.close()
    return record.nbytes


def _reserve(arena: Arena, nbytes: int, archive: Archive) -> None:
    try:
        arena.reserve(nbytes)
    except StorageError as error:
        raise StorageError(
            error.errno, f"no memory to copy {archive.location}: {nbytes:,} bytes are needed; free some host memory"
        ) from error


def _window_nbytes(record: ArchiveRecord, pace: Pace | None) -> int:
    """Return the bytes of a window, in whole blocks: a second's worth where the pace is bounded, no more than all."""
    window = min(WINDOW_NBYTES, record.nbytes)
    if pace is not None:
        window = int(min(window, max(_LEAST_WINDOW_NBYTES, pace.bytes_per_second)))
    return -(-window // BLOCK_NBYTES) * BLOCK_NBYTES


def _copy_fixed(
    archive: Archive, writer: ArchiveWriter, arena: Arena, window: int, pace: Pace | None, report: Callable[[int], None]
) -> None:
    """Copy the fixed region; while one window is written the next is read."""
    positions = range(0, archive.fixed_nbytes, window)

    def span(number: int) -> tuple[int, int, int]:
        """Return a window's position and bytes in the file, and its address."""
        position = positions[number]
        nbytes = min(window, archive.fixed_nbytes - position)
        return position, nbytes, arena.address + number % 2 * window

    def read(number: int) -> None:
        position, nbytes, address = span(number)
        if pace is not None:
            pace.take(nbytes)
        archive.read_into(position, address, nbytes)

    def write(number: int) -> None:
        position, nbytes, address = span(number)
        writer.write(address, nbytes, position)
        report(nbytes)

    for number in range(len(positions) + 1):
        calls = [lambda: write(number - 1)] if number else []  # noqa: B023 - called within this turn
        if number < len(positions):
            calls.append(lambda: read(number))  # noqa: B023
        in_parallel(lambda call: call(), calls, len(calls))


def _copy_tail(
    archive: Archive, writer: ArchiveWriter, arena: Arena, pace: Pace | None, report: Callable[[int], None]
) -> None:
    """Write the tail, which opening the archive has read and verified, out of aligned memory."""
    tail = archive.tail_bytes
    for begin in range(0, len(tail), arena.nbytes):
        part = tail[begin : begin + arena.nbytes]
        if pace is not None:
            pace.take(len(part))
        arena.view(0, len(part))[:] = part
        writer.write(arena.address, len(part), archive.fixed_nbytes + begin)
        report(len(part))


def copy_commit(source: StorageView, target: Storage, directory: str, manifest: Manifest) -> None:
    """Commit the complete copy of a checkpoint; `directory` is the checkpoint's in both storages.

    Copies the layout where the target lacks it, then the claims of generations that it lacks, and last the manifest: as
    it is in the source, for it may have keys that this version does not know. A source that has none (what it holds was
    never committed there) is what `manifest` describes. That the target has the very same manifest is success.

    Raises `SaveFailedError` where a file of the target is missing or has another size, `CheckpointDamagedError` where
    the source's manifest is not `manifest`, `StorageError` (EEXIST) where another run lives in the target.
    """
    check_same_run(source, target)
    data = attempt_directory(directory, manifest.attempt)
    copy_archive(source, target, join(data, manifest.layout.name), manifest.layout)
    in_parallel(lambda record: check_file(target, join(data, record.name), record), manifest.archives, _LOOKS)
    document = _manifest_bytes(source, directory, manifest)
    there = set(claimed_generations(target))
    for generation in claimed_generations(source):
        if generation not in there:
            claim = source.read_bytes(claim_name(generation), MAX_CLAIM_NBYTES)
            if not target.put_if_absent(claim_name(generation), claim):
                _check_claim(source, target, generation)
    name = join(directory, manifest_name(manifest.generation))
    if not target.put_if_absent(name, document):
        _check_bytes(source, target, name, document)


def is_committed(source: StorageView, target: Storage, directory: str, manifest: Manifest) -> bool:
    """Return whether the target has the source's very manifest; its files may still be missing, or be damaged.

    Raises `StorageError` (EEXIST) where it has another one of that step and generation.
    """
    name = join(directory, manifest_name(manifest.generation))
    if target.size(name) is None:
        return False
    _check_bytes(source, target, name, _manifest_bytes(source, directory, manifest))
    return True


def check_same_run(source: StorageView, target: Storage) -> bool:
    """Raise `StorageError` (EEXIST) where the target holds another run: another job has claimed a generation there.

    The newest claim that both have tells: they are copied in their order, each only after this check. Returns whether
    there was one.
    """
    both = set(claimed_generations(source)) & set(claimed_generations(target))
    if both:
        _check_claim(source, target, max(both))
    return bool(both)


def _check_claim(source: StorageView, target: Storage, generation: int) -> None:
    name = claim_name(generation)
    mine, theirs = source.read_bytes(name, MAX_CLAIM_NBYTES), target.read_bytes(name, MAX_CLAIM_NBYTES)
    if is_split(mine, theirs):
        raise StorageError(
            errno.EEXIST,
            f"{target.location()} looks like another run than {source.location()}, but one process has claimed "
            f"generation {generation} in both, as older versions did when a reply was lost. If they are the places of "
            "one run, end its jobs and call `ckptengine mend RUN DIRECTORY` with the run and the local directory",
        )
    if mine != theirs:
        raise StorageError(
            errno.EEXIST,
            f"{target.location()} holds another run than {source.location()}: generation {generation} was claimed by "
            f"another job there; {_ELSEWHERE}",
        )


def _check_bytes(source: StorageView, target: Storage, name: str, document: bytes) -> None:
    """Raise where the target's manifest is not the source's."""
    if target.read_bytes(name, MAX_MANIFEST_NBYTES) != document:
        raise StorageError(
            errno.EEXIST, f"{target.location(name)} exists already, and is not {source.location(name)}; {_ELSEWHERE}"
        )


def _manifest_bytes(source: StorageView, directory: str, manifest: Manifest) -> bytes:
    """Return the source's manifest as it lies there; where it has none, `manifest` encoded."""
    name = join(directory, manifest_name(manifest.generation))
    try:
        document = source.read_bytes(name, MAX_MANIFEST_NBYTES)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        return manifest.encode()
    if Manifest.decode(document, source.location(name)) != manifest:
        raise CheckpointDamagedError(f"{source.location(name)} is not the manifest whose files were copied")
    return document
