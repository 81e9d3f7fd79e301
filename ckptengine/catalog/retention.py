"""Deleting: what need not be kept, and what dead attempts left. Always the manifest first, then the data."""

from __future__ import annotations

import re
from collections.abc import Collection

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.lease import LEASE_SECONDS, is_leased
from ckptengine.catalog.listing import (
    Entry,
    Problem,
    attempt_of,
    claimed_generations,
    committed,
    lineage,
    read_claim,
    read_manifest,
    step_directories,
)
from ckptengine.errors import CheckpointError
from ckptengine.storage.base import Storage, join

__all__ = ["remove_leftovers", "replace_older", "retain"]

# What an attempt's directory may hold. One with anything else in it belongs to somebody else: people keep
# directories such as `data-train` beside their checkpoints. Messages once lay in a directory `receipts`.
_OURS = re.compile(r"lease\.json|layout\.zarr\.zip|rank-\d+\.zarr\.zip|message-[\w-]+|receipts")
_OUR_ATTEMPT = re.compile(r"[0-9a-f]{12}-\d+")  # what the planner makes; a user's `data-train` is not ours to delete
_OUR_TEMPORARY = re.compile(
    r"\.tmp-(site|manifest-\d+\.json|generation-\d+\.json|lease\.json|clock|.+\.zarr\.zip)\.[0-9a-f]{12}"
)


def retain(
    storage: Storage, keep_last: int, keep_every: int | None = None, protected: Collection[str] = ()
) -> list[str]:
    """Keep the newest `keep_last` checkpoints of a run's lineage, and in it all multiples of `keep_every`.

    Attempts that are `protected`, by their ids, stay in any case. What lies on an abandoned branch goes; so that a life
    that has not saved yet can fall back, what it was restored from stays. A manifest that can't be read stays, for
    people to look at. Returns what could not be deleted; raises nothing that a delete says. Where the line began
    without a restore, earlier lives are no branch of it and stay: a job that forgot to restore must not delete what was
    trained before.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last}: at least one checkpoint is kept")
    try:
        # Listed first: a checkpoint that another life commits meanwhile is in no danger.
        entries = committed(storage)
        kept: set[Entry] = set()
        line = root = 0
        for item in lineage(storage):
            if isinstance(item, Problem):
                continue
            entry, manifest = item
            root = entry.generation if manifest.parent is None else 0
            if line < keep_last or _is_multiple(entry.step, keep_every):
                kept.add(entry)
            line += 1
        parents = _parents_of_new_lives(storage, entries)
    except CheckpointError as error:
        return [f"nothing was deleted: {error}"]
    if not kept:
        return []
    return _delete(
        storage,
        [entry for entry in entries if entry not in kept and entry.order not in parents and entry.generation >= root],
        protected,
    )


def replace_older(storage: Storage, generation: int) -> list[str]:
    """Delete the checkpoints of a single checkpoint's directory that a newer generation has replaced."""
    try:
        entries = [entry for entry in committed(storage) if entry.generation < generation]
    except CheckpointError as error:
        return [f"nothing was deleted: {error}"]
    return _delete(storage, entries)


def remove_leftovers(storage: Storage) -> list[str]:
    """Delete the data of attempts that have neither manifest nor living writer, and forgotten temporaries.

    Directories that hold anything but an attempt's files are left alone, and so is everything beside a
    manifest that can't be read. Returns what could not be deleted.
    """
    problems: list[str] = []
    try:
        directories = ["", *(name for _, name in step_directories(storage))]
        now = storage.now()
    except CheckpointError as error:
        return [f"nothing was swept: {error}"]
    try:
        _sweep_unfinished(storage, now)
    except CheckpointError as error:
        problems.append(f"{storage.location()}: unfinished uploads were not swept: {error}")
    for directory in directories:
        try:
            _sweep(storage, directory, now)
        except CheckpointError as error:
            problems.append(f"{storage.location(directory)} was not swept: {error}")
    return problems


def _sweep(storage: Storage, directory: str, now: float) -> None:
    swept = False
    for name in storage.list(directory):
        attempt, path = attempt_of(name), join(directory, name)
        if attempt is None or not _OUR_ATTEMPT.fullmatch(attempt) or storage.size(path) is not None:
            continue
        if not all(map(_OURS.fullmatch, storage.list(path))) or is_leased(storage, path):
            continue
        # Looked up last: a writer that was thought dead may have committed meanwhile.
        if attempt not in _attempts_in_use(storage, directory):
            storage.delete_tree(path)
            swept = True
    for name in filter(_OUR_TEMPORARY.fullmatch, storage.temporaries(directory)):
        path = join(directory, name)
        modified = storage.modified(path)
        if modified is not None and now - modified > LEASE_SECONDS:
            storage.delete(path)
    if directory and not storage.list(directory):
        modified = storage.modified(directory)
        # A new one may be another job's, about to be filled.
        if swept or (modified is not None and now - modified > LEASE_SECONDS):
            storage.remove_directory(directory)


def _sweep_unfinished(storage: Storage, now: float) -> None:
    """Give up the archives that dead attempts have begun: their parts take room, and no listing shows them."""
    for name, began in storage.unfinished():
        directory, _, file = name.rpartition("/")
        attempt = attempt_of(directory.rpartition("/")[2])
        if attempt is None or not _OUR_ATTEMPT.fullmatch(attempt) or not _OURS.fullmatch(file):
            continue
        # A new one may be of an attempt whose lease is on its way.
        if now - began > LEASE_SECONDS and not is_leased(storage, directory):
            storage.abandon(name)


def _attempts_in_use(storage: Storage, directory: str) -> set[str]:
    """Return the attempts that the manifests in a directory refer to; raises where any can't be read."""
    entries = [entry for entry in committed(storage) if entry.directory == directory]
    return {read_manifest(storage, entry).attempt for entry in entries}


def _parents_of_new_lives(storage: Storage, entries: list[Entry]) -> set[tuple[int, int]]:
    """Return the (generation, step) from which lives were restored that have not committed anything yet."""
    latest = max((entry.generation for entry in entries), default=0)
    claims = [generation for generation in claimed_generations(storage) if generation > latest]
    return {parent for generation in claims if (parent := read_claim(storage, generation)) is not None}


def _is_multiple(step: int | None, every: int | None) -> bool:
    return step is not None and every is not None and step % every == 0


def _delete(storage: Storage, entries: list[Entry], protected: Collection[str] = ()) -> list[str]:
    problems = []
    for entry in entries:
        try:
            attempt = read_manifest(storage, entry).attempt
        except CheckpointError:
            continue
        if attempt in protected:
            continue
        try:
            storage.delete(entry.manifest)
            storage.delete_tree(attempt_directory(entry.directory, attempt))
            if entry.directory:
                storage.remove_directory(entry.directory)
        except CheckpointError as error:
            problems.append(f"{storage.location(entry.directory)} was not deleted: {error}")
    return problems
