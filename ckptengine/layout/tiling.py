"""Whether boxes tile a tensor: every element in exactly one box."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fault", "Int64s", "find_fault", "inside", "linear", "strides_of", "tiles", "untiled"]

Int64s = NDArray[np.int64]

# The weights are taken modulo a prime below 2**31, so that a product of two fits in 64 bits. Boxes that do
# not tile pass one round with a chance of at most ndim / 2**31, and all rounds with less than 1e-20.
_PRIME = np.uint64(2**31 - 1)
_ROUNDS = 3
_SLICE = 1 << 20  # rows at a time: bounds the temporaries

# Drawn for each process, so that no file can be made to pass.
_SEEDS = tuple(secrets.randbits(64) for _ in range(_ROUNDS))


@dataclass(frozen=True, slots=True)
class Fault:
    """One element that not exactly one box covers, and the rows of the boxes that do: none, or several."""

    element: tuple[int, ...]
    rows: tuple[int, ...]


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the distance, in elements, between neighbours in each dimension of a C-ordered tensor."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))


def linear(shape: Sequence[int], offsets: Int64s) -> Int64s:
    """Return the C-order index of each offset (int64 [n, ndim]) in a tensor of this shape."""
    return offsets @ np.asarray(strides_of(shape), np.int64)


def inside(shape: Sequence[int], offsets: Int64s, lengths: Int64s) -> NDArray[np.bool_]:
    """Return for each box (int64 [n, ndim]) whether it is not empty and lies within this shape."""
    limit = np.asarray(shape, np.int64).reshape(1, -1)
    good = (offsets >= 0) & (lengths >= 1) & (lengths <= limit)
    good &= offsets <= limit - np.where(good, lengths, 0)
    result: NDArray[np.bool_] = np.logical_and.reduce(good, axis=1)
    return result


def tiles(shape: Sequence[int], offsets: Int64s, lengths: Int64s) -> bool:
    """Return whether these boxes (int64 [n, ndim], inside the shape) cover each element exactly once."""
    counts = np.asarray([offsets.shape[0]], np.int64)
    return not untiled([tuple(shape)], counts, offsets.reshape(-1), lengths.reshape(-1)).size


def untiled(shapes: Sequence[tuple[int, ...]], counts: Int64s, offsets: Int64s, lengths: Int64s) -> Int64s:
    """Return the tensors whose boxes do not cover each of their elements exactly once.

    `shapes` are the tensors' shapes and `counts` how many rows each has; `offsets` and `lengths` are the
    rows, each with its tensor's number of dimensions, one after the other in 1-D int64 arrays. Boxes must lie
    inside.

    Give every element the weight f0[i] * f1[j] * ... with f drawn at random for each dimension. Boxes tile
    the tensor if and only if their weights sum to the tensor's as polynomials in f; a box's weight is the
    product of the differences of prefix sums of f at its two ends, of which we draw only those that occur.
    Equality at a random point decides it but for a chance of ndim / prime (Schwartz-Zippel lemma: Schwartz
    1980, "Fast probabilistic algorithms for verification of polynomial identities"). Linear in the rows,
    whatever the boxes.
    """
    ndims = np.asarray([len(shape) for shape in shapes], np.int64)
    whole_lengths = np.asarray([length for shape in shapes for length in shape], np.int64)
    row_ndims = np.repeat(ndims, counts)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    bad = np.zeros(len(shapes), np.bool_)
    for seed in _SEEDS:
        whole = _weights(seed, ndims, np.zeros_like(whole_lengths), whole_lengths)
        # uint64 sums wrap, which the differences undo: each tensor's own sum is below 2**64.
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_weights(seed, row_ndims, offsets, lengths))])
        bad |= (sums[bounds[1:]] - sums[bounds[:-1]]) % _PRIME != whole
    return np.flatnonzero(bad)


def find_fault(shape: Sequence[int], offsets: Int64s, lengths: Int64s) -> Fault:
    """Return an element that not exactly one of these boxes (int64 [n, ndim]) covers; they don't tile the tensor.

    Bisects the tensor, each time into the half that is not tiled: linear in the rows, times log2 of the
    elements.
    """
    low, high = np.zeros(len(shape), np.int64), np.asarray(shape, np.int64)
    rows = np.arange(offsets.shape[0])
    while math.prod((high - low).tolist()) > 1:
        dim = int(np.argmax(high - low))
        middle = int(low[dim] + high[dim]) // 2
        first_high = high.copy()
        first_high[dim] = middle
        first = _clipped(low, first_high, offsets, lengths, rows)
        if not tiles((first_high - low).tolist(), *first[1:]):
            high, rows = first_high, first[0]
        else:
            low = low.copy()
            low[dim] = middle
            rows = _clipped(low, high, offsets, lengths, rows)[0]
    return Fault(tuple(low.tolist()), tuple(rows.tolist()))


def _clipped(
    low: Int64s, high: Int64s, offsets: Int64s, lengths: Int64s, rows: Int64s
) -> tuple[Int64s, Int64s, Int64s]:
    """Return the rows that reach into the region, and their parts in it with offsets from its corner."""
    start = np.maximum(offsets[rows], low)
    length = np.minimum(offsets[rows] + lengths[rows], high) - start
    kept = (length > 0).all(axis=1)
    return rows[kept], (start - low)[kept], length[kept]


def _weights(seed: int, ndims: Int64s, offsets: Int64s, lengths: Int64s) -> NDArray[np.uint64]:
    """Return the weight of each box; box i has `ndims[i]` numbers in the flat arrays."""
    result = np.ones(ndims.size, np.uint64)
    ends = np.cumsum(ndims)
    for begin in range(0, ndims.size, _SLICE):
        part = slice(begin, min(begin + _SLICE, ndims.size))
        starts = ends[part] - ndims[part]
        for dim in range(int(ndims[part].max(initial=0))):
            with_dim = np.flatnonzero(ndims[part] > dim)
            place = starts[with_dim] + dim
            first, stop = offsets[place], offsets[place] + lengths[place]
            difference = (_random(seed, dim, stop) + _PRIME - _random(seed, dim, first)) % _PRIME
            with_dim += begin
            result[with_dim] = result[with_dim] * difference % _PRIME
    return result


def _random(seed: int, dim: int, coordinate: Int64s) -> NDArray[Any]:
    """Return a number below the prime for each coordinate, by splitmix64 (Steele et al., OOPSLA 2014)."""
    key = np.uint64((seed + 0x9E3779B97F4A7C15 * (dim + 1)) % 2**64)
    z = coordinate.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) % _PRIME
