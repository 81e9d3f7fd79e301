"""What one walk over a state met, so that the next one only looks whether it is all still there.

A walk costs tens of microseconds per leaf; comparing with the walk before costs about one. A *step* compares one value
with what lay there; `Trace.again` then compares all tensors at once.
"""

from __future__ import annotations

import operator
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.frameworks.adapter import ABOUT, Adapter
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import Part, Placement
from ckptengine.schema.path import Path
from ckptengine.state.asked import Asked
from ckptengine.state.kinds import SCALARS, Inspector, Kind
from ckptengine.state.outline import part_order
from ckptengine.state.own_state import named_state
from ckptengine.state.sharded import ShardedArray

__all__ = [
    "AbsentStep",
    "Again",
    "DictStep",
    "ModuleStep",
    "ObjectStep",
    "OptimizerStep",
    "OwnOptimizerStep",
    "PerRankStep",
    "PlainStep",
    "SequenceStep",
    "ShardedStep",
    "Step",
    "TensorStep",
    "Trace",
    "Visited",
    "WrappedStep",
    "head_of",
]


class Changed(Exception):
    """The state is not what it was: it must be walked anew."""


class _Met:
    """What a comparison has come by: plain values by path (shared, per rank), and tensors in order."""

    __slots__ = ("inspector", "tensors", "values")

    def __init__(self, asked: Asked) -> None:
        self.inspector = Inspector(asked)
        self.tensors: list[Any] = []
        self.values: tuple[dict[Path, Any], dict[Path, Any]] = ({}, {})


class Step(ABC):
    """One value of a state as the walk before met it."""

    __slots__ = ()

    @abstractmethod
    def again(self, value: Any, met: _Met) -> None:
        """Compare a value with the one that was met, and note what must be looked at; raises `Changed`."""


class AbsentStep(Step):
    """Nothing: a parameter that an optimizer has no state for, not even an empty one."""

    __slots__ = ()

    def again(self, value: Any, met: _Met) -> None:
        """Look whether there is still nothing."""
        if value is not None:
            raise Changed


class PlainStep(Step):
    """A plain value: it may be any other plain value now."""

    __slots__ = ("path", "per_rank")

    def __init__(self, path: Path, per_rank: bool) -> None:
        self.path, self.per_rank = path, per_rank

    def again(self, value: Any, met: _Met) -> None:
        """Note the value."""
        if type(value) not in SCALARS and met.inspector.kind(value, self.path)[0] is not Kind.PLAIN:
            raise Changed
        met.values[self.per_rank][self.path] = value


class TensorStep(Step):
    """A tensor: another of its class may lie there."""

    __slots__ = ("kind",)

    def __init__(self, kind: type) -> None:
        self.kind: Any = kind

    def again(self, value: Any, met: _Met) -> None:
        """Note the tensor."""
        if type(value) is not self.kind:
            raise Changed
        met.tensors.append(value)


class WrappedStep(Step):
    """A tensor that is made of others: it is taken apart again, which costs more than a plain tensor does."""

    __slots__ = ("adapter", "inner", "kind", "path", "per_rank")

    def __init__(self, kind: type, adapter: Adapter, path: Path, steps: Mapping[str, Step], per_rank: bool) -> None:
        self.kind: Any = kind
        self.adapter, self.path, self.per_rank = adapter, path, per_rank
        self.inner = DictStep(dict, steps)

    def again(self, value: Any, met: _Met) -> None:
        """Look at its inner tensors, and note what they make."""
        if type(value) is not self.kind or not self.adapter.is_wrapped(value):
            raise Changed
        inner = self.adapter.unwrap(value, self.path)
        met.values[self.per_rank][(*self.path, ABOUT)] = inner.pop(ABOUT)
        self.inner.again(inner, met)


class ShardedStep(Step):
    """A `ShardedArray`, which many jobs make anew for each save."""

    __slots__ = ("box", "global_shape", "kind")

    def __init__(self, array: ShardedArray) -> None:
        self.box, self.global_shape, self.kind = array.box, array.global_shape, type(array.local)

    def again(self, value: Any, met: _Met) -> None:
        """Note the local part."""
        if type(value) is not ShardedArray or type(value.local) is not self.kind:
            raise Changed
        if value.global_shape != self.global_shape or value.box != self.box:
            raise Changed
        met.tensors.append(value.local)


