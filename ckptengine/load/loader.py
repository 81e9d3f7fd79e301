"""The life of a load: choose, bind, read, verify on all ranks, finish."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptengine._native as _native
from ckptengine.catalog.keep import Best
from ckptengine.comm.agree import do_and_exchange, gather, on_all
from ckptengine.comm.base import Communicator
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointError,
    DeviceError,
    ForeignFormatError,
    LoadMismatchError,
    RankFailedError,
    StorageError,
)
from ckptengine.frameworks.registry import adapters
from ckptengine.load.checkpoint import Checkpoint, Opened, naming
from ckptengine.load.choose import TRIES, Chooser, newest_or_foreign, outrun
from ckptengine.load.describe import describe
from ckptengine.load.fill import Filling, host_memory, plan_filling, read_ranges
from ckptengine.load.judge import judge, said_of
from ckptengine.load.node import Offer
from ckptengine.load.same import brings_the_same
from ckptengine.load.share import Counts, Together, make_offer, read, together
from ckptengine.load.verify import Marks, check_restored
from ckptengine.load.window import StoppedElsewhere
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, Part
from ckptengine.schema.path import Path, dotted
from ckptengine.state.bind import Binding, LoadReport, check_fit, match
from ckptengine.state.outline import ordered_forms, put_in_order
from ckptengine.state.rename import Rename, renamer
from ckptengine.state.saved import Saved
from ckptengine.state.select import Selection
from ckptengine.state.tree import unflatten
from ckptengine.storage.base import StorageView
from ckptengine.storage.within import within

__all__ = ["LoadOptions", "Loaded", "check_distinct", "load_arrays", "load_newest", "restore_newest", "tell_leftovers"]

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint and a state are matched; `ckptengine.load` explains them."""

    only: tuple[str, ...] | None = None
    rename: Rename | None = None
    strict: bool = True
    cast: bool = False
    verify: bool = True

    @classmethod
    def of(
        cls,
        only: Iterable[str] | None,
        rename: Rename | None,
        strict: bool,
        cast: bool,
        verify: bool = True,
    ) -> LoadOptions:
        """Return the options as users give them: `only` may be a single prefix."""
        if isinstance(only, str):
            only = [only]
        return cls(None if only is None else tuple(only), rename, strict, cast, verify)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded: the checkpoint's step (None: a single one), generation and place, and the bytes of its archives.
    `attempt` is that which wrote it, empty for another library's. `tells` tells whether this rank is the first of those
    for which the same does not fit.

    Over the ranks of a node, `counts.read` sums up to `counts.node_needed` where they could read together.
    """

    step: int | None
    generation: int
    location: str
    report: LoadReport
    counts: Counts
    attempt: str = ""
    tells: bool = True


def load_newest(
    storage: StorageView,
    state: Mapping[str, Any],
    comm: Communicator,
    timeout: float,
    options: LoadOptions,
    arguments: Mapping[str, object] | None = None,
) -> Loaded:
    """Fill a state from the newest checkpoint, which must be whole; all ranks call it.

    `arguments` are those of the caller that all ranks must give alike. Raises on all ranks what any of them found;
    `ValueError` where these differ.
    """
    chooser = Chooser([storage], comm, timeout, "load", arguments)
    for _ in range(TRIES):
        checkpoint = chooser.newest()
        try:
            return _load(checkpoint, state, comm, timeout, options)
        except (CheckpointDamagedError, StorageError, RankFailedError) as error:
            failure = error
        if not chooser.is_gone(checkpoint):
            break
        _tell_gone(comm, checkpoint, failure)
    else:
        raise outrun(storage, filling=True) from failure
    if isinstance(failure, CheckpointDamagedError):
        raise CheckpointDamagedError(
            f"{failure}. Parts of the state may have been overwritten: don't use it; load another checkpoint into it"
        ) from failure
    raise failure


def restore_newest(
    views: Sequence[StorageView],
    state: Mapping[str, Any],
    comm: Communicator,
    timeout: float,
    options: LoadOptions,
    step: int | None = None,
    best: Best | None = None,
    upload: Callable[[Checkpoint], None] | None = None,
    where: str = "",
    arguments: Mapping[str, object] | None = None,
) -> Loaded | None:
    """Fill a state from the newest checkpoint that is whole, that of a step, or the best; all ranks call it.

    What is damaged is logged, and another copy or the one before it is taken; where one can't be read, another copy
    only. See `Chooser` for `views`. `upload` is called on all ranks before a checkpoint is read, to have it where
    every rank can read it. `where` is what messages call the place. `arguments` are those of the caller that all
    ranks must give alike. Returns None where nothing was ever committed.

    Raises `CheckpointDamagedError` naming all that are damaged, where none is whole; `StorageError`, ESTALE where a
    writer has deleted each one before it was read; `ValueError` on all ranks where `arguments` differ.
    """
    chooser = Chooser(views, comm, timeout, "restore", arguments)
    for _ in range(TRIES):
        damaged: list[str] = []
        unread: StorageError | None = None
        place: tuple[str, int] | None = None
        for checkpoint in chooser.candidates(step, damaged, best):
            if unread is not None and place != (checkpoint.directory, checkpoint.manifest.generation):
                raise unread
            unread, place = None, (checkpoint.directory, checkpoint.manifest.generation)
            try:
                if upload is not None:
                    upload(checkpoint)
                return _load(checkpoint, state, comm, timeout, options)
            except (CheckpointDamagedError, StorageError) as error:
                if chooser.is_gone(checkpoint):
                    # Its writer has deleted it since: there is a newer one.
                    _tell_gone(comm, checkpoint, error)
                    failure = error
                    break
                if isinstance(error, CheckpointDamagedError):
                    damaged.append(str(error))
                    if comm.rank == 0:
                        _log.warning(
                            "%s is damaged; another copy or its parent is tried: %s", checkpoint.location, error
                        )
                    continue
                # Another copy of it will do; an older one would not, for it may be there again the next time.
                if checkpoint.storage is views[-1]:
                    raise
                unread = error
                if comm.rank == 0:
                    _log.warning("%s can't be read; another copy is tried: %s", checkpoint.location, error)
        else:
            break
    else:
        raise outrun(views[0], filling=True) from failure
    if unread is not None:
        raise unread
    if damaged:
        raise CheckpointDamagedError(
            f"{where or views[0].location()}: no checkpoint is complete. {'; '.join(damaged)}. The state may be partly "
            "filled"
        )
    return None


def tell_leftovers(loaded: Loaded, comm: Communicator) -> None:
    """Log what did not fit and was left as it is, once for all ranks for which it is the same."""
    if loaded.tells and not loaded.report.complete:
        who = f" on rank {comm.rank}" if comm.rank else ""
        _log.warning("%s: not all of it was loaded%s: %s", loaded.location, who, loaded.report)


def _tell_gone(comm: Communicator, checkpoint: Opened, error: Exception) -> None:
    if comm.rank == 0:
        _log.info(
            "%s was deleted while it was being read; the checkpoint that is there now is loaded: %s",
            checkpoint.location,
            error,
        )


def load_arrays(
    storage: StorageView,
    options: LoadOptions,
    rank: int | None = None,
    timeout: float = 600.0,
    convert: Callable[[NDArray[Any], str], Any] | None = None,
) -> dict[Any, Any]:
    """Return the newest checkpoint as nested dicts of numpy arrays and plain values, in this process alone.

    With `rank`, also what that rank has of its own. `convert` makes of each array, given its logical dtype, what is
    returned in its place; None: the array itself.
    """
    if not options.strict or options.cast:
        raise ValueError("strict and cast are for loading into a state: load() without `into` returns what there is")

    def read(checkpoint: Opened) -> dict[Any, Any]:
        with naming(checkpoint.location):
            return _arrays_of(checkpoint, options, rank, timeout, convert)

    doing = f"loading {storage.location()}"
    return within(timeout, doing, lambda: newest_or_foreign(storage, read), _native.counters)


def _arrays_of(
    checkpoint: Opened,
    options: LoadOptions,
    rank: int | None,
    timeout: float,
    convert: Callable[[NDArray[Any], str], Any] | None,
) -> dict[Any, Any]:
    saved = describe(checkpoint)
    if rank is not None and not 0 <= rank < saved.world_size:
        raise ValueError(f"rank {rank}: {checkpoint.location} was saved by {saved.world_size} ranks")
    selection, rename = Selection(options.only), renamer(options.rename, {}, saved.flat)
    refuse_unread(saved.unread_of(selection, rename))
    # Where each array comes from: tied ones come from the first of their names, which may itself not be wanted.
    names: dict[Path, tuple[Path, int | None]] = {path: (path, None) for path in saved.leaves}
    names |= {path: (first, None) for path, first in saved.aliases.items()}
    values, containers = dict(saved.values), dict(saved.containers)
    if rank is not None:
        names |= {path: (path, rank) for path in saved.rank_leaves[rank]}
        values |= saved.rank_values[rank]
        containers |= saved.rank_containers[rank]
    wanted = {path: source for path, source in names.items() if selection.holds(rename(path))}
    check_distinct([*wanted, *(path for path in values if selection.holds(rename(path)))], rename)
    values = {rename(path): value for path, value in values.items() if selection.holds(rename(path))}
    outlines = [saved.outline, *([] if rank is None else [saved.rank_outlines[rank]])]
    for outline in outlines:
        empty = () if outline is None or outline.empty is None else map(rename, outline.empty)
        values |= {path: {} for path in empty if selection.holds(path)}
    selection.check()
    arrays: dict[tuple[Path, int | None], Any] = {}
    reads = []
    for source in dict.fromkeys(wanted.values()):
        record = checkpoint.rows.leaves[checkpoint.rows.index[source]]
        arrays[source] = array = _new_array(record.shape, record.dtype, record.path)
        parts = (Part(Box.whole(record.shape), host_memory(array)),) if array.size else ()
        target = ArrayLeaf(record.path, record.dtype, record.shape, record.placement, parts, "numpy")
        reads.append((checkpoint.rows.index[source], target))
    filling = plan_filling(checkpoint, reads)
    read_ranges(filling, filling.needs, timeout)
    filling.finish()
    if convert is not None:
        for (source, array), (_, target) in zip(list(arrays.items()), reads, strict=True):
            arrays[source] = convert(array, target.dtype)
    containers = {rename(path): kind for path, kind in containers.items()}
    for outline in outlines:
        containers |= {} if outline is None else {rename(path): form for path, form in ordered_forms(outline).items()}
    nested = unflatten(values, {rename(path): arrays[source] for path, source in wanted.items()}, containers, {})
    for outline in outlines:
        if outline is not None:
            put_in_order(nested, outline, rename)
    return nested


def refuse_unread(unread: Mapping[str, str]) -> None:
    """Raise `ForeignFormatError` where something is wanted that is not read."""
    for name, what in unread.items():
        raise ForeignFormatError(
            f"{name} holds {what}, which is not among the types of weights and plain values that are read: "
            "no code in it was run. `only=` loads the rest. If you trust the file, load it with the library that wrote "
            "it and save weights and plain values alone"
        )


def check_distinct(paths: Iterable[Path], rename: Callable[[Path], Path]) -> None:
    """Raise `LoadMismatchError` where two leaves would have one name."""
    first: dict[Path, Path] = {}
    for path in paths:
        if first.setdefault(rename(path), path) != path:
            both = f"{dotted(first[rename(path)])!r} and {dotted(path)!r}"
            raise LoadMismatchError(f"rename: {both} would both be called {dotted(rename(path))!r}; change the rule")


def _new_array(shape: tuple[int, ...], dtype: str, path: Path) -> NDArray[Any]:
    try:
        return np.empty(shape, DTYPES[dtype].numpy)
    except MemoryError as error:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        raise CheckpointError(
            f"{dotted(path)}: not enough memory for {nbytes:,} bytes; load a part (`only=`), or into a sharded state"
        ) from error


def _load(
    checkpoint: Opened, state: Mapping[str, Any], comm: Communicator, timeout: float, options: LoadOptions
) -> Loaded:
    with contextlib.ExitStack() as undo:
        loaded = _load_undoing(undo.callback, checkpoint, state, comm, timeout, options)
        undo.pop_all()
    return loaded


def _load_undoing(
    undo: Callable[[Callable[[], None]], object],
    checkpoint: Opened,
    state: Mapping[str, Any],
    comm: Communicator,
    timeout: float,
    options: LoadOptions,
) -> Loaded:
    """Load; `undo` is given what is to be done where that fails."""
    where = checkpoint.location
    with contextlib.ExitStack() as held:

        def work() -> tuple[_Matched, bytes]:
            matched = _match(undo, checkpoint, state, comm, timeout, options)
            held.enter_context(matched.offer)
            return matched, matched.offer.greeting + said_of(matched.binding, options.strict, options.verify)

        matched, words = do_and_exchange(comm, work, timeout, f"matching {where} with the state")
        binding, filling, offer = matched.binding, matched.filling, matched.offer
        size = len(offer.greeting)
        greetings = [word[:size] for word in words]
        with naming(where):
            verdict = judge(binding, [word[size:] for word in words], comm.rank)
        if matched.unread:
            binding.report = replace(binding.report, unexpected=(*binding.report.unexpected, *matched.unread))
        if verdict.refused:
            _refuse(binding, options.strict, comm, timeout, where)
        with together(comm, offer, greetings, timeout, f"preparing to read {where}") as group:
            fill = functools.partial(_fill, filling, group, where, timeout, comm.rank)
            counts = on_all(comm, fill, timeout, f"reading {where}")
    if counts is None:
        raise RankFailedError(f"reading {where} was stopped by a rank that gave no reason")
    finish = functools.partial(_finish, binding, verdict.verifies, where, comm.rank)
    marks = on_all(comm, finish, timeout, f"setting the state from {where}")
    if marks is not None:  # all ranks ask their objects once more, or none does
        check = functools.partial(
            check_restored, checkpoint, state, binding, marks, comm.rank, comm.world_size, timeout
        )
        on_all(comm, check, timeout, f"comparing the state with {where}")
    attempt = checkpoint.manifest.attempt if isinstance(checkpoint, Checkpoint) else ""
    return Loaded(checkpoint.step, checkpoint.generation, where, binding.report, counts, attempt, verdict.tells)


@dataclass(frozen=True, slots=True)
class _Matched:
    """A checkpoint and a state: how they fit, what is wanted and not read, what this rank reads and what it offers."""

    binding: Binding
    unread: list[str]
    filling: Filling
    offer: Offer


def _match(
    undo: Callable[[Callable[[], None]], object],
    checkpoint: Opened,
    state: Mapping[str, Any],
    comm: Communicator,
    timeout: float,
    options: LoadOptions,
) -> _Matched:
    """Match a checkpoint and a state on this rank, and plan what it reads."""
    where = checkpoint.location
    try:
        with naming(where):
            saved = within(timeout, f"reading {where}", lambda: describe(checkpoint), _native.counters)
            unread = _unread(saved, state, options)
            binding = match(
                state,
                saved,
                comm.rank,
                comm.world_size,
                only=options.only,
                rename=options.rename,
                strict=options.strict,
                cast=options.cast,
                same=functools.partial(brings_the_same, checkpoint, timeout),
            )
            undo(binding.give_up)
            index = checkpoint.rows.index
            wanted = [(index[one.path, one.rank], one.target) for one in binding.reads]
            plan = functools.partial(plan_filling, checkpoint, wanted, timeout)
            filling = within(timeout, f"reading {where}", plan, _native.counters)
            return _Matched(binding, unread, filling, make_offer(comm, filling))
    except DeviceError as problem:
        raise DeviceError(f"rank {comm.rank}: {where}: {problem}. Nothing of the state was changed") from problem


def _refuse(binding: Binding, strict: bool, comm: Communicator, timeout: float, where: str) -> None:
    """Raise on all ranks what does not fit on any; all of them come here."""
    error: Exception | None = None
    try:
        with naming(where):
            check_fit(binding, strict)
    except LoadMismatchError as problem:
        error = problem
    gather(comm, b"", error, timeout, f"matching {where} with the state")


def _unread(saved: Saved, state: Mapping[str, Any], options: LoadOptions) -> list[str]:
    """Return the names of what is wanted and not read, where not everything has to fit; raises otherwise."""
    if not saved.unread:
        return []
    unread = saved.unread_of(Selection(options.only), renamer(options.rename, state, saved.flat))
    if options.strict:
        refuse_unread(unread)
    return list(unread)


def _devices_errors() -> tuple[type[Exception], ...]:
    return (DeviceError, *(kind for adapter in adapters() for kind in adapter.shortages))


@contextlib.contextmanager
def _naming_devices(where: str, rank: int) -> Iterator[None]:
    """Have an error of a device say on which rank, of what, and what state it leaves; raises `DeviceError`."""
    try:
        yield
    except _devices_errors() as error:
        text = f"{error}" if isinstance(error, DeviceError) else f"{type(error).__name__}: {error}"
        raise DeviceError(
            f"rank {rank}: {where}: {text}. Parts of the state may have been overwritten: don't use it before a load "
            "into it has ended well",
            isinstance(error, DeviceError) and error.under_way,
        ) from error


def _fill(filling: Filling, group: Together | None, where: str, timeout: float, rank: int) -> Counts | None:
    """Read this rank's part; None where another rank, which raises its error on all, has stopped it."""
    try:
        with naming(where), _naming_devices(where, rank):
            counts = read(filling, group, timeout)
            filling.finish()
    except StoppedElsewhere:
        return None
    finally:
        filling.close()
    return counts


def _finish(binding: Binding, verify: bool, where: str, rank: int) -> Marks | None:
    """Hand over what objects get; return what tells the tensors of before, where the state is verified."""
    marks = Marks(binding) if verify else None
    with _naming_devices(where, rank):
        binding.finish()
    return marks
