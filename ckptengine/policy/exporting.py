"""Exports that a training makes of its own checkpoints, as it commits them."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptengine.catalog.naming import open_checkpoint
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointNotFoundError, StorageError
from ckptengine.policy.arguments import checked_callable, checked_count
from ckptengine.policy.hook import Commit, CommitHook, CommitHooks
from ckptengine.state.rename import Rename
from ckptengine.storage.open import open_storage

__all__ = ["Export", "Exporter", "exporter_of", "hooks_of"]

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class Export:
    """Say what `Checkpointer(export_every=…)` exports, and where.

    `target` is a directory, file or URL with `{step}` or `{step:08d}` in it. `target_options` are for the file system
    of a URL. The other options are those of `ckptengine.export`.

        Export("hub/step-{step}", only=["model"], rename={"model": ""})

    Raises `ValueError` for a target without `{step}`, and for unknown options.
    """

    target: str | os.PathLike[str]
    to: str = "safetensors"
    only: Iterable[str] | None = None
    rename: Rename | None = None
    dtype: Any = None
    max_shard_size: int | str = "5GB"
    target_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        from ckptengine.export.run import ExportOptions  # here: the formats are only loaded where one is written

        if self.only is not None and not isinstance(self.only, str):
            object.__setattr__(self, "only", tuple(self.only))
        ExportOptions.of(self.to, self.only, self.rename, self.dtype, self.max_shard_size)
        try:
            places = {self.place(1), self.place(2)}
        except (LookupError, ValueError) as error:
            raise ValueError(f"target={self.target!r}: {{step}} is the only placeholder: {error}") from None
        if len(places) == 1:
            raise ValueError(f"target={self.target!r}: put {{step}} into it: each export needs its own target")

    def place(self, step: int) -> str:
        """Return the target of a step."""
        return os.fspath(self.target).format(step=step)


class Exporter:
    """Writes the checkpoints whose step is a multiple of `every`, on rank 0, each once it has come to the run."""

    def __init__(self, every: int, export: Export, storage_options: Mapping[str, Any] | None, timeout: float) -> None:
        self.every = every
        self._export = export
        self._storage_options, self._timeout = storage_options, timeout

    def __call__(self, commit: Commit) -> None:
        """Export a checkpoint that was committed; raises as `ckptengine.export`."""
        if not commit.persistent or commit.step % self.every:
            return
        try:
            self._write(commit)
        except CheckpointNotFoundError:
            if not commit.restored:  # else it is still to be uploaded, and there will be another call
                raise
        except StorageError as error:
            if not (commit.restored and error.errno == errno.EEXIST):
                raise
            _log.info("%s: not exported after the restore: %s", commit.path, error)

    def _write(self, commit: Commit) -> None:
        from ckptengine.export.run import ExportOptions, export_checkpoint, target_of

        began, export = time.monotonic(), self._export
        options = ExportOptions.of(export.to, export.only, export.rename, export.dtype, export.max_shard_size)
        source = open_checkpoint(commit.path, self._storage_options, None, self._timeout)
        place = open_storage(export.place(commit.step), export.target_options, self._timeout)
        target, name = target_of(place, export.to)
        comm = SingleProcess()
        report = export_checkpoint(
            source, target, name, options, comm, self._timeout, finish=commit.restored, attempt=commit.attempt
        )
        seconds = time.monotonic() - began
        _log.info("%s: exported to %s, %d bytes in %.3g s", commit.path, report.target, report.nbytes, seconds)


def exporter_of(every: Any, export: Any, storage_options: Mapping[str, Any] | None, timeout: float) -> Exporter | None:
    """Return what `Checkpointer(export_every=…, export=…)` asks for, None for nothing; raises for nonsense."""
    if every is None and export is None:
        return None
    if not isinstance(export, Export):
        raise TypeError(f"export={export!r}: give a ckptengine.Export, which says what export_every= writes, and where")
    if every is None:
        raise ValueError("export= without export_every=: give a number of steps")
    every = checked_count("export_every", every, 1, "a number of steps (None: no exports)")
    return Exporter(every, export, storage_options, timeout)


def hooks_of(
    on_commit: Callable[[Commit], object] | None, exporter: Exporter | None
) -> tuple[CommitHooks, CommitHook | None]:
    """Return all that is called with each commit, and that of the exports, which is told of a restore, too."""
    exporting = None if exporter is None else CommitHook(exporter, "export_every")
    called = None if on_commit is None else CommitHook(checked_callable("on_commit", on_commit))
    return CommitHooks(*(hook for hook in (called, exporting) if hook is not None)), exporting
