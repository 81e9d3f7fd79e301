"""Which checkpoint is read: rank 0 chooses, all ranks take the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.listing import Entry, Problem, committed, lineage, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.comm.agree import share
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError
from ckptengine.load.checkpoint import Checkpoint
from ckptengine.storage.base import StorageView

__all__ = ["Chooser", "newest_checkpoint"]

_log = logging.getLogger("ckptengine")


def newest_checkpoint(storage: StorageView) -> Checkpoint:
    """Return the newest checkpoint of a run or of a checkpoint directory.

    One whose data is gone as a whole, as where a writer that stood still was swept before it published, is passed over
    with a warning, as `restore` does. Raises `CheckpointNotFoundError` where none is committed,
    `CheckpointDamagedError` or `FormatVersionError` where its manifest can't be used or a part of its files is missing,
    `StorageError`.
    """
    empty: CheckpointDamagedError | None = None
    for item in lineage(storage):
        if isinstance(item, Problem):
            raise item.error
        checkpoint = Checkpoint(storage, item[0].directory, item[1])
        try:
            checkpoint.check_files()
        except CheckpointDamagedError as error:
            if storage.list(attempt_directory(checkpoint.directory, checkpoint.manifest.attempt)):
                raise
            empty = empty or error
            continue
        if empty is not None:
            _log.warning("%s is taken, a newer one has a manifest and no data: %s", checkpoint.location, empty)
        return checkpoint
    if empty is not None:
        raise empty
    raise _not_found(storage)


class Chooser:
    """Chooses for a group of ranks; every method is called by all of them.

    `views` are where this rank looks, first all places together, then the slower ones without the faster: a checkpoint
    that is damaged in one of them may be whole in the next.
    """

    def __init__(self, views: Sequence[StorageView], comm: Communicator, timeout: float) -> None:
        self._views, self._storage, self._comm, self._timeout = views, views[0], comm, timeout

    def newest(self) -> Checkpoint:
        """Return the newest checkpoint; raises on all ranks as `newest_checkpoint` does."""
        value, error = None, None
        if self._comm.rank == 0:
            try:
                value = _pack(newest_checkpoint(self._storage), 0)
            except Exception as problem:
                error = problem
        found = self._share(value, error)
        assert found is not None
        return found

    def candidates(self, step: int | None, damaged: list[str]) -> Iterator[Checkpoint]:
        """Yield what to try, one after the other: the lineage of the newest checkpoint, or the step's alone.

        Each is yielded once for every view that has it.

        What is found damaged is logged and added to `damaged`, on rank 0. Raises `CheckpointNotFoundError` on all
        ranks where a step is asked for that was never committed.
        """
        items = self._items(step, damaged) if self._comm.rank == 0 else iter(())
        while True:
            value, error = b"", None
            if self._comm.rank == 0:
                try:
                    item = next(items, None)
                    value = b"" if item is None else _pack(*item)
                except Exception as problem:
                    error = problem
            found = self._share(value, error)
            if found is None:
                damaged[:] = self._all_damaged(damaged)
                return
            yield found

    def _items(self, step: int | None, damaged: list[str]) -> Iterator[tuple[Checkpoint, int]]:
        """Yield checkpoints and the numbers of their views, on rank 0."""
        if step is not None:
            entries = [entry for entry in committed(self._storage) if entry.step == step]
            if not entries:
                raise _not_found(self._storage, step)
            line: Iterator[tuple[Entry, Manifest] | Problem] = iter(
                [(entries[-1], read_manifest(self._storage, entries[-1]))]
            )
        else:
            line = lineage(self._storage)
        for item in line:
            if isinstance(item, Problem):
                if not isinstance(item.error, CheckpointDamagedError):
                    raise item.error
                self._report(item.error, damaged)
            entry = item.entry if isinstance(item, Problem) else item[0]
            first = 1 if isinstance(item, Problem) else 0
            for number, view in enumerate(self._views[first:], first):
                try:
                    if number and view.size(entry.manifest) is None:
                        continue
                    manifest = item[1] if not isinstance(item, Problem) and not number else read_manifest(view, entry)
                    checkpoint = Checkpoint(view, entry.directory, manifest)
                    checkpoint.check_files()
                except CheckpointDamagedError as error:
                    self._report(error, damaged)
                    continue
                yield checkpoint, number

    def _report(self, error: Exception, damaged: list[str]) -> None:
        damaged.append(str(error))
        _log.warning("a checkpoint is damaged, another copy or the one before it is tried: %s", error)

    def _all_damaged(self, damaged: list[str]) -> list[str]:
        mine = json.dumps(damaged).encode() if self._comm.rank == 0 else None
        return list(map(str, json.loads(share(self._comm, mine, None, self._timeout, "choosing a checkpoint"))))

    def _share(self, value: bytes | None, error: Exception | None) -> Checkpoint | None:
        doing = f"choosing a checkpoint in {self._storage.location()}"
        reply = share(self._comm, value, error, self._timeout, doing)
        if not reply:
            return None
        document = json.loads(reply)
        manifest = Manifest.decode(document["manifest"].encode(), document["directory"])
        return Checkpoint(self._views[document["view"]], document["directory"], manifest)


def _pack(checkpoint: Checkpoint, view: int) -> bytes:
    manifest = checkpoint.manifest.encode().decode()
    return json.dumps({"directory": checkpoint.directory, "manifest": manifest, "view": view}).encode()


def _not_found(storage: StorageView, step: int | None = None) -> CheckpointNotFoundError:
    what = "no committed checkpoint" if step is None else f"no committed checkpoint of step {step}"
    steps = sorted({entry.step for entry in committed(storage) if entry.step is not None})
    there = f"; there are steps {', '.join(map(str, steps[-10:]))}" if steps else "; `ckptengine ls` lists a run"
    return CheckpointNotFoundError(f"{storage.location()}: {what}{there}")
