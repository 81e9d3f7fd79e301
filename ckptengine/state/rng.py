"""The random streams of a job: exact at the same number of ranks, by a fixed rule at another one."""

from __future__ import annotations

import logging
import operator
import random
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import CheckpointDamagedError, FormatVersionError, LoadMismatchError, StateError
from ckptengine.frameworks.numpy_random import NumpyStream
from ckptengine.frameworks.random_stream import PythonStream, RandomStream
from ckptengine.frameworks.registry import adapters
from ckptengine.schema.type_name import describe_type
from ckptengine.state.per_rank import PerRank
from ckptengine.state.random_record import Record, digest_of, new_seed, shared_streams

__all__ = ["RNG", "given_streams"]

_log = logging.getLogger("ckptengine")

_VERSION = 1
_GIVEN_NAME = re.compile(r"[^.:/]{1,64}")  # so that it is never a framework's
_FRAMEWORK_NAME = re.compile(r"[a-z]+\.[a-z]+(:\d+)?")


_living: weakref.WeakSet[RNG] = weakref.WeakSet()


def given_streams() -> list[RandomStream]:
    """Return the streams of all generators that were given to any `RNG` that there is."""
    return [stream for rng in list(_living) for stream in rng._given.values()]


class RNG:
    """Save and restore the random streams of the process: `{"model": model, "rng": ce.RNG()}`.

    These are Python's `random`, numpy's global stream (`np.random.seed`), torch's for the CPU and for each device that
    the process uses, and the given `generators`: a mapping from names of your choice to `random.Random`,
    `np.random.Generator`, `RandomState` or bit generators, and `torch.Generator`. All are saved completely, with the
    normal numbers that `random.gauss` and `np.random.randn` cached. Their names are `python`, `numpy`, `torch.cpu`,
    `torch.cuda` (or `npu`, `xpu`, ...: the current device, whatever its number), `torch.cuda:3` for further devices in
    use, and the given names. No stream is drawn from, and no device is initialized.

    **The same world size**: each rank gets its own streams back, bit for bit.

    **Another world size**: the ranks *share* a stream if two or more ranks saved and all had it in the same state, or
    if it is in `shared`; it continues from that state on every rank. Any other stream is a rank's own. It is seeded
    anew on every rank, from the SHA-256 of a fixed text, the stream's name, the digests of its states on all
    ranks that saved, in their order, how often the job was resumed, the new rank or `key`, and the new world size: the
    same whenever the same checkpoint is loaded, another one on each rank, and none that was saved. What was found to be
    shared is remembered: a job of one rank (or whose ranks all have one `key`) shares what was shared before.

    `shared` are names of streams that all ranks hold in the same state. A save raises `ReplicaMismatchError` if they
    don't. `key` is an integer for ranks that must draw the same, such as those of a tensor-parallel group: they
    pass the number of their group (their data-parallel index), which then takes the rank's place. At the same world
    size a rank gets its own streams back whatever its key; a key that has changed is logged as a warning.

    **Saved, but not here** (a device that is gone, a generator that is no longer passed): the stream is left out.
    **Here, but not saved** (the job has moved to a device, another framework is imported): the stream is seeded anew as
    above, without digests; if it is shared, alike on every rank. Both are logged as a warning with the streams' names.

    Raises `TypeError` for a generator of another kind, `ValueError` for a name that can't be.
    """

    def __init__(
        self, generators: Mapping[str, Any] | None = None, /, *, shared: Iterable[str] = (), key: int | None = None
    ) -> None:
        if isinstance(shared, str):
            raise TypeError(f"RNG: shared={shared!r} is one string; pass a list of names")
        self._given = {name: _given_stream(name, item) for name, item in (generators or {}).items()}
        _living.add(self)
        self._declared = frozenset(shared)
        self._key = None if key is None else operator.index(key)
        self._resumed = 0
        self._anew: tuple[str, ...] = ()
        self._found: frozenset[str] = frozenset()
        self._arrays: dict[str, NDArray[np.uint8]] = {}
        self._handed_out: Callable[[], object] = lambda: None
        self._restored: dict[str, NDArray[np.uint8] | bytes] | None = None  # states, and what begins streams anew
        here = self._streams()
        for name in sorted(self._declared):
            if name not in here and not _FRAMEWORK_NAME.fullmatch(name):
                raise ValueError(f"RNG: shared={name!r}: there is no such stream; there are {', '.join(here)}")

    def __repr__(self) -> str:
        return f"RNG({', '.join(self._streams())})"

    def state_dict(self) -> dict[str, Any]:
        """Return the states, an array of bytes for each stream, and what the rule for another world size needs.

        The arrays stay as they are for as long as the result lives; once it is gone the next call fills them anew, so
        that a save finds them where they were. Raises `StateError` naming a stream whose state can't be saved.
        """
        before = {} if self._handed_out() is not None else self._arrays
        self._arrays = {}
        said: dict[str, tuple[str, str]] = {}
        for name, stream in self._streams().items():
            try:
                self._arrays[name] = data = _in_place_of(before.get(name), stream.get())
            except (ValueError, OverflowError) as error:
                raise StateError(f"RNG: the state of {name!r} ({stream.kind}) can't be saved: {error}") from error
            said[name] = stream.kind, digest_of(stream.kind, data)
        record, place = Record(self._key, self._resumed, self._found, said), _Place()
        self._handed_out = weakref.ref(place)  # what is returned holds it
        states = dict(self._arrays)
        return {
            "version": _VERSION,
            "shared": {name: said[name][1] for name in sorted(self._declared) if name in said},
            # At another world size a rank reads the records of all ranks, which are small, and the states of one.
            "record": PerRank(record.as_value(), resize=place.records, ranks=place.all_or_own),
            "states": PerRank(states, resize=_only, ranks=_first_or_own),
        }

    def rederived_state(self, saved_world_size: int, world_size: int) -> list[str | tuple[str, ...]]:
        """Return what is not as it was saved after a load: the count of lives, and the streams that don't go on."""
        if saved_world_size != world_size:
            return ["record", "shared", "states"]
        return ["record", "shared", *(("states", name) for name in self._anew)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the streams from what `state_dict` returned, or what loading made of it for this rank.

        Each state is verified before the first is set. Raises `LoadMismatchError` where a stream is another kind of
        generator here, or this is no state of an `RNG`; `CheckpointDamagedError` where a state is not what was saved.
        """
        saved = _parsed(state)
        here = self._streams()
        for name in saved.names:
            stream = here.get(name) or _unused_stream(name)
            if stream is not None:
                here[name] = stream
        shared = shared_streams(saved.records, saved.declared) if saved.resized else frozenset(here)
        first = saved.records[0]
        data = {name: saved.state(name, here[name]) for name in here if name in shared and name in first.streams}
        # Nothing has been changed so far, and no state is refused from here on.
        self._restored = {}
        for name, stream in here.items():
            if name in data:
                self._restored[name] = np.array(data[name])  # the array that was loaded may be filled anew
            else:
                alike = name in self._declared or (saved.resized and name in shared)
                who = {} if alike else {"rank": saved.rank} if self._key is None else {"key": self._key}
                self._restored[name] = new_seed(name, saved.records, who, saved.world_size)
            _set(stream, self._restored[name])
        self._resumed = max(record.resumed for record in saved.records) + 1
        self._found = shared if saved.resized else first.found
        unlike = {name for name in data if _keeps_a_part(here[name], data[name])}
        self._anew = tuple(name for name in {*here, *saved.names} if name not in data or name in unlike)
        self._tell(saved, here, data)

    def get_streams(self) -> dict[str, NDArray[np.uint8]]:
        """Return where each stream is now, as a new array of bytes by the stream's name; draws nothing."""
        return {name: stream.get() for name, stream in self._streams().items()}

    def set_streams(self, states: Mapping[str, NDArray[np.uint8]]) -> None:
        """Make the streams of these names go on from what `get_streams` returned; others stay where they are.

        Each state is checked before the first is set. Raises `LoadMismatchError` for what is no state of the stream.
        """
        here = {name: stream for name, stream in self._streams().items() if name in states}
        for name, stream in here.items():
            try:
                stream.check(states[name])
            except ValueError as error:
                raise LoadMismatchError(f"RNG: the state of {name!r} can't be set: {error}") from error
        for name, stream in here.items():
            stream.set(states[name])

    def rewind(self) -> bool:
        """Set the streams once more to where the last load has left them; return whether there was such a load.

        For frameworks that draw random numbers after the restore, as for the seeds of a data loader's workers: call it
        where the training goes on, after the loader's iterator is made and before the first batch is fetched. Each load
        is gone back to once: further calls change nothing, so that it may be called for every batch.
        """
        restored, self._restored = self._restored, None
        here = self._streams()
        for name, state in (restored or {}).items():
            stream = here.get(name) or _unused_stream(name)
            if stream is not None:
                _set(stream, state)
        return restored is not None

    def _tell(self, saved: _Saved, here: Iterable[str], going_on: Iterable[str]) -> None:
        where = f"RNG, rank {saved.rank}"
        if saved.resized:
            anew = [name for name in here if name not in going_on]
            _log.info(
                "%s: saved by %d ranks, loaded by %d; shared streams that continue: %s; seeded anew: %s",
                where,
                len(saved.records),
                saved.world_size,
                ", ".join(going_on) or "none",
                ", ".join(anew) or "none",
            )
        elif saved.records[0].key != self._key:
            _log.warning(
                "%s: the key was %s and is %s; at the same world size each rank continues with its own streams",
                where,
                saved.records[0].key,
                self._key,
            )
        if gone := [name for name in saved.names if name not in here]:
            _log.warning("%s: saved, but not in this process, so ignored: %s", where, ", ".join(gone))
        if new := [name for name in here if name not in saved.names]:
            _log.warning("%s: in this process, but not saved, so seeded anew: %s", where, ", ".join(new))

    def _streams(self) -> dict[str, RandomStream]:
        """Return the streams of the process as they are now, by name."""
        streams: dict[str, RandomStream] = {"python": PythonStream(random._inst)}
        for adapter in adapters():
            streams |= adapter.random_streams()
        return streams | self._given


def _set(stream: RandomStream, state: NDArray[np.uint8] | bytes) -> None:
    """Set a stream to a state, or begin it anew from a seed."""
    if isinstance(state, bytes):
        stream.seed(state)
    else:
        stream.set(state)


def _keeps_a_part(stream: RandomStream, state: NDArray[np.uint8]) -> bool:
    """Whether a stream that was set has kept what the state, one of an earlier version, does not say yet.

    Only numpy's states have grown; a device's stream must not be asked before the process uses the device.
    """
    if not isinstance(stream, NumpyStream):
        return False
    now = stream.get()
    return now.size > state.size and np.array_equal(now[: state.size], state)


def _unused_stream(name: str) -> RandomStream | None:
    found = (adapter.unused_random_stream(name) for adapter in adapters())
    return next((stream for stream in found if stream is not None), None)


def _given_stream(name: str, generator: Any) -> RandomStream:
    if type(name) is not str or not _GIVEN_NAME.fullmatch(name) or name in ("python", "numpy"):
        raise ValueError(
            f"RNG: a generator can't be called {name!r}: give a name of 1 to 64 characters without `.`, `:` and `/`, "
            "and not `python` or `numpy`, which are the global streams"
        )
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return PythonStream(generator)
    for adapter in adapters():
        stream = adapter.random_stream_of(generator)
        if stream is not None:
            return stream
    raise TypeError(
        f"RNG: {name!r} is {describe_type(generator)}; pass a random.Random, a np.random.Generator or RandomState, or "
        "a torch.Generator"
    )


def _in_place_of(array: NDArray[np.uint8] | None, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return data, in the memory of another array where there is one that fits."""
    if array is None or array.size != data.size:
        return data
    array[:] = data
    return array


class _Place:
    """Where in the job the load takes place: it learns that by being asked whose records it wants."""

    def __init__(self) -> None:
        self._resized = False

    def all_or_own(self, saved_world_size: int, rank: int, world_size: int) -> Iterable[int]:
        """Return all ranks that saved, at the same world size only this one."""
        self._resized = saved_world_size != world_size
        return range(saved_world_size) if self._resized else (rank,)

    def records(self, values: list[Any], rank: int, world_size: int) -> _Records:
        """Return the records, and where they were asked for."""
        return _Records(values, rank, world_size, self._resized)


@dataclass(frozen=True, slots=True)
class _Records:
    values: list[Any]
    rank: int
    world_size: int
    resized: bool


def _first_or_own(saved_world_size: int, rank: int, world_size: int) -> Iterable[int]:
    """Return the rank whose states are wanted: what ranks share, the first has too."""
    return (0,) if saved_world_size != world_size else (rank,)


def _only(values: list[Any], rank: int, world_size: int) -> Any:
    return values[0]


@dataclass(frozen=True, slots=True)
class _Saved:
    """What was saved, for the rank that it is to be set on.

    `records` are this rank's alone at the same world size, and those of all ranks that saved at another one. `states`
    go with the first of them. `names` are those of all streams that are in any record.
    """

    records: tuple[Record, ...]
    states: Mapping[str, Any]
    declared: frozenset[str]
    rank: int
    world_size: int
    resized: bool
    names: tuple[str, ...]

    def state(self, name: str, stream: RandomStream) -> NDArray[np.uint8]:
        """Return a stream's state, verified."""
        kind, digest = self.records[0].streams[name]
        if kind != stream.kind:
            raise LoadMismatchError(
                f"RNG: {name!r} was saved from {kind}, and is {stream.kind} here; pass the same kind of generator, or "
                "one under another name, which begins anew"
            )
        data = self.states.get(name)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
            raise CheckpointDamagedError(f"RNG: the state of {name!r} is not there")
        if digest_of(kind, data) != digest:
            raise CheckpointDamagedError(
                f"RNG: the state of {name!r} is not the one that was saved: its digest differs"
            )
        try:
            stream.check(data)
        except ValueError as error:
            raise CheckpointDamagedError(f"RNG: the state of {name!r} can't be set: {error}") from error
        return data


def _parsed(state: Any) -> _Saved:
    parts = {key: state[key] for key in ("version", "shared", "record", "states") if key in state}
    parts = {key: part.value if isinstance(part, PerRank) else part for key, part in parts.items()}
    try:
        version, declared, record, states = (parts[key] for key in ("version", "shared", "record", "states"))
        if type(version) is int and version > _VERSION:
            raise FormatVersionError(f"RNG: a state of version {version} is newer than this ckptengine; upgrade it")
        if version != _VERSION or not isinstance(declared, Mapping) or not isinstance(states, Mapping):
            raise ValueError("its parts are not those of an RNG")
        placed = record if isinstance(record, _Records) else _Records([record], 0, 1, False)
        records = tuple(Record.of_value(value) for value in placed.values)
    except (KeyError, ValueError) as error:
        raise LoadMismatchError(f"RNG: this is not the state of an RNG: {error}") from error
    names = dict.fromkeys(name for record in records for name in record.streams)
    return _Saved(records, states, frozenset(declared), placed.rank, placed.world_size, placed.resized, tuple(names))
