"""What differs between two checkpoints, of ours or of other libraries: names, heads, contents, plain values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.catalog.naming import open_checkpoint
from ckptengine.load.checkpoint import Opened, naming
from ckptengine.load.choose import newest_or_foreign
from ckptengine.load.describe import describe
from ckptengine.load.loader import check_distinct, refuse_unread
from ckptengine.load.slabs import read_boxes, slabs
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.path import Path, dotted
from ckptengine.state.rename import Rename, renamer
from ckptengine.state.select import Selection
from ckptengine.state.values import digest, encode

__all__ = ["Comparison", "LeafDifference", "diff"]

_WINDOW_NBYTES = 16 << 20
"""Bytes of an array of each checkpoint that are compared at once."""


@dataclass(frozen=True, slots=True)
class LeafDifference:
    """One name that is not the same in both: `kind` is `only in the first`, `only in the second`, `head`, `contents` or
    `value`; `text` says what differs."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints, the differences by name, and how many arrays and plain values are the same in both."""

    first: str
    second: str
    differences: tuple[LeafDifference, ...]
    same_arrays: int
    same_values: int


@dataclass(frozen=True, slots=True)
class _Side:
    checkpoint: Opened
    arrays: dict[str, int]
    values: dict[str, Any]


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    only: Iterable[str] | None = None,
    rename: Rename | None = None,
    contents: bool = True,
    timeout: float = 600.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Return what differs between two checkpoints, given as `ckptengine.load` takes them.

    `rename` changes names of the first, `only` restricts to dotted prefixes of the names after that. Without `contents`
    dtypes and shapes are compared alone. What ranks have of their own is left out. Memory stays the same whatever the
    size. `progress` is called with the bytes of arrays that are compared, and all of them.

    Raises what opening a checkpoint does, `LoadMismatchError` for names that clash, or a prefix that names nothing.
    """
    selection = Selection(None if only is None else ((only,) if isinstance(only, str) else only))

    def compare(one: Opened) -> Comparison:
        return newest_or_foreign(open_checkpoint(second), lambda two: _compared(one, two, selection, rename, look))

    look = _Look(contents, timeout, progress)
    result = newest_or_foreign(open_checkpoint(first), compare)
    selection.check()
    return result


@dataclass(frozen=True, slots=True)
class _Look:
    contents: bool
    timeout: float
    progress: Callable[[int, int], None] | None


def _compared(one: Opened, two: Opened, selection: Selection, rename: Rename | None, look: _Look) -> Comparison:
    a, b = _side(one, selection, rename), _side(two, selection, None)
    differences = [*_missing(a, b, "only in the first"), *_missing(b, a, "only in the second")]
    both = [name for name in a.arrays if name in b.arrays]
    same: list[str] = []
    for name in both:
        text = _heads(a, b, name)
        if text:
            differences.append(LeafDifference(name, "head", text))
        else:
            same.append(name)
    equal = len(same)
    if look.contents:
        total = sum(_nbytes(a, name) for name in same)
        done = 0
        for name in same:
            text = _contents(a, b, name, look.timeout)
            done += _nbytes(a, name)
            if look.progress is not None:
                look.progress(done, total)
            if text:
                equal -= 1
                differences.append(LeafDifference(name, "contents", text))
    values = [name for name in a.values if name in b.values]
    odd = [name for name in values if _print(a.values[name]) != _print(b.values[name])]
    differences += [LeafDifference(n, "value", f"{a.values[n]!r:.60} and {b.values[n]!r:.60}") for n in odd]
    differences.sort(key=lambda difference: difference.name)
    return Comparison(one.location, two.location, tuple(differences), equal, len(values) - len(odd))


def _side(checkpoint: Opened, selection: Selection, rename: Rename | None) -> _Side:
    saved = describe(checkpoint)
    renamed = renamer(rename, {}, saved.flat)
    index = checkpoint.rows.index
    sources: Mapping[Path, Path] = {path: path for path in saved.leaves} | dict(saved.aliases)
    with naming(checkpoint.location):
        refuse_unread(saved.unread_of(selection, renamed))
    arrays = {path: first for path, first in sources.items() if selection.holds(renamed(path))}
    values = {path: value for path, value in saved.values.items() if selection.holds(renamed(path))}
    check_distinct([*arrays, *values], lambda path: (dotted(renamed(path)),))
    return _Side(
        checkpoint,
        {dotted(renamed(path)): index[first, None] for path, first in arrays.items()},
        {dotted(renamed(path)): value for path, value in values.items()},
    )


def _missing(side: _Side, other: _Side, kind: str) -> Iterator[LeafDifference]:
    for name, number in side.arrays.items():
        if name not in other.arrays:
            record = side.checkpoint.rows.leaves[number]
            yield LeafDifference(name, kind, f"{record.dtype} {record.shape}")
    for name, value in side.values.items():
        if name not in other.values:
            yield LeafDifference(name, kind, f"{value!r:.60}")


def _heads(a: _Side, b: _Side, name: str) -> str:
    one, two = (side.checkpoint.rows.leaves[side.arrays[name]] for side in (a, b))
    if (one.dtype, one.shape) == (two.dtype, two.shape):
        return ""
    return f"{one.dtype} {one.shape} and {two.dtype} {two.shape}"


def _nbytes(side: _Side, name: str) -> int:
    record = side.checkpoint.rows.leaves[side.arrays[name]]
    return Box.whole(record.shape).volume * record.itemsize


def _contents(a: _Side, b: _Side, name: str, timeout: float) -> str:
    """Return how two arrays of one head differ, "" where they are equal to the bit."""
    record = a.checkpoint.rows.leaves[a.arrays[name]]
    dtype = DTYPES[record.dtype].numpy
    differing, largest = 0, 0.0
    for box in slabs(record.shape, max(1, _WINDOW_NBYTES // record.itemsize)):
        one, two = (_read(side, name, box, record.itemsize, timeout) for side in (a, b))
        if np.array_equal(one, two):
            continue
        odd = (one.reshape(-1, record.itemsize) != two.reshape(-1, record.itemsize)).any(axis=1)
        differing += int(odd.sum())
        if dtype.kind in "iuf" or record.dtype in ("bfloat16", "float16"):
            with np.errstate(invalid="ignore", over="ignore"):
                apart = np.abs(one.view(dtype)[odd].astype("f8") - two.view(dtype)[odd].astype("f8"))
            largest = max(largest, float(np.nanmax(apart))) if not np.isnan(apart).all() else largest
    if not differing:
        return ""
    volume = Box.whole(record.shape).volume
    return f"{differing:,} of {volume:,} elements differ" + (f", by {largest:.3g} at most" if largest else "")


def _read(side: _Side, name: str, box: Box, itemsize: int, timeout: float) -> NDArray[np.uint8]:
    memory = np.empty(box.volume * itemsize, np.uint8)
    read_boxes(side.checkpoint, [(side.arrays[name], box, memory)], timeout)
    return memory


def _print(value: Any) -> Any:
    return digest(encode(value, ()))
