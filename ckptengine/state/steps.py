"""The steps of a walk over a state: each compares the value in one place with what lay there before."""

from __future__ import annotations

import operator
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptengine.frameworks.adapter import ABOUT, Adapter
from ckptengine.schema.path import Path
from ckptengine.state.asked import Asked
from ckptengine.state.kinds import SCALARS, Inspector, Kind
from ckptengine.state.own_state import named_state
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.shards import Declaration

__all__ = [
    "AbsentStep",
    "Changed",
    "DeclaredStep",
    "DictStep",
    "Met",
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
    "WrappedStep",
    "same_objects",
]


class Changed(Exception):
    """The state is not what it was: it must be walked anew."""


class Met:
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
    def again(self, value: Any, met: Met) -> None:
        """Compare a value with the one that was met, and note what must be looked at; raises `Changed`."""


class AbsentStep(Step):
    """Nothing: a parameter that an optimizer has no state for, not even an empty one."""

    __slots__ = ()

    def again(self, value: Any, met: Met) -> None:
        """Look whether there is still nothing."""
        if value is not None:
            raise Changed


class PlainStep(Step):
    """A plain value: it may be any other plain value now."""

    __slots__ = ("path", "per_rank")

    def __init__(self, path: Path, per_rank: bool) -> None:
        self.path, self.per_rank = path, per_rank

    def again(self, value: Any, met: Met) -> None:
        """Note the value."""
        if type(value) not in SCALARS and met.inspector.inspect(value, self.path).kind is not Kind.PLAIN:
            raise Changed
        met.values[self.per_rank][self.path] = value


class TensorStep(Step):
    """A tensor: another of its class may lie there."""

    __slots__ = ("kind",)

    def __init__(self, kind: type) -> None:
        self.kind: Any = kind

    def again(self, value: Any, met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
        """Look at what is in it now."""
        if type(value) is not self.kind:
            raise Changed
        self.inner.again(value.value, met)


class DeclaredStep(Step):
    """A declaration: the same one, around the same kind of thing."""

    __slots__ = ("declaration", "inner")

    def __init__(self, declaration: Declaration, inner: Step) -> None:
        self.declaration, self.inner = weakref.ref(declaration), inner

    def again(self, value: Any, met: Met) -> None:
        """Look at what it says something of."""
        if not isinstance(value, Declaration) or self.declaration() is not value:
            raise Changed
        self.inner.again(value.value, met)


class ObjectStep(Step):
    """An object with `state_dict`."""

    __slots__ = ("inner", "kind", "path")

    def __init__(self, kind: type, inner: Step, path: Path) -> None:
        self.inner, self.path = inner, path
        self.kind: Any = kind

    def again(self, value: Any, met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
        """Look at each item."""
        if type(value) is not self.kind or len(value) != len(self.steps):
            raise Changed
        if self.kind is deque and value.maxlen != self.maxlen:
            raise Changed
        self.items(value, met)

    def items(self, items: Sequence[Any], met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
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

    def again(self, value: Any, met: Met) -> None:
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
        if not same_objects(there, group["params"]):
            raise Changed
        parameters += group["params"]
    return parameters


def same_objects(known: Sequence[weakref.ref[Any]], values: Sequence[Any]) -> bool:
    """Return whether these are the objects that are known, one by one."""
    return len(known) == len(values) and all(map(operator.is_, [ref() for ref in known], values))
