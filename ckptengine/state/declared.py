"""What the declarations in a state say of its tensors, by the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter, ModuleEntry, TensorView
from ckptengine.frameworks.registry import adapter_of_tensor
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.cut import Cut, cut_view, state_cuts
from ckptengine.state.moments import Moments
from ckptengine.state.shards import Declaration

__all__ = ["Declared", "NamedTensor", "refuse_distributed"]

NamedTensor = tuple[str, Any, Adapter | None, Path]
"""A tensor's name in a declared value, itself, its adapter (None: it says itself how it is spread), and its path."""


class Declared:
    """The declarations that one walk has met. It keeps the tensors alive: an `id` says something only while they are.

    Optimizers' states are noted under their parameters when they are met.
    """

    def __init__(self) -> None:
        self._cuts: dict[int, tuple[Any, Cut, Path]] = {}
        self._own: dict[int, Any] = {}
        self._modules: dict[int, tuple[Any, Declaration, str]] = {}
        self._moments: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self._cuts or self._own)

    def add(self, declaration: Declaration, tensors: Iterable[NamedTensor], modules: Iterable[tuple[str, Any]]) -> None:
        """Note what a declaration says of the tensors in its value; `modules` come with what precedes their names.

        Raises `StateError` where a tensor is there that its patterns fit and that was not there when it was made.
        """
        self._moments |= declaration.moments
        for prefix, module in modules if declaration.shifts else ():
            self._modules[id(module)] = module, declaration, prefix
        for name, tensor, adapter, where in tensors:
            cut = declaration.cuts.get(name)
            if cut is not None:
                refuse_distributed(tensor, adapter, where)
                self.note(tensor, cut, where)
            elif name in declaration.own:
                self._own[id(tensor)] = tensor
            elif declaration.says(name):
                raise StateError(
                    f"{dotted(where)}: did not exist when its ce.Sharded was made; make the ce.Sharded again, on all "
                    "ranks"
                )

    def note(self, tensor: Any, cut: Cut, path: Path) -> None:
        """Note how a tensor is cut; raises `StateError` where something else is known of it."""
        known = self._cuts.setdefault(id(tensor), (tensor, cut, path))
        if known[1] != cut:
            raise StateError(
                f"{dotted(path)}: {cut.about}, but under its name {dotted(known[2])} it is {known[1].about}; "
                "declare a tensor the same under all of its names"
            )

    def replace(self, tensor: Any, new: Any, path: Path) -> None:
        """Note that another tensor, which takes the place of one, is cut as that is, or each rank's own as that is."""
        cut = self.cut_of(tensor)
        if cut is not None:
            self.note(new, cut, path)
        elif self.is_own(tensor):
            self._own[id(new)] = new

    def renamed(self, module: Any, entries: list[ModuleEntry]) -> list[ModuleEntry]:
        """Return a module's entries with the names that they have over all ranks."""
        if id(module) not in self._modules:
            return entries
        _, declaration, prefix = self._modules[id(module)]
        start = len(prefix)
        return [
            ModuleEntry(
                declaration.global_name(prefix + one.name)[start:],
                one.key, one.value, one.buffer, one.live, one.added,
            )
            for one in entries
        ]  # fmt: skip

    def cut_of(self, tensor: Any) -> Cut | None:
        """Return how a tensor is cut, None where nothing is said of it."""
        known = self._cuts.get(id(tensor)) if self._cuts else None
        return None if known is None else known[1]

    def is_own(self, tensor: Any) -> bool:
        """Whether each rank has its own of a tensor."""
        return id(tensor) in self._own

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        """Return the shape of a tensor over all ranks."""
        cut = self.cut_of(tensor)
        return tuple(tensor.shape) if cut is None else cut.shape

    def view(self, tensor: Any, adapter: Adapter, path: Path, *, target: bool) -> TensorView:
        """Return a tensor's view, at its place in the global one where it is declared as a part."""
        cut = self.cut_of(tensor)
        if cut is None:
            return adapter.view(tensor, path, target=target)
        return cut_view(cut, adapter, tensor, path, target=target)

    def moments(self, states: Iterable[tuple[Any, Mapping[Any, Any] | None]]) -> Moments:
        """Return what is known of an optimizer's states, given its parameters with their states on this rank."""
        if not self._cuts:
            return Moments()
        found = ((tuple(parameter.shape), _shapes(dict(_arrays(state, ())))) for parameter, state in states if state)
        return Moments(found, self._moments)

    def stored_moments(self, states: Iterable[tuple[tuple[int, ...], Mapping[Path, tuple[int, ...]]]]) -> Moments:
        """Return what is known of an optimizer's states in a checkpoint, given the global shapes."""
        return Moments(states, self._moments)

    def add_state(self, parameter: Any, state: Mapping[Any, Any] | None, path: Path, moments: Moments) -> None:
        """Note that a parameter's state in an optimizer is cut as the parameter is, or each rank's own as that is.

        Raises `StateError` where that can't be known.
        """
        cut = self.cut_of(parameter)
        if not state or (cut is None and not self.is_own(parameter)):
            return
        arrays = dict(_arrays(state, ()))
        if cut is None:
            self._own.update((id(array), array) for array in arrays.values())
            return
        for keys, inner in state_cuts(cut, _shapes(arrays), path, stored=False, moments=moments).items():
            refuse_distributed(arrays[keys], adapter_of_tensor(arrays[keys]), (*path, *keys))
            self.note(arrays[keys], inner, (*path, *keys))


def refuse_distributed(tensor: Any, adapter: Adapter | None, path: Path) -> None:
    """Raise `StateError` where a tensor says itself how it is spread, or is made of others."""
    if adapter is None or adapter.is_spread(tensor) or adapter.is_wrapped(tensor):
        raise StateError(
            f"{dotted(path)}: a {describe_type(tensor)} is declared with ce.Sharded, which is for plain tensors; it "
            "says itself how it is spread: leave it out of the patterns"
        )


def _shapes(arrays: Mapping[Path, Any]) -> dict[Path, tuple[int, ...]]:
    return {keys: tuple(array.shape) for keys, array in arrays.items()}


def _arrays(value: Any, keys: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _arrays(item, (*keys, key if type(key) in (str, int) else repr(key)))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _arrays(item, (*keys, number))
    elif isinstance(value, np.ndarray) or adapter_of_tensor(value) is not None:
        yield keys, value
