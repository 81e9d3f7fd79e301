"""Save and load as single calls; `Checkpointer` is the same with a policy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

from ckptengine.catalog.naming import open_checkpoint
from ckptengine.comm.base import Communicator
from ckptengine.comm.select import current
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
    """Save a state as one checkpoint and return its statistics once it is durable. Collective: all ranks call it.

    - `path`: a directory that all ranks see, or a URL that fsspec opens, such as `s3://bucket/path`, with
      `storage_options` for its file system. A checkpoint at that path is replaced after the new one is committed.
    - `state`: a dict of names and modules, optimizers, objects with `state_dict`, tensors and arrays of any shape and
      of the dtypes in `docs/format.md`, plain values, dicts and lists of these, `Sharded`, `ShardedArray`, `PerRank`.
    - `metadata`: plain JSON for the manifest.
    - `check_replicas`: plain tensors and arrays that several ranks have under one name are replicas; one copy is
      stored. Compare their contents at the first save of each structure of the state (`"first"`; the second, too, where
      tensors are declared as split, or optimizers' groups hold tensors), at every save (`"always"` or True), or never
      (`"never"` or False). Comparing reads every byte of every replica.
    - `timeout`: seconds; bounds each wait for other ranks or for the storage.
    - `comm`: the ranks that save together; by default those of what is initialized (torch.distributed, MindSpore, MPI).

    Raises `StateError` for what can't be saved, `ReplicaMismatchError` if replicated values differ between ranks,
    `SaveFailedError` if any rank failed, `StorageError` if the storage can't be opened, and `DeadlineError`, naming the
    missing ranks, if they do not come in time. After an error an earlier checkpoint at the path is unchanged.
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
    """Start to save a state in the background and return a `SaveHandle`. Collective: all ranks call it.

    Take the same arguments as `save` and raise the same errors; errors after the snapshot are raised by
    `handle.durable.result()`.
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

    With `into`, fill that state in place and return a `LoadReport`. Collective: all ranks call it, at any world size
    and sharding. Objects are loaded through `load_state_dict`. Without `into`, return nested dicts of numpy arrays with
    the global shapes and the saved dtypes (bfloat16 and float8 as the types of `ml_dtypes`), and plain values, to this
    process alone; no framework is needed.

    - `path`: a run (its newest checkpoint, or that of `step`), RUN/step-40, or what `save` wrote; or a URL of these,
      with fsspec's `storage_options`. Or another library's checkpoint: a safetensors file, a Hugging Face or DCP
      directory, a `torch.save` file (`docs/foreign.md`).
    - `only`: load only these parts of the state, as dotted prefixes (`["model", "optimizer.state"]`).
    - `rename`: a dict from dotted prefixes of the checkpoint to those of the state. In both, `*` stands for one part of
      a name and `**` for any number. Keys may also be compiled regular expressions, with the replacement as value. Or a
      function from a name to a name.
    - `strict=False`: report missing, unexpected and mismatched leaves instead of raising. `cast=True`: allow another
      dtype. `verify=False`: skip the comparison of the state with the checkpoint (`docs/verification.md`). These three
      are for `into`.
    - `rank`, without `into`: include this rank's `PerRank` values, which are otherwise left out.
    - `as_torch=True`, without `into`: return torch tensors on the CPU instead of numpy arrays.
    - `timeout`: seconds; bounds each wait for other ranks or for the storage. `comm`: as for `save`.

    Raises `CheckpointNotFoundError`; `CheckpointDamagedError`, naming the file; `LoadMismatchError`, listing every leaf
    that does not match; `RestoreDifferenceError`, naming what differs after the load; `FormatVersionError` for a newer
    format; `ForeignFormatError` for parts of another library's checkpoint that are not read; `StorageError`;
    `DeadlineError`; `ValueError` if ranks give different `step`s. If damage is found while tensors are being filled,
    the state is not usable, and the message says so.
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
    loaded = load_newest(storage, into, comm, timeout, options, {"step": step})
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
    """Write a checkpoint in another library's format and return an `ExportReport`. Collective: ranks share the files.

    - `path`, `step`: as for `load`. `storage_options` are for its file system, `target_options` for that of `target`.
    - `to`, `target`: `safetensors` (a directory for files as Hugging Face names them, or `FILE.safetensors`), `torch`
      (a file for `torch.load`), `dcp` (a directory), `zarr` (a directory, or `FILE.zip`) or `mindspore` (a file).
      `docs/foreign.md` says what each can hold.
    - `only`: dotted prefixes of the checkpoint's names. `rename`: as for `load`.
    - `dtype`: what to convert floating arrays to, except scalars: `"bfloat16"`, or a torch dtype.
    - `max_shard_size`: most bytes of arrays in one safetensors file, as a number or a text such as `"5GB"`.
    - `progress`: called with the bytes that this rank has written and the bytes that it has to write.
    - `timeout`: seconds; bounds each wait. `comm`: as for `save`.

    Memory does not depend on the size of the checkpoint. Raises what `load` raises, `StorageError` (EEXIST) if a file
    exists already, `ForeignFormatError` naming what the format can't hold, `ValueError` for unknown options
    and ones that differ between ranks.
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
