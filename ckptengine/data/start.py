"""Starting a loader: workers get another seed at each place in the data, and training's random numbers stay its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ckptengine.frameworks.random_stream import RandomStream
from ckptengine.frameworks.registry import adapters

__all__ = ["seeded", "start"]


def start(loader: Iterable[Any], place: object) -> Iterator[Any]:
    """Return a loader's iterator; the random streams of the process's CPU are as they were before.

    torch's `DataLoader` draws a seed for its workers whenever an iteration begins, from its `generator` or the global
    stream. A job that is restarted in mid-epoch begins one iteration more than one that was not: each random number
    after that would be another one. So the draw is undone. But a job that draws nothing else from that stream would
    then give its workers the same seed in each epoch: while the loader starts, each stream is seeded anew, from the
    state it has and from `place`, plain JSON values that say where in the data this rank's iteration begins.
    """
    restore = seeded(loader, place)
    try:
        return iter(loader)
    finally:
        restore()


def seeded(loader: Iterable[Any], place: object) -> Callable[[], None]:
    """Seed the streams that a loader draws from, for a place; return what sets them back to where they were."""
    streams = _streams(loader)
    before = [stream.get() for stream in streams]
    where = json.dumps(place, sort_keys=True).encode()

    def restore() -> None:
        for stream, state in zip(streams, before, strict=True):
            stream.set(state)

    for stream, state in zip(streams, before, strict=True):
        stream.seed(hashlib.sha256(where + b"\0" + state.tobytes()).digest())
    return restore


def _streams(loader: Iterable[Any]) -> list[RandomStream]:
    generator = getattr(loader, "generator", None)
    found = []
    for adapter in adapters():
        own = None if generator is None else adapter.random_stream_of(generator)
        found += [
            stream for name, stream in adapter.random_streams().items() if name in ("numpy", f"{adapter.name}.cpu")
        ]
        found += [own] if own is not None else []
    return found
