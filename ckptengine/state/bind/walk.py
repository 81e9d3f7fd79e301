"""One walk over a state that is to be filled."""

from __future__ import annotations

import copy
import functools
import logging
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping, MutableMapping
from typing import Any

from ckptengine.frameworks.registry import adapter_of_loader
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.bind.base import Put
from ckptengine.state.bind.live import is_optimizer_state
from ckptengine.state.bind.own_calls import OwnCallsBinder, has_own_names
from ckptengine.state.bind.work import SET
from ckptengine.state.forms import own_keys
from ckptengine.state.kinds import Kind, children
from ckptengine.state.merged import Merged
from ckptengine.state.saved import Node, SavedValue

__all__ = ["Binder"]

_log = logging.getLogger("ckptengine")


class Binder(OwnCallsBinder):
    """Walks a state and sorts its values by kind."""

    def walk(self, state: Mapping[str, Any]) -> None:
        """Bind everything in a state."""
        self._memory.give(state)
        self._bind_items(state, (), self._source.shared, per_rank=False)
        # Objects come last: what they are handed must not be read into memory that something else is read into.
        self._work.note_taken()
        while self._late:
            self._work.made = {}
            self._late.pop(0)()

    def _bind(self, value: Any, put: Put | None, path: Path, node: Node | None, *, per_rank: bool) -> None:
        found = self._inspector.inspect(value, path)
        if found.kind is Kind.PER_RANK:
            self._bind_per_rank(value, path, node)
        elif found.kind is Kind.DECLARED:
            self._bind(value.value, functools.partial(setattr, value, "value"), path, node, per_rank=per_rank)
        elif found.kind in (Kind.TENSOR, Kind.WRAPPED, Kind.SHARDED):
            new = found.adapter.replacement(value) if found.kind is Kind.TENSOR and put is not None else None
            if new is not None:
                self._inspector.declared.replace(value, new, path)
            reads = len(self._work.reads)
            self._bind_tensor(value if new is None else new, found.adapter, path, node, per_rank)
            if new is not None and put is not None and len(self._work.reads) > reads:
                self._work.act(SET, functools.partial(put, new))
        elif found.kind is Kind.MODULE:
            self._bind_module(value, found.adapter, path, node, per_rank)
        elif found.kind is Kind.OPTIMIZER:
            if found.adapter.saves_itself(value) or (has_own_names(node) and not isinstance(value, Merged)):
                self._late.append(
                    functools.partial(self._bind_own_optimizer, value, found.adapter, path, node, per_rank)
                )
            else:
                self._bind_optimizer(value, found.adapter, path, node, per_rank)
        elif found.kind is Kind.OBJECT and (known := adapter_of_loader(value)) is not None:
            self._bind_loader(value, known, path, node if per_rank else self._source.own.find(path))
        elif found.kind is Kind.OBJECT:
            self._late.append(functools.partial(self._bind_object, value, path, node, per_rank))
        elif found.kind is Kind.PLAIN:
            self._bind_plain(value, put, path, node, per_rank)
        elif node is not None and node.entry is not None and self._selection.holds(path):
            self._bind_emptied(value, path, node)
        else:
            if isinstance(value, Mapping) and is_optimizer_state(value):
                self._note_optimizer_state(value, path, node)
            self._bind_items(value, path, node, per_rank=per_rank)

    def _note_optimizer_state(self, value: Mapping[Any, Any], path: Path, node: Node | None) -> None:
        """What an optimizer's `state_dict` returned is a copy: filling it fills no optimizer that has no state yet."""
        self._optimizer_states.add(path)
        saved = None if node is None else node.child("state")
        if not value["state"] and saved is not None and saved.children and self._options.rank == 0:
            _log.warning(
                "%s: this is what the optimizer's state_dict() returned, and it is filled; the optimizer itself has no "
                "state and stays as it is. Pass the optimizer itself in the state, or call "
                "optimizer.load_state_dict(...) with this dict after the restore",
                dotted(path),
            )

    def _bind_live(self, value: Any, path: Path, node: Node) -> None:
        """What holds it is handed it as it is; it has its own state before that."""
        found = self._inspector.inspect(value, path)
        if found.kind is Kind.OBJECT:
            self._bind_object(value, path, node, False)
        elif found.kind is Kind.OPTIMIZER and found.adapter.saves_itself(value):
            self._bind_own_optimizer(value, found.adapter, path, node, False)
        else:
            self._bind(value, None, path, node, per_rank=False)

    def _bind_items(self, value: Any, path: Path, node: Node | None, *, per_rank: bool) -> None:
        if type(value) is OrderedDict and node is not None and node.tells_metadata and self._selection.holds(path):
            self._work.act(SET, functools.partial(_set_metadata, value, copy.deepcopy(node.metadata)))
        settable = isinstance(value, (MutableMapping, list, deque))
        for own, (key, item) in zip(own_keys(value), children(value, path), strict=True):
            put = functools.partial(operator.setitem, value, own) if settable else None
            child = None if node is None else node.child(key)
            self._bind(item, put, (*path, key), child, per_rank=per_rank)

    def _bind_emptied(self, value: Any, path: Path, node: Node) -> None:
        """What is walked in the state and one value in the checkpoint: fits where both are plain dicts."""
        plain = isinstance(value, dict) and all(
            self._inspector.inspect(item, (*path, key)).kind is Kind.PLAIN for key, item in children(value, path)
        )
        saved = node.entry.value if isinstance(node.entry, SavedValue) else None
        alike = type(value) is type(saved) or type(value) not in (dict, OrderedDict, defaultdict)
        if plain and saved == {} and alike:
            node.use()
            self._found.loaded.append(dotted(path))
            self._work.act(SET, value.clear)
        else:
            here = describe_type(value)
            self._mismatch(path, f"{here} of several leaves here, {node.description} in the checkpoint", node)


def _set_metadata(value: Any, metadata: Any) -> None:
    """Give an `OrderedDict` the `_metadata` that was saved, or none."""
    if metadata is not None:
        value._metadata = metadata
    elif hasattr(value, "_metadata"):
        del value._metadata
