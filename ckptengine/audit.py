"""Whether a run used its data as it should have: every sample of each finished epoch once, over all restarts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.catalog import listing
from ckptengine.catalog.listing import Entry
from ckptengine.catalog.manifest import Manifest
from ckptengine.data.cursor import MARKER
from ckptengine.data.digest import DIGEST_BITS, parse_digest
from ckptengine.data.ledger import Ledger, Run
from ckptengine.data.order import Order, order_from
from ckptengine.data.proof import coverage, digest_of_runs, identify, new_runs, place_after, samples_in
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError, FormatVersionError, StorageError
from ckptengine.inspect import verify
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.load.describe import describe
from ckptengine.state.leaf import Path, dotted
from ckptengine.state.saved import Saved
from ckptengine.storage.base import Storage
from ckptengine.storage.open import open_storage

__all__ = ["AuditReport", "AuditedCheckpoint", "CursorReport", "Finding", "LifeReport", "audit"]

_MARKER_START = MARKER.partition("/")[0] + "/"
_MODULUS = 1 << DIGEST_BITS
_MOST_SEARCHED_EPOCHS = 64
_MOST_NOTES = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    `kind` is `damage` (a file), `lineage` (which checkpoint follows which), `cursor` (its state contradicts itself),
    `ledger` (a checkpoint's does not continue the one before), `gap`, `repeat` (positions of an epoch), or `digest`
    (what was handed to training is not what the ledger says). `cursor` is its name in the state, None where the
    finding is of the checkpoint itself. `between` are the steps of the checkpoints before and after it happened, None
    for the start and for what no checkpoint tells.
    """

    kind: str
    cursor: str | None
    between: tuple[int | None, int | None]
    message: str


@dataclass(frozen=True, slots=True)
class AuditedCheckpoint:
    """One checkpoint of the line that leads to the newest."""

    step: int | None
    generation: int
    parent: tuple[int, int] | None
    world_size: int


@dataclass(frozen=True, slots=True)
class LifeReport:
    """What one life of the job, from a start or restart to the next, used.

    `generation` and `steps` (first and last checkpoint) are None where no checkpoint of this life is there any more.
    `batches` are the first and the last global batch, `epochs` likewise; `samples` counts positions, `padding` what
    filled up batches, `left_out` what `last="drop"` left out.
    """

    life: int
    generation: int | None
    steps: tuple[int, int] | None
    world_size: int
    batches: tuple[int, int]
    epochs: tuple[int, int]
    samples: int
    padding: int
    left_out: int


