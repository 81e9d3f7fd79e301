"""Modules without memory (torch's meta device): what the checkpoint has of them gets memory, to be read into."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ckptengine.schema.path import Path, dotted
from ckptengine.state.bind.room import room_for
from ckptengine.state.kinds import ROOT, Inspector, Kind, children
from ckptengine.state.saved import Node, SavedArray
from ckptengine.state.select import Selection
from ckptengine.state.values import MAX_DEPTH

__all__ = ["GivenMemory"]

_log = logging.getLogger("ckptengine")
_NAMED = 8


class GivenMemory:
    """The tensors of a state that had no memory and were given some, and how it is taken away from them again.

    Nothing is read twice, and no second copy made. Memory that was not filled holds nothing that means anything: no
    tensor keeps it.
    """

    def __init__(self, inspector: Inspector, selection: Selection, saved: Node, cast: bool) -> None:
        self._inspector, self._selection, self._saved, self._cast = inspector, selection, saved, cast
        self._undo: dict[int, Callable[[], bool]] = {}
        self._names: dict[int, list[str]] = {}

    def give(self, state: Mapping[str, Any]) -> None:
        """Give the tensors of modules memory, in place, where the checkpoint has them.

        What stays without memory, since no checkpoint has it, is told: buffers that are not persistent, which the
        user's code computes.
        """
        left: list[str] = []
        self._look(state, (), left)
        if left:
            _log.warning(
                "%s: on the meta device, and not in the checkpoint (non-persistent buffers never are); give the module "
                "these values before the first forward pass",
                _named(left),
            )

    def keep(self, loaded: Collection[str]) -> None:
        """Take it away from what is not `loaded` under any of its names."""
        self._take([one for one, names in self._names.items() if not any(name in loaded for name in names)])

    def take_back(self) -> None:
        """Take it away from all: nothing has filled it, or not all of it."""
        self._take(list(self._names))

    def _take(self, which: list[int]) -> None:
        names = [self._names.pop(one) for one in which]
        stuck = [own[0] for one, own in zip(which, names, strict=True) if not self._undo.pop(one)()]
        if stuck:
            _log.error(
                "%s: given memory by a restore that failed, and referred to elsewhere, so it can't be put back on the "
                "meta device; it holds NaN or undefined contents: make the model again",
                _named(stuck),
            )

    def _look(self, value: Any, path: Path, left: list[str]) -> None:
        if len(path) > MAX_DEPTH:
            return
        found = ROOT if path == () else self._inspector.inspect(value, path)
        if found.kind in (Kind.PER_RANK, Kind.DECLARED):
            self._look(value.value, path, left)
        elif found.kind is Kind.MODULE:
            tensors = found.adapter.module_tensors(value)
            without = {id(tensor) for tensor in tensors if found.adapter.dtype_without_memory(tensor) is not None}
            without |= self._names.keys()  # shared with a module that was looked at before
            if not without or not self._selection.reaches(path):
                return
            for entry in self._inspector.entries(value, found.adapter, path):
                where = (*path, entry.name)
                if id(entry.value) not in without or not self._selection.holds(where):
                    continue
                node = self._saved.find(where)
                leaf = node.entry.leaf if node is not None and isinstance(node.entry, SavedArray) else None
                if id(entry.value) in self._names:
                    self._names[id(entry.value)].append(dotted(where))
                elif leaf is not None and leaf.shape == self._inspector.declared.shape_of(entry.value):
                    with room_for(leaf, where):
                        undo = found.adapter.give_memory(entry.value, leaf.dtype, self._cast)
                    if undo is not None:
                        self._undo[id(entry.value)], self._names[id(entry.value)] = undo, [dotted(where)]
            left += [dotted((*path, name)) for name in found.adapter.unsaved_without_memory(value)]
        elif found.kind in (Kind.DICT, Kind.SEQUENCE):
            for key, item in children(value, path):
                self._look(item, (*path, key), left)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
