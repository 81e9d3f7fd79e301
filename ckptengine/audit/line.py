"""The checkpoints that lead to the newest one, with the cursors in them, read while the job may go on."""

from __future__ import annotations

import errno
import itertools
from dataclasses import dataclass
from typing import Any

from ckptengine.audit.report import Findings
from ckptengine.catalog import listing
from ckptengine.catalog.listing import Entry
from ckptengine.catalog.manifest import Manifest
from ckptengine.data.cursor import MARKER
from ckptengine.data.described import order_from
from ckptengine.data.ledger import Ledger, Run
from ckptengine.data.order import Order
from ckptengine.data.tally import total_of
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    FormatVersionError,
    StorageError,
)
from ckptengine.inspect import verify
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.load.describe import describe
from ckptengine.schema.path import Path, dotted
from ckptengine.state.saved import Saved
from ckptengine.storage.base import Storage

__all__ = ["Line", "Look", "State", "read_line"]

_MARKER_START = MARKER.partition("/")[0] + "/"
_MOST_RUNS = 1 << 22
"""Runs of one ledger that are gone through: about 1 GB."""
_MOST_LISTINGS = 50
"""How often a run is listed again because its newest checkpoint was deleted while it was read."""


@dataclass(frozen=True, slots=True)
class State:
    """One cursor in one checkpoint. `restarts` are those since the first checkpoint of the line, `apart` the ranks that
    were handed other samples than an earlier rank with the same share of each batch."""

    step: int | None
    generation: int
    restarts: int
    order: Order
    description: dict[str, Any]
    epoch: int
    consumed: int
    batches: int
    life: int
    largest: int
    ledger: Ledger
    digest: int
    apart: list[int]

    def runs(self) -> list[Run]:
        """Return the ledger's runs, unfolded anew each time: of many checkpoints that would take much memory."""
        return list(self.ledger.runs())


@dataclass(frozen=True, slots=True)
class Look:
    """The cursors of one checkpoint by their names: `names` are all of them, `states` those that can be read."""

    step: int | None
    generation: int
    restarts: int
    names: frozenset[str]
    states: dict[str, State]


@dataclass(frozen=True, slots=True)
class Line:
    """The checkpoints that lead to the newest, oldest first; `looks` are those that could be read."""

    checkpoints: list[tuple[Entry, Manifest]]
    looks: list[Look]
    findings: Findings


def read_line(storage: Storage, *, deep: bool) -> Line:
    """Return the checkpoints that lead to the newest one, what is in them, and what is wrong with them.

    Retention deletes a checkpoint's manifest first. So where something can't be read and the manifest is gone as well,
    the checkpoint was deleted meanwhile: it is passed over, and where it is the newest one, the run is listed again.

    Raises `CheckpointNotFoundError` where there is no checkpoint, `StorageError` where the storage refuses or fails to
    read, which says nothing of what lies there, or where the newest one was deleted each time.
    """
    for _ in range(_MOST_LISTINGS):
        line = _read_once(storage, deep)
        if line is not None:
            return line
    raise StorageError(
        errno.EAGAIN,
        f"{storage.location()}: the newest checkpoint was deleted before it could be read, {_MOST_LISTINGS} times in a "
        "row: audit the run when it is over, or keep more of its checkpoints (keep_last=)",
    )


def _read_once(storage: Storage, deep: bool) -> Line | None:
    """Return what lies there, None where the newest checkpoint was deleted meanwhile."""
    findings = Findings()
    found: list[tuple[Entry, Manifest]] = []
    newest: Entry | None = None
    for item in listing.lineage(storage):
        entry = item.entry if isinstance(item, listing.Problem) else item[0]
        newest = newest or entry
        if not isinstance(item, listing.Problem):
            found.insert(0, item)
        elif not _gone(storage, entry):
            _raise_unread(item.error)
            findings.add("damage", (entry.step, entry.step), str(item.error))
        elif entry == newest:
            return None
    line: list[tuple[Entry, Manifest]] = []
    looks: list[Look] = []
    restarts = 0
    for entry, manifest in found:
        passed = _restarts(storage, line[-1][0], entry, manifest) if line else 0
        of_this = Findings()
        look = _look(storage, entry, manifest, restarts + passed, deep, of_this)
        if of_this.items and _gone(storage, entry):
            if entry == newest:
                return None
            continue
        restarts += passed
        line.append((entry, manifest))
        looks += [look] if look is not None else []
        findings.items += of_this.items
    if not line and not findings.items:
        if listing.committed(storage):
            return None  # what was listed first had been deleted when it was looked into
        raise CheckpointNotFoundError(f"{storage.location()}: no committed checkpoint")
    _check_lineage(storage, line, findings)
    return Line(line, looks, findings)


def _raise_unread(error: Exception) -> None:
    """Raise an error of the storage that is no damage: what is there could not be read."""
    if isinstance(error, StorageError) and error.errno not in (errno.ENOENT, errno.EFBIG):
        raise error