@dataclass(frozen=True, slots=True)
class CursorReport:
    """One cursor of the run, as its newest checkpoint has it.

    `order` describes the order of the samples. `finished_epochs` are those before `epoch`, of which `consumed` samples
    are used. `proven` says what is shown by what, `notes` what is worth knowing and no error.
    """

    name: str
    order: dict[str, Any]
    epoch: int
    consumed: int
    batches: int
    finished_epochs: int
    lives: tuple[LifeReport, ...]
    proven: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found; `clean` where there is no finding."""

    path: str
    checkpoints: tuple[AuditedCheckpoint, ...]
    cursors: tuple[CursorReport, ...]
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class _State:
    """One cursor in one checkpoint."""

    step: int | None
    generation: int
    order: Order
    description: dict[str, Any]
    epoch: int
    consumed: int
    batches: int
    life: int
    largest: int
    runs: list[Run]
    digest: int


@dataclass(slots=True)
class _Findings:
    items: list[Finding] = field(default_factory=list)

    def add(self, kind: str, between: tuple[int | None, int | None], message: str, cursor: str | None = None) -> None:
        self.items.append(Finding(kind, cursor, between, message))


def audit(path: str | os.PathLike[str], *, deep: bool = False, progress: Progress | None = None) -> AuditReport:
    """Check what training used, from the start to the newest checkpoint of a run, over all its restarts.

    Goes along the parents of the newest checkpoint and shows, for each data cursor in it: that each checkpoint's
    ledger continues the one of the checkpoint before; that the ledger has every position of each finished epoch once;
    that the digest of the samples the ledger names is the sum of what all ranks handed to training; and that the files
    are there, with the sizes and digests of their manifests (`deep`: that every byte is as it was written). The ledger
    and the digests go back to the start, so checkpoints that retention has deleted leave no hole.

    `progress` is called with the samples that were hashed and those that are to be. Raises `CheckpointNotFoundError`
    where there is no checkpoint, or none with a data cursor; `StorageError`.
    """
    storage = open_storage(path)
    findings = _Findings()
    line = _line(storage, findings)
    if deep:
        for entry, _ in line:
            for problem in verify(storage.location(entry.directory)):
                findings.add("damage", (entry.step, entry.step), problem.message)
    states: dict[str, list[_State]] = {}
    for entry, manifest in line:
        try:
            checkpoint = Checkpoint(storage, entry.directory, manifest)
            checkpoint.check_files()
            for rank in range(manifest.world_size):
                checkpoint.archive(rank)
            saved = describe(checkpoint)
        except (CheckpointDamagedError, StorageError) as error:
            findings.add("damage", (entry.step, entry.step), str(error))
            continue
        for place in _cursors(saved):
            name = dotted(place) or "the state"
            try:
                states.setdefault(name, []).append(_state(saved, place, entry))
            except (ValueError, KeyError, TypeError) as error:
                findings.add("cursor", (entry.step, entry.step), f"step {entry.step}: {error}", name)
    if not states and not any(finding.kind in ("cursor", "damage") for finding in findings.items):
        raise CheckpointNotFoundError(
            f"{storage.location()}: no data cursor in any checkpoint: put the sampler into the state that is saved "
            "({'data': sampler, …}) to have one"
        )
    meter = _Meter(progress, sum(samples_in(line_of[-1].runs) for line_of in states.values()))
    cursors = [_check(name, line_of, findings, meter) for name, line_of in sorted(states.items())]
    return AuditReport(
        path=storage.location(),
        checkpoints=tuple(AuditedCheckpoint(e.step, e.generation, m.parent, m.world_size) for e, m in line),
        cursors=tuple(cursors),
        findings=tuple(dict.fromkeys(findings.items)),
    )


class _Meter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, samples: int) -> None:
        self._done += samples
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _line(storage: Storage, findings: _Findings) -> list[tuple[Entry, Manifest]]:
    """Return the checkpoints that lead to the newest, oldest first; notes what doesn't fit together."""
    line: list[tuple[Entry, Manifest]] = []
    for item in listing.lineage(storage):
        if isinstance(item, listing.Problem):
            findings.add("damage", (item.entry.step, item.entry.step), str(item.error))
        else:
            line.insert(0, item)
    if not line and not findings.items:
        raise CheckpointNotFoundError(f"{storage.location()}: no committed checkpoint")
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
    return line


def _leads_to(storage: Storage, parent: tuple[int, int] | None, before: Entry) -> bool:
    """Whether a parent leads to the checkpoint before, also where retention has deleted those in between."""
    while parent is not None and parent[0] > before.generation:
        try:
            parent = listing.read_claim(storage, parent[0])
        except (CheckpointDamagedError, FormatVersionError, StorageError):
            return False
    return parent is not None and parent[0] == before.generation and parent >= before.order


def _parent(parent: tuple[int, int] | None) -> str:
    return "no checkpoint" if parent is None else f"step {parent[1]} of generation {parent[0]}"


# The cursors of one checkpoint.


def _cursors(saved: Saved) -> list[Path]:
    """Return the paths of the cursors' states."""
    return [
        path[:-1]
        for path, value in saved.values.items()
        if path[-1] == "cursor" and isinstance(value, str) and value.startswith(_MARKER_START)
    ]


