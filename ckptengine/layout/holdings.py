"""What one rank holds of each leaf."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ckptengine.layout.tiling import Int64s
from ckptengine.schema.head import LeafHead
from ckptengine.schema.leaf import ArrayLeaf

__all__ = ["Holding", "holdings_of", "same_holding"]


@dataclass(frozen=True, slots=True)
class Holding(LeafHead):
    """One leaf and the boxes of it that a rank holds; `offsets` and `lengths` are int64 [n, ndim]."""

    offsets: Int64s = field(compare=False, repr=False)
    lengths: Int64s = field(compare=False, repr=False)


def same_holding(a: Holding, b: Holding) -> bool:
    """Return whether two holdings are of the same leaf and have the same boxes in the same order.

    `==` compares the heads only: arrays have no truth value.
    """
    return a == b and np.array_equal(a.offsets, b.offsets) and np.array_equal(a.lengths, b.lengths)


def holdings_of(leaves: Iterable[ArrayLeaf]) -> list[Holding]:
    """Return what this rank holds, one holding for each leaf in the given order."""
    return [
        Holding(
            leaf.path,
            leaf.dtype,
            leaf.shape,
            leaf.placement,
            leaf.container,
            _numbers([part.box.offset for part in leaf.parts], len(leaf.shape)),
            _numbers([part.box.shape for part in leaf.parts], len(leaf.shape)),
        )
        for leaf in leaves
    ]


def _numbers(rows: list[tuple[int, ...]], ndim: int) -> Int64s:
    return np.asarray(rows, np.int64).reshape(len(rows), ndim)
