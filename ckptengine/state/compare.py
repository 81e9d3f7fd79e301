"""Whether a state that was filled is what was saved: its leaves, values, classes, containers and their order."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ckptengine.schema.leaf import ArrayLeaf, Placement
from ckptengine.schema.path import Path, dotted, is_inside
from ckptengine.schema.type_name import describe_type
from ckptengine.state.binding import Promise
from ckptengine.state.nested import item_of
from ckptengine.state.outline import Container, class_name, is_of_class, sorted_keys
from ckptengine.state.per_rank import PerRank
from ckptengine.state.saved import Node, SavedArray, SavedValue
from ckptengine.state.tree import FlatState
from ckptengine.state.union import NAMED
from ckptengine.state.values import digest, encode

__all__ = ["Difference", "Found", "compare"]

_, _GIVEN = NAMED
_SCALARS = frozenset({type(None), bool, int, str, bytes})


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was saved: the leaf or container, and what was stored and what is there now."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{dotted(self.path) or 'the state'}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Found:
    """What is to be compared byte by byte: an array of the checkpoint, and the leaf that has its name now."""

    path: Path
    entry: SavedArray
    leaf: ArrayLeaf


def compare(
    promise: Promise, flat: FlatState, world_size: int
) -> tuple[list[Difference], list[Difference], list[Found]]:
    """Return what differs, what the checkpoint does not have and objects had before, and the arrays to compare.

    Takes what was promised, and the state as a save would see it now.
    """
    comparison = _Comparison(promise, flat, world_size)
    comparison.leaves()
    comparison.surplus()
    comparison.containers()
    return comparison.differences, comparison.kept, comparison.found


class _Comparison:
    def __init__(self, promise: Promise, flat: FlatState, world_size: int) -> None:
        self.differences: list[Difference] = []
        self.kept: list[Difference] = []
        self.found: list[Found] = []
        self._promise, self._flat = promise, flat
        self._arrays = {leaf.path: leaf for leaf in flat.arrays}
        for path, first in flat.aliases.items():
            self._arrays[path] = self._arrays[first]
        self._values = {**flat.values, **flat.rank_values}
        self._derived = self._derived_paths(world_size)

    def _derived_paths(self, world_size: int) -> set[Path]:
        """Return what is not compared: what a `resize` made, and what an object says it derives anew."""
        result: set[Path] = set()
        say = {p: t.rederived_state for p, t in self._promise.built.items() if callable(_said(t))}
        result.update(path for path in self._promise.derived if not is_inside(path, say))
        for path, told in say.items():
            for name in told(self._promise.saved_world_size, world_size):
                result.add((*path, *((name,) if isinstance(name, str) else name)))
        return result

    def _differ(self, path: Path, reason: str) -> None:
        self.differences.append(Difference(path, reason))

    def leaves(self) -> None:
        """Compare every leaf that was to be loaded."""
        for path, entry in self._promise.leaves.items():
            if is_inside(path, self._derived):
                continue
            if isinstance(entry, SavedArray):
                self._array(path, entry)
            else:
                self._value(path, entry)

    def _array(self, path: Path, entry: SavedArray) -> None:
        leaf, saved = self._arrays.get(path), entry.leaf
        stored = f"{saved.dtype} of shape {saved.shape} in the checkpoint"
        if leaf is None:
            there = describe_type(self._values[path]) if path in self._values else "nothing"
            self._differ(path, f"{stored}, {there} now")
        elif leaf.shape != saved.shape or (leaf.dtype != saved.dtype and path not in self._promise.cast):
            self._differ(path, f"{stored}, {leaf.dtype} of shape {leaf.shape} now")
        elif self._whole_copy(path, entry, leaf):
            self._differ(
                path, f"spread over the ranks in the checkpoint, a whole copy on every rank now, shape {leaf.shape}"
            )
        else:
            self.found.append(Found(path, entry, leaf))

    def _whole_copy(self, path: Path, entry: SavedArray, leaf: ArrayLeaf) -> bool:
        """Whether a part of a sharded tensor, or what belongs to a sharded parameter, has become a whole copy.

        A state whose tensors are whole takes what was sharded: that is another layout, and no difference.
        """
        if not self._became_whole(path, entry.leaf.placement, leaf):
            return False
        if path in self._promise.spread:
            return True
        return path not in self._promise.given and self._belongs_to_sharded(path, leaf)

    def _became_whole(self, path: Path, saved: Placement, leaf: ArrayLeaf) -> bool:
        whole = saved is Placement.SHARDED and leaf.placement is not Placement.SHARDED
        return whole and is_inside(path, self._promise.built)

    def _belongs_to_sharded(self, path: Path, leaf: ArrayLeaf) -> bool:
        """Whether the tensor that a key of the path names is sharded; without one, whether all of the shape are.

        A key is a whole name, as the parameters of an optimizer have it, or a name inside a module. A tensor of another
        framework, or one whose own layout is in question, says nothing.
        """
        tensors, by_name = self._patterns
        for key in reversed(path):
            named = by_name.get(self._promise.parameter_name(str(key)), [])
            if len(named) == 1 and named[0].shape == leaf.shape and named[0].container == leaf.container:
                return named[0].placement is Placement.SHARDED
        if is_inside(path, self._promise.optimizers):
            return False  # its parameter isn't in the state; the walk refuses plain state of a sharded one
        alike = {one.placement for one in tensors if (one.shape, one.container) == (leaf.shape, leaf.container)}
        return alike == {Placement.SHARDED}

    @functools.cached_property
    def _patterns(self) -> tuple[list[ArrayLeaf], dict[str, list[ArrayLeaf]]]:
        """Return the leaves that show how others are to be spread; by whole name and last key, what isn't built."""
        tensors, by_name = [], defaultdict(list)
        for path, one in self._arrays.items():
            entry = self._promise.leaves.get(path)
            if isinstance(entry, SavedArray) and self._became_whole(path, entry.leaf.placement, one):
                continue
            tensors.append(one)
            for name in () if is_inside(path, self._promise.built) else {dotted(path), str(path[-1])}:
                by_name[name].append(one)
        return tensors, by_name

    def _value(self, path: Path, entry: SavedValue) -> None:
        if self._is_groups(path):
            self._groups(path, entry.value)
        elif path not in self._values:
            there = "a tensor" if path in self._arrays else "nothing, or several leaves,"
            self._differ(path, f"{_short(entry.value)} in the checkpoint, {there} now")
        elif not _same(self._values[path], entry.value, path):
            self._differ(path, f"{_short(entry.value)} in the checkpoint, {_short(self._values[path])} now")

    def _is_groups(self, path: Path) -> bool:
        return any(
            path[: len(one)] == one and path[len(one) :][:1] == ("param_groups",) for one in self._promise.optimizers
        )

    def _groups(self, path: Path, saved: Any) -> None:
        """Compare an optimizer's groups: names of parameters are those of the state, rates may be kept in tensors."""
        if path in self._arrays:
            return  # a number in the checkpoint and a tensor here: it was set to the number
        if path[-1] == _GIVEN and path not in self._values:
            return
        now = self._values.get(path)
        if path[-1] == "params":
            saved, now = self._named(saved), self._named(now)
        if path in self._values and isinstance(saved, list) and isinstance(now, list) and path[-1] == "param_groups":
            saved, now = ([_renamed(group, self._named) for group in groups] for groups in (saved, now))
            if len(saved) == len(now):
                # A key that this version of the optimizer has and the one that saved had not keeps its value.
                now = [_known(group, one) for group, one in zip(now, saved, strict=True)]
                saved = [_without_names(group, one) for group, one in zip(saved, now, strict=True)]
        if path not in self._values and isinstance(saved, list):
            for number, group in enumerate(saved):  # plain in the checkpoint, with tensors here
                for key, value in group.items() if isinstance(group, dict) else ():
                    self._groups((*path, number, key), value)
        elif path not in self._values or not _same(now, saved, path):
            self._differ(path, f"{_short(saved)} in the checkpoint, {_short(now)} now")

    def _named(self, names: Any) -> Any:
        # Two of the checkpoint may be one tied parameter here.
        return sorted({self._promise.parameter_name(str(name)) for name in names}) if isinstance(names, list) else names

    def surplus(self) -> None:
        """Find what is there now, where everything is built from the checkpoint, and is not in it."""
        for path in [*self._arrays, *self._values]:
            if path in self._promise.leaves or not is_inside(path, self._promise.built):
                continue
            if is_inside(path, self._derived) or is_inside(path, self._promise.refused) or self._is_groups(path):
                continue
            if path in self._promise.containers:
                self._differ(path, "several leaves in the checkpoint, one value now")
                continue
            one = Difference(path, "not in the checkpoint, here now")
            (self.kept if self._was_there(path) else self.differences).append(one)

    def _was_there(self, path: Path) -> bool:
        """Whether an object had it before the load, too: then it is only newer than the checkpoint."""
        for depth in range(len(path), 0, -1):
            if path[:depth] in self._promise.before:
                value = self._promise.before[path[:depth]]
                for key in path[depth:]:
                    value = item_of(value.value if isinstance(value, PerRank) else value, key)
                return value is not None
        return False

    def containers(self) -> None:
        """Compare classes, kinds of containers and the order of keys, where all is built from the checkpoint."""
        empty = {path for one in (self._flat.outline, self._flat.rank_outline) for path in one.empty or ()}
        for path in sorted(self._promise.empty - empty, key=dotted):
            self._differ(path, "an empty state of a parameter in the checkpoint, none now")
        outlines = (self._flat.outline.by_path, self._flat.rank_outline.by_path)
        for path, node in self._promise.containers.items():
            if not is_inside(path, self._promise.built) or is_inside(path, self._derived):
                continue
            target = self._promise.built.get(path)
            if target is not None and node.cls is not None and not is_of_class(target, node.cls):
                if path in self._promise.other_class or not any(leaf.used for _, leaf in node.leaves()):
                    continue
                self._differ(path, f"{node.cls} in the checkpoint, {class_name(target)} now")
            there = [one for outline in outlines for one in outline.get(path, [])]
            now = [one for one in there if one.kind not in ("object", "optimizer")]
            if node.cls and len(now) == len(there) and (now or path in self._values):
                found = _kind(now[0].kind) if now else describe_type(self._values[path])
                self._differ(path, f"{node.cls} in the checkpoint, {found} in its place now")
                continue
            if node.kind in (None, "optimizer") or self._is_groups(path) or not now:
                continue
            if now[0].kind != node.kind:
                self._differ(path, f"{_kind(node.kind)} in the checkpoint, {_kind(now[0].kind)} now")
            elif node.ordered and not self._in_order(path, node, now[0]):
                keys = ", ".join(map(str, list(node.children)[:6]))
                self._differ(path, f"the order of the keys is not that of the checkpoint, which began with {keys}")

    def _in_order(self, path: Path, node: Node, now: Container) -> bool:
        """Whether keys are in the saved order, or in that which the object gave them before: its own."""
        saved = [key for key in node.children if (*path, key) not in self._promise.refused]
        keys = list(now.keys) if now.keys is not None else sorted_keys(saved)
        if path[-1:] == ("state",) and path[:-1] in self._promise.optimizers:
            return True  # the order of the parameters is that of the groups
        if _common(keys, saved):
            return True
        for depth in range(len(path), 0, -1):
            if path[:depth] in self._promise.before:
                value: Any = self._promise.before[path[:depth]]
                for key in path[depth:]:
                    value = item_of(value, key)
                # Only where it had them all: an order of nothing is no order.
                return isinstance(value, dict) and set(keys).issubset(value) and _common(keys, list(value))
        return False


