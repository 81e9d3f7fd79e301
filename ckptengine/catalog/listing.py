"""Which checkpoints lie in a storage: a run with one directory per step, or one checkpoint by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptengine.catalog.manifest import (
    ATTEMPT,
    FORMAT_VERSION,
    MAX_MANIFEST_NBYTES,
    Manifest,
    parent_of,
    parse_document,
)
from ckptengine.errors import CheckpointDamagedError, CheckpointError, FormatVersionError, StorageError
from ckptengine.storage.base import StorageView, join

__all__ = [
    "MAX_CLAIM_NBYTES",
    "Entry",
    "Problem",
    "attempt_of",
    "claim_name",
    "claimed_generations",
    "claims_of",
    "committed",
    "is_later",
    "lineage",
    "manifest_name",
    "newest",
    "next_generation",
    "read_claim",
    "read_manifest",
    "step_directories",
    "step_directory",
]

_STEP = re.compile(r"step-(\d{8,18})")
_STEPS = 10**18  # the first that has more digits
_MANIFEST = re.compile(r"manifest-(\d{4,9})\.json")
_CLAIM = re.compile(r"generation-(\d{4,9})\.json")
MAX_CLAIM_NBYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One committed checkpoint, by its names alone.

    `directory` is relative to the storage. Where the storage itself is the checkpoint, it is empty and `step`
    None.
    """

    step: int | None
    generation: int
    directory: str

    @property
    def manifest(self) -> str:
        """The manifest's name, relative to the storage."""
        return join(self.directory, manifest_name(self.generation))

    @property
    def order(self) -> tuple[int, int]:
        """What decides which is newer: the generation, then the step."""
        return self.generation, -1 if self.step is None else self.step


@dataclass(frozen=True, slots=True)
class Problem:
    """A checkpoint on the way back that can't be used, and why."""

    entry: Entry
    error: CheckpointError


def step_directory(step: int) -> str:
    """Return the name of a step's directory; raises `ValueError` for a step whose name no listing would find."""
    if not 0 <= step < _STEPS:
        raise ValueError(f"step {step}: steps count from 0 to 10**18 - 1; count from the beginning of the training")
    return f"step-{step:08d}"


def is_later(directory: str, than: str) -> bool:
    """Return whether two directories are of steps, and the first one's is the higher."""
    first, second = (_number(_STEP, name, step_directory) for name in (directory, than))
    return first is not None and second is not None and first > second


def manifest_name(generation: int) -> str:
    """Return the file name of a generation's manifest."""
    return f"manifest-{generation:04d}.json"


def claim_name(generation: int) -> str:
    """Return the name of the file that claims a generation of a run."""
    return f"generation-{generation:04d}.json"


def attempt_of(name: str) -> str | None:
    """Return the attempt whose directory bears a name, None where it is none.

    Ids are of two parts at least: `data-train` beside a checkpoint is somebody's own directory.
    """
    attempt = name.removeprefix("data-")
    return attempt if attempt != name and "-" in attempt and ATTEMPT.fullmatch(attempt) else None


def step_directories(storage: StorageView) -> list[tuple[int, str]]:
    """Return the steps that have a directory, committed or not, in order, each with its directory."""
    found = ((_number(_STEP, name, step_directory), name) for name in storage.list())
    return sorted((step, name) for step, name in found if step is not None)


def committed(storage: StorageView) -> list[Entry]:
    """Return all committed checkpoints, oldest first, in the order (generation, step); no file is opened."""
    steps: list[tuple[int | None, str]] = [(None, ""), *step_directories(storage)]
    entries = [
        Entry(step, generation, directory)
        for step, directory in steps
        for name in storage.list(directory)
        if (generation := _number(_MANIFEST, name, manifest_name))
    ]
    return sorted(entries, key=lambda entry: entry.order)


def newest(storage: StorageView) -> Entry | None:
    """Return the newest committed checkpoint, None where there is none."""
    return max(committed(storage), key=lambda entry: entry.order, default=None)


def claimed_generations(storage: StorageView) -> list[int]:
    """Return the generations of a run that have been claimed, in order."""
    return sorted(filter(None, (_number(_CLAIM, name, claim_name) for name in storage.list())))


def next_generation(storage: StorageView) -> int:
    """Return the number after all generations that are claimed or have committed; 1 to begin with."""
    return max((*claimed_generations(storage), *(entry.generation for entry in committed(storage))), default=0) + 1


