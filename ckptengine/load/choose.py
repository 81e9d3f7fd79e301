"""Which checkpoint is read: rank 0 chooses, all ranks take the same."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.foreign import foreign_checkpoint, foreign_file
from ckptengine.catalog.keep import Best
from ckptengine.catalog.listing import Entry, Problem, committed, lineage, manifest_name, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.comm.agree import from_first
from ckptengine.comm.alike import first_alike
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError, StateError, StorageError
from ckptengine.foreign.checkpoint import ForeignCheckpoint
from ckptengine.foreign.description import Description
from ckptengine.load.checkpoint import Checkpoint, Opened
from ckptengine.storage.base import StorageView, join
from ckptengine.storage.within import within

__all__ = ["TRIES", "Chooser", "newest_checkpoint", "newest_or_foreign", "outrun", "while_replaced"]

TRIES = 20
"""How often a reader begins anew because a writer has deleted what it reads."""

_FOREIGN = (b"D", b"F")
"""What begins the description of a directory and of a file of another library; a manifest begins otherwise."""

_log = logging.getLogger("ckptengine")
_T = TypeVar("_T")


def newest_checkpoint(storage: StorageView) -> Checkpoint:
    """Return the newest checkpoint of a run or of a checkpoint directory.

    One that is replaced or deleted meanwhile is no error: the one that has come in its place is taken.

    Raises `CheckpointNotFoundError` where none is committed, `CheckpointDamagedError` or `FormatVersionError` where
    its manifest can't be used.
    """
    return while_replaced(storage, lambda checkpoint: checkpoint)


def newest_or_foreign(storage: StorageView, read: Callable[[Opened], _T]) -> _T:
    """Return what `read` makes of the newest checkpoint, as `while_replaced`, or of one that another library wrote.

    Raises `ForeignFormatError` and `CheckpointDamagedError` for what is there and can't be read.
    """
    try:
        return while_replaced(storage, read)
    except CheckpointNotFoundError:
        from ckptengine.foreign.find import open_foreign  # here: it reads six formats, and most loads none of them

        foreign = open_foreign(storage)
        if foreign is None:
            raise
    return read(foreign)


def while_replaced(storage: StorageView, read: Callable[[Checkpoint], _T]) -> _T:
    """Return what `read` makes of the newest checkpoint, and read anew each time that it is deleted meanwhile.

    A writer deletes a checkpoint's manifest before its data, so what fails while the manifest is there is no
    replacement, and is raised.
    """
    for _ in range(TRIES):
        # Of two names of which one comes before the other goes, a directory's listing may show neither.
        entries = committed(storage) or committed(storage)
        if not entries:
            raise _not_found(storage)
        looked_at = [entries[-1]]
        try:
            return read(_first_with_data(storage, looked_at))
        except (CheckpointDamagedError, StorageError):
            if storage.size(looked_at[-1].manifest) is not None:
                raise
    raise outrun(storage)


def outrun(storage: StorageView, filling: bool = False) -> StorageError:
    """Return the error of a reader that has found each checkpoint deleted before it was read.

    It is no `CheckpointNotFoundError`, after which a job may begin anew. With `filling` it has read into a state.
    """
    return StorageError(
        errno.ESTALE,
        f"{storage.location()}: its checkpoints are deleted faster than they can be read ({TRIES} tries): keep more "
        "of them (keep_last=)"
        + (". Parts of the state may have been overwritten: don't use it, load it again" if filling else ""),
    )


def _first_with_data(storage: StorageView, looked_at: list[Entry]) -> Checkpoint:
    """Return the newest checkpoint whose data is there; the entries of the lineage are added to `looked_at`.

    A writer that stood still and was swept before it published leaves a manifest whose data is gone as a whole: that is
    passed over with a warning. Other damage is raised.
    """
    empty: CheckpointDamagedError | None = None
    for item in lineage(storage):
        looked_at.append(item.entry if isinstance(item, Problem) else item[0])
        if isinstance(item, Problem):
            raise item.error
        checkpoint = Checkpoint(storage, item[0].directory, item[1])
        try:
            checkpoint.check_files()
        except CheckpointDamagedError as error:
            if storage.list(attempt_directory(checkpoint.directory, checkpoint.manifest.attempt)):
                raise
            if storage.size(item[0].manifest) is None:
                raise
            empty = empty or error
            continue
        if empty is not None:
            _log.warning("%s is loaded; a newer checkpoint has a manifest but no data: %s", checkpoint.location, empty)
        return checkpoint
    raise empty or _not_found(storage)


class Chooser:
    """Chooses for a group of ranks; every method is called by all of them.

    `views` are where this rank looks, first all places together, then the slower ones without the faster: a checkpoint
    that is damaged in one of them may be whole in the next. `arguments` are those of the caller, whose name is
    `call`, that all ranks must give alike: `newest` and `candidates` raise `ValueError` on all ranks where they differ.
    """

    def __init__(
        self,
        views: Sequence[StorageView],
        comm: Communicator,
        timeout: float,
        call: str = "",
        arguments: Mapping[str, object] | None = None,
    ) -> None:
        self._views, self._storage, self._comm, self._timeout = views, views[0], comm, timeout
        self._call, self._arguments = call, arguments
        self._doing = f"choosing a checkpoint in {self._storage.location()}"

    def _within(self, look: Callable[[], _T]) -> _T:
        """Return what a look at the storage returns, in time; see `within`."""
        return within(self._timeout, self._doing, look)

    def _first(self, look: Callable[[], bytes]) -> bytes:
        """Return what rank 0 finds first, on all ranks, where they have given the same arguments."""
        if self._arguments is None:
            return from_first(self._comm, look, self._timeout, self._doing)
        return first_alike(self._comm, look, self._call, self._arguments, self._timeout, self._doing)

    def newest(self) -> Opened:
        """Return the newest checkpoint, or one of another library; raises on all ranks as `newest_or_foreign` does."""

        def look() -> bytes:
            try:
                return _pack(newest_checkpoint(self._storage), 0)
            except CheckpointNotFoundError:
                from ckptengine.foreign.find import describe_foreign

                foreign = describe_foreign(self._storage)
                if foreign is None:
                    raise
            return _FOREIGN[foreign[1]] + foreign[0].encode()

        reply = self._first(lambda: self._within(look))
        if reply[:1] in _FOREIGN:
            from ckptengine.foreign.find import at_place

            return at_place(self._storage, Description.decode(reply[1:]), reply[:1] == _FOREIGN[True])
        return self._unpack(reply)

    def is_gone(self, checkpoint: Opened) -> bool:
        """Return whether a checkpoint was deleted since it was chosen: rank 0 looks, for all."""
        if isinstance(checkpoint, ForeignCheckpoint):
            return False
        manifest = join(checkpoint.directory, manifest_name(checkpoint.manifest.generation))

        def look() -> bytes:
            return bytes([self._within(lambda: all(view.size(manifest) is None for view in self._views))])

        doing = f"looking whether {checkpoint.location} was deleted"
        return from_first(self._comm, look, self._timeout, doing) == b"\1"

    def candidates(self, step: int | None, damaged: list[str], best: Best | None = None) -> Iterator[Checkpoint]:
        """Yield what to try, one after the other: the lineage of the newest checkpoint, the step's or the best alone.

        Each is yielded once for every view that has it.

        What is found damaged is logged and added to `damaged`, on rank 0. Raises `CheckpointNotFoundError` on all
        ranks where a step is asked for that was never committed, or the best where none has the metric, and
        `ValueError` where the ranks' arguments differ.
        """
        items = self._items(step, damaged, best) if self._comm.rank == 0 else iter(())

        def look() -> bytes:
            item = self._within(lambda: next(items, None))
            return b"" if item is None else _pack(*item)

        reply = self._first(look)
        while True:
            found = self._unpack(reply) if reply else None
            if found is None:
                damaged[:] = self._all_damaged(damaged)
                return
            yield found
            reply = from_first(self._comm, look, self._timeout, self._doing)

    def _items(self, step: int | None, damaged: list[str], best: Best | None) -> Iterator[tuple[Checkpoint, int]]:
        """Yield checkpoints and the numbers of their views, on rank 0."""
        line: Iterator[tuple[Entry, Manifest] | Problem]
        if best is not None:
            line = iter(self._best(best, damaged))
        elif step is not None:
            entries = [entry for entry in committed(self._storage) if entry.step == step]
            if not entries:
                raise _not_found(self._storage, step)
            line = iter([self._look(entries[-1])])
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

    def _look(self, entry: Entry) -> tuple[Entry, Manifest] | Problem:
        try:
            return entry, read_manifest(self._storage, entry)
        except CheckpointDamagedError as error:
            return Problem(entry, error)

    def _best(self, best: Best, damaged: list[str]) -> list[tuple[Entry, Manifest]]:
        """Return the checkpoints in the line of the newest that are the best, the best first.

        A manifest that can't be read now may be that of the best: its `StorageError` is raised. A damaged one is read
        where another view has it whole; else it is reported, and can't be among them.
        """
        read: dict[Entry, Manifest] = {}
        for item in lineage(self._storage):
            if not isinstance(item, Problem):
                read[item[0]] = item[1]
                continue
            if not isinstance(item.error, CheckpointDamagedError):
                raise item.error
            self._report(item.error, damaged)
            for view in self._views[1:]:
                with contextlib.suppress(CheckpointDamagedError):
                    if view.size(item.entry.manifest) is not None:
                        read[item.entry] = read_manifest(view, item.entry)
                        break
        found = best.kept(read.items())
        if not found and read:
            metrics = sorted({name for manifest in read.values() for name in manifest.metrics})
            there = f"their metrics are {', '.join(metrics)}" if metrics else "none of them has metrics"
            what = f"no checkpoint has the metric {best.metric!r}; {there}: give metrics to `step` and `save`"
            if best.metric in metrics:
                what = f"the metric {best.metric!r} is a finite number in no checkpoint: choose one with `step`"
            raise CheckpointNotFoundError(f"{self._storage.location()}: {what}")
        return [(entry, read[entry]) for entry in found]

    def _report(self, error: Exception, damaged: list[str]) -> None:
        damaged.append(str(error))
        _log.warning("a checkpoint is damaged; another copy or its parent is tried: %s", error)

    def _all_damaged(self, damaged: list[str]) -> list[str]:
        doing = "choosing a checkpoint"
        return list(map(str, json.loads(from_first(self._comm, json.dumps(damaged).encode, self._timeout, doing))))

    def _unpack(self, reply: bytes) -> Checkpoint:
        document = json.loads(reply)
        manifest = Manifest.decode(document["manifest"].encode(), document["directory"])
        return Checkpoint(self._views[document["view"]], document["directory"], manifest)


def _pack(checkpoint: Checkpoint, view: int) -> bytes:
    try:
        manifest = checkpoint.manifest.encode().decode()
    except StateError as error:  # it was read on a thread, whose stack goes deeper
        name = join(checkpoint.directory, manifest_name(checkpoint.manifest.generation))
        raise CheckpointDamagedError(f"{checkpoint.storage.location(name)}: {error}") from None
    return json.dumps({"directory": checkpoint.directory, "manifest": manifest, "view": view}).encode()


def _not_found(storage: StorageView, step: int | None = None) -> CheckpointNotFoundError:
    what = "no committed checkpoint" if step is None else f"no committed checkpoint of step {step}"
    steps = sorted({entry.step for entry in committed(storage) if entry.step is not None})
    there = f"; there are steps {', '.join(map(str, steps[-10:]))}" if steps else "; `ckptengine ls` lists a run"
    message = f"{storage.location()}: {what}{there}"
    if not steps:
        with contextlib.suppress(StorageError):
            found = foreign_file(storage) or foreign_checkpoint(storage)
            message = found.tell(storage.location()) if found is not None else message
    return CheckpointNotFoundError(message)
