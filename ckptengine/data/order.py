"""In which order an epoch gives its samples: position by position, without a list of them."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.data.mix import GOLDEN, mix64

__all__ = ["MAX_LENGTH", "Order", "Sequential", "Shuffled"]

MAX_LENGTH = 1 << 62
"""The longest epoch, in samples."""

_ROUNDS = 10
_SIDES_TRIED = 1024
_MULTIPLIERS = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)
_32 = np.uint64(32)


class Order(ABC):
    """The order of the samples of each epoch: a bijection from positions to sample numbers.

    `length` is the number of samples of an epoch; positions and sample numbers are from 0 to `length - 1`.
    """

    length: int

    @abstractmethod
    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample numbers at positions of an epoch's order: int64, one for each, in the same order.

        `positions` is one-dimensional, int64. Raises `ValueError` where one lies outside of the epoch.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain values that identify the order, equal for equal orders; `order_from` makes it anew of them.

        `kind` is its name there, `length` the number of samples.
        """


def _checked_length(length: int) -> int:
    length = operator.index(length)
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length={length}: an epoch has from 1 to 2**62 samples")
    return length


def _checked_positions(positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    positions = np.asarray(positions)
    if positions.dtype != np.int64 or positions.ndim != 1:
        raise ValueError(f"positions are one-dimensional int64, not {positions.dtype} of shape {positions.shape}")
    if positions.size and (positions.min() < 0 or positions.max() >= length):
        raise ValueError(f"positions {positions.min()} to {positions.max()}: an epoch has {length} samples")
    return positions


class Sequential(Order):
    """Samples as they are numbered, the same in each epoch."""

    def __init__(self, length: int) -> None:
        self.length = _checked_length(length)

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions themselves, as a new array."""
        return _checked_positions(positions, self.length).copy()

    def describe(self) -> dict[str, Any]:
        """Return kind and length."""
        return {"kind": "sequential", "length": self.length}


def _sides(length: int) -> tuple[int, int]:
    """Return two numbers of about the same size whose product is the length or little more.

    What is more has to be walked on, which takes a batch as long as another one. Under 256 samples the sides are as
    equal as can be: with a very short one, the rounds would reach few permutations.
    """
    least = math.isqrt(length - 1) + 1
    most = least if length < 256 else min(least + least // 4, least + _SIDES_TRIED)
    left = np.arange(least, most + 1, dtype=np.int64)
    right = (length + left - 1) // left
    best = int(np.argmin(left * right))
    return int(left[best]), int(right[best])


class Shuffled(Order):
    """Samples in a pseudo-random order, another one in each epoch, computed position by position.

    `length` is from 1 to 2**62 samples, `seed` from 0 to 2**64 - 1. No memory is needed per sample. The order depends
    on length, seed and epoch only, never on the machine or on a library's version.

    Source: the generalized Feistel cipher with cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", CT-RSA 2002, section 5: a position is a pair of numbers below a and b, a·b just above the length, and
    each round adds a keyed hash of one to the other. (Over a power of four, plain xor would do, but up to three of four
    results would have to be walked on.) This is a shuffle, not a cipher: keys and rounds are chosen for speed.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = _checked_length(length)
        self.seed = operator.index(seed)
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed={seed}: give a number from 0 to 2**64 - 1")
        self._left, self._right = _sides(self.length)
        self._epoch = -1
        self._keys: tuple[np.uint64, ...] = ()

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples at positions of an epoch, about ten million of them per second and core."""
        positions = _checked_positions(positions, self.length)
        keys = self._keys_of(epoch)
        samples = self._permute(positions.astype(np.uint64), keys)
        # Few results, if any, lie outside of the epoch: those are permuted again until they lie inside.
        outside = np.flatnonzero(samples >= np.uint64(self.length))
        while outside.size:
            samples[outside] = self._permute(samples[outside], keys)
            outside = outside[samples[outside] >= np.uint64(self.length)]
        return samples.view(np.int64)

    def describe(self) -> dict[str, Any]:
        """Return kind, length and seed."""
        return {"kind": "shuffled", "length": self.length, "seed": self.seed}

    def _keys_of(self, epoch: int) -> tuple[np.uint64, ...]:
        if epoch != self._epoch:
            key = mix64(mix64(self.seed) + mix64(~operator.index(epoch)))
            self._keys = tuple(np.uint64(mix64(key + GOLDEN * number)) for number in range(1, _ROUNDS + 1))
            self._epoch = epoch
        return self._keys

    def _permute(self, values: NDArray[np.uint64], keys: tuple[np.uint64, ...]) -> NDArray[np.uint64]:
        """Return each value's image in the domain of `left · right` values; the argument is overwritten."""
        right_size = np.uint64(self._right)
        left = values // right_size
        right = values
        right -= left * right_size
        word, other = np.empty_like(values), np.empty_like(values)
        sizes = np.uint64(self._left), right_size
        halves = left, right
        for number, key in enumerate(keys):
            target, source, size = halves[number % 2], halves[1 - number % 2], sizes[number % 2]
            # Two multiplications that carry upwards, and between them the upper half back down.
            np.add(source, key, out=word)
            np.multiply(word, _MULTIPLIERS[0], out=word)
            np.right_shift(word, _32, out=other)
            np.bitwise_xor(word, other, out=word)
            np.multiply(word, _MULTIPLIERS[1], out=word)
            np.right_shift(word, _32, out=word)
            # 32 bits scaled to a number below the size, which is 2**31 at most.
            np.multiply(word, size, out=word)
            np.right_shift(word, _32, out=word)
            np.add(target, word, out=target)
            np.subtract(target, size, out=other)  # what is below the size wraps round to the greater of the two
            np.minimum(target, other, out=target)
        left *= right_size
        left += right
        return left