_AS = {"dict": "a dict", "ordered": "an OrderedDict", "list": "a list", "tuple": "a tuple", "module": "a module"}


def _kind(kind: str) -> str:
    return _AS.get(kind, f"a {kind}")


def _said(target: Any) -> Any:
    return getattr(target, "rederived_state", None)


def _known(group: Any, saved: Any) -> Any:
    both = isinstance(group, dict) and isinstance(saved, dict)
    return {key: value for key, value in group.items() if key in saved} if both else group


def _without_names(group: Any, now: Any) -> Any:
    """Return a saved group without the names that its parameters were given, where none are kept here: of parameters
    in flat buffers (FSDP1) the optimizer knows only the buffers'."""
    both = isinstance(group, dict) and isinstance(now, dict)
    return {key: value for key, value in group.items() if key != _GIVEN or key in now} if both else group


def _renamed(group: Any, named: Any) -> Any:
    """Return a group with its parameters, and the names given to them, in one order whatever order they are in."""
    if not isinstance(group, dict) or "params" not in group:
        return group
    names, given = group["params"], group.get(_GIVEN)
    result = {**group, "params": named(names)}
    if isinstance(names, list) and isinstance(given, list) and len(names) == len(given):
        result[_GIVEN] = sorted(zip([named([name])[0] for name in names], map(str, given), strict=True))
    return result


def _common(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two lists of keys have those that are in both in the same order."""
    a, b = list(one), list(other)
    return [key for key in a if key in set(b)] == [key for key in b if key in set(a)]


def _same(now: Any, saved: Any, path: Path) -> bool:
    """Whether two plain values would be stored as the same one; the order of a dict's keys makes no difference."""
    if type(now) is type(saved) and type(now) in _SCALARS:
        return bool(now == saved)
    one, other = encode(now, path), encode(saved, path)
    return json.dumps(one) == json.dumps(other) or digest(one) == digest(other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
