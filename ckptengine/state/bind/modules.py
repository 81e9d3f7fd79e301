"""How modules are bound: filled in place, then loaded by their own code where they have any."""

from __future__ import annotations

import functools
import logging
from typing import Any

from ckptengine.errors import LoadMismatchError
from ckptengine.frameworks.adapter import Adapter, ModuleEntry
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.bind.objects import hand_over
from ckptengine.state.bind.tensors import TensorBinder
from ckptengine.state.bind.work import FRAMEWORK
from ckptengine.state.saved import Node, SavedArray

__all__ = ["ModuleBinder"]

_log = logging.getLogger("ckptengine")


class ModuleBinder(TensorBinder):
    """Binds modules by their entries."""

    def _bind_module(self, module: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        loading = adapter.module_loading(module)
        if self._work.taken is None:  # else the module lies in an object that is being built
            self._work.made = {}
        handed: dict[str, Any] = {}
        names = set()
        for entry in self._inspector.entries(module, adapter, path):
            where = (*path, entry.name)
            names.add(entry.name)
            child = None if node is None else node.child(entry.name)
            if entry.live and not (child is not None and _adapts(entry, child, loading)):
                self._bind_tensor(entry.value, adapter, where, child, per_rank)
            elif self._selection.holds(where):
                if child is None:
                    if entry.added and node is not None and _has_others(node, entry.name):
                        self._work.act(FRAMEWORK, functools.partial(_tell_added, where, entry.value))
                    else:
                        self._absent(where, per_rank)
                    continue
                handed[entry.key] = self._rebuild_item(child, where, None if entry.live else entry.value, None)
                self._found.loaded.append(dotted(where))
        for name, child in () if node is None else node.children.items():
            # What such code makes when it is loaded; other code, and no code, would not take it.
            if name not in names and _owner(str(name)) in (loading or ()) and self._selection.holds((*path, name)):
                handed[str(name)] = self._rebuild(child, (*path, name))
                self._found.loaded.append(dotted((*path, name)))
        if handed or (loading is not None and node is not None and self._selection.reaches(path)):
            call = functools.partial(_load, adapter, module, path, self._options.strict)
            self._work.act(FRAMEWORK, functools.partial(hand_over, module, handed, path, call))


def _adapts(entry: ModuleEntry, node: Node, loading: frozenset[str] | None) -> bool:
    """Whether an entry has another shape in the checkpoint, and belongs to a module that may take that."""
    if loading is None or _owner(entry.key) not in loading or not isinstance(node.entry, SavedArray):
        return False
    return tuple(entry.value.shape) != node.entry.leaf.shape


def _has_others(node: Node, name: str) -> bool:
    """Whether the checkpoint has something else of the owner of a name."""
    return any(_owner(str(other)) == _owner(name) for other in node.children)


def _tell_added(path: Path, value: Any) -> None:
    _log.warning(
        "%s: not in the checkpoint, which an earlier version has saved without it, so it stays %s; what the metric "
        "weighs by it (a mean over calls of forward) is right again from its next reset() on",
        dotted(path),
        value,
    )


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _load(adapter: Adapter, module: Any, path: Path, strict: bool, handed: dict[str, Any]) -> None:
    try:
        refused = adapter.load_module(module, handed)
    except RuntimeError as error:  # torch's word for shapes that don't fit, when everything else is loaded
        if strict:
            raise
        _log.warning(
            "%s: %s refused some of the saved values, so its own values stay: %s", dotted(path), type(module), error
        )
        return
    if not refused:
        return
    names = ", ".join(refused[:8]) + (f" and {len(refused) - 8} more" if len(refused) > 8 else "")
    message = (
        f"{dotted(path)}: load_state_dict of {describe_type(module)} did not take {names}, which its state_dict() "
        "gave, and what is there now is not what was saved. Give the class a `_load_from_state_dict` that takes it, or "
        "leave it out of the state"
    )
    if strict:
        raise LoadMismatchError(message)
    _log.warning("%s", message)
