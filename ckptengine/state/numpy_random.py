"""numpy's random streams: the global one of `np.random.seed`, and any generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.state.random_stream import RandomStream

__all__ = ["NumpyStream"]

_INT_NBYTES = 16  # the longest integer in numpy's states, PCG64's, has 128 bits
# Positions in a buffer, by the generators' names: numpy doesn't check them, and would read outside.
_LIMITS = {"MT19937": ("pos", 624), "Philox": ("buffer_pos", 4)}


class NumpyStream(RandomStream):
    """A `Generator`, a `RandomState` or a bare bit generator; without one, the global `RandomState`.

    The state is the dict that numpy gives, its numbers one after the other in the order of the dict: arrays as
    they are, integers with 16 bytes, floats with 8, all little-endian. A `RandomState` has the normal number that
    it has in store as well.
    """

    def __init__(self, generator: Any = None) -> None:
        self._legacy = generator is None or isinstance(generator, np.random.RandomState)
        self._get: Callable[[], Mapping[str, Any]]
        self._set: Callable[[Any], None]
        if generator is None:
            self._bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
            self._get, self._set = _global_state, np.random.set_state
        elif self._legacy:
            self._bits = generator._bit_generator
            self._get, self._set = lambda: dict(generator.get_state(legacy=False)), generator.set_state
        else:
            self._bits = generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator
            self._get = lambda: self._bits.state
            self._set = lambda state: setattr(self._bits, "state", state)
        self.kind = f"numpy's {'RandomState' if self._legacy else 'Generator'} of {type(self._bits).__name__}"

    def get(self) -> NDArray[np.uint8]:
        """Return the numbers of the state as bytes."""
        pieces: list[bytes] = []
        _pack(self._get(), pieces)
        return np.frombuffer(bytearray(b"".join(pieces)), np.uint8)

    def check(self, data: NDArray[np.uint8]) -> None:
        """Raise `ValueError` where numpy does not take the state, or would run out of its memory with it."""
        state = self._state(data)
        key, limit = _LIMITS.get(type(self._bits).__name__, ("", 0))
        position = {**state, **(state["state"] if isinstance(state.get("state"), dict) else {})}.get(key, 0)
        flags = [state.get(key, 0) for key in ("has_gauss", "has_uint32")]
        if not 0 <= position <= limit or not set(flags) <= {0, 1}:
            raise ValueError(f"the bytes are no state of {self.kind}")
        try:
            scratch = type(self._bits)()
            if self._legacy:
                np.random.RandomState(scratch).set_state(state)
            else:
                scratch.state = state
        except (TypeError, OverflowError, KeyError) as error:
            raise ValueError(f"the bytes are no state of {self.kind}: {error}") from error

    def set(self, data: NDArray[np.uint8]) -> None:
        """Set the state."""
        self._set(self._state(data))

    def seed(self, seed: bytes) -> None:
        """Seed as numpy does: through a `SeedSequence`, whose results numpy promises not to change."""
        fresh: Any = type(self._bits)(np.random.SeedSequence(int.from_bytes(seed, "little")))
        self._set(np.random.RandomState(fresh).get_state(legacy=False) if self._legacy else fresh.state)

    def _state(self, data: NDArray[np.uint8]) -> dict[str, Any]:
        raw = data.tobytes()
        state, end = _unpack(self._get(), raw, 0)
        if end != len(raw):
            raise ValueError(f"{len(raw)} bytes are no state of {self.kind}, which has {end}")
        return state


def _global_state() -> Mapping[str, Any]:
    state: Any = np.random.get_state(legacy=False)
    return dict(state)


def _pack(state: Mapping[str, Any], pieces: list[bytes]) -> None:
    for key, value in state.items():
        if isinstance(value, Mapping):
            _pack(value, pieces)
        elif isinstance(value, np.ndarray):
            pieces.append(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
        elif isinstance(value, float):
            pieces.append(np.array([value], "<f8").tobytes())
        elif isinstance(value, (int, np.integer)):
            pieces.append(int(value).to_bytes(_INT_NBYTES, "little"))
        elif not isinstance(value, str):
            raise ValueError(f"{key!r} of the generator's state is {type(value).__name__}, not a number")


def _unpack(like: Mapping[str, Any], raw: bytes, at: int) -> tuple[dict[str, Any], int]:
    """Return a state of the form of another one, and where its bytes end."""
    state: dict[str, Any] = {}
    for key, value in like.items():
        if isinstance(value, Mapping):
            state[key], at = _unpack(value, raw, at)
            continue
        if isinstance(value, str):
            state[key] = value
            continue
        is_array, is_float = isinstance(value, np.ndarray), isinstance(value, float)
        nbytes = value.nbytes if is_array else 8 if is_float else _INT_NBYTES
        piece, at = raw[at : at + nbytes].ljust(nbytes, b"\0"), at + nbytes
        if is_array:
            numbers = np.frombuffer(piece, value.dtype.newbyteorder("<"))
            state[key] = numbers.astype(value.dtype).reshape(value.shape)
        elif is_float:
            state[key] = float(np.frombuffer(piece, "<f8")[0])
        else:
            state[key] = int.from_bytes(piece, "little")
    return state, at
