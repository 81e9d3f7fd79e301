"""`save`, `load` and `async_save` with the signatures of `torch.distributed.checkpoint`."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ckptengine.dcp.reader import Reader
from ckptengine.dcp.staging import stager
from ckptengine.dcp.writer import Writer
from ckptengine.save.saver import DEFAULT_TIMEOUT

__all__ = ["async_save", "load", "save"]

Id = str | os.PathLike[str]


def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Id | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Save a state as a checkpoint of this engine; takes and returns what `torch.distributed.checkpoint.save` does.

    `checkpoint_id` is a directory that all ranks see, or a URL that fsspec opens. What lies there is replaced after the
    new checkpoint is committed. Plain objects are stored as typed values; nothing is pickled.

    Raises torch's `CheckpointException` on all ranks, with each failed rank's error: `StateError` names what can't be
    saved, `StorageError` what the storage refused.
    """
    writer = _writer(storage_writer, checkpoint_id)
    try:
        metadata: Metadata = state_dict_saver.save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )
    finally:
        if isinstance(writer, Writer):
            writer.give_up()
    return metadata


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Id | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Future[Any] | AsyncSaveResponse:
    """Save in the background; takes and returns what `torch.distributed.checkpoint.async_save` does.

    The state is copied when this returns, into memory that is kept for the next save. Where the save before has not
    been written yet, this waits for it, and raises `DeadlineError` after 600 seconds.
    """
    own = async_stager is None and async_checkpointer_type is AsyncCheckpointerType.THREAD
    own = own and not isinstance(storage_writer, AsyncStager)  # one that stages by itself, as torch takes it
    writer = _writer(storage_writer, checkpoint_id)
    with stager.turn(DEFAULT_TIMEOUT) if own else contextlib.nullcontext():
        future: Future[Any] | AsyncSaveResponse = state_dict_saver.async_save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            async_checkpointer_type=async_checkpointer_type,
            async_stager=stager if own else async_stager,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )
        if own:
            written = future.upload_completion if isinstance(future, AsyncSaveResponse) else future
            stager.used_by(written)
    if own and isinstance(writer, Writer):
        # One that was committed has left nothing, and its writer may have begun the next save by now.
        written.add_done_callback(lambda one: writer.give_up() if one.exception() is not None else None)
    return future


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: Id | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Fill a state from a checkpoint; takes what `torch.distributed.checkpoint.load` does.

    `checkpoint_id` is a checkpoint of this engine, whoever saved it, a run, of which the newest is taken, or one that
    torch's own `save` has written.
    """
    if storage_reader is None:
        storage_reader = Reader(_given(checkpoint_id, "storage_reader"))
    try:
        state_dict_loader.load(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_reader=storage_reader,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
        )
    except CheckpointException as error:
        problem = storage_reader.problem if isinstance(storage_reader, Reader) else None
        if problem is not None and str(problem) not in str(error):
            raise error from problem
        raise


def _writer(writer: StorageWriter | None, checkpoint_id: Id | None) -> StorageWriter:
    return Writer(_given(checkpoint_id, "storage_writer")) if writer is None else writer


def _given(checkpoint_id: Id | None, other: str) -> Id:
    if checkpoint_id is None:
        raise ValueError(f"`checkpoint_id` must be specified if {other} is None")
    return checkpoint_id
