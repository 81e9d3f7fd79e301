"""The audit of a run."""

from __future__ import annotations

import os
from collections.abc import Callable

from ckptengine.audit.line import read_line
from ckptengine.audit.report import AuditedCheckpoint, AuditReport
from ckptengine.audit.stretch import check, stretches
from ckptengine.catalog.naming import open_checkpoint
from ckptengine.data.proof import samples_in
from ckptengine.errors import CheckpointNotFoundError

__all__ = ["audit"]

Progress = Callable[[int, int], None]


def audit(path: str | os.PathLike[str], *, deep: bool = False, progress: Progress | None = None) -> AuditReport:
    """Check what training used, from the start to the newest checkpoint of a run, over all its restarts.

    Goes along the parents of the newest checkpoint and shows, for each data cursor in it: that each checkpoint's
    ledger continues the one of the checkpoint before; that the ledger has every position of each finished epoch once;
    that the digest of the samples the ledger names is the sum of what all ranks handed to training; and that the files
    are there, with the sizes and digests of their manifests (`deep`: that every byte is as it was written). The ledger
    and the digests go back to the start, so checkpoints that retention has deleted leave no hole; the job may be under
    way meanwhile. Where a cursor began anew at a restart, since only other parts were restored, that is noted, and what
    it and the one before it used is audited each by itself.

    `progress` is called with the samples that were hashed and those that are to be. Raises `CheckpointNotFoundError`
    where there is no checkpoint, or none with a data cursor; `StorageError`.
    """
    storage = open_checkpoint(path)
    line = read_line(storage, deep=deep)
    findings = line.findings
    found = stretches(line.looks, findings)
    if not found and not any(finding.kind in ("cursor", "damage") for finding in findings.items):
        raise CheckpointNotFoundError(
            f"{storage.location()}: no data cursor in any checkpoint: put the sampler into the state that is saved "
            "({'data': sampler, …}) to have one"
        )
    meter = _Meter(progress, sum(samples_in(stretch.states[-1].ledger.runs()) for stretch in found))
    cursors = [check(stretch, findings, meter) for stretch in found]
    return AuditReport(
        path=storage.location(),
        checkpoints=tuple(AuditedCheckpoint(e.step, e.generation, m.parent, m.world_size) for e, m in line.checkpoints),
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
