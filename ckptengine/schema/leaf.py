"""A leaf: one array or one plain value of the state, and where this rank's part of it lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from ckptengine.schema.box import Box
from ckptengine.schema.path import Path

__all__ = [
    "ArrayLeaf",
    "DeviceMemory",
    "HostMemory",
    "Link",
    "LinkError",
    "Memory",
    "Part",
    "Placement",
]


class Placement(StrEnum):
    """How a leaf is spread over the ranks."""

    REPLICATED = "replicated"
    """Every rank holds the whole; written once, the writing spread over the ranks."""
    WHOLE = "whole"
    """Every rank holds one, possibly differing (BatchNorm's statistics): one rank's is taken, never split."""
    SHARDED = "sharded"
    """Each rank holds the boxes that it lists."""
    PER_RANK = "per_rank"
    """Each rank has its own, and all are kept."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Strided host memory.

    `address` is where element 0 lies; `strides` are in bytes and may be negative or zero; `low` and `nbytes`
    are the extent of the allocation that it lies in (the C code checks every access against it).
    `owner` keeps the allocation alive.
    """

    address: int
    strides: tuple[int, ...]
    low: int
    nbytes: int
    owner: object = field(repr=False, compare=False)


class LinkError(Exception):
    """Copies of a `Link` did not end well: the message begins with the device, and says what happened and what to do.

    `number` is that of the pair that could not be copied, None where the device does not tell. With `under_way` some
    copies may still be: the host's memory must stay where it is.
    """

    def __init__(self, message: str, number: int | None = None, under_way: bool = False) -> None:
        super().__init__(message)
        self.number, self.under_way = number, under_way


class Link(Protocol):
    """The way between the host and one device, whose copies may go on beside what the device computes.

    `owner`s are those of the device's `DeviceMemory`, or views of them. A target or source is made of a numpy array of
    the memory's shape once, and may be used again for as long as the array lives. What waits for copies takes the
    seconds that it may, keeps what they need until then, and raises `LinkError`.
    """

    def mark(self) -> object:
        """Return this moment: what the device has been given so far, by the caller's thread; raises `LinkError`."""

    def host(self, array: np.ndarray[Any, Any]) -> Any:
        """Return contiguous host memory as `to_host` and `to_device` take it."""

    def kept(self, owner: Any) -> Any:
        """Return a copy on the device itself, made when that has done what it was given; None where it has no room."""

    def turned(self, owner: Any, order: tuple[int, ...]) -> Any:
        """Return a view of an owner with its dimensions in another order."""

    def to_host(self, pairs: Sequence[tuple[Any, Any]], after: object | None) -> Callable[[float], None]:
        """Begin to copy owners to host memory, and return what waits until all is there; another thread may.

        With `after`, a moment, the copies follow what was given to the device until then, and it goes on with its work
        beside them: nothing may change the owners before they are there. Without, they are what it is given next.
        """

    def to_device(self, pairs: Sequence[tuple[Any, Any]], after: object) -> Callable[[float], None]:
        """Begin to copy host memory, the second of each pair, to owners; return what waits until it may be changed."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory that the CPU can't address: the adapter copies it.

    `copy_to_host(dst)` fills a numpy array (dtype: unsigned bytes-equivalent storage dtype of the leaf,
    shape: the part's box; possibly strided) and returns when the bytes are there. `copy_from_host(src)` is
    the reverse. `link` copies `owner`, a tensor of the part's shape that may be sliced, beside other work; None where
    only the two calls can. `alias` tells that the owner is no more than the tensor itself, as `Adapter.aliases` has it.
    """

    copy_to_host: Callable[[np.ndarray[Any, Any]], None]
    copy_from_host: Callable[[np.ndarray[Any, Any]], None]
    owner: Any = field(repr=False, compare=False)
    link: Link | None = field(default=None, repr=False, compare=False)
    alias: bool = False


Memory = HostMemory | DeviceMemory


@dataclass(frozen=True, slots=True)
class Part:
    """One box of a leaf that this rank holds; `memory` has the box's shape.

    `order` is that of the tensor's dimensions in memory, from the outermost to the innermost, where the rank has a run
    of its elements: the boxes that it is cut into say nothing of that, and it can't lie in another order.
    """

    box: Box
    memory: Memory
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ArrayLeaf:
    """One tensor or array.

    `path` is its identity. `dtype` is a logical name of `ckptengine.schema.dtypes`. `shape` is the global
    shape. `parts` are this rank's boxes, none empty, none overlapping. `container` says what it was, `torch`,
    `numpy` or `mindspore`, so that objects with `load_state_dict` get the same back. `fenced` tells that nothing but
    an optimizer's step changes it, so that a copy may go on until the next one. `by_hand` tells that the boxes are what
    a program says of plain arrays, so that those that several ranks have are compared. `undeclared` is a buffer in a
    module of which a declaration says how it is split, and nothing of this.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    placement: Placement
    parts: tuple[Part, ...]
    container: str
    fenced: bool = False
    by_hand: bool = False
    undeclared: bool = False