def _gone(storage: Storage, entry: Entry) -> bool:
    """Whether a checkpoint that was listed has been deleted."""
    return listing.manifest_name(entry.generation) not in storage.list(entry.directory)


def _restarts(storage: Storage, before: Entry, entry: Entry, manifest: Manifest) -> int:
    """Return how many restarts lie between two checkpoints of the line; what can't be told is one."""
    if before.generation == entry.generation:
        return 0
    count, parent = 1, manifest.parent
    while parent is not None and parent[0] > before.generation:
        try:
            count, parent = count + 1, listing.read_claim(storage, parent[0])
        except (CheckpointDamagedError, FormatVersionError, StorageError) as error:
            _raise_unread(error)
            return 1
    return count


def _look(
    storage: Storage, entry: Entry, manifest: Manifest, restarts: int, deep: bool, findings: Findings
) -> Look | None:
    """Return a checkpoint's cursors, None where it can't be read."""
    between = entry.step, entry.step
    try:
        if deep:
            for problem in verify(storage.location(entry.directory)):
                findings.add("damage", between, problem.message)
        checkpoint = Checkpoint(storage, entry.directory, manifest)
        checkpoint.check_files()
        for rank in range(manifest.world_size):
            checkpoint.archive(rank)
        saved = describe(checkpoint)
    except (CheckpointDamagedError, CheckpointNotFoundError, StorageError) as error:
        _raise_unread(error)
        findings.add("damage", between, str(error))
        return None
    names, states = set(), {}
    for place in _cursors(saved):
        name = dotted(place) or "the state"
        names.add(name)
        try:
            states[name] = _state(saved, place, entry, restarts)
        except (ValueError, KeyError, TypeError) as error:
            findings.add("cursor", between, f"step {entry.step}: {error}", name)
    return Look(entry.step, entry.generation, restarts, frozenset(names), states)


def _check_lineage(storage: Storage, line: list[tuple[Entry, Manifest]], findings: Findings) -> None:
    for (before, earlier), (entry, manifest) in itertools.pairwise(line):
        between = before.step, entry.step
        if before.generation == entry.generation:
            if manifest.parent != earlier.parent:
                findings.add(
                    "lineage",
                    between,
                    f"generation {entry.generation} comes from {_parent(earlier.parent)} by the manifest of step "
                    f"{before.step}, from {_parent(manifest.parent)} by that of step {entry.step}",
                )
        elif entry.step is not None and not _leads_to(storage, manifest.parent, before):
            findings.add(
                "lineage",
                between,
                f"step {entry.step} of generation {entry.generation} was restored from {_parent(manifest.parent)}; "
                f"before it lies step {before.step} of generation {before.generation}",
            )


def _leads_to(storage: Storage, parent: tuple[int, int] | None, before: Entry) -> bool:
    """Whether a parent leads to the checkpoint before, also where retention has deleted those in between."""
    while parent is not None and parent[0] > before.generation:
        try:
            parent = listing.read_claim(storage, parent[0])
        except (CheckpointDamagedError, FormatVersionError, StorageError) as error:
            _raise_unread(error)
            return False
    return parent is not None and parent[0] == before.generation and parent >= before.order


def _parent(parent: tuple[int, int] | None) -> str:
    return "no checkpoint" if parent is None else f"step {parent[1]} of generation {parent[0]}"


def _cursors(saved: Saved) -> list[Path]:
    """Return the paths of the cursors' states."""
    return [
        path[:-1]
        for path, value in saved.values.items()
        if path[-1] == "cursor" and isinstance(value, str) and value.startswith(_MARKER_START)
    ]


def _state(saved: Saved, place: Path, entry: Entry, restarts: int) -> State:
    """Return one cursor's state; raises `ValueError` or `KeyError` where it is not what a cursor saves."""
    state: dict[Any, Any] = {}
    for path, value in saved.values.items():
        if path[: len(place)] == place and len(path) > len(place):
            inner = state
            for key in path[len(place) : -1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = value
    if state["cursor"] != MARKER:
        raise ValueError(f"the cursor's state is {state['cursor']!r}, this version reads {MARKER!r}")
    where = (*place, "digest")
    ranks = [values.get(where) for values in saved.rank_values]
    order = order_from(state["order"])
    numbers = [state[key] for key in ("epoch", "consumed", "batches", "life", "global_batch")]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"epoch, consumed, batches, life and global_batch are {numbers}: not counts")
    ledger = Ledger.from_plain(state["ledger"])
    digest, apart = total_of(ranks)
    if len(ledger) > _MOST_RUNS:
        raise ValueError(f"its ledger stands for {len(ledger)} runs of batches; more than {_MOST_RUNS} are not audited")
    largest = max((run.samples // run.batches for run in ledger.runs() if run.batches), default=0)
    return State(
        step=entry.step,
        generation=entry.generation,
        restarts=restarts,
        order=order,
        description=order.describe(),
        epoch=numbers[0],
        consumed=numbers[1],
        batches=numbers[2],
        life=numbers[3],
        largest=max(largest, numbers[4]),
        ledger=ledger,
        digest=digest,
        apart=apart,
    )