class PerRankStep(Step):
    """A `PerRank` around something."""

    __slots__ = ("inner", "kind")

    def __init__(self, kind: type, inner: Step) -> None:
        self.inner = inner
        self.kind: Any = kind

    def again(self, value: Any, met: _Met) -> None:
        """Look at what is in it now."""
        if type(value) is not self.kind:
            raise Changed
        self.inner.again(value.value, met)


class ObjectStep(Step):
    """An object with `state_dict`."""

    __slots__ = ("inner", "kind", "path")

    def __init__(self, kind: type, inner: Step, path: Path) -> None:
        self.inner, self.path = inner, path
        self.kind: Any = kind

    def again(self, value: Any, met: _Met) -> None:
        """Look at the state that it gives now."""
        if type(value) is not self.kind:
            raise Changed
        self.inner.again(met.inspector.asked.state_of(value, self.path), met)


class SequenceStep(Step):
    """Items one after the other."""

    __slots__ = ("kind", "kinds", "maxlen", "steps")

    def __init__(self, kind: type, steps: Sequence[Step], maxlen: int | None = None) -> None:
        self.steps = list(steps)
        self.kind: Any = kind
        self.maxlen = maxlen
        only = [step.kind for step in steps if isinstance(step, TensorStep)]
        self.kinds = only if len(only) == len(self.steps) else None
        """The classes of the items, where all are tensors: then they are compared in one go."""

    def again(self, value: Any, met: _Met) -> None:
        """Look at each item."""
        if type(value) is not self.kind or len(value) != len(self.steps):
            raise Changed
        if self.kind is deque and value.maxlen != self.maxlen:
            raise Changed
        self.items(value, met)

    def items(self, items: Sequence[Any], met: _Met) -> None:
        """Look at each item of a sequence of the right length."""
        if self.kinds is None:
            for step, item in zip(self.steps, items, strict=True):
                step.again(item, met)
        elif list(map(type, items)) == self.kinds:
            met.tensors += items
        else:
            raise Changed


class DictStep(Step):
    """Items under keys, in their order."""

    __slots__ = ("about", "inner", "keys", "kind", "names")

    def __init__(self, kind: type, steps: Mapping[Any, Step], about: Any = None) -> None:
        """`about` is what `_about` tells of the dict."""
        self.keys = list(steps)
        self.names = None if all(type(key) is str for key in steps) else _names(self.keys)
        self.kind: Any = kind
        self.about = about
        self.inner = SequenceStep(list, list(steps.values()))

    @classmethod
    def of(cls, value: Mapping[Any, Any], steps: Sequence[Step]) -> DictStep:
        """Return the step of a dict, given those of its items."""
        return cls(type(value), dict(zip(value, steps, strict=True)), _about(value))

    def again(self, value: Any, met: _Met) -> None:
        """Look at each item."""
        if type(value) is not self.kind or list(value) != self.keys:
            raise Changed
        if self.names is not None and _names(value) != self.names:
            raise Changed
        if self.kind in _TELLING and _about(value) != self.about:
            raise Changed
        self.inner.items(list(value.values()), met)


_TELLING = frozenset({OrderedDict, defaultdict})


def _about(value: Any) -> Any:
    """Return what a dict holds beside its items: a factory, or torch's `_metadata`, as text since it may be changed."""
    if type(value) is defaultdict:
        return value.default_factory
    return repr(getattr(value, "_metadata", None)) if type(value) is OrderedDict else None


def _names(keys: Iterable[Any]) -> list[tuple[type, str]]:
    """Return what tells keys apart that are equal and saved differently: 1, 1.0 and True, 0.0 and -0.0."""
    return [(type(key), repr(key)) for key in keys]


class ModuleStep(Step):
    """A module: the same one, with entries under the same keys."""

    __slots__ = ("adapter", "entries", "module", "path")

    def __init__(self, module: Any, adapter: Adapter, steps: Mapping[str, Step], path: Path) -> None:
        self.module, self.adapter, self.path = weakref.ref(module), adapter, path
        self.entries = DictStep(dict, steps)

    def again(self, value: Any, met: _Met) -> None:
        """Look at each entry."""
        if self.module() is not value:
            raise Changed
        self.entries.again(met.inspector.asked.values_of(value, self.adapter, self.path), met)


