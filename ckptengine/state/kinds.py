"""What a value of the state is to the engine: a tensor, a module, something to walk, or a plain value."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

from ckptengine.errors import CheckpointError, StateError
from ckptengine.frameworks.adapter import Adapter, ModuleEntry, TensorView
from ckptengine.frameworks.registry import adapters
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.asked import Asked
from ckptengine.state.declared import Declared, NamedTensor
from ckptengine.state.forms import path_keys
from ckptengine.state.merged import Merged
from ckptengine.state.per_rank import PerRank
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.shards import Declaration
from ckptengine.state.values import MAX_DEPTH

__all__ = ["ROOT", "SCALARS", "Inspected", "Inspector", "Kind", "children", "optimizer_names"]


class Kind(Enum):
    """How the engine treats a value."""

    PER_RANK = auto()
    DECLARED = auto()
    """A value of which is said what its tensors are parts of."""
    SHARDED = auto()
    TENSOR = auto()
    WRAPPED = auto()
    """A tensor that is made of other tensors."""
    MODULE = auto()
    OPTIMIZER = auto()
    OBJECT = auto()
    """It has `state_dict` and `load_state_dict`."""
    DICT = auto()
    """Walked key by key."""
    SEQUENCE = auto()
    """A list or tuple that holds more than plain values: walked."""
    PLAIN = auto()


@dataclass(frozen=True, slots=True)
class FrameworkValue:
    """What a value is that a framework knows, whose adapter comes with it."""

    kind: Literal[Kind.SHARDED, Kind.TENSOR, Kind.WRAPPED, Kind.MODULE, Kind.OPTIMIZER]
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class OtherValue:
    """What a value is that no framework knows."""

    kind: Literal[Kind.PER_RANK, Kind.DECLARED, Kind.OBJECT, Kind.DICT, Kind.SEQUENCE, Kind.PLAIN]
    adapter: None = None


Inspected = FrameworkValue | OtherValue

_DICT = OtherValue(Kind.DICT)
ROOT = _DICT
"""What a state is as a whole."""
_PER_RANK, _DECLARED, _OBJECT = OtherValue(Kind.PER_RANK), OtherValue(Kind.DECLARED), OtherValue(Kind.OBJECT)
_SEQUENCE, _PLAIN = OtherValue(Kind.SEQUENCE), OtherValue(Kind.PLAIN)

SCALARS = frozenset({type(None), bool, int, float, str, bytes, complex})
"""What is plain whatever it holds."""

_NUMBERED = re.compile(r"\d+\.\d+")


class Inspector:
    """One walk's view of the frameworks: sorts values into kinds; `asked` has what modules and objects answered."""

    def __init__(self, asked: Asked | None = None) -> None:
        self._frameworks = [_Framework(adapter) for adapter in adapters()]
        self.asked = Asked() if asked is None else asked
        self.declared = Declared()

    def inspect(self, value: Any, path: Path) -> Inspected:
        """Return a value's kind, with its adapter where it is a framework's.

        Raises `StateError` where tensors lie in a dict whose keys can't be part of a path, or nesting has no
        end.
        """
        if type(value) in SCALARS:
            return _PLAIN
        known = self._known(value)
        if known is not None:
            return known
        if isinstance(value, Mapping):
            return self._dict_kind(value, path)
        if isinstance(value, (list, tuple, deque)):
            return _SEQUENCE if self._holds_more(value, path, 0) else _PLAIN
        return _PLAIN

    def _known(self, value: Any) -> Inspected | None:
        if isinstance(value, PerRank):
            return _PER_RANK
        if isinstance(value, Merged):
            if value.adapter is None:
                return _OBJECT
            return FrameworkValue(Kind.OPTIMIZER if value.optimizers else Kind.MODULE, value.adapter)
        if isinstance(value, Declaration):
            return _DECLARED
        if isinstance(value, ShardedArray):
            return FrameworkValue(Kind.SHARDED, value.adapter)
        for framework in self._frameworks:
            adapter = framework.adapter
            if adapter.is_tensor(value):
                return framework.wrapped if adapter.is_wrapped(value) else framework.tensor
            if adapter.is_module(value):
                return framework.module
            if adapter.is_optimizer(value):
                return framework.optimizer
        if isinstance(value, type):
            return None
        return _OBJECT if _saves_itself(value) else None

    def _dict_kind(self, value: Mapping[Any, Any], path: Path) -> OtherValue:
        if isinstance(value, Counter) or (not value and type(value) in (dict, OrderedDict, defaultdict)):
            return _PLAIN
        keys_fit = all(type(key) in (str, int) for key in value)
        # A class made from dict has no place among plain values: its items are filled into the one that is there.
        own_class = isinstance(value, dict) and type(value) not in (dict, OrderedDict, defaultdict)
        if keys_fit and (type(value) is dict or own_class):
            return _DICT
        if not self._holds_more(value.values(), path, 0):
            return _PLAIN
        if not isinstance(value, dict):
            raise StateError(f"{dotted(path)}: {describe_type(value)} holds tensors; convert it to a plain dict")
        return _DICT

    def _holds_more(self, items: Iterable[Any], path: Path, depth: int) -> bool:
        if depth > MAX_DEPTH:
            raise StateError(f"{dotted(path)}: nested more than {MAX_DEPTH} deep (or inside itself); flatten it")
        for item in items:
            if type(item) in SCALARS:
                continue
            if self._known(item) is not None:
                return True
            inner = item.values() if isinstance(item, Mapping) else item
            if not isinstance(inner, (list, tuple, deque, ValuesView)):
                continue
            if self._holds_more(inner, path, depth + 1):
                return True
        return False

    def holds_more(self, value: Any) -> bool:
        """Whether a value is, or has somewhere inside, what a framework or the engine knows; False where it is odd."""
        try:
            return self._holds_more((value,), (), 0)
        except StateError:
            return False

    def entries(self, module: Any, adapter: Adapter, path: Path) -> list[ModuleEntry]:
        """Return a module's entries, the same ones each time that this walk asks."""
        return self.declared.renamed(module, self.local_entries(module, adapter, path))

    def local_entries(self, module: Any, adapter: Adapter, path: Path) -> list[ModuleEntry]:
        """Return a module's entries by the names that they have on this rank."""
        return self.asked.entries_of(module, adapter, path)

    def view(self, tensor: Any, adapter: Adapter, path: Path, *, target: bool) -> TensorView:
        """Return a tensor's view, as `Adapter.view` does, at the place that is declared for it."""
        return self.declared.view(tensor, adapter, path, target=target)

    def named_tensors(self, value: Any, path: Path, inner: Path = ()) -> Iterator[NamedTensor]:
        """Yield the tensors of modules, dicts and lists in a value at a path, by the names that this rank has."""
        where = (*path, *inner)
        if len(where) > MAX_DEPTH:
            raise StateError(f"{dotted(where[:3])}…: nested more than {MAX_DEPTH} deep (or inside itself); flatten it")
        found = self.inspect(value, where)
        if found.kind in (Kind.TENSOR, Kind.WRAPPED):
            yield dotted(inner), value, found.adapter, where
        elif found.kind is Kind.SHARDED:
            yield dotted(inner), value, None, where
        elif found.kind is Kind.MODULE:
            for entry in self.local_entries(value, found.adapter, where):
                if found.adapter.is_tensor(entry.value):
                    yield dotted((*inner, entry.name)), entry.value, found.adapter, (*where, entry.name)
        elif found.kind in (Kind.DICT, Kind.SEQUENCE):
            for key, item in children(value, where):
                yield from self.named_tensors(item, path, (*inner, key))

    def named_modules(self, value: Any, inner: Path) -> Iterator[tuple[str, Any]]:
        """Yield the modules in a value, each after what comes before the names of its tensors."""
        found = self.inspect(value, inner)
        if found.kind is Kind.MODULE:
            yield dotted((*inner, "")), value
        elif found.kind in (Kind.DICT, Kind.SEQUENCE):
            for key, item in children(value, inner):
                yield from self.named_modules(item, (*inner, key))

    def declare(self, value: Any, path: Path = ()) -> None:
        """Note what the declarations in a state say; raises `StateError` where they don't fit it.

        Everything in it has been asked for its state.
        """
        modules: list[tuple[Any, Adapter, Path]] = []
        self._declare(value, path, modules)
        if self.declared:
            for module, adapter, where in modules:
                owned = list(adapter.state_owners(module))
                moments = self.declared.moments((parameter, {name: tensor}) for name, tensor, parameter in owned)
                for name, tensor, parameter in owned:
                    self.declared.add_state(parameter, {name: tensor}, where, moments)

    def _declare(self, value: Any, path: Path, modules: list[tuple[Any, Adapter, Path]]) -> None:
        if len(path) > MAX_DEPTH:
            return  # the walk refuses it
        found = ROOT if path == () else self.inspect(value, path)
        if found.kind is Kind.DECLARED:
            self.declared.add(value, self.named_tensors(value.value, path), self.named_modules(value.value, ()))
            self._declare(value.value, path, modules)
        elif found.kind is Kind.MODULE:
            modules.append((value, found.adapter, path))
        elif found.kind in (Kind.DICT, Kind.SEQUENCE):
            for key, item in children(value, path):
                if type(item) not in SCALARS:
                    self._declare(item, (*path, key), modules)

    def ask(
        self,
        value: Any,
        path: Path = (),
        wanted: Callable[[Any, Path], bool] = lambda value, path: True,
        depth: int = 0,
    ) -> None:
        """Ask every module and object in a state, in the state's order, before anything is made of an answer.

        Whatever differs between ranks, they then have all been asked as often and in the same order: what they raise
        comes out when they are asked again. Objects that are not `wanted` are left out.
        """
        if depth > MAX_DEPTH:
            return  # the walk refuses it
        try:
            found = ROOT if path == () else self.inspect(value, path)
            if found.kind in (Kind.PER_RANK, Kind.DECLARED):
                self.ask(value.value, path, wanted, depth + 1)
            elif found.kind is Kind.MODULE:
                found.adapter.check_module(value, path)
                self.asked.values_of(value, found.adapter, path)
            elif found.kind is Kind.OPTIMIZER and wanted(value, path):
                found.adapter.check_optimizer(value, path)
                if found.adapter.saves_itself(value):
                    self.ask(self.asked.state_of(value, path), path, wanted, depth + 1)
            elif found.kind is Kind.OBJECT and wanted(value, path):
                self.ask(self.asked.state_of(value, path), path, wanted, depth + 1)
            elif found.kind in (Kind.DICT, Kind.SEQUENCE):
                for key, item in children(value, path):
                    if type(item) not in SCALARS:
                        self.ask(item, (*path, key), wanted, depth + 1)
        except CheckpointError:
            return  # the walk that follows comes to the same place, and says so

    def parameter_names(self, state: Any) -> dict[int, str]:
        """Return the names of all parameters in the state, by the `id` of the parameter.

        A name is the module's dotted path and the fully qualified name in it; a parameter that is reached
        twice has the name by which it is reached first. What is in no module has the path of the tensor in the state,
        unless that reads like another one's, or like a number of `optimizer_names`.
        """
        names = self.module_parameter_names(state)
        loose: dict[int, str] = {}
        for number, name in self._parameters(state, (), True):
            if number not in names:
                loose.setdefault(number, name)
        known = Counter(loose.values())
        known.update(set(names.values()))
        names |= {n: name for n, name in loose.items() if known[name] == 1 and not _NUMBERED.fullmatch(name)}
        return names

    def module_parameter_names(self, state: Any) -> dict[int, str]:
        """Return those of `parameter_names` that modules give."""
        names: dict[int, str] = {}
        for number, name in self._parameters(state, (), False):
            names.setdefault(number, name)
        return names

    def further_names(self, state: Any, names: Mapping[int, str]) -> dict[str, str]:
        """Return, of parameters that modules in the state have under several names, each further one and the first."""
        return {name: names[number] for number, name in self._parameters(state, (), False) if name != names[number]}

    def _parameters(self, value: Any, path: Path, loose: bool) -> Iterator[tuple[int, str]]:
        """Yield `id`s and names of the parameters in modules, or, with `loose`, of the tensors outside of them."""
        if len(path) > MAX_DEPTH:
            raise StateError(f"{dotted(path[:3])}…: nested more than {MAX_DEPTH} deep (or inside itself); flatten it")
        found = ROOT if path == () else self.inspect(value, path)
        if found.kind in (Kind.PER_RANK, Kind.DECLARED):
            yield from self._parameters(value.value, path, loose)
        elif found.kind in (Kind.TENSOR, Kind.WRAPPED) and loose:
            yield id(value), dotted(path)
        elif found.kind is Kind.MODULE and not loose:
            for entry in self.entries(value, found.adapter, path):
                if found.adapter.is_tensor(entry.value) and not entry.buffer:
                    yield id(entry.value), dotted((*path, entry.name))
        elif found.kind in (Kind.DICT, Kind.SEQUENCE):
            for key, item in children(value, path):
                yield from self._parameters(item, (*path, key), loose)


