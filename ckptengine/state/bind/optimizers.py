"""How optimizers are bound."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.state.bind.adopt import adopt, adopt_numbered
from ckptengine.state.bind.groups import regroup, saved_groups
from ckptengine.state.bind.objects import hand_over
from ckptengine.state.bind.room import room_for
from ckptengine.state.bind.tensors import Maker, TensorBinder, of_kind
from ckptengine.state.bind.work import FRAMEWORK
from ckptengine.state.cut import Cut, state_cuts
from ckptengine.state.kinds import optimizer_names
from ckptengine.state.moments import Moments
from ckptengine.state.outline import in_order
from ckptengine.state.own_state import GROUPS
from ckptengine.state.saved import Node, SavedArray
from ckptengine.state.values import digest, encode

__all__ = ["OptimizerBinder"]

_GIVEN = "param_names"
"""Where torch keeps the names of the parameters that an optimizer was given with names."""


class OptimizerBinder(TensorBinder):
    """Binds optimizers by their parameters."""

    def _bind_optimizer(self, optimizer: Any, adapter: Adapter, path: Path, node: Node | None, per_rank: bool) -> None:
        adapter.check_optimizer(optimizer, path)
        groups = adapter.optimizer_groups(optimizer)
        names = optimizer_names(groups, self._names)
        if node is None:
            if self._selection.reaches(path):
                self._absent(path, per_rank)
            return
        if self._selection.reaches(path):
            if self._another_class(adapter.bare_optimizer(optimizer), path, node):
                return
            self._rebuilt.objects[path] = adapter.bare_optimizer(optimizer)
            self._rebuilt.optimizers.add(path)
            if node.cls is None:
                self._adopted |= adopt(node, names)
            numbered = adopt_numbered(node, names, self._source.resized)
            self._adopted |= numbered.keys()
            self._look_for_tied(node, names)
            if adapter.has_one_state(optimizer) and not self._is_in_order(node, path, names):
                return
            if not self._regroup(node, path, names, numbered, per_rank):
                return
        saved_state = node.child("state") or Node()
        _order_alike(saved_state)
        all_of = self._states_by_name(saved_state)
        by_name = {name: found[0][1] for name, found in all_of.items()}
        self._add_own_states(groups, names, (*path, "state"), by_name)
        elsewhere = adapter.states_elsewhere(optimizer, [p for group in groups for p in group["params"]])
        moments = self._inspector.declared.moments(
            (p, adapter.optimizer_state(optimizer, p)) for group in groups for p in group["params"]
        )
        stored = self._stored_moments(by_name)
        for group, group_names in zip(groups, names, strict=True):
            for parameter, name in zip(group["params"], group_names, strict=True):
                where = (*path, "state", name)
                current = adapter.optimizer_state(optimizer, parameter)
                self._inspector.declared.add_state(parameter, current, where, moments)
                child = by_name.get(name)
                # Older checkpoints do not tell an empty state from none.
                if child is None and not (current or (current is not None and self._source.tells_empty)):
                    continue
                if not self._selection.holds(where):
                    continue
                if id(parameter) in elsewhere:
                    for one in (child, *(node for _, node in all_of.get(name, ())[1:])):
                        self._is_elsewhere(where, one, parameter)
                    continue
                if child is not None and self._state_differs(parameter, name, where, child, current or {}):
                    continue
                new: dict[str, Any] | None = None
                if child is not None:
                    new = self._bind_parameter_state(adapter, group, parameter, current or {}, where, child, stored)
                    for key, other in all_of.get(name, ())[1:]:
                        self._bind_again(adapter, group, parameter, new, (*path, "state", key), other, stored)
                setting = functools.partial(adapter.set_optimizer_state, optimizer, parameter, new)
                self._work.act(FRAMEWORK, setting)
        self._work.act(FRAMEWORK, functools.partial(adapter.finish_states, optimizer, groups, (*path, "state")))
        self._bind_groups(adapter, groups, names, (*path, "param_groups"), node.child("param_groups"), per_rank)
        if adapter.loads_itself(optimizer):
            call = functools.partial(adapter.hand_over, optimizer)
            self._work.act(FRAMEWORK, functools.partial(hand_over, optimizer, None, path, call))

    def _look_for_tied(self, node: Node, names: list[list[str]]) -> None:
        """Have parameters found that the checkpoint has, tied, under other names only."""
        place, states = node.child(GROUPS), node.child("state") or Node()
        stored = {name for group in (saved_groups(place) or () if place is not None else ()) for name in group.params}
        self._tied.look_for(
            (name for group in names for name in group),
            (self._parameter_name(str(name)) for name in {*stored, *states.children}),
        )

    def _states_by_name(self, states: Node) -> dict[str, list[tuple[Key, Node]]]:
        """Return the saved states, with their keys, by the parameters' names here: several for a tied parameter."""
        found: dict[str, list[tuple[Key, Node]]] = {}
        for key, child in states.children.items():
            name = self._parameter_name(str(key))
            known = found.get(name, []) if self._tied.is_tied(name) else []
            found[name] = [*known, (key, child)]
        return found

    def _bind_again(
        self,
        adapter: Adapter,
        group: dict[str, Any],
        parameter: Any,
        state: dict[str, Any],
        path: Path,
        node: Node,
        moments: Moments,
    ) -> None:
        """Bind the state of a second parameter of the checkpoint, tied to the first here: both must bring the same."""
        other = self._bind_parameter_state(adapter, group, parameter, state, path, node, moments)
        odd = [key for key in {**state, **other} if not _is_same(state.get(key), other.get(key), adapter, path)]
        if odd:
            reason = f"one tied parameter here, and in the checkpoint two whose {odd[0]!r} differs"
            self._mismatch(path, f"{reason}; load into a state in which they are not tied", node)

    def _is_in_order(self, node: Node, path: Path, names: list[list[str]]) -> bool:
        """Whether the one state that an optimizer has for all of its parameters was saved for those here, in their
        order. Else it is noted."""
        place, states = node.child(GROUPS), node.child("state")
        groups = (saved_groups(place) or []) if place is not None else []
        here = [name for group in names for name in group]
        there = [self._parameter_name(str(name)) for group in groups for name in group.params]
        firsts = set() if states is None else {self._parameter_name(str(name)) for name in states.children}
        if not there or not here or firsts.isdisjoint(there):
            return True
        first = there.index(here[0]) if here[0] in firsts and here[0] in there else 0
        end = next((n for n in range(first + 1, len(there)) if there[n] in firsts), len(there))
        known = there[first:end]  # other stages' parameters follow, from the first of each
        if known == here:
            return True
        number = next((n for n, pair in enumerate(zip(known, here, strict=False)) if pair[0] != pair[1]), None)
        if number is None:
            what = f"{len(known)} parameters in the checkpoint, {len(here)} here"
        else:
            what = f"parameter {number} is {known[number]} in the checkpoint, {here[number]} here"
        self._mismatch(
            path,
            f"its history is one vector of all parameters, one after the other, and these are others: {what}; give the "
            "optimizer the same parameters in the same order, or leave it out with `only`: it begins a new history",
            node,
        )
        return False

    def _regroup(
        self, node: Node, path: Path, names: list[list[str]], numbered: Mapping[str, str], per_rank: bool
    ) -> bool:
        """Make of the saved groups those that are here; whether that can be done. Else it is noted.

        Those of an optimizer that each rank has of its own are not shared out among ranks. `numbered` are the names in
        the checkpoint of parameters that it has by number.
        """
        if per_rank or not self._selection.holds((*path, GROUPS)):
            return True
        apart = self._options.world_size > 1 or self._source.saved.world_size > 1
        regrouped = regroup(node, names, self._parameter_name, apart)
        if regrouped.reason is not None:
            self._mismatch((*path, GROUPS), regrouped.reason, node)
            return False
        self._source.dropped += [((*path, GROUPS, *keys), one) for keys, one in regrouped.dropped]
        if regrouped.taken is not None:
            self._source.regrouped[*path, GROUPS] = frozenset(numbered.get(name, name) for name in regrouped.taken)
        return True

    def _is_elsewhere(self, path: Path, node: Node | None, parameter: Any) -> None:
        """Note that other ranks have what the checkpoint has here; where none takes it, it is unexpected."""
        self._found.elsewhere.append(path)
        if node is not None and 0 in self._inspector.declared.shape_of(parameter):  # no rank has anything of it
            node.use()

    def _add_own_states(
        self, groups: list[dict[str, Any]], names: list[list[str]], path: Path, by_name: dict[str, Node]
    ) -> None:
        """Take what the checkpoint has of the states of parameters of which each rank has its own."""
        for group, group_names in zip(groups, names, strict=True):
            for parameter, name in zip(group["params"], group_names, strict=True):
                if self._inspector.declared.is_own(parameter):
                    own = self._own_of((*path, name), by_name.get(name))
                    if own is not None:
                        by_name[name] = own

    def _state_differs(self, parameter: Any, name: str, path: Path, node: Node, current: Mapping[Any, Any]) -> bool:
        """Whether the saved state belongs to a parameter of another shape: then none of it is taken.

        The checkpoint says the shape of that parameter, whatever the shapes of its state; only old ones may not.
        """
        here = self._inspector.declared.shape_of(parameter)
        told = self._source.shapes.get(name)
        if name in self._adopted:  # by number: the model's tensor of that name may be another parameter's
            told = _common_shape(node)
        live = {key: self._inspector.declared.shape_of(one) for key, one in current.items() if hasattr(one, "shape")}
        saved = node.parameter_shape or told or _shape_by_state(here, live, node)
        if saved == here:
            return False
        self._mismatch(path, f"state of a parameter of shape {here} here, {saved} in the checkpoint", node)
        return True

    def _bind_parameter_state(
        self,
        adapter: Adapter,
        group: dict[str, Any],
        parameter: Any,
        current: dict[str, Any],
        path: Path,
        node: Node,
        moments: Moments,
    ) -> dict[str, Any]:
        cuts = self._state_cuts(parameter, path, node, moments)

        def new(entry: SavedArray, where: Path) -> Any:
            leaf, cut, key = entry.leaf, cuts.get(where[len(path) :]), str(where[-1])
            shape = leaf.shape if cut is None else cut.local
            with room_for(leaf, where):
                return adapter.new_state_tensor(group, parameter, key, leaf.dtype, shape, entry.spread)

        def fitting(array: Any, entry: SavedArray, where: Path) -> Any:
            if entry.told and not in_order(adapter.view(array, where, target=False), entry.order):
                with room_for(entry.leaf, where):
                    array = adapter.new_like(array, entry.order)
            return array

        def noted(array: Any, where: Path) -> Any:
            if cut := cuts.get(where[len(path) :]):
                self._inspector.declared.note(array, cut, where)
            return array

        def make(entry: SavedArray, where: Path) -> Any:
            array = noted(fitting(new(entry, where), entry, where), where)
            self._read(array, adapter, self._target_view(array, adapter, where), entry, where)
            return array

        state: dict[str, Any] = {}
        node.used = True
        for key, child in node.children.items():
            where = (*path, key)
            entry = child.entry
            if not isinstance(entry, SavedArray):
                state[str(key)] = self._rebuild(child, where, current.get(str(key)), Maker(make, parameter))
                self._found.loaded.append(dotted(where))
                continue
            tensor = current.get(str(key))
            if tensor is None or not adapter.is_tensor(tensor) or adapter.is_wrapped(tensor):
                made = self._work.made.get((entry.path, entry.rank))
                tensor = made[0] if made else new(entry, where)
            tensor = noted(of_kind(fitting(tensor, entry, where), entry, where), where)
            state[str(key)] = tensor
            self._work.made.setdefault((entry.path, entry.rank), []).append(tensor)
            self._bind_tensor(tensor, adapter, where, child, per_rank=entry.rank is not None)
        return state

    def _stored_moments(self, states: Mapping[str, Node]) -> Moments:
        """Return what is known of the states that the checkpoint has, by the names of parameters."""
        if not self._inspector.declared:
            return Moments()
        shapes = {name: node.parameter_shape or self._source.shapes.get(name) for name, node in states.items()}
        return self._inspector.declared.stored_moments(
            (shape, _array_shapes(states[name])) for name, shape in shapes.items() if shape is not None
        )

    def _state_cuts(self, parameter: Any, path: Path, node: Node, moments: Moments) -> dict[Path, Cut]:
        """Return how the arrays that the checkpoint has of a parameter's state are cut here, by their keys."""
        cut = self._inspector.declared.cut_of(parameter)
        if cut is None:
            return {}
        return state_cuts(cut, _array_shapes(node), path, stored=True, moments=moments)

    def _bind_groups(
        self,
        adapter: Adapter,
        groups: list[dict[str, Any]],
        names: list[list[str]],
        path: Path,
        node: Node | None,
        per_rank: bool,
    ) -> None:
        node = self._as_a_whole(path, node, per_rank)
        saved = None if node is None else self._rebuild_groups(adapter, groups, names, path, node, node)
        if saved is None:
            return
        told: dict[int, Any] = {}  # what each tensor that holds a number is set to
        for group, group_names, new in zip(groups, names, saved, strict=True):
            for key, value in new.items():
                if key == "params":
                    continue
                if key == _GIVEN and isinstance(value, (list, tuple)):  # it is in the order of the saved group
                    given = _given_names([self._parameter_name(str(name)) for name in new["params"]], new)
                    value = [given[name] for name in group_names if name in given]
                tensor = group.get(key)
                holds = adapter.is_tensor(tensor) and type(value) in (int, float)
                if holds and told.setdefault(id(tensor), value) != value:
                    # Groups share one tensor, and have different numbers in the checkpoint: one of its own.
                    self._work.act(FRAMEWORK, functools.partial(_give_own, adapter, group, key))
                self._work.act(
                    FRAMEWORK, functools.partial(adapter.set_hyperparameter, group, key, value, self._options.cast)
                )

    def _rebuild_groups(
        self,
        adapter: Adapter,
        groups: list[dict[str, Any]],
        names: list[list[str]],
        path: Path,
        node: Node,
        optimizer: Node,
    ) -> list[dict[str, Any]] | None:
        """Return the saved groups, with the parameters' names; None where they are not those that are here.

        Then nothing of them is read, and what `optimizer` has is a mismatch.
        """
        reads, actions, cast = len(self._work.reads), len(self._work.actions), len(self._found.cast)
        saved: list[dict[str, Any]] = self._rebuild(node, path, groups)
        reason = self._groups_differ(adapter, saved, names, groups)
        if reason is not None:
            del self._work.reads[reads:], self._work.actions[actions:], self._found.cast[cast:]
            self._work.made = {}
            self._work.converted = {number: one for number, one in self._work.converted.items() if number < reads}
            self._mismatch(path, reason, optimizer)
            return None
        self._found.loaded.append(dotted(path))
        return saved

    def _groups_differ(
        self, adapter: Adapter, saved: Any, names: list[list[str]], groups: list[dict[str, Any]]
    ) -> str | None:
        if not isinstance(saved, list) or not all(isinstance(g, dict) and "params" in g for g in saved):
            return "no parameter groups in the checkpoint"
        if len(saved) != len(names):
            return f"{len(names)} parameter groups here, {len(saved)} in the checkpoint"
        for number, (group, here) in enumerate(zip(saved, names, strict=True)):
            there = {self._parameter_name(str(name)) for name in group["params"]}
            if there != set(here):
                odd = sorted(there.symmetric_difference(here))
                return f"group {number} has other parameters in the checkpoint: {', '.join(odd[:8])}" + (
                    f" and {len(odd) - 8} more" if len(odd) > 8 else ""
                )
            then = _given_names([self._parameter_name(str(name)) for name in group["params"]], group)
            now = _given_names(here, groups[number])
            # By its name in the state it is known which one is meant, but by number only what a module has.
            known = (set(self._names.values()) - self._adopted) | self._in_modules if then and now else set()
            for name in here if then and now else ():
                if name in known or name not in then or name not in now:
                    continue
                if adapter.bare_name(str(then[name])) != adapter.bare_name(str(now[name])):
                    return (
                        f"parameter {name} is called {now[name]!r} here, {then[name]!r} in the checkpoint; pass the "
                        "model in the same state, or give the optimizer its parameters in the same order"
                    )
        return None


