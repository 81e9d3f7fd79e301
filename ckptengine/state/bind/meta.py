"""Modules without memory (torch's meta device): what the checkpoint has of them gets memory, to be read into."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ckptengine.schema.path import Path, dotted
from ckptengine.state.kinds import Inspector, Kind, children
from ckptengine.state.saved import Node, SavedArray
from ckptengine.state.select import Selection
from ckptengine.state.values import MAX_DEPTH

__all__ = ["materialize"]

_log = logging.getLogger("ckptengine")
_NAMED = 8


def materialize(state: Mapping[str, Any], inspector: Inspector, selection: Selection, saved: Node, cast: bool) -> None:
    """Give the tensors of modules that have no memory memory, in place, where the checkpoint has them.

    Nothing is read twice, and no second copy made. What stays without memory, since no checkpoint has it, is told:
    buffers that are not persistent, which the user's code computes.
    """
    left: list[str] = []
    _look(state, (), inspector, selection, saved, cast, left)
    if left:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        _log.warning(
            "%s%s: on the meta device, and not in the checkpoint (non-persistent buffers never are); give the "
            "module these values before the first forward pass",
            ", ".join(left[:_NAMED]),
            more,
        )


def _look(
    value: Any, path: Path, inspector: Inspector, selection: Selection, saved: Node, cast: bool, left: list[str]
) -> None:
    if len(path) > MAX_DEPTH:
        return
    kind, adapter = (Kind.DICT, None) if path == () else inspector.kind(value, path)
    if kind in (Kind.PER_RANK, Kind.DECLARED):
        _look(value.value, path, inspector, selection, saved, cast, left)
    elif kind is Kind.MODULE and adapter is not None:
        without = {id(tensor) for tensor in adapter.module_tensors(value) if adapter.is_without_memory(tensor)}
        if not without or not selection.reaches(path):
            return
        for entry in inspector.entries(value, adapter, path):
            where = (*path, entry.name)
            node = saved.find(where) if id(entry.value) in without and selection.holds(where) else None
            leaf = node.entry.leaf if node is not None and isinstance(node.entry, SavedArray) else None
            if leaf is not None and leaf.shape == tuple(entry.value.shape):
                adapter.give_memory(entry.value, leaf.dtype, cast)
        left += [dotted((*path, name)) for name in adapter.unsaved_without_memory(value)]
    elif kind in (Kind.DICT, Kind.SEQUENCE):
        for key, item in children(value, path):
            _look(item, (*path, key), inspector, selection, saved, cast, left)
