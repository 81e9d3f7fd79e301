"""Starting a loader without drawing a random number that training would have drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ckptengine.state.adapters import adapters
from ckptengine.state.random_stream import RandomStream

__all__ = ["start"]


def start(loader: Iterable[Any]) -> Iterator[Any]:
    """Return a loader's iterator; the random streams of the process's CPU are as they were before.

    torch's `DataLoader` draws a seed for its workers whenever an iteration begins, from its `generator` or the global
    stream. A job that is restarted in mid-epoch begins one iteration more than one that was not: each random number
    after that would be another one.
    """
    streams = _streams(loader)
    before = [stream.get() for stream in streams]
    iterator = iter(loader)
    for stream, state in zip(streams, before, strict=True):
        stream.set(state)
    return iterator


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
