"""What one rank holds of each leaf, as it travels in the planning exchange."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ckptengine.errors import SaveFailedError
from ckptengine.layout.head import LeafHead, head_from_json, head_to_json
from ckptengine.layout.packing import pack, parse_json, unpack
from ckptengine.layout.tiling import Int64s
from ckptengine.state.leaf import ArrayLeaf

__all__ = ["Holding", "decode", "encode", "holdings_of", "same_holding"]


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


def encode(holdings: Sequence[Holding]) -> bytes:
    """Return the holdings as one message: a JSON table of the heads, then counts, offsets and lengths."""
    counts = np.asarray([holding.offsets.shape[0] for holding in holdings], np.int64)
    flat = [
        np.concatenate([np.zeros(0, np.int64), *(getattr(holding, name).reshape(-1) for holding in holdings)])
        for name in ("offsets", "lengths")
    ]
    return pack([head_to_json(holding) for holding in holdings], [counts, *flat])


def decode(message: bytes) -> list[Holding]:
    """Return the holdings that `encode` was given; raises SaveFailedError where the message is damaged.

    Whether the boxes make sense is for `assign` to check, which knows the ranks.
    """
    try:
        table, (counts, offsets, lengths) = unpack(message, columns=3)
        heads = _heads(table)
        ndims = np.asarray([len(head.shape) for head in heads], np.int64)
        if counts.size != len(heads) or (counts < 0).any() or (counts > offsets.size + 1).any():
            raise ValueError("its counts don't fit its leaves")
        # A zero-dimensional leaf has one box at most, so the counts are bounded by the message in all cases.
        if (counts[ndims == 0] > 1).any() or int((counts * ndims).sum()) != offsets.size:
            raise ValueError("its counts don't fit its boxes")
        if offsets.size != lengths.size:
            raise ValueError("it has not as many offsets as lengths")
    except ValueError as error:
        raise SaveFailedError(
            f"a rank's planning message is damaged ({error}); nothing was written, save again"
        ) from error
    ends = np.cumsum(counts * ndims).tolist()
    result, start = [], 0
    for head, count, end in zip(heads, counts.tolist(), ends, strict=True):
        shape = (count, len(head.shape))
        result.append(
            Holding(
                head.path,
                head.dtype,
                head.shape,
                head.placement,
                head.container,
                offsets[start:end].reshape(shape),
                lengths[start:end].reshape(shape),
            )
        )
        start = end
    return result


def _numbers(rows: list[tuple[int, ...]], ndim: int) -> Int64s:
    return np.asarray(rows, np.int64).reshape(len(rows), ndim)


@lru_cache(maxsize=4)
def _heads(json_part: bytes) -> tuple[LeafHead, ...]:
    """Return the leaf table; cached, because most ranks send the same one."""
    table = parse_json(json_part)
    if not isinstance(table, list):
        raise ValueError("its leaf table is no list")
    return tuple(map(head_from_json, table))
