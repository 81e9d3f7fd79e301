"""One source of random numbers: its state as bytes, and how it is set, or begun anew."""

from __future__ import annotations

import hashlib
import random
import struct
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

__all__ = ["PythonStream", "RandomStream", "expand"]

_FORM = struct.Struct("<625Id?")  # 624 words of the Mersenne Twister and its position; the number in store, if any
_VERSION = 3  # of `random.Random.getstate`, since Python 3.2


class RandomStream(ABC):
    """A stream of random numbers that lives somewhere in the process."""

    kind: str
    """Which generator it is; a state fits streams of its own kind only."""

    @abstractmethod
    def get(self) -> NDArray[np.uint8]:
        """Return the whole state as a new array of bytes; its length depends on nothing but the kind. Draws nothing."""

    @abstractmethod
    def check(self, data: NDArray[np.uint8]) -> None:
        """Raise `ValueError` where bytes are not a state that `set` takes; changes nothing."""

    @abstractmethod
    def set(self, data: NDArray[np.uint8]) -> None:
        """Make the stream go on from a state that `get` returned."""

    @abstractmethod
    def seed(self, seed: bytes) -> None:
        """Begin the stream anew from 32 bytes, in the same way on every machine; all of them count."""


def expand(seed: bytes, nbytes: int) -> bytes:
    """Return bytes that look random and depend on the seed alone: SHA-256 of the seed and a counter, block by block."""
    blocks = (hashlib.sha256(seed + number.to_bytes(8, "little")).digest() for number in range(-(-nbytes // 32)))
    return b"".join(blocks)[:nbytes]


class PythonStream(RandomStream):
    """`random.Random`: 625 words of 32 bits, the normal number that `gauss` has in store, and whether it has one."""

    kind = "Python's random.Random"

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def get(self) -> NDArray[np.uint8]:
        """Return 2509 bytes, little-endian."""
        version, words, gauss = self._generator.getstate()
        try:
            if version != _VERSION:
                raise struct.error
            raw = _FORM.pack(*words, gauss or 0.0, gauss is not None)
        except struct.error as error:
            raise ValueError(f"a state of random.Random of version {version} is unknown here") from error
        return np.frombuffer(bytearray(raw), np.uint8)

    def check(self, data: NDArray[np.uint8]) -> None:
        """Raise `ValueError` where `setstate` would."""
        random.Random().setstate(self._state(data))

    def set(self, data: NDArray[np.uint8]) -> None:
        """Set the words and what `gauss` has in store."""
        self._generator.setstate(self._state(data))

    def seed(self, seed: bytes) -> None:
        """Seed as Python does from bytes: through SHA-512 and all words."""
        self._generator.seed(seed, version=2)

    @staticmethod
    def _state(data: NDArray[np.uint8]) -> tuple[int, tuple[int, ...], float | None]:
        if data.size != _FORM.size:
            raise ValueError(f"{data.size} bytes are no state of random.Random, which has {_FORM.size}")
        *words, gauss, has_gauss = _FORM.unpack(data.tobytes())
        return _VERSION, tuple(words), gauss if has_gauss else None
