"""A number for a set of samples that does not depend on their order, and adds up over ranks and lives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptengine.data.mix import GOLDEN, mix64, mix64_array

__all__ = ["DIGEST_BITS", "digest_of", "hash_of", "parse_digest", "write_digest"]

DIGEST_BITS = 128
_MODULUS = 1 << DIGEST_BITS
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_BLOCK = 1 << 16
"""Samples that are hashed in one go: what stays in a cache."""


def hash_of(epoch: int, samples: NDArray[np.int64], *, padding: bool = False) -> tuple[NDArray[np.uint64], ...]:
    """Return the upper and the lower 64 bits of each sample's hash, which depends on the epoch and on `padding`.

    `samples` are global sample numbers, one-dimensional, int64. Each half is SplitMix64's finalizer of the number plus
    a key: of two samples of one epoch the halves always differ. It finds errors, not forgers: there is no secret in it.
    """
    key = mix64(2 * epoch + padding)
    halves = []
    for number in (1, 2):
        values = samples.astype(np.uint64)
        values *= np.uint64(GOLDEN)
        values += np.uint64(mix64(key + number))
        halves.append(mix64_array(values))
    return tuple(halves)


def digest_of(epoch: int, samples: NDArray[np.int64], *, padding: bool = False) -> int:
    """Return the sum of the hashes of samples that were used in an epoch, modulo 2**128.

    The digest of two sets together is the sum of theirs; the order doesn't matter, a sample that comes twice counts
    twice. `padding` marks samples that only fill up a batch.
    """
    total = 0
    for start in range(0, len(samples), _BLOCK):
        upper, lower = hash_of(epoch, samples[start : start + _BLOCK], padding=padding)
        total += (_sum(upper) << 64) + _sum(lower)
    return total % _MODULUS


def _sum(values: NDArray[np.uint64]) -> int:
    """Return the exact sum of fewer than 2**32 numbers."""
    return int(np.add.reduce(values & _LOW)) + (int(np.add.reduce(values >> _32)) << 32)


def write_digest(digest: int) -> str:
    """Return a digest as 32 hexadecimal digits."""
    return f"{digest % _MODULUS:032x}"


def parse_digest(text: object) -> int:
    """Return the digest that `write_digest` wrote; raises `ValueError` for anything else."""
    if not isinstance(text, str) or len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"a digest has 32 hexadecimal digits, not {text!r:.60}")
    return int(text, 16)
