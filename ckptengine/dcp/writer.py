"""A storage writer for torch's distributed checkpoint: its planner plans, this engine copies, writes and commits."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptengine.dcp.attempt import (
    Attempt,
    Begun,
    Part,
    Place,
    attempt_under_way,
    begin_archive,
    check_free,
    check_no_other,
    new_attempt,
)
from ckptengine.dcp.items import assigned_to, grids_of, leaves_of, merged, values_of
from ckptengine.dcp.meshes import refuse_unordered
from ckptengine.errors import SaveFailedError
from ckptengine.policy.arguments import checked_seconds
from ckptengine.save.saver import DEFAULT_TIMEOUT
from ckptengine.storage.base import Storage
from ckptengine.storage.open import open_storage

__all__ = ["Writer"]

_RECEIPT = MetadataIndex("ckptengine.receipt")
_written: set[str] = set()  # attempts in which this process has written, or was about to


class Writer(StorageWriter):
    """Write a checkpoint of this engine from within `torch.distributed.checkpoint.save` and `async_save`.

    Give it as `storage_writer=`, wherever a trainer lets one choose a writer. `path` is a directory that all ranks see,
    or a URL that fsspec opens, with its `storage_options`; a checkpoint that is there already is replaced after the new
    one is committed, or refused with `overwrite=False`. `metadata` is plain JSON for the manifest, `timeout` bounds
    each wait for the storage, in seconds. Custom planners work as with torch's own writers: each tensor is written as
    the planner gives it. Plain objects are stored as typed values; what these can't hold is refused with a `StateError`
    that names it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = True,
        metadata: Mapping[str, Any] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint_id: str | os.PathLike[str] = path
        self.save_id = new_attempt()
        self._overwrite, self._metadata, self._options = overwrite, dict(metadata or {}), storage_options
        self._timeout = checked_seconds("timeout", timeout)
        self._held = ExitStack()
        # A save that failed on another rank does not come back to its writer.
        weakref.finalize(self, _close_in, os.getpid(), self._held)
        self._alone: int | None = None
        self._storage: Storage | None = None
        self._attempt: Attempt | None = None
        self._begun: Begun | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # For the process of its own in which torch saves with AsyncCheckpointerType.PROCESS.
        mine = vars(Writer(""))
        of_subclass = {name: value for name, value in vars(self).items() if name not in mine}
        arguments = (self.checkpoint_id, self._overwrite, self._metadata, self._timeout, self._options)
        return _made, (type(self), *arguments), of_subclass or None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the next checkpoint's path; what a failed save has left is removed."""
        self._held.close()
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self.save_id = new_attempt()
        self._storage = self._attempt = self._begun = None

    def give_up(self) -> None:
        """Remove what a save has left that failed on this rank or another; after one that was committed, nothing."""
        self._held.close()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take what torch tells of this rank; without collectives each rank writes a checkpoint of its own."""
        self._held.close()
        self._alone = None if kwargs.get("use_collectives", True) else int(kwargs.get("rank", 0))
        self._storage = self._attempt = self._begun = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the attempt, and give each rank its place in it. Called on the coordinator.

        Raises `StorageError` where the place can't be written to, holds a run, or is taken with `overwrite=False`.
        """
        storage = self._open()
        check_free(storage, self._overwrite)
        if self._alone is not None:
            check_no_other(self._open_at(os.fspath(self.checkpoint_id)))
        attempt = self._attempt = Attempt(storage, self._metadata, len(plans), self.save_id)
        self._held.callback(attempt.give_up)
        # A rank whose plan has not changed keeps its own, and knows of no other rank's: then each goes by its own plan.
        grids = [grids_of(plans)] * len(plans) if all(plan.usable for plan in plans) else [grids_of([p]) for p in plans]
        places = [Place(attempt.name, rank, of_rank) for rank, of_rank in enumerate(grids)]
        return [replace(plan, storage_data=place) for plan, place in zip(plans, places, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's archive, and return its receipt; it is durable then, and not yet committed.

        Raises `StateError` naming what can't be saved, `StorageError`.
        """
        refuse_unordered(planner)
        storage = self._open()
        place = self._place(plan, storage)
        leaves = leaves_of(plan, planner)
        values, inside = values_of(plan, planner)
        leaves += inside
        assigned = assigned_to(place.rank, leaves, place.grids)
        arrays = [leaf for _, leaf in leaves]
        begun, rows = begin_archive(storage, place, assigned, arrays, self._timeout, self._held)
        record = None
        if place.rank == 0:
            self._begun = begun  # its tail has all ranks' values, which come with their receipts
        else:
            record = begun.end(merged([]), place.rank)
            self._held.close()
        part = Part(place.attempt, place.rank, record, rows, values)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(_RECEIPT, begun.image.fixed_nbytes, part)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit. Called on the coordinator, once all ranks have written; raises `SaveFailedError`, `StorageError`."""
        if self._attempt is None or self._begun is None:
            raise SaveFailedError("finish() was called before write_data() on the coordinator")
        parts = [one.storage_data for of_rank in results for one in of_rank if isinstance(one.storage_data, Part)]
        self._attempt.commit(parts, self._begun)
        metadata.storage_meta = self.storage_meta()
        self._held.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this writer takes such an id: any path, and any URL."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def storage_meta(self) -> StorageMeta | None:
        """Return what planners may want to know of the place."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    def _place(self, plan: SavePlan, storage: Storage) -> Place:
        """Return the place that the coordinator has given this rank.

        A planner that keeps its plans between saves (`enable_plan_caching`) gives back the one of an earlier save: then
        the attempt is looked up in the storage, where the coordinator has begun it before it sent the plans.
        """
        place = plan.storage_data
        if not isinstance(place, Place):
            raise SaveFailedError("the planner has dropped the plan's storage_data: finish_plan has to keep it")
        kept = place.attempt in _written
        _written.add(place.attempt)
        if kept:
            known = self._attempt
            begun = known.name if known is not None else attempt_under_way(storage, self._timeout, _written)
            _written.add(begun)
            place = replace(place, attempt=begun, grids=grids_of([plan]))
        return place

    def _open(self) -> Storage:
        if self._storage is None:
            path = os.fspath(self.checkpoint_id)
            if self._alone is not None:
                path = f"{path.rstrip('/')}/rank-{self._alone}"
            self._storage = self._open_at(path)
        return self._storage

    def _open_at(self, path: str) -> Storage:
        return open_storage(path, self._options, self._timeout)


def _close_in(process: int, held: ExitStack) -> None:
    """Close, but not in a process that was forked from the one that saves: there it would delete what that writes."""
    if os.getpid() == process:
        held.close()


def _made(
    cls: type[Writer],
    path: str | os.PathLike[str],
    overwrite: bool,
    metadata: Mapping[str, Any],
    timeout: float,
    options: Mapping[str, Any] | None,
) -> Writer:
    """Return a writer of a class whose own arguments may be others."""
    writer = cls.__new__(cls)
    Writer.__init__(writer, path, overwrite=overwrite, metadata=metadata, timeout=timeout, storage_options=options)
    return writer