class OptimizerStep(Step):
    """An optimizer: the same one, with the same parameters in the same groups."""

    __slots__ = ("adapter", "groups", "names", "optimizer", "parameters", "states")

    def __init__(
        self,
        optimizer: Any,
        adapter: Adapter,
        names: Sequence[Sequence[str]],
        states: Sequence[Step],
        groups: Step,
    ) -> None:
        self.optimizer, self.adapter, self.names = weakref.ref(optimizer), adapter, names
        self.parameters = [[weakref.ref(p) for p in g["params"]] for g in adapter.optimizer_groups(optimizer)]
        self.states, self.groups = states, groups

    def again(self, value: Any, met: _Met) -> None:
        """Look at each parameter's state, and at the groups."""
        if self.optimizer() is not value or self.adapter.saves_itself(value):  # a hook may be new
            raise Changed
        groups = self.adapter.optimizer_groups(value)
        parameters = _same_parameters(self.parameters, groups)
        states = self.adapter.optimizer_states(value, parameters)
        if states is None:
            raise Changed
        for step, state in zip(self.states, states, strict=True):
            step.again(state, met)
        self.groups.again([{**g, "params": n} for g, n in zip(groups, self.names, strict=True)], met)


class OwnOptimizerStep(Step):
    """An optimizer that is saved by its own `state_dict`: the same one, with the same parameters."""

    __slots__ = ("adapter", "inner", "names", "optimizer", "parameters", "path")

    def __init__(
        self, optimizer: Any, adapter: Adapter, names: Sequence[Sequence[str]], inner: Step, path: Path
    ) -> None:
        self.optimizer, self.adapter, self.names = weakref.ref(optimizer), adapter, names
        self.parameters = [[weakref.ref(p) for p in g["params"]] for g in adapter.optimizer_groups(optimizer)]
        self.inner, self.path = inner, path

    def again(self, value: Any, met: _Met) -> None:
        """Look at what it says of itself now."""
        if self.optimizer() is not value or not self.adapter.saves_itself(value):
            raise Changed
        groups = self.adapter.optimizer_groups(value)
        _same_parameters(self.parameters, groups)
        own = met.inspector.asked.state_of(value, self.path)
        self.inner.again(named_state(own, groups, self.names), met)


