"""Save and load as single calls; `Checkpointer` is the same with a policy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

from ckptengine.catalog.naming import open_checkpoint
from ckptengine.comm.base import Communicator
from ckptengine.comm.select import current
from ckptengine.errors import SaveFailedError
from ckptengine.frameworks.registry import framework
from ckptengine.lifecycle import after_fork
from ckptengine.load.loader import LoadOptions, load_arrays, load_newest, tell_leftovers
from ckptengine.policy.arguments import checked_comm, checked_seconds, checked_step
from ckptengine.save.handle import SaveHandle, SaveStats
from ckptengine.save.replicas import replica_check
from ckptengine.save.saver import DEFAULT_TIMEOUT, Saver
from ckptengine.save.single import single_checkpoint
from ckptengine.state.bind import LoadReport
from ckptengine.state.rename import Rename
from ckptengine.storage.open import open_storage

if TYPE_CHECKING:
    from ckptengine.export.run import ExportReport

__all__ = ["async_save", "export", "load", "save"]


# Plans and memory are reused from call to call; one group of ranks at a time, so that those of an ended one are freed.
_savers: dict[Communicator, Saver] = {}
_lock = threading.RLock()  # a signal handler may save while this thread is in here


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    check_replicas: str | bool = "first",
    timeout: float = DEFAULT_TIMEOUT,
    comm: Communicator | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SaveStats:
    """Save a state as one checkpoint and return its figures when it is durable; all ranks call it.

    `path` is a directory that all ranks see, or a URL that fsspec opens, such as `s3://bucket/path`, with
    `storage_options` for its file system; a checkpoint that is there already is replaced, after the new one is
    committed. `state` maps names to modules, optimizers, objects with `state_dict`, tensors, arrays, plain values,
    dicts and lists of these, `ShardedArray` and `PerRank`. `metadata` is plain JSON for the manifest.
    `check_replicas`: plain tensors and arrays that several ranks have under one name are replicas, of which one is
    stored. Their contents are compared at the first save of each structure of the state (`"first"`), at every save
    (`"always"`, or True) or not at all (`"never"`, or False); comparing reads every byte of every replica.
    `timeout`, in seconds, bounds each wait for other ranks or for the storage.

    Raises `StateError` for what can't be saved, `ReplicaMismatchError` where replicated values differ between
    ranks, `SaveFailedError` where any rank failed, `DeadlineError` naming the ranks that did not come. Whatever
    was there before then still is.
    """
    timeout = checked_seconds("timeout", timeout)
    comm = checked_comm(comm) or current(timeout)
    saver = _saver(comm, timeout)
    handle = async_save(
        path,
        state,
        metadata=metadata,
        check_replicas=check_replicas,
        timeout=timeout,
        comm=comm,
        storage_options=storage_options,
    )
    stats = handle.durable.result()
    saver.settle(timeout)
    if stats is None:
        raise SaveFailedError(f"{handle.path}: the save ended without statistics")
    return stats


def async_save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    check_replicas: str | bool = "first",
    timeout: float = DEFAULT_TIMEOUT,
    comm: Communicator | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SaveHandle:
    """Start to save a state and return a handle with `.staged` and `.durable`; all ranks call it.

    Takes and raises what `save` does; what happens after the snapshot is raised by `handle.durable.result()`.
    """
    timeout = checked_seconds("timeout", timeout)
    comm = checked_comm(comm) or current(timeout)
    saver = _saver(comm, timeout)
    storage = open_storage(path, storage_options, timeout)
    storage.check_shared(comm.world_size)
    target = single_checkpoint(storage, metadata)
    return saver.start(target, state, replica_check(check_replicas), timeout)


def _saver(comm: Communicator, timeout: float) -> Saver:
    with _lock:
        if comm not in _savers:
            for other in [other for other, saver in _savers.items() if not saver.busy]:
                _savers.pop(other).close()
            _savers[comm] = Saver(comm, timeout)
        return _savers[comm]


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


after_fork(_after_fork)


@overload
def load(
    path: str | os.PathLike[str],
    into: None = None,
    *,
    step: int | None = None,
    only: Iterable[str] | None = None,
    rename: Rename | None = None,
    rank: int | None = None,
    as_torch: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[Any, Any]: ...


@overload
def load(
    path: str | os.PathLike[str],
    into: Mapping[str, Any],
    *,
    step: int | None = None,
    only: Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    verify: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    comm: Communicator | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> LoadReport: ...


def load(
    path: str | os.PathLike[str],
    into: Mapping[str, Any] | None = None,
    *,
    step: int | None = None,
    only: Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    verify: bool = True,
    rank: int | None = None,
    as_torch: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    comm: Communicator | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[Any, Any] | LoadReport:
    """Fill a state from a checkpoint, or return its arrays and values.

    `path` is a run, of which the newest checkpoint is taken or that of `step`; or RUN/step-40, or what `save` wrote; or
    a URL of these, with fsspec's `storage_options`. Or it is another library's: a safetensors file, a directory of
    Hugging Face or of DCP, a file that `torch.save` wrote (`docs/foreign.md`).

    With `into`, all ranks call it, at any world size and sharding, and get a `LoadReport`; tensors are filled in place,
    objects through `load_state_dict`. Without, this process alone gets nested dicts of numpy arrays (bfloat16 and
    float8 as `ml_dtypes`' types) and plain values; no framework is needed. With `as_torch=True` the arrays are torch
    tensors on the CPU, of the dtypes that were saved. What ranks have of their own (`PerRank`) is left out, or with
    `rank` that rank's is included.

    `only` restricts to parts of the state, by dotted prefixes (`["model", "optimizer.state"]`). `rename` maps dotted
    prefixes of the checkpoint to those of the state, `*` in both standing for one part of a name and `**` for any
    number, or compiled regular expressions to what takes their place; or it is a function of a name. With
    `strict=False` missing and unexpected leaves are reported, not raised; with `cast=True` a leaf may change its dtype.
    With `into`, the state is compared with the checkpoint afterwards (`docs/verification.md`), unless `verify=False`.
    `timeout` is in seconds.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError` naming the file, `LoadMismatchError` listing every
    leaf that doesn't fit, `RestoreDifferenceError` naming what is not as it was saved once all is set,
    `FormatVersionError`, `ForeignFormatError` for what another library wrote and is not read. After damage that was
    found while tensors were being filled, the state is not usable; the message says so.
    """
    timeout, comm = checked_seconds("timeout", timeout), checked_comm(comm)
    storage = open_checkpoint(path, storage_options, None if step is None else checked_step(step, {}), timeout)
    options = LoadOptions.of(only, rename, strict, cast, verify)
    if into is None:
        return load_arrays(storage, options, rank, timeout, framework("torch").tensor_of if as_torch else None)
    if as_torch or rank is not None:
        raise ValueError("as_torch and rank are for loading without `into`; with it the state decides")
    comm = comm or current(timeout)
    storage.check_shared(comm.world_size)
    loaded = load_newest(storage, into, comm, timeout, options)
    tell_leftovers(loaded, comm)
    report: LoadReport = loaded.report
    return report


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "safetensors",
    step: int | None = None,
    only: Iterable[str] | None = None,
    rename: Rename | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    comm: Communicator | None = None,
    storage_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a checkpoint in the format of another library; all ranks call it, and share the files.

    `path` is what `load` takes. `to` is `safetensors` (`target` is a directory for files as Hugging Face names them, or
    `FILE.safetensors`), `torch` (a file for `torch.load`), `dcp` (a directory), `zarr` (a directory, or `FILE.zip`) or
    `mindspore` (a file); `docs/foreign.md` tells what each holds. `only` restricts to dotted prefixes of the names in
    the checkpoint, `rename` is that of `load`; `dtype` (`"bfloat16"`, or torch's own) is what floating arrays but
    scalars are written as. A safetensors file has arrays of at most `max_shard_size` bytes. `progress` is called with
    the bytes that this rank has written and those that it has to. Both places may be URLs, with fsspec's
    `storage_options` and `target_options`. Memory stays the same whatever the size.

    Raises what `load` raises, `StorageError` (EEXIST) where a file is there already, `ForeignFormatError` naming what
    the format can't hold, `ValueError` for options that are none.
    """
    from ckptengine.export.run import ExportOptions, export_checkpoint, target_of  # here: most jobs never export

    timeout, comm = checked_seconds("timeout", timeout), checked_comm(comm)
    options = ExportOptions.of(to, only, rename, dtype, max_shard_size)
    source = open_checkpoint(path, storage_options, None if step is None else checked_step(step, {}), timeout)
    place, name = target_of(open_storage(target, target_options, timeout), options.format)
    comm = comm or current(timeout)
    for storage in (source, place):
        storage.check_shared(comm.world_size)
    return export_checkpoint(source, place, name, options, comm, timeout, progress)
