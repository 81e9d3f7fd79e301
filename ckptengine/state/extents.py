"""Where two leaves would be read into one memory: found before a byte is read."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part

__all__ = ["Extent", "Taken", "array_at", "extent_of", "extents", "host_extent", "overlap", "sharing"]

_MAX_WORK = 10_000
"""Steps after which two strided memories count as overlapping: more than any slices of one tensor need."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes from `low` to before `high` of a memory (`space`: the device's name, empty on the host).

    A part of a leaf lies in them: `address` is its element 0, `strides` are in bytes.
    """

    space: str
    low: int
    high: int
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


def extents(leaf: ArrayLeaf) -> list[Extent]:
    """Return the extent of each part of a leaf; none where a framework does not say where a part lies."""
    itemsize = DTYPES[leaf.dtype].itemsize
    found = (extent_of(part, itemsize) for part in leaf.parts)
    return [one for one in found if one is not None]


def extent_of(part: Part, itemsize: int) -> Extent | None:
    """Return the extent of a part of elements of `itemsize` bytes; None where its framework does not say."""
    memory, shape = part.memory, part.box.shape
    if isinstance(memory, HostMemory):
        return host_extent(memory, shape, itemsize)
    owner: Any = memory.owner
    if not callable(getattr(owner, "data_ptr", None)):
        return None
    if callable(getattr(owner, "stride", None)):
        strides = tuple(stride * itemsize for stride in owner.stride())
    else:
        strides = np.empty(shape, np.dtype(f"V{itemsize}")).strides
    return _extent(str(getattr(owner, "device", "device")), owner.data_ptr(), shape, strides, itemsize)


def host_extent(memory: HostMemory, shape: Sequence[int], itemsize: int) -> Extent:
    """Return the extent of an array of elements of `itemsize` bytes in host memory."""
    return _extent("", memory.address, shape, memory.strides, itemsize)


def _extent(space: str, address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Extent:
    steps = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    low = address + sum(step for step in steps if step < 0)
    high = address + sum(step for step in steps if step > 0) + itemsize
    return Extent(space, low, high, address, tuple(shape), tuple(strides), itemsize)


def overlap(one: Extent, other: Extent) -> bool:
    """Whether two parts have a byte in common; columns of one matrix, for example, have none."""
    if one.space != other.space or one.high <= other.low or other.high <= one.low:
        return False
    try:
        return bool(np.shares_memory(_array(one), _array(other), max_work=_MAX_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Interface:
    """What numpy needs to make an array that is never looked into."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{itemsize}",
        }


def _array(extent: Extent) -> np.ndarray[Any, Any]:
    return array_at(extent.address, extent.shape, extent.strides, extent.itemsize)


def array_at(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> np.ndarray[Any, Any]:
    """Return memory as a read-only array of raw elements of `itemsize` bytes; whoever has it keeps it alive."""
    return np.asarray(_Interface(address, shape, strides, itemsize))


class Taken:
    """The memories that something will be read into, to be asked about one more."""

    def __init__(self) -> None:
        self._spaces: dict[str, tuple[list[int], list[tuple[int, list[tuple[Extent, int]]]]]] = {}

    def add(self, number: int, found: Iterable[Extent]) -> None:
        """Note the extents of a leaf under a number."""
        for extent in found:
            lows, clusters = self._spaces.setdefault(extent.space, ([], []))
            begin, end = self._meeting(lows, clusters, extent)
            members = [member for _, inside in clusters[begin:end] for member in inside]
            low = min([extent.low, *lows[begin:end]])
            high = max([extent.high, *(high for high, _ in clusters[begin:end])])
            lows[begin:end] = [low]
            clusters[begin:end] = [(high, [*members, (extent, number)])]

    def meeting(self, found: Iterable[Extent]) -> list[int]:
        """Return the numbers, ascending, under which there are bytes of these extents."""
        numbers: set[int] = set()
        for extent in found:
            lows, clusters = self._spaces.get(extent.space, ([], []))
            begin, end = self._meeting(lows, clusters, extent)
            for _, inside in clusters[begin:end]:
                numbers.update(number for other, number in inside if overlap(extent, other))
        return sorted(numbers)

    @staticmethod
    def _meeting(lows: list[int], clusters: Sequence[tuple[int, Any]], extent: Extent) -> tuple[int, int]:
        begin = bisect.bisect_right(lows, extent.low)
        if begin and clusters[begin - 1][0] > extent.low:
            begin -= 1
        return begin, bisect.bisect_left(lows, extent.high)


def sharing(places: Sequence[Iterable[Extent]]) -> list[list[int]]:
    """Return the groups of leaves, given the extents of each, that have bytes of memory in common.

    A group has the leaves' numbers, ascending.
    """
    found = [(extent, number) for number, extents_ in enumerate(places) for extent in extents_]
    found.sort(key=lambda item: (item[0].space, item[0].low))
    parent = list(range(len(places)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number] = parent[parent[number]]
        return number

    open_: list[tuple[Extent, int]] = []
    for extent, number in found:
        open_ = [other for other in open_ if other[0].space == extent.space and other[0].high > extent.low]
        for other, before in open_:
            if root(before) != root(number) and overlap(extent, other):
                parent[max(root(before), root(number))] = min(root(before), root(number))
        open_.append((extent, number))
    groups: dict[int, list[int]] = {}
    for number in range(len(places)):
        groups.setdefault(root(number), []).append(number)
    return [group for group in groups.values() if len(group) > 1]
