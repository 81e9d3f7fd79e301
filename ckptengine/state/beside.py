"""What changes as a job trains, lies beside what modules and optimizers save, and so is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptengine.schema.path import Path, dotted
from ckptengine.state.kinds import ROOT, SCALARS, Inspector, Kind, children
from ckptengine.state.merged import Merged
from ckptengine.state.tree import FlatState
from ckptengine.state.values import MAX_DEPTH

__all__ = ["Beside"]


class Beside:
    """Compares the numbers that modules and optimizers keep in plain attributes at some of a job's saves.

    `state_dict()` leaves such attributes out, in torch too, and a restore begins them anew without a word. They are
    looked at in the 1st, 2nd, 4th, 8th, … save: rarely enough to cost nothing, often enough to see a count of epochs.
    """

    def __init__(self) -> None:
        self._saves = 0
        self._known: dict[tuple[Path, str], dict[str, int | float]] = {}
        self._told: set[str] = set()

    def changed(self, state: Mapping[str, Any], read: FlatState) -> dict[str, tuple[int | float, int | float]]:
        """Return by name what has changed since the comparison before: the number of then, and that of now.

        Each is returned once; a number of which a plain value in the state has the name is saved there. Takes a state,
        and what was read of it, once for each save.
        """
        self._saves += 1
        if self._saves & (self._saves - 1):
            return {}
        before, self._known = self._known, dict(_attributes(state, (), Inspector()))
        saved = {path[-1] for values in (read.values, read.rank_values) for path in values}
        new: dict[str, tuple[int | float, int | float]] = {}
        for (path, owner), numbers in self._known.items():
            earlier = before.get((path, owner), numbers)
            if earlier == numbers:
                continue
            for key, now in numbers.items():
                name = ".".join(filter(None, (dotted(path), owner, key)))
                if earlier.get(key, now) != now == now and name not in self._told and key not in saved:
                    new[name] = (earlier[key], now)
        self._told.update(new)
        return new


def _attributes(
    value: Any, path: Path, inspector: Inspector
) -> Iterator[tuple[tuple[Path, str], dict[str, int | float]]]:
    if len(path) > MAX_DEPTH or isinstance(value, Merged):
        return
    found = ROOT if path == () else inspector.inspect(value, path)
    if found.kind in (Kind.MODULE, Kind.OPTIMIZER):
        for owner, numbers in found.adapter.plain_attributes(value):
            yield (path, owner), numbers
    elif found.kind in (Kind.PER_RANK, Kind.DECLARED):
        yield from _attributes(value.value, path, inspector)
    elif found.kind in (Kind.DICT, Kind.SEQUENCE):
        for key, item in children(value, path):
            if type(item) not in SCALARS:
                yield from _attributes(item, (*path, key), inspector)
