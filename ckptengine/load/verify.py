"""After a load: whether the state is what was saved, without reading most of it twice."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import ckptengine._native as _native
from ckptengine.errors import CheckpointError, RestoreDifferenceError
from ckptengine.frameworks.adapter import TensorView
from ckptengine.frameworks.registry import adapters
from ckptengine.load.checkpoint import Opened
from ckptengine.load.same import stored_parts
from ckptengine.load.seen import Watch
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import HostMemory, Part
from ckptengine.schema.path import Path, is_inside
from ckptengine.state.binding import Binding, Promise, Read
from ckptengine.state.compare import Difference, Found, compare
from ckptengine.state.extents import Extent, array_at, extents, sharing
from ckptengine.state.outline import part_order
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.tree import FlatState, flatten_loaded
from ckptengine.storage.within import within

__all__ = ["Marks", "check_restored"]

_SHOWN = 8

_log = logging.getLogger("ckptengine")


class Marks:
    """What was filled, and what shows a change: taken when all is verified, before any code of the user ran."""

    def __init__(self, binding: Binding) -> None:
        promise = binding.promise
        self._reads = binding.reads
        self._of: dict[tuple[Path, int | None], list[int]] = {}
        for number, read in enumerate(self._reads):
            self._of.setdefault((read.path, read.rank), []).append(number)
        # What objects are handed is summed up whole: it may be numpy's, which counts no writes.
        whole = [
            number
            for number, read in enumerate(self._reads)
            if read.target.path not in promise.optimizers and is_inside(read.target.path, promise.before)
        ]
        self._watch = Watch([read.target for read in self._reads], [read.places for read in self._reads], whole)
        self._unchanged: Sequence[bool] = ()
        self._prints = self._fingerprints()

    def _fingerprints(self) -> dict[int, tuple[Any, ...]]:
        """Return by the `id` of each tensor that was filled what its view depends on; the reads keep the tensors."""
        tensors: dict[str, list[Any]] = {}
        for read in self._reads:
            if read.live is not None and not isinstance(read.live[0], ShardedArray):
                tensors.setdefault(read.target.container, []).append(read.live[0])
        known = {adapter.name: adapter for adapter in adapters()}
        return {
            id(tensor): columns
            for name, ours in tensors.items()
            for tensor, columns in zip(ours, zip(*known[name].fingerprints(ours), strict=True), strict=True)
        }

    def views(self) -> dict[int, TensorView]:
        """Return the views of the tensors, by `id`, that lie where they lay: nobody has to find them out again."""
        now = self._fingerprints()
        return {
            id(read.live[0]): read.live[1]
            for read in self._reads
            if read.live is not None and self._prints.get(id(read.live[0]), self) == now.get(id(read.live[0]))
        }

    def look(self) -> None:
        """See what has changed; called once, when no code of the user is going to run any more."""
        self._unchanged = self._watch.unchanged().tolist()

    def vouch_for(self, one: Found) -> bool | None:
        """Return whether a leaf is as it was read; None where only the checkpoint can tell.

        What lies where it was read to and was not touched since needs no second look. What was read, and is untouched,
        is compared with what lies elsewhere.
        """
        for number in self._of.get((one.entry.path, one.entry.rank), []):
            read = self._reads[number]
            target = read.target
            if not self._unchanged[number]:
                continue
            same = one.leaf.parts is target.parts
            if not same and [part.box for part in target.parts] != [part.box for part in one.leaf.parts]:
                continue
            if _lies_at(one, read):
                return True
            pairs = zip(target.parts, one.leaf.parts, strict=True)
            if all(_equal(_host(a, target.dtype), _host(b, target.dtype)) for a, b in pairs):
                return True
        return None

    def made(self, one: Found) -> bool:
        """Whether a leaf lies in memory that was read into."""
        return any(_lies_at(one, self._reads[n]) for n in self._of.get((one.entry.path, one.entry.rank), []))

    def places(self, one: Found) -> Sequence[Extent]:
        """Return where a leaf lies."""
        for number in self._of.get((one.entry.path, one.entry.rank), []):
            if self._reads[number].target.parts is one.leaf.parts:
                return self._reads[number].places
        return extents(one.leaf)


def _lies_at(one: Found, read: Read) -> bool:
    """Whether a leaf lies where a read went to."""
    if one.leaf.parts is read.target.parts:  # the view is that of the binding
        return len(read.places) == len(read.target.parts)
    places = tuple(extents(one.leaf))
    return len(places) == len(one.leaf.parts) and places == read.places


def check_restored(
    checkpoint: Opened,
    state: Mapping[str, Any],
    binding: Binding,
    marks: Marks,
    rank: int,
    world_size: int,
    timeout: float,
) -> FlatState:
    """Walk the state as a save would and compare it with the checkpoint; return what the walk saw.

    `timeout` bounds each array that is read once more, in seconds.

    Raises `RestoreDifferenceError` naming the leaves, the rank, what was stored and what is there now.
    """
    promise = binding.promise
    try:
        flat = flatten_loaded(state, promise.wanted, marks.views)
        marks.look()
        differences, kept, found = compare(promise, flat, world_size)
    except CheckpointError as error:
        raise RestoreDifferenceError(
            f"rank {rank}: the state can't be compared with {checkpoint.location}, from which it was restored: "
            f"{error}. `verify=False` restores without this check"
        ) from error
    differences += _arrays(checkpoint, promise, marks, found, timeout)
    if kept:
        _log.warning(
            "%s: %d value(s) of objects are newer than the checkpoint and were left as they are: %s",
            checkpoint.location,
            len(kept),
            ", ".join(str(one).partition(":")[0] for one in kept[:_SHOWN]),
        )
    if differences:
        raise RestoreDifferenceError(_message(checkpoint.location, differences, rank))
    return flat


def _arrays(
    checkpoint: Opened, promise: Promise, marks: Marks, found: Sequence[Found], timeout: float
) -> list[Difference]:
    """Return the arrays whose bytes, or whose order in memory, are not those of the checkpoint."""
    differences = []
    doubtful = _sharing(found, marks)
    for number, one in enumerate(found):
        if one.path in promise.cast:
            continue  # its bytes are what the cast made of them
        if (number in doubtful or not marks.vouch_for(one)) and not _as_stored(checkpoint, one, timeout):
            differences.append(Difference(one.path, f"other contents now than in the checkpoint, {_head(one)}"))
        elif one.entry.told and is_inside(one.path, promise.built) and marks.made(one) and not _lies_as_saved(one):
            order = "row-major" if one.entry.order is None else f"dimensions {one.entry.order}, outermost first"
            differences.append(Difference(one.path, f"{order} in the checkpoint, another memory layout now"))
    return differences


def _sharing(found: Sequence[Found], marks: Marks) -> set[int]:
    """Return the arrays that have memory in common with one that has other bytes in the checkpoint."""
    result: set[int] = set()
    for group in sharing([marks.places(one) for one in found]):
        if len({(found[n].entry.path, found[n].entry.rank) for n in group}) > 1:
            result.update(group)
    return result


def _lies_as_saved(one: Found) -> bool:
    if not one.leaf.parts or one.leaf.parts[0].order is not None:
        return True
    shape, here = one.leaf.parts[0].box.shape, part_order(one.leaf.parts[0])
    natural = range(len(shape))
    orders = [
        [dim for dim in (order or natural) if dim < len(shape) and shape[dim] > 1] for order in (here, one.entry.order)
    ]
    return orders[0] == orders[1]


def _as_stored(checkpoint: Opened, one: Found, timeout: float) -> bool:
    """Whether an array has the bytes that are stored, which are read once more."""
    read, doing = Read(one.entry.path, one.entry.rank, one.leaf), f"reading {checkpoint.location} once more"
    stored = within(timeout, doing, lambda: stored_parts(checkpoint, read, one.leaf, timeout), _native.counters)
    pairs = zip(one.leaf.parts, stored, strict=True)
    return all(_equal(_host(part, one.leaf.dtype), array) for part, array in pairs)


def _host(part: Part, dtype: str) -> np.ndarray[Any, Any]:
    """Return a part's memory as an array of raw elements, a copy of it where it is a device's."""
    raw = DTYPES[dtype].numpy
    memory = part.memory
    if isinstance(memory, HostMemory):
        kind = np.dtype(f"V{raw.itemsize}")
        return array_at(memory.address, part.box.shape, memory.strides, kind.itemsize)
    array = np.empty(part.box.shape, raw)
    memory.copy_to_host(array)
    return array.view(f"V{raw.itemsize}")


def _equal(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    kind = _WORDS.get(one.dtype.itemsize)
    if kind is None:
        return one.tobytes() == other.tobytes()
    return bool(np.array_equal(one.view(kind), other.view(kind)))


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _head(one: Found) -> str:
    leaf = one.leaf
    return f"{leaf.dtype} of shape {leaf.shape}, {leaf.placement.value}"


def _message(where: str, differences: Sequence[Difference], rank: int) -> str:
    lines = [f"  {one}" for one in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"  … and {len(differences) - _SHOWN:,} more")
    count = "1 thing differs" if len(differences) == 1 else f"{len(differences):,} things differ"
    return (
        f"rank {rank}: the state is not what {where} has, {count} after the load:\n" + "\n".join(lines) + "\n"
        "Don't train on with it. Code of the state's own objects (load_state_dict, hooks) has most likely changed what "
        "it was handed; an object that derives part of its state anew says so with `rederived_state`. `verify=False` "
        "restores without looking"
    )
