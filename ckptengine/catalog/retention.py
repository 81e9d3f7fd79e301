"""Deleting: what need not be kept, and what dead attempts left. Always the manifest first, then the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.keep import KeepRule
from ckptengine.catalog.lease import LEASE_SECONDS, is_leased, is_old
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
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import CheckpointError, StateError, StorageError
from ckptengine.storage.base import Storage, join

__all__ = ["Leftover", "delete_checkpoint", "remove_leftovers", "replace_older", "retain", "superseded"]

# What an attempt's directory may hold. One with anything else in it belongs to somebody else: people keep
# directories such as `data-train` beside their checkpoints. Messages once lay in a directory `receipts`.
_OURS = re.compile(r"lease\.json|layout\.zarr\.zip|rank-\d+\.zarr\.zip|message-[\w-]+|receipts")
_OUR_ATTEMPT = re.compile(r"[0-9a-f]{12}-\d+")  # what the planner makes; a user's `data-train` is not ours to delete
_OUR_TEMPORARY = re.compile(
    r"\.tmp-(site|manifest-\d+\.json|generation-\d+\.json|lease\.json|writer\.json|clock|.+\.zarr\.zip)\.[0-9a-f]{12}"
)


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a dead attempt has left: its data, a temporary file, an upload, or a step's directory without anything.

    `name` is relative to the storage.
    """

    kind: Literal["attempt", "temporary", "upload", "directory"]
    name: str

    def delete(self, storage: Storage) -> None:
        """Delete it; raises `StorageError`."""
        if self.kind == "attempt":
            storage.delete_tree(self.name)
        elif self.kind == "temporary":
            storage.delete(self.name)
        elif self.kind == "upload":
            storage.abandon(self.name)
        else:
            storage.remove_directory(self.name)


def retain(storage: Storage, rules: Collection[KeepRule], protected: Collection[str] = ()) -> list[str]:
    """Delete the checkpoints that are `superseded`; return what could not be deleted, and raise nothing of that.

    Attempts that are `protected`, by their ids, stay in any case: what this life has just committed is among them.
    """
    try:
        old, problems = superseded(storage, rules)
    except CheckpointError as error:
        return [f"nothing was deleted: {error}"]
    old = [(entry, manifest) for entry, manifest in old if manifest.attempt not in protected]
    return [*problems, *_delete(storage, old)]


def superseded(storage: Storage, rules: Collection[KeepRule]) -> tuple[list[tuple[Entry, Manifest]], list[str]]:
    """Return all checkpoints of a run but the newest and what any of the `rules` keeps of its lineage.

    What lies on an abandoned branch is among them; so that a life that has not saved yet can fall back, what it was
    restored from is not. Where the line began without a restore, earlier lives are no branch of it and stay: a job that
    forgot to restore must not delete what was trained before. A link to a checkpoint is neither counted nor returned.

    Nothing is among them because something could not be read: neither a checkpoint whose manifest was unreadable once,
    whatever comes of it later, nor what may lie in the line below a generation whose parent can't be told. The second
    value says what the storage could not read. Raises `StorageError`, and where the claim of a life that has not saved
    yet can't be read what `read_claim` does; `ValueError` where there is no rule.
    """
    if not rules:
        raise ValueError("no rule says what to keep: give at least one, such as KeepLast(1)")
    # Listed first: a checkpoint that another life commits meanwhile is in no danger.
    entries = [entry for entry in committed(storage) if not storage.is_linked(entry.manifest)]
    own = set(entries)
    read: dict[Entry, Manifest] = {}
    unread: dict[Entry, CheckpointError] = {}
    unknown: list[int] = []
    root = 0
    for item in lineage(storage, unknown.append):
        if isinstance(item, Problem):
            unread[item.entry] = item.error
            continue
        entry, manifest = item
        root = entry.generation if manifest.parent is None else 0
        if entry not in own:
            continue
        read[entry] = manifest
    line = list(read.items())
    kept = {entry for entry, _ in line[:1]}.union(*(_kept(rule, line) for rule in rules))
    root = max([root, *unknown])
    parents = _parents_of_new_lives(storage, entries)
    stay = kept | set(unread) | {entry for entry in entries if entry.order in parents or entry.generation < root}
    old = _readable(storage, [entry for entry in entries if entry not in stay], read, unread) if kept else []
    problems = [f"nothing before generation {number} was deleted: its parent is unknown" for number in unknown]
    return old, problems + _unreadable(storage, unread)


def _kept(rule: KeepRule, line: list[tuple[Entry, Manifest]]) -> list[Entry]:
    """Return what a rule keeps; raises `StateError` where it is no answer: nothing is deleted on the ground of that."""
    try:
        kept = list(rule.kept(line))
    except Exception as error:
        raise StateError(f"the rule {rule!r} failed: {type(error).__name__}: {error}") from error
    odd = next((one for one in kept if not isinstance(one, Entry)), None)
    if odd is not None:
        raise StateError(
            f"the rule {rule!r} returned {odd!r}: `kept` returns entries, the first of each pair of `line`"
        )
    return kept


def replace_older(storage: Storage, generation: int) -> list[str]:
    """Delete the checkpoints of a single checkpoint's directory that a newer generation has replaced."""
    unread: dict[Entry, CheckpointError] = {}
    try:
        entries = [
            entry
            for entry in committed(storage)
            if entry.generation < generation and not storage.is_linked(entry.manifest)
        ]
        old = _readable(storage, entries, {}, unread)
    except CheckpointError as error:
        return [f"nothing was deleted: {error}"]
    return [*_unreadable(storage, unread), *_delete(storage, old)]