def read_manifest(storage: StorageView, entry: Entry) -> Manifest:
    """Return an entry's manifest, verified.

    Raises `CheckpointDamagedError`, also where the manifest is that of another place, `FormatVersionError`,
    `StorageError`.
    """
    where = storage.location(entry.manifest)
    manifest = Manifest.decode(storage.read_bytes(entry.manifest, MAX_MANIFEST_NBYTES), where)
    # A step's directory may be opened on its own: then its name is not known here.
    if manifest.generation != entry.generation or entry.step not in (None, manifest.step):
        raise CheckpointDamagedError(
            f"{where}: the manifest is that of generation {manifest.generation}, step {manifest.step}"
        )
    return manifest


def claims_of(storage: StorageView) -> dict[int, bytes]:
    """Return the claim files of a storage, by generation; raises `StorageError`."""
    return {
        generation: storage.read_bytes(claim_name(generation), MAX_CLAIM_NBYTES)
        for generation in claimed_generations(storage)
    }


def read_claim(storage: StorageView, generation: int) -> tuple[int, int] | None:
    """Return the parent that a generation's claim tells.

    Raises `CheckpointDamagedError`, `FormatVersionError`, `StorageError` (ENOENT where there is no claim).
    """
    name = claim_name(generation)
    where = storage.location(name)
    document = parse_document(storage.read_bytes(name, MAX_CLAIM_NBYTES), where)
    version = document.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatVersionError(f"{where}: format version {version}: upgrade ckptengine to read this run")
    try:
        if version != FORMAT_VERSION or document["generation"] != generation:
            raise ValueError(f"this is not a claim of generation {generation}")
        parent = document["parent"]
        return None if parent is None else parent_of(parent)
    except (KeyError, ValueError) as error:
        raise CheckpointDamagedError(f"{where}: {error}") from None


def lineage(
    storage: StorageView, unknown: Callable[[int], None] | None = None
) -> Iterator[tuple[Entry, Manifest] | Problem]:
    """Yield the checkpoints that lead to the newest one, newest first: what to restore, and to fall back to.

    From the newest down the steps of its generation, then from that generation's parent down, and so on. What
    can't be read is yielded as a `Problem` on the way. A generation's parent is told by any readable manifest
    of it, else by its claim; where neither can be read, or what they tell can't be, the next lower generation
    with checkpoints is taken, from its newest on: it may be a branch that was abandoned, but its checkpoints
    are whole. A checkpoint that lies outside of a run has no parents: its lower generations follow.

    With `unknown` nothing is guessed, for those who delete what is not in the line: it is called with a generation of a
    run whose parent can't be told, and the line ends there.
    """
    entries = committed(storage)[::-1]
    if not entries:
        return
    place: tuple[int, int] | None = entries[0].order
    while place is not None:
        generation, highest = place
        known, parent = False, None
        for entry in entries:
            if entry.generation != generation or entry.order[1] > highest:
                continue
            try:
                manifest = read_manifest(storage, entry)
            except CheckpointError as error:
                yield Problem(entry, error)
                continue
            if entry.step is not None:
                known, parent = True, manifest.parent
            yield entry, manifest
        if not known and highest >= 0:
            known, parent = _parent_without(storage, entries, generation, highest)
        if not known or (parent is not None and parent[0] >= generation):
            if unknown is not None and highest >= 0:
                unknown(generation)
                return
            parent = next((entry.order for entry in entries if entry.generation < generation), None)
        place = parent


def _parent_without(
    storage: StorageView, entries: list[Entry], generation: int, highest: int
) -> tuple[bool, tuple[int, int] | None]:
    """Return whether a generation's parent is known, and the parent, where no manifest in line told it."""
    for entry in entries:
        if entry.generation == generation and entry.order[1] > highest:
            try:
                return True, read_manifest(storage, entry).parent
            except CheckpointError:
                continue
    try:
        return True, read_claim(storage, generation)
    except (CheckpointDamagedError, FormatVersionError, StorageError):
        return False, None


def _number(pattern: re.Pattern[str], name: str, written: object) -> int | None:
    """Return the number in a name, None where the name is not exactly what we would write for that number."""
    match = pattern.fullmatch(name)
    number = int(match[1]) if match and match[1].isascii() else None
    return number if number is not None and callable(written) and written(number) == name else None