class _Framework:
    """What one framework's values are, made once for a walk that meets many of them."""

    __slots__ = ("adapter", "module", "optimizer", "tensor", "wrapped")

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.tensor, self.wrapped = FrameworkValue(Kind.TENSOR, adapter), FrameworkValue(Kind.WRAPPED, adapter)
        self.module, self.optimizer = FrameworkValue(Kind.MODULE, adapter), FrameworkValue(Kind.OPTIMIZER, adapter)


def _saves_itself(value: Any) -> bool:
    # A dict may answer for any attribute (`AttrDict`), with an error of its own too: there the class decides.
    owner = type(value) if isinstance(value, Mapping) else value
    return callable(getattr(owner, "state_dict", None)) and callable(getattr(owner, "load_state_dict", None))


def children(value: Any, path: Path) -> list[tuple[Key, Any]]:
    """Return keys, as they are in paths, and items of a dict or sequence; raises `StateError` at one that fits none."""
    if not isinstance(value, Mapping):
        return list(enumerate(value))
    if not path:
        for key in value:
            if type(key) not in (str, int):
                raise StateError(f"the state: the key {key!r} is {describe_type(key)}; use str or int")
    return list(zip(path_keys(value, path), value.values(), strict=True))


def optimizer_names(groups: list[dict[str, Any]], names: Mapping[int, str]) -> list[list[str]]:
    """Return the names of an optimizer's parameters by group.

    A parameter that is nowhere in the state is called `<group>.<index>`.
    """
    return [
        [names.get(id(parameter), f"{g}.{i}") for i, parameter in enumerate(group["params"])]
        for g, group in enumerate(groups)
    ]
