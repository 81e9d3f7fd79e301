"""numpy's random streams: the global one of `np.random.seed`, and any generator."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.frameworks.random_stream import RandomStream

__all__ = ["NumpyStream"]

_SEED = b"\0seed "  # what the seed sequence of a generator begins with, after the numbers of its state
_INT_NBYTES = 16  # the longest integer in numpy's states, PCG64's, has 128 bits
# Positions in a buffer, by the generators' names: numpy doesn't check them, and would read outside.
_LIMITS = {"MT19937": ("pos", 624), "Philox": ("buffer_pos", 4)}


class NumpyStream(RandomStream):
    """A `Generator`, a `RandomState` or a bare bit generator; without one, the global `RandomState`.

    The state is the dict that numpy gives, its numbers one after the other in the order of the dict: arrays as
    they are, integers with 16 bytes, floats with 8, all little-endian. A `RandomState` has the normal number that
    it has in store as well. A generator that can `spawn` has its `SeedSequence` after that, as JSON: what its children
    are made of, and how many there are. States of earlier versions end before it; then the live one stays.
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
        if (sequence := self._sequence()) is not None:
            pieces.append(_SEED + _encoded(sequence))
        return np.frombuffer(bytearray(b"".join(pieces)), np.uint8)

    def check(self, data: NDArray[np.uint8]) -> None:
        """Raise `ValueError` where numpy does not take the state, or would run out of its memory with it."""
        state, seed = self._state(data)
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
            if seed is not None:
                self._check_seed(seed)
        except (TypeError, OverflowError, KeyError) as error:
            raise ValueError(f"the bytes are no state of {self.kind}: {error}") from error

    def set(self, data: NDArray[np.uint8]) -> None:
        """Set the state."""
        state, seed = self._state(data)
        self._set(state)
        if seed is not None:
            self._set_sequence(seed)

    def seed(self, seed: bytes) -> None:
        """Seed as numpy does: through a `SeedSequence`, whose results numpy promises not to change."""
        sequence = np.random.SeedSequence(int.from_bytes(seed, "little"))
        fresh: Any = type(self._bits)(sequence)
        self._set(np.random.RandomState(fresh).get_state(legacy=False) if self._legacy else fresh.state)
        if self._sequence() is not None and _SETS_SEQUENCE:
            self._set_sequence(sequence)

    def _state(self, data: NDArray[np.uint8]) -> tuple[dict[str, Any], np.random.SeedSequence | None]:
        """Return the state, and the seed sequence, None where there is none in the bytes."""
        raw = data.tobytes()
        state, end = _unpack(self._get(), raw, 0)
        if end == len(raw):
            return state, None
        if self._legacy or raw[end : end + len(_SEED)] != _SEED:
            raise ValueError(f"{len(raw)} bytes are no state of {self.kind}, which has {end}")
        return state, _decoded(raw[end + len(_SEED) :], self.kind)

    def _sequence(self) -> np.random.SeedSequence | None:
        """Return what children are made of, None where there can be none, or it is not numpy's own class."""
        sequence = None if self._legacy else getattr(self._bits, "seed_seq", None)
        return sequence if type(sequence) is np.random.SeedSequence else None

    def _check_seed(self, sequence: np.random.SeedSequence) -> None:
        """Raise `ValueError` where this version of numpy can't set the seed sequence."""
        live = self._sequence()
        if _SETS_SEQUENCE or live is None:
            return
        same = {**live.state, "n_children_spawned": 0} == {**sequence.state, "n_children_spawned": 0}
        if sequence.n_children_spawned and not (same and live.n_children_spawned <= sequence.n_children_spawned):
            raise ValueError(
                f"{sequence.n_children_spawned} children were spawned, and numpy {np.__version__} can't set this for a "
                "generator of another seed: make it from the same seed, or install numpy 2"
            )

    def _set_sequence(self, sequence: np.random.SeedSequence) -> None:
        live = self._sequence()
        if live is None:
            return
        if _SETS_SEQUENCE:
            bits: Any = self._bits
            bits.__setstate__((bits.state, sequence))
        elif live.n_children_spawned < sequence.n_children_spawned:
            live.spawn(sequence.n_children_spawned - live.n_children_spawned)


_SETS_SEQUENCE = int(np.__version__.partition(".")[0]) >= 2
"""Whether a generator's pickled state, which `__setstate__` takes, has the seed sequence."""


def _encoded(sequence: np.random.SeedSequence) -> bytes:
    """Return a seed sequence as JSON, of the same length whatever the number of its children."""
    state = sequence.state
    entropy: Any = state["entropy"]
    given = None if entropy is None else [_hex(number) for number in np.array(entropy, object).ravel()]
    document = {
        "entropy": given if given is None or np.ndim(entropy) else given[0],
        "spawn_key": [hex(number) for number in state["spawn_key"]],
        "pool_size": state["pool_size"],
        "children": f"{state['n_children_spawned']:016x}",
    }
    return json.dumps(document).encode()


def _hex(number: Any) -> str:
    return hex(int(number, 0) if isinstance(number, str) else number)


def _decoded(data: bytes, kind: str) -> np.random.SeedSequence:
    """Return the seed sequence of `_encoded`; raises `ValueError` for anything else."""
    try:
        document = json.loads(data)
        entropy = document["entropy"]
        if entropy is not None:
            entropy = int(entropy, 16) if isinstance(entropy, str) else [int(number, 16) for number in entropy]
        key = tuple(int(number, 16) for number in document["spawn_key"])
        children, pool = int(document["children"], 16), int(document["pool_size"])
        return np.random.SeedSequence(entropy, spawn_key=key, pool_size=pool, n_children_spawned=children)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the bytes are no seed sequence of {kind}: {error}") from error


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