def remove_leftovers(storage: Storage, remove: Callable[[Leftover], None] | None = None) -> list[str]:
    """Delete the data of attempts that have neither manifest nor living writer, and forgotten temporaries.

    Directories that hold anything but an attempt's files are left alone, and so is everything beside a
    manifest that can't be read. Returns what could not be deleted. `remove` is called in place of `Leftover.delete`,
    for each thing as soon as it is known that nobody writes it any more.
    """
    remove = remove or (lambda leftover: leftover.delete(storage))
    problems: list[str] = []
    try:
        directories = ["", *(name for _, name in step_directories(storage))]
        now = storage.now()
    except CheckpointError as error:
        return [f"nothing was swept: {error}"]
    try:
        _sweep_unfinished(storage, now, remove)
    except CheckpointError as error:
        problems.append(f"{storage.location()}: unfinished uploads were not swept: {error}")
    for directory in directories:
        try:
            _sweep(storage, directory, now, remove)
        except CheckpointError as error:
            problems.append(f"{storage.location(directory)} was not swept: {error}")
    return problems


def _sweep(storage: Storage, directory: str, now: float, remove: Callable[[Leftover], None]) -> None:
    if directory and storage.is_linked(directory):
        return  # another run's
    swept = False
    for name in storage.list(directory):
        attempt, path = attempt_of(name), join(directory, name)
        if attempt is None or not _OUR_ATTEMPT.fullmatch(attempt) or storage.size(path) is not None:
            continue
        if not all(map(_OURS.fullmatch, storage.list(path))) or storage.is_linked(path) or is_leased(storage, path):
            continue
        # Looked up last: a writer that was thought dead may have committed meanwhile.
        if attempt not in _attempts_in_use(storage, directory):
            remove(Leftover("attempt", path))
            swept = True
        elif storage.leaves_temporaries:
            # An upload that was killed, and was done again by another process.
            _sweep_temporaries(storage, path, now, remove)
    _sweep_temporaries(storage, directory, now, remove)
    # A new one may be another job's, about to be filled.
    if directory and not storage.list(directory) and (swept or is_old(storage, directory, now)):
        remove(Leftover("directory", directory))


def _sweep_temporaries(storage: Storage, directory: str, now: float, remove: Callable[[Leftover], None]) -> None:
    for name in filter(_OUR_TEMPORARY.fullmatch, storage.temporaries(directory)):
        path = join(directory, name)
        if is_old(storage, path, now):
            remove(Leftover("temporary", path))


def _sweep_unfinished(storage: Storage, now: float, remove: Callable[[Leftover], None]) -> None:
    """Give up the archives that dead attempts have begun: their parts take room, and no listing shows them."""
    for name, began in storage.unfinished():
        directory, _, file = name.rpartition("/")
        attempt = attempt_of(directory.rpartition("/")[2])
        if attempt is None or not _OUR_ATTEMPT.fullmatch(attempt) or not _OURS.fullmatch(file):
            continue
        # A new one may be of an attempt whose lease is on its way.
        if now - began > LEASE_SECONDS and not is_leased(storage, directory):
            remove(Leftover("upload", name))


def _attempts_in_use(storage: Storage, directory: str) -> set[str]:
    """Return the attempts that the manifests in a directory refer to; raises where any can't be read."""
    entries = [entry for entry in committed(storage) if entry.directory == directory]
    return {read_manifest(storage, entry).attempt for entry in entries}


def _parents_of_new_lives(storage: Storage, entries: list[Entry]) -> set[tuple[int, int]]:
    """Return the (generation, step) from which lives were restored that have not committed anything yet."""
    latest = max((entry.generation for entry in entries), default=0)
    claims = [generation for generation in claimed_generations(storage) if generation > latest]
    return {parent for generation in claims if (parent := read_claim(storage, generation)) is not None}


def _readable(
    storage: Storage, entries: list[Entry], read: Mapping[Entry, Manifest], unread: dict[Entry, CheckpointError]
) -> list[tuple[Entry, Manifest]]:
    """Return entries with their manifests, of which some have been `read`; `unread` gets those that can't be."""
    found = []
    for entry in entries:
        try:
            found.append((entry, read[entry] if entry in read else read_manifest(storage, entry)))
        except CheckpointError as error:
            unread[entry] = error
    return found


def _unreadable(storage: Storage, unread: Mapping[Entry, CheckpointError]) -> list[str]:
    """Return what to tell of manifests that the storage could not read; damaged ones are for `ls` and `verify`."""
    return [
        f"{storage.location(entry.directory)} was not deleted, whether or not it is to be kept: {error}"
        for entry, error in unread.items()
        if isinstance(error, StorageError)
    ]


def _delete(storage: Storage, checkpoints: list[tuple[Entry, Manifest]]) -> list[str]:
    problems = []
    for entry, manifest in checkpoints:
        try:
            delete_checkpoint(storage, entry, manifest)
        except CheckpointError as error:
            problems.append(f"{storage.location(entry.directory)} was not deleted: {error}")
    return problems


def delete_checkpoint(storage: Storage, entry: Entry, manifest: Manifest) -> None:
    """Delete a committed checkpoint, and its step's directory with the last one in it; raises `StorageError`."""
    storage.delete(entry.manifest)
    storage.delete_tree(attempt_directory(entry.directory, manifest.attempt))
    if entry.directory:
        storage.remove_directory(entry.directory)
