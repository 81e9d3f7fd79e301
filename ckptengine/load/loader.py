"""The life of a load: choose, bind, read, verify on all ranks, finish."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.comm.agree import agree
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointDamagedError, CheckpointError
from ckptengine.layout.box import Box
from ckptengine.load.checkpoint import Checkpoint, naming
from ckptengine.load.choose import Chooser, newest_checkpoint
from ckptengine.load.describe import describe
from ckptengine.load.fill import fill, host_memory
from ckptengine.state.bind import Binding, LoadReport, bind
from ckptengine.state.dtypes import DTYPES
from ckptengine.state.leaf import ArrayLeaf, Part, Path, dotted
from ckptengine.state.select import Selection, renamer
from ckptengine.state.tree import unflatten
from ckptengine.storage.base import Storage

__all__ = ["LoadOptions", "Loaded", "load_arrays", "load_newest", "restore_newest"]

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint and a state are matched; `ckptengine.load` explains them."""

    only: tuple[str, ...] | None = None
    rename: Mapping[str, str] | None = None
    strict: bool = True
    cast: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded: the checkpoint's step (None: a single one), generation and place; the bytes this rank read."""

    step: int | None
    generation: int
    location: str
    report: LoadReport
    nbytes: int


def load_newest(
    storage: Storage, state: Mapping[str, Any], comm: Communicator, timeout: float, options: LoadOptions
) -> Loaded:
    """Fill a state from the newest checkpoint, which must be whole; all ranks call it.

    Raises on all ranks what any of them found.
    """
    checkpoint = Chooser(storage, comm, timeout).newest()
    try:
        return _load(checkpoint, state, comm, timeout, options)
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(
            f"{error}. Parts of the state may have been overwritten: don't use it; load another checkpoint into it"
        ) from error


def restore_newest(
    storage: Storage,
    state: Mapping[str, Any],
    comm: Communicator,
    timeout: float,
    options: LoadOptions,
    step: int | None = None,
) -> Loaded | None:
    """Fill a state from the newest checkpoint that is whole, or from that of a step; all ranks call it.

    What is damaged is logged, and the one before it is taken. Returns None where nothing was ever committed.

    Raises `CheckpointDamagedError` naming all that are damaged, where none is whole.
    """
    damaged: list[str] = []
    for checkpoint in Chooser(storage, comm, timeout).candidates(step, damaged):
        try:
            return _load(checkpoint, state, comm, timeout, options)
        except CheckpointDamagedError as error:
            damaged.append(str(error))
            if comm.rank == 0:
                _log.warning("%s is damaged, the checkpoint before it is tried: %s", checkpoint.location, error)
    if damaged:
        raise CheckpointDamagedError(
            f"{storage.location()}: no checkpoint is whole. " + "; ".join(damaged) + ". The state may be partly filled"
        )
    return None


def load_arrays(storage: Storage, options: LoadOptions, rank: int | None = None) -> dict[Any, Any]:
    """Return the newest checkpoint as nested dicts of numpy arrays and plain values, in this process alone.

    With `rank`, also what that rank has of its own.
    """
    if not options.strict or options.cast:
        raise ValueError("strict and cast are for loading into a state: load() without `into` returns what there is")
    checkpoint = newest_checkpoint(storage)
    with naming(checkpoint.location):
        return _arrays_of(checkpoint, options, rank)


def _arrays_of(checkpoint: Checkpoint, options: LoadOptions, rank: int | None) -> dict[Any, Any]:
    saved = describe(checkpoint)
    if rank is not None and not 0 <= rank < saved.world_size:
        raise ValueError(f"rank {rank}: {checkpoint.location} was saved by {saved.world_size} ranks")
    selection, rename = Selection(options.only), renamer(options.rename, {})
    # Where each array comes from: tied ones come from the first of their names, which may itself not be wanted.
    names: dict[Path, tuple[Path, int | None]] = {path: (path, None) for path in saved.leaves}
    names |= {path: (first, None) for path, first in saved.aliases.items()}
    values, containers = dict(saved.values), dict(saved.containers)
    if rank is not None:
        names |= {path: (path, rank) for path in saved.rank_leaves[rank]}
        values |= saved.rank_values[rank]
        containers |= saved.rank_containers[rank]
    wanted = {path: source for path, source in names.items() if selection.holds(rename(path))}
    values = {rename(path): value for path, value in values.items() if selection.holds(rename(path))}
    selection.check()
    arrays: dict[tuple[Path, int | None], Any] = {}
    reads = []
    for source in dict.fromkeys(wanted.values()):
        record = checkpoint.rows.leaves[checkpoint.rows.index[source]]
        arrays[source] = array = _new_array(record.shape, record.dtype, record.path)
        parts = (Part(Box.whole(record.shape), host_memory(array)),) if array.size else ()
        target = ArrayLeaf(record.path, record.dtype, record.shape, record.placement, parts, "numpy")
        reads.append((checkpoint.rows.index[source], target))
    fill(checkpoint, reads)
    containers = {rename(path): kind for path, kind in containers.items()}
    return unflatten(values, {rename(path): arrays[source] for path, source in wanted.items()}, containers, {})


def _new_array(shape: tuple[int, ...], dtype: str, path: Path) -> NDArray[Any]:
    try:
        return np.empty(shape, DTYPES[dtype].numpy)
    except MemoryError as error:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        raise CheckpointError(
            f"{dotted(path)}: no memory for {nbytes:,} bytes; load a part (`only=`), or into a sharded state"
        ) from error


def _load(
    checkpoint: Checkpoint, state: Mapping[str, Any], comm: Communicator, timeout: float, options: LoadOptions
) -> Loaded:
    binding: Binding | None = None
    error: Exception | None = None
    try:
        with naming(checkpoint.location):
            binding = bind(
                state,
                describe(checkpoint),
                comm.rank,
                comm.world_size,
                only=options.only,
                rename=options.rename,
                strict=options.strict,
                cast=options.cast,
            )
    except Exception as problem:
        error = problem
    agree(comm, error, timeout, f"matching {checkpoint.location} with the state")
    assert binding is not None
    nbytes = 0
    try:
        index = checkpoint.rows.index
        with naming(checkpoint.location):
            nbytes = fill(checkpoint, [(index[read.path, read.rank], read.target) for read in binding.reads])
    except Exception as problem:
        error = problem
    agree(comm, error, timeout, f"reading {checkpoint.location}")
    try:
        binding.finish()
    except Exception as problem:
        error = problem
    agree(comm, error, timeout, f"setting the state from {checkpoint.location}")
    manifest = checkpoint.manifest
    return Loaded(manifest.step, manifest.generation, checkpoint.location, binding.report, nbytes)
