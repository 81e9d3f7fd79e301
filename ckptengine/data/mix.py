"""Integer hashes of 64 bits, for single numbers and for arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["GOLDEN", "MASK", "mix64", "mix64_array"]

GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio, odd: the increment of SplitMix64."""
MASK = (1 << 64) - 1

# The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
# which is Stafford's variant 13 of MurmurHash3's: a bijection whose every output bit depends on all input bits.
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix64(value: int) -> int:
    """Return the hash of an integer, taken modulo 2**64, as one below 2**64."""
    value &= MASK
    value = (value ^ (value >> 30)) * _FIRST & MASK
    value = (value ^ (value >> 27)) * _SECOND & MASK
    return value ^ (value >> 31)


def mix64_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `mix64` of each; the argument is overwritten and returned."""
    shifted = np.right_shift(values, np.uint64(30))
    np.bitwise_xor(values, shifted, out=values)
    np.multiply(values, np.uint64(_FIRST), out=values)
    np.right_shift(values, np.uint64(27), out=shifted)
    np.bitwise_xor(values, shifted, out=values)
    np.multiply(values, np.uint64(_SECOND), out=values)
    np.right_shift(values, np.uint64(31), out=shifted)
    return np.bitwise_xor(values, shifted, out=values)