def _is_same(one: Any, other: Any, adapter: Adapter, path: Path) -> bool:
    """Whether two items of a state are one tensor to be filled, or equal plain values."""
    if one is other or adapter.is_tensor(one) or adapter.is_tensor(other):
        return one is other
    try:
        return digest(encode(one, path)) == digest(encode(other, path))
    except StateError:  # containers with tensors
        return False


def _array_shapes(node: Node) -> dict[Path, tuple[int, ...]]:
    return {keys: one.entry.leaf.shape for keys, one in node.leaves() if isinstance(one.entry, SavedArray)}


def _order_alike(states: Node) -> None:
    """Give states whose keys are in no known order, since the rank that told of orders had none of them, in place, the
    order of another state with the same keys."""
    known = {frozenset(child.children): list(child.children) for child in states.children.values() if child.ordered}
    for child in states.children.values():
        keys = None if child.ordered or not child.children else known.get(frozenset(child.children))
        if keys is not None:
            child.children = {key: child.children[key] for key in keys}


def _shape_by_state(here: tuple[int, ...], current: Mapping[Any, tuple[int, ...]], node: Node) -> tuple[int, ...]:
    """Return the shape that a parameter seems to have had, from its saved state alone.

    Arrays with as many dimensions as the parameter have its shape, or that of something that is kept for rows, blocks
    or a projection of it. So they tell another shape only where none has the parameter's, and the state that is here
    has no such array either.
    """
    shapes = {
        str(key): child.entry.leaf.shape
        for key, child in node.children.items()
        if isinstance(child.entry, SavedArray) and len(child.entry.leaf.shape) == len(here) > 0
    }
    live = {key: current.get(key, ()) for key in shapes}
    if here in shapes.values() or any(live[key] == shape for key, shape in shapes.items()):
        return here
    odd = [shape for shape in shapes.values() if all(a != 1 for a in shape)]
    return odd[0] if odd and len(set(odd)) == 1 and not any(live.values()) else here


def _common_shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape that all arrays of a parameter's state have; None where they have several, or are scalars."""
    entries = (child.entry for child in node.children.values())
    shapes = {entry.leaf.shape for entry in entries if isinstance(entry, SavedArray) and entry.leaf.shape}
    return shapes.pop() if len(shapes) == 1 else None


def _given_names(names: list[str], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names that the user gave the parameters of a group, if any, by those that they have in the state."""
    given = group.get(_GIVEN)
    return dict(zip(names, given, strict=False)) if isinstance(given, (list, tuple)) else {}


def _give_own(adapter: Adapter, group: dict[str, Any], key: str) -> None:
    group[key] = adapter.new_like(group[key], None)