def _same_parameters(known: Sequence[Sequence[weakref.ref[Any]]], groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the parameters of all groups; raises `Changed` where they are not those that are known."""
    if len(groups) != len(known):
        raise Changed
    parameters: list[Any] = []
    for group, there in zip(groups, known, strict=True):
        if not _same(there, group["params"]):
            raise Changed
        parameters += group["params"]
    return parameters


def _same(known: Sequence[weakref.ref[Any]], values: Sequence[Any]) -> bool:
    return len(known) == len(values) and all(map(operator.is_, [ref() for ref in known], values))


@dataclass(frozen=True, slots=True)
class Visited:
    """One tensor as a walk met it: its parts and identity, and the number of the leaf that it is or was tied to.

    `sharded` is the box that a `ShardedArray` gives it, else None; `head` what of its view must stay the same.
    """

    tensor: Any
    adapter: Adapter
    path: Path
    leaf: int
    tied: bool
    identity: Hashable | None
    sharded: Box | None
    head: tuple[Any, ...]
    on_device: bool


def head_of(dtype: str, shape: tuple[int, ...], placement: Placement, parts: Sequence[Part]) -> tuple[Any, ...]:
    """Return what of a tensor's view its place in the plan, and what is stored of it beside its bytes, depend on."""
    return dtype, shape, placement, tuple((part.box, type(part.memory), part_order(part)) for part in parts)


@dataclass(frozen=True, slots=True)
class Again:
    """A state with the structure of the one before.

    `values` and `rank_values` are its plain values. `moved` has the new parts of the leaves, by number, whose memory
    is not where it was. `tensors` keep all memory alive.
    """

    values: dict[Path, Any]
    rank_values: dict[Path, Any]
    moved: dict[int, tuple[Part, ...]]
    tensors: list[Any]


class Trace:
    """What one walk met. It keeps no tensor alive: that is up to the job."""

    def __init__(self, root: Step, visited: Sequence[Visited], fenced: Sequence[int], free: Sequence[int]) -> None:
        """`fenced` and `free` number what only an optimizer's step changes, and the tensors that are in no module."""
        self._root = root
        self._tensors = [weakref.ref(one.tensor) for one in visited]
        self._rows = [_Row(one) for one in visited]
        self._identities = [one.identity for one in visited]
        self._by_adapter: dict[str, tuple[Adapter, list[int]]] = {}
        for number, one in enumerate(visited):
            self._by_adapter.setdefault(one.adapter.name, (one.adapter, []))[1].append(number)
        self._on_device = [number for number, one in enumerate(visited) if one.on_device]
        self._fenced = list(fenced)
        self.fenced = [visited[number].path for number in fenced]
        """The paths of what only an optimizer's step changes, in the order of `versions`."""
        tensors = [one.tensor for one in visited]
        self._free: dict[str, list[int]] = {}
        for number in free:
            self._free.setdefault(visited[number].adapter.name, []).append(number)
        self._kinds = self._marks(tensors)
        self._fingerprints = {
            name: adapter.fingerprints(_pick(tensors, numbers)) for name, (adapter, numbers) in self._by_adapter.items()
        }

    def tensors(self) -> list[Any]:
        """Return the tensors that were met and still live, None in place of others."""
        return [ref() for ref in self._tensors]

    def versions(self, tensors: Sequence[Any]) -> list[Any]:
        """Return numbers that change when what is fenced is written to, given the tensors in the order of the trace."""
        return [self._rows[n].adapter.versions((tensors[n],))[0] for n in self._fenced]

    def again(self, state: Any, asked: Asked | None = None) -> Again | None:
        """Compare a state with the one before; None where its structure has changed, or may have.

        What modules and objects answer stays in `asked`.

        What is found to have moved is remembered: the next comparison is with this state.
        """
        met = _Met(Asked() if asked is None else asked)
        try:
            self._root.again(state, met)
            moved = self._moved(met.tensors)
        except Changed:
            return None
        return Again(met.values[0], met.values[1], moved, met.tensors)

    def _moved(self, tensors: list[Any]) -> dict[int, tuple[Part, ...]]:
        if len(tensors) != len(self._tensors):
            raise Changed
        if self._marks(tensors) != self._kinds:
            raise Changed
        odd: set[int] = set(self._on_device)
        if not _same(self._tensors, tensors):
            odd.update(
                n for n, (known, now) in enumerate(zip(self._tensors, tensors, strict=True)) if known() is not now
            )
        for name, (adapter, numbers) in self._by_adapter.items():
            before, now = self._fingerprints[name], adapter.fingerprints(_pick(tensors, numbers))
            if before != now:
                odd.update(numbers[n] for old, new in zip(before, now, strict=True) for n in _differing(old, new))
                self._fingerprints[name] = now
        if not odd:
            return {}
        moved: dict[int, tuple[Part, ...]] = {}
        for number in sorted(odd):
            row = self._rows[number]
            parts, identity = row.view(tensors[number])
            if not row.tied:
                moved[row.leaf] = parts
            if self._identities[number] is not None:
                self._identities[number] = identity
            self._tensors[number] = weakref.ref(tensors[number])
        self._check_ties()
        return moved

    def _marks(self, tensors: list[Any]) -> list[Sequence[Any]]:
        """Return what of the tensors in no module changes with what they are beside their contents."""
        return [
            self._by_adapter[name][0].kind_marks([tensors[number] for number in numbers])
            for name, numbers in self._free.items()
        ]

    def _check_ties(self) -> None:
        """Raise `Changed` where tensors are tied that were not, or no longer are."""
        first: dict[Hashable, int] = {}
        for row, identity in zip(self._rows, self._identities, strict=True):
            if identity is None:
                continue
            leaf = first.get(identity)
            if (leaf != row.leaf) if row.tied else (leaf is not None):
                raise Changed
            first[identity] = row.leaf


class _Row:
    """What stays of a visited tensor."""

    __slots__ = ("adapter", "head", "leaf", "path", "sharded", "tied")

    def __init__(self, one: Visited) -> None:
        self.adapter, self.path, self.leaf, self.tied = one.adapter, one.path, one.leaf, one.tied
        self.sharded, self.head = one.sharded, one.head

    def view(self, tensor: Any) -> tuple[tuple[Part, ...], Hashable | None]:
        """Return a tensor's parts and identity; raises `Changed` where it has no place in the plan."""
        view = self.adapter.view(tensor, self.path, target=False)
        parts, head = view.parts, head_of(view.dtype, view.shape, view.placement, view.parts)
        if self.sharded is not None:
            parts = tuple(Part(self.sharded, part.memory) for part in parts)
        if head != self.head:
            raise Changed
        return parts, view.identity


def _pick(items: list[Any], numbers: list[int]) -> list[Any]:
    return items if len(numbers) == len(items) else [items[number] for number in numbers]


def _differing(old: Sequence[Any], new: Sequence[Any]) -> list[int]:
    if old == new:
        return []
    return [number for number, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
