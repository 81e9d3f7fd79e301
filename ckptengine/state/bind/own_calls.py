"""How optimizers that are saved by their own `state_dict` are bound."""

from __future__ import annotations

import functools
from typing import Any

from ckptengine.frameworks.adapter import Adapter
from ckptengine.schema.path import Path, dotted
from ckptengine.state.bind.adopt import adopt_numbered
from ckptengine.state.bind.modules import ModuleBinder
from ckptengine.state.bind.objects import ObjectBinder, hand_over
from ckptengine.state.bind.optimizers import OptimizerBinder
from ckptengine.state.bind.work import FRAMEWORK
from ckptengine.state.kinds import optimizer_names
from ckptengine.state.own_state import GROUPS, STATE, numbered, numbers_of, parts_of
from ckptengine.state.saved import Node, SavedValue

__all__ = ["OwnCallsBinder", "has_own_names"]


def has_own_names(node: Node | None) -> bool:
    """Whether an optimizer was saved with state under other names than its parameters'."""
    state, groups = (None, None) if node is None else (node.child(STATE), node.child(GROUPS))
    if state is None or groups is None:
        return False
    if isinstance(groups.entry, SavedValue):
        listed = [group.get("params", ()) for group in groups.entry.value if isinstance(group, dict)]
    else:
        params = [child.child("params") for child in groups.children.values()]
        listed = [one.entry.value for one in params if one is not None and isinstance(one.entry, SavedValue)]
    names = {str(name) for group in listed for name in group}
    return any(str(key) not in names for key in state.children)


def _spelled_out(node: Node) -> Node:
    """Return a dict that was saved as one plain value, since it held no arrays, as a node with its items."""
    if not (isinstance(node.entry, SavedValue) and isinstance(node.entry.value, dict)):
        return node
    result = Node()
    result.parameter_shape, result.ordered = node.parameter_shape, True
    for key, value in node.entry.value.items():
        result.children[key] = Node()
        result.children[key].entry = SavedValue(value)
    return result


class OwnCallsBinder(ObjectBinder, OptimizerBinder, ModuleBinder):
    """Binds optimizers whose `state_dict` says more than their state and groups, by their own calls."""

    def _bind_own_optimizer(
        self, optimizer: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool
    ) -> None:
        adapter.check_optimizer(optimizer, path)
        current = self._inspector.asked.state_of(optimizer, path)
        groups = adapter.optimizer_groups(optimizer)
        parts = parts_of(current, groups)
        call = functools.partial(adapter.hand_over, optimizer)
        if parts is None:
            self._bind_object(optimizer, path, node, per_rank, call)
            return
        node = self._as_a_whole(path, node, per_rank)
        if node is None or self._another_class(optimizer, path, node):
            return
        self._rebuilt.objects[path], self._rebuilt.before[path] = optimizer, current
        self._rebuilt.optimizers.add(path)
        names = optimizer_names(groups, self._names)
        numbered = adopt_numbered(node, names, self._source.resized)
        self._adopted |= numbered.keys()
        self._look_for_tied(node, names)
        if adapter.has_one_state(optimizer) and not self._is_in_order(node, path, names):
            return
        if not self._regroup(node, path, names, numbered, per_rank):
            return
        packed = self._own_groups(adapter, groups, names, path, node, per_rank)
        if packed is None:
            return
        state = self._own_states(adapter, groups, names, parts[0], packed, path, node)
        numbers = numbers_of(groups)
        handed: dict[Any, Any] = {
            STATE: state,
            GROUPS: [{**group, "params": numbers[g]} for g, group in enumerate(packed)],
        }
        for key, child in node.children.items():
            if key not in (STATE, GROUPS):
                handed[key] = self._rebuild_item(child, (*path, key), current.get(key), None)
                self._found.loaded.append(dotted((*path, key)))
        for key in current:
            if key not in handed:
                self._absent((*path, key), per_rank)
        self._work.act(FRAMEWORK, functools.partial(hand_over, optimizer, handed, path, call))

    def _own_groups(
        self,
        adapter: Adapter,
        groups: list[dict[str, Any]],
        names: list[list[str]],
        path: Path,
        node: Node,
        per_rank: bool,
    ) -> list[dict[str, Any]] | None:
        """Return the saved groups, with the parameters' names; None where they are not those that are here."""
        where, child = (*path, GROUPS), node.child(GROUPS)
        if child is None:
            self._absent(where, per_rank)
            return None
        return self._rebuild_groups(adapter, groups, names, where, child, node)

    def _own_states(
        self,
        adapter: Adapter,
        groups: list[dict[str, Any]],
        names: list[list[str]],
        current: Any,
        packed: list[dict[str, Any]],
        path: Path,
        node: Node,
    ) -> dict[Any, Any]:
        """Return the saved states, under the parameters' numbers; what belongs to no parameter under its own key."""
        whole = node.child(STATE) or Node()
        whole.used = True  # where no parameter had arrays it is one plain value
        saved = _spelled_out(whole)
        all_of = self._states_by_name(saved)
        by_name = {name: found[0] for name, found in all_of.items()}
        moments = self._inspector.declared.moments((p, current.get(number)) for p, number in numbered(groups))
        stored = self._stored_moments({name: _spelled_out(child) for name, (_, child) in by_name.items()})
        states: dict[Any, Any] = {}
        number_of: dict[Any, Any] = {}
        for group, group_names, numbers in zip(groups, names, numbers_of(groups), strict=True):
            for parameter, name, number in zip(group["params"], group_names, numbers, strict=True):
                where = (*path, STATE, name)
                key, child = by_name.pop(name, (name, None))
                here = current.get(number, {})
                self._inspector.declared.add_state(parameter, here, where, moments)
                if child is None or self._state_differs(parameter, name, where, child, here):
                    continue
                inner = _spelled_out(child)
                states[number] = self._bind_parameter_state(adapter, group, parameter, here, where, inner, stored)
                for other_key, other in all_of[name][1:]:
                    there = (*path, STATE, other_key)
                    self._bind_again(adapter, group, parameter, states[number], there, _spelled_out(other), stored)
                    other.used = other.used or other.entry is not None
                number_of[key] = number
                if child.entry is not None:  # plain values, or none: the parameter is known, and has nothing yet
                    child.used = True
                    self._found.loaded.append(dotted(where))
        # Those of other ranks, too: their states are theirs.
        of_parameters = {self._parameter_name(str(name)) for group in packed for name in group["params"]}
        of_parameters |= {
            self._parameter_name(one.name) for one in self._source.members if one.groups == (*path, GROUPS)
        }
        for name, (key, child) in by_name.items():
            if name not in of_parameters:
                states[key] = self._rebuild(child, (*path, STATE, key), current.get(key))
                self._found.loaded.append(dotted((*path, STATE, key)))
        order = [number_of.get(key, key) for key in saved.children]
        return {key: states[key] for key in order if key in states}
