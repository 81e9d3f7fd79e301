"""Counters that go on as a job trains, lie beside what modules and optimizers save, and so are lost."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ckptengine.frameworks.adapter import Adapter
from ckptengine.schema.path import Path, dotted
from ckptengine.state.kinds import ROOT, SCALARS, Inspector, Kind, children
from ckptengine.state.merged import Merged
from ckptengine.state.tree import FlatState
from ckptengine.state.values import MAX_DEPTH

__all__ = ["Beside"]

_Known = dict[tuple[Path, str], tuple[weakref.ref[Any], dict[str, int]]]


class Beside:
    """Compares the counters that modules and optimizers keep in plain attributes at some of a job's saves.

    `state_dict()` leaves such attributes out, in torch too, and a restore begins them anew without a word. They are
    looked at in the 1st, 2nd, 4th, 8th, … save: rarely enough to cost nothing, often enough to see a count of epochs.
    Only integers are: of numbers with fractions most are results that are kept for a log.
    """

    def __init__(self) -> None:
        self._saves = 0
        self._known: _Known = {}
        self._told: set[str] = set()

    def changed(self, state: Mapping[str, Any], read: FlatState) -> dict[str, tuple[int, int]]:
        """Return by name what has changed since the previous comparison: the number of then, and that of now.

        Each is returned once; where the plain values of the state have its name, it is saved there. Takes a state, and
        what was read of it, once for each save.
        """
        self._saves += 1
        if self._saves & (self._saves - 1):
            return {}
        before, self._known = self._known, {}
        new: dict[str, tuple[int, int]] = {}
        for adapter, path, owner, one, counters in _counters(state, (), Inspector()):
            known, numbers = before.get((path, owner), (None, counters))
            with contextlib.suppress(TypeError):  # a class with slots may have no room for a reference
                self._known[path, owner] = weakref.ref(one), counters
            if numbers == counters or known is None or known() is not one:
                continue
            for key, now in counters.items():
                name = ".".join(filter(None, (dotted(path), adapter.bare_name(owner), key)))
                if numbers.get(key, now) != now and name not in self._told:
                    new[name] = numbers[key], now
        if new:
            saved = set(_keys((read.values, read.rank_values)))
            new = {name: numbers for name, numbers in new.items() if name.rpartition(".")[2] not in saved}
        self._told.update(new)
        return new


def _counters(value: Any, path: Path, inspector: Inspector) -> Iterator[tuple[Adapter, Path, str, Any, dict[str, int]]]:
    if len(path) > MAX_DEPTH or isinstance(value, Merged):
        return
    found = ROOT if path == () else inspector.inspect(value, path)
    if found.kind in (Kind.MODULE, Kind.OPTIMIZER):
        for owner, one, counters in found.adapter.plain_counters(value):
            yield found.adapter, path, owner, one, counters
    elif found.kind in (Kind.PER_RANK, Kind.DECLARED):
        yield from _counters(value.value, path, inspector)
    elif found.kind in (Kind.DICT, Kind.SEQUENCE):
        for key, item in children(value, path):
            if type(item) not in SCALARS:
                yield from _counters(item, (*path, key), inspector)


def _keys(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the last keys of paths, and the keys of dicts, however deep in plain values."""
    for value in values:
        if isinstance(value, Mapping):
            yield from (key[-1] if isinstance(key, tuple) and key else key for key in value)
            yield from _keys(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _keys(value)
