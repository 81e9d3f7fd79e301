"""What an audit tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["AuditReport", "AuditedCheckpoint", "CursorReport", "Finding", "Findings", "LifeReport"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    `kind` is `damage` (a file), `lineage` (which checkpoint follows which), `cursor` (its state contradicts itself, or
    a checkpoint lacks it), `ledger` (a checkpoint's does not continue the one before), `gap`, `repeat` (positions of an
    epoch), `digest` (what was handed to training is not what the ledger says), or `step` (at a restart global batches
    were counted that no step was made of). `cursor` is its name in the state, None where the
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
    """One cursor of the run, as its newest checkpoint has it; where it began anew, one report for each beginning.

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


@dataclass(slots=True)
class Findings:
    """Findings as they are made."""

    items: list[Finding] = field(default_factory=list)

    def add(self, kind: str, between: tuple[int | None, int | None], message: str, cursor: str | None = None) -> None:
        """Add one."""
        self.items.append(Finding(kind, cursor, between, message))
