"""What shows whether memory has been written to: counters of writes, some of its elements, and sums of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptengine._native as _native
from ckptengine.frameworks.registry import adapters
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part
from ckptengine.snapshot.threads import copy_threads
from ckptengine.state.extents import Extent, array_at, host_extent

__all__ = ["Watch"]

_SAMPLES = 32
"""Elements of an array, evenly spread, that show whether user code has written to it past the framework's counter."""

_THREADS_FROM = 1 << 20
"""Bytes from which several threads sum up: below, starting them takes longer."""


class Watch:
    """Arrays that were filled, watched from now on; they are kept alive.

    All are looked at together, with a few calls of numpy, since there may be many thousands.
    """

    def __init__(self, leaves: Sequence[ArrayLeaf], places: Sequence[Sequence[Extent]], whole: Iterable[int]) -> None:
        """Begin to watch leaves, given the extents of each.

        Those that `whole` numbers are summed up (CRC32), as nothing counts who writes to them.
        """
        summed = set(whole)
        self._count = len(leaves)
        self._owners: dict[str, tuple[list[int], list[Any]]] = {}
        self._sampled: dict[int, tuple[list[int], list[Extent]]] = {}
        self._summed: tuple[list[int], list[Extent]] = ([], [])
        for number, leaf in enumerate(leaves):
            itemsize = DTYPES[leaf.dtype].itemsize
            known = places[number] if len(places[number]) == len(leaf.parts) else [None] * len(leaf.parts)
            for part, extent in zip(leaf.parts, known, strict=True):
                self._watch(number, part, extent, itemsize, leaf.container, number in summed)
        self._elements = {size: _elements(found) for size, (_, found) in self._sampled.items()}
        self._before = self._look()

    def _watch(
        self, number: int, part: Part, extent: Extent | None, itemsize: int, container: str, whole: bool
    ) -> None:
        """Watch a part; `extent` is its own where it is known."""
        owners = self._owners.setdefault(container, ([], []))
        owners[0].append(number)
        owners[1].append(part.memory.owner)
        if isinstance(part.memory, HostMemory):
            numbers, found = self._summed if whole else self._sampled.setdefault(itemsize, ([], []))
            numbers.append(number)
            found.append(extent or host_extent(part.memory, part.box.shape, itemsize))

    def unchanged(self) -> NDArray[np.bool_]:
        """Return for each array, by its number, whether nothing shows a write since."""
        result = np.ones(self._count, np.bool_)
        for (numbers, seen), (_, now) in zip(self._before, self._look(), strict=True):
            differs = seen != now
            result[np.asarray(numbers, np.int64)[differs if differs.ndim == 1 else differs.any(axis=(1, 2))]] = False
        return result

    def _look(self) -> list[tuple[list[int], NDArray[Any]]]:
        """Return what changes with a write, in rows, and the number of each row's array."""
        known = {adapter.name: adapter for adapter in adapters()}
        seen: list[tuple[list[int], NDArray[Any]]] = []
        for container, (numbers, owners) in self._owners.items():
            adapter = known[container]
            ours = all(map(adapter.is_tensor, owners))  # the memory of some tensors belongs to something else
            versions = adapter.versions(owners) if ours else [0] * len(owners)
            seen.append((numbers, np.array(versions, np.int64)))
        for size, (numbers, _) in self._sampled.items():
            seen.append((numbers, _gather(self._elements[size], size)))
        seen.append((self._summed[0], _sums(self._summed[1])))
        return seen


def _elements(found: Sequence[Extent]) -> NDArray[np.int64]:
    """Return the addresses of the elements to look at, one row of them for each memory."""
    itemsize = found[0].itemsize
    low = np.array([one.low for one in found], np.int64)
    nbytes = np.array([one.high for one in found], np.int64) - low
    spread = np.arange(_SAMPLES, dtype=np.int64) * (nbytes[:, None] // itemsize - 1) // (_SAMPLES - 1)
    elements: NDArray[np.int64] = low[:, None] + spread * itemsize
    for row, one in enumerate(found):
        volume = int(np.prod(one.shape, dtype=np.int64)) if one.shape else 1
        if volume * itemsize != nbytes[row]:  # gaps between its elements, which belong to something else
            numbers = np.arange(_SAMPLES) * (volume - 1) // (_SAMPLES - 1)
            places = np.unravel_index(numbers, one.shape)
            elements[row] = one.address + sum(p * s for p, s in zip(places, one.strides, strict=True))
    return elements


def _gather(elements: NDArray[np.int64], itemsize: int) -> NDArray[np.uint8]:
    """Return the bytes of elements at addresses: one look at all the memory from the first to the last of them."""
    low = int(elements.min())
    memory = array_at(low, (int(elements.max()) + itemsize - low,), (1,), 1).view(np.uint8)
    found: NDArray[np.uint8] = memory[(elements - low)[:, :, None] + np.arange(itemsize)]
    return found


def _sums(found: Sequence[Extent]) -> NDArray[np.int64]:
    if sum(one.high - one.low for one in found) < _THREADS_FROM or copy_threads() == 1:
        return np.array([_crc(one) for one in found], np.int64)
    with ThreadPoolExecutor(copy_threads(), "ckptengine-sums") as threads:
        return np.array(list(threads.map(_crc, found)), np.int64)


def _crc(extent: Extent) -> int:
    array = array_at(extent.address, extent.shape, extent.strides, extent.itemsize)
    return int(_native.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