def _state(saved: Saved, place: Path, entry: Entry) -> _State:
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
    runs = list(Ledger.from_plain(state["ledger"]).runs())
    largest = max((run.samples // run.batches for run in runs if run.batches), default=0)
    return _State(
        step=entry.step,
        generation=entry.generation,
        order=order,
        description=order.describe(),
        epoch=numbers[0],
        consumed=numbers[1],
        batches=numbers[2],
        life=numbers[3],
        largest=max(largest, numbers[4]),
        runs=runs,
        digest=sum(map(parse_digest, ranks)) % _MODULUS,
    )


# One cursor over all checkpoints.


def _check(name: str, states: Sequence[_State], findings: _Findings, meter: _Meter) -> CursorReport:
    newest = states[-1]
    _check_places(name, states, findings)
    _check_coverage(name, states, findings)
    continuous = _check_ledgers_and_digests(name, states, findings, meter)
    return CursorReport(
        name=name,
        order=newest.description,
        epoch=newest.epoch,
        consumed=newest.consumed,
        batches=newest.batches,
        finished_epochs=newest.epoch,
        lives=tuple(_lives(states)),
        proven=tuple(_proven(name, states, findings, continuous)),
        notes=tuple(_notes(states)),
    )


def _check_places(name: str, states: Sequence[_State], findings: _Findings) -> None:
    """Check that each cursor stands where its ledger ends, and that nothing is left out but at epochs' ends."""
    before: int | None = None
    for state in states:
        between, before = (before, state.step), state.step
        place, expected = (state.epoch, state.consumed, state.batches), place_after(state.runs, state.order.length)
        if place != expected:
            findings.add(
                "cursor",
                between,
                f"step {state.step}: the cursor is at epoch {place[0]}, sample {place[1]}, after {place[2]} global "
                f"batches; its ledger ends at epoch {expected[0]}, sample {expected[1]}, after {expected[2]}",
                name,
            )
        for run in state.runs:
            if not run.batches and (run.end != state.order.length or run.end - run.begin >= state.largest):
                findings.add(
                    "cursor",
                    between,
                    f"step {state.step}: epoch {run.epoch}: positions {run.begin} to {run.end - 1} are left out, which "
                    "is not the rest of an epoch that is shorter than a global batch",
                    name,
                )


def _check_coverage(name: str, states: Sequence[_State], findings: _Findings) -> None:
    newest = states[-1]
    for one in coverage(newest.runs, newest.order, newest.epoch):
        between = _between(states, one.batch)
        findings.add("repeat" if one.times else "gap", between, one.text, name)
    expected = 0
    for run in newest.runs:
        if run.first != expected:
            message = f"after global batch {expected - 1} the ledger goes on with global batch {run.first}"
            findings.add("ledger", _between(states, run.first), message, name)
        expected = run.last + 1


def _between(states: Sequence[_State], batch: int) -> tuple[int | None, int | None]:
    """Return the steps of the last checkpoint before a global batch was used, and of the first one after."""
    before = [state.step for state in states if state.batches <= batch]
    after = [state.step for state in states if state.batches > batch]
    return (before[-1] if before else None), (after[0] if after else None)


def _check_ledgers_and_digests(
    name: str, states: Sequence[_State], findings: _Findings, meter: _Meter
) -> list[tuple[int | None, int | None]]:
    """Compare each checkpoint with the one before; return between which steps the ledgers are continuous."""
    continuous = []
    runs: list[Run] = []
    expected = error = 0
    before: int | None = None
    order: dict[str, Any] | None = None
    for state in states:
        between = before, state.step
        if order not in (None, state.description):
            message = f"the order of the samples was {order} up to step {before}, and is {state.description} in step "
            findings.add("cursor", between, f"{message}{state.step}", name)
            runs, expected, error = [], 0, 0
        new = new_runs(runs, state.runs)
        if isinstance(new, int):
            was = _run_text(runs[new])
            now = _run_text(state.runs[new]) if new < len(state.runs) else "nothing"
            findings.add(
                "ledger",
                between,
                f"the ledger of step {state.step} does not continue that of step {before}: where that has {was}, it "
                f"has {now}",
                name,
            )
            new, expected = list(state.runs), 0
        elif before is not None:
            continuous.append(between)
        expected = (expected + digest_of_runs(new, state.order, meter)) % _MODULUS
        now_error = (state.digest - expected) % _MODULUS
        if now_error != error:
            epochs = sorted({run.epoch for run in new})[:_MOST_SEARCHED_EPOCHS]
            one = identify((now_error - error) % _MODULUS, state.order, epochs)
            what = one or "more than one sample differs, or none of the run's"
            if before is None:
                what += "; it may have happened at any step before, since no earlier checkpoint is there"
            findings.add(
                "digest",
                between,
                f"up to step {state.step} the ranks handed other samples to training than the ledger says: {what}",
                name,
            )
        runs, error, before, order = state.runs, now_error, state.step, state.description
    return continuous


def _run_text(run: Run) -> str:
    what = f"global batches {run.first} to {run.last}" if run.batches else "left out"
    return (
        f"({what}: epoch {run.epoch}, positions {run.begin} to {run.end - 1}, {run.world_size} ranks, life {run.life})"
    )


# What is reported beside the findings.


def _lives(states: Sequence[_State]) -> Iterable[LifeReport]:
    by_life: dict[int, list[Run]] = {}
    for run in states[-1].runs:
        by_life.setdefault(run.life, []).append(run)
    for life, runs in sorted(by_life.items()):
        own = [state for state in states if state.life == life]
        steps = [state.step for state in own if state.step is not None]
        yield LifeReport(
            life=life,
            generation=own[-1].generation if own else None,
            steps=(min(steps), max(steps)) if steps else None,
            world_size=runs[-1].world_size,
            batches=(runs[0].first, runs[-1].last),
            epochs=(runs[0].epoch, runs[-1].epoch),
            samples=sum(run.samples for run in runs),
            padding=sum(run.padding for run in runs),
            left_out=sum(run.end - run.begin for run in runs if not run.batches),
        )


def _proven(
    name: str, states: Sequence[_State], findings: _Findings, continuous: Sequence[tuple[int | None, int | None]]
) -> Iterable[str]:
    """Say what is shown, and by what; nothing is said of what has a finding."""
    newest = states[-1]
    kinds = {finding.kind for finding in findings.items if finding.cursor == name}
    if not kinds & {"gap", "repeat", "cursor"}:
        claims = []
        if newest.epoch:
            left_out = sum(run.end - run.begin for run in newest.runs if not run.batches)
            but = f', but for {left_out} that last="drop" left out' if left_out else ""
            epochs = "1 finished epoch" if newest.epoch == 1 else f"{newest.epoch} finished epochs"
            claims.append(f"each of the {newest.order.length} samples was used once in each of {epochs}{but}")
        if newest.consumed:
            claims.append(f"each of the {newest.consumed} consumed ones of epoch {newest.epoch} once")
        yield f"{'; '.join(claims) or 'nothing was used'}: by the ledger of step {newest.step}, from the start"
    if "digest" not in kinds:
        what = "what the ranks handed to training is what the ledger says, from the start"
        yield f"{what}: by the digests of step {newest.step}"
    if continuous and "ledger" not in kinds:
        first = continuous[0][0]
        yield f"each checkpoint continues the one before: by the {len(states)} checkpoints from step {first} on"


def _notes(states: Sequence[_State]) -> Iterable[str]:
    """Say where the count of steps and that of global batches don't advance alike."""
    uneven = []
    for before, after in itertools.pairwise(states):
        if before.step is not None and after.step is not None:
            steps, batches = after.step - before.step, after.batches - before.batches
            if steps != batches:
                uneven.append(f"from step {before.step} to step {after.step} training used {batches} global batches")
    yield from uneven[:_MOST_NOTES]
    if len(uneven) > _MOST_NOTES:
        yield f"steps and global batches don't advance alike between {len(uneven) - _MOST_NOTES} more checkpoints"
