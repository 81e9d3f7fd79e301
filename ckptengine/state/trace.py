"""What one walk over a state met, so that the next one only looks whether it is all still there.

A walk costs tens of microseconds per leaf; comparing with the walk before costs about one. A *step* compares one value
with what lay there; `Trace.again` then compares all tensors at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.frameworks.adapter import Adapter
from ckptengine.frameworks.registry import at_rest
from ckptengine.schema.leaf import DeviceMemory, Part, Placement
from ckptengine.schema.path import Path
from ckptengine.state.asked import Asked
from ckptengine.state.cut import Cut, cut_view
from ckptengine.state.outline import part_order
from ckptengine.state.steps import Changed, Met, Step, same_objects

__all__ = ["Again", "Trace", "Visited", "head_of"]


@dataclass(frozen=True, slots=True)
class Visited:
    """One tensor as a walk met it: its parts and identity, and the number of the leaf that it is or was tied to.

    `cut` is its place in a larger array, where a `ShardedArray` or a declaration says one; `head` what of its view must
    stay the same.
    """

    tensor: Any
    adapter: Adapter
    path: Path
    leaf: int
    tied: bool
    identity: Hashable | None
    cut: Cut | None
    head: tuple[Any, ...]
    parts: tuple[Part, ...]
    on_device: bool


def head_of(dtype: str, shape: tuple[int, ...], placement: Placement, parts: Sequence[Part]) -> tuple[Any, ...]:
    """Return what of a tensor's view its place in the plan, and what is stored of it beside its bytes, depend on."""
    return dtype, shape, placement, tuple((part.box, type(part.memory), part_order(part)) for part in parts)


@dataclass(frozen=True, slots=True)
class Again:
    """A state with the structure of the one before.

    `values` and `rank_values` are its plain values. `moved` has the new parts of the leaves, by number, whose memory
    is not where it was. `tensors` keep all memory alive. `held` has by number, of leaves on a device that are where
    they were, what owns their memory.
    """

    values: dict[Path, Any]
    rank_values: dict[Path, Any]
    moved: dict[int, tuple[Part, ...]]
    tensors: list[Any]
    held: dict[int, Any]


class Trace:
    """What one walk met. It keeps no tensor alive: that is up to the job."""

    def __init__(self, root: Step, visited: Sequence[Visited], fenced: Sequence[int], free: Sequence[int]) -> None:
        """`fenced` and `free` number what only an optimizer's step changes, and the tensors that are in no module."""
        self._root = root
        self._tensors = [weakref.ref(one.tensor) for one in visited]
        self._rows = [_Row(one) for one in visited]
        self._leaves = [one.leaf for one in visited]
        self._identities = [one.identity for one in visited]
        self._by_adapter: dict[str, tuple[Adapter, list[int]]] = {}
        for number, one in enumerate(visited):
            self._by_adapter.setdefault(one.adapter.name, (one.adapter, []))[1].append(number)
        self._on_device = {number for number, one in enumerate(visited) if one.on_device}
        self._aliased = {n for n in self._on_device if _is_alias(self._rows[n], visited[n].tensor, visited[n].parts)}
        self._fenced = list(fenced)
        ours = set(fenced)
        self._fenced_by = [
            (adapter, [number for number in numbers if number in ours])
            for adapter, numbers in self._by_adapter.values()
        ]
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
        found: dict[int, Any] = {}
        for adapter, numbers in self._fenced_by:
            found.update(zip(numbers, adapter.versions([tensors[number] for number in numbers]), strict=True))
        return [found[number] for number in self._fenced]

    def again(self, state: Any, asked: Asked | None = None) -> Again | None:
        """Compare a state with the one before; None where its structure has changed, or may have.

        What modules and objects answer stays in `asked`.

        What is found to have moved is remembered: the next comparison is with this state.
        """
        met = Met(Asked() if asked is None else asked)
        try:
            with at_rest():
                self._root.again(state, met)
                moved, held = self._moved(met.tensors)
        except Changed:
            return None
        return Again(met.values[0], met.values[1], moved, met.tensors, held)

    def _moved(self, tensors: list[Any]) -> tuple[dict[int, tuple[Part, ...]], dict[int, Any]]:
        if len(tensors) != len(self._tensors):
            raise Changed
        if self._marks(tensors) != self._kinds:
            raise Changed
        odd: set[int] = self._on_device - self._aliased
        if not same_objects(self._tensors, tensors):
            odd.update(
                n for n, (known, now) in enumerate(zip(self._tensors, tensors, strict=True)) if known() is not now
            )
        for name, (adapter, numbers) in self._by_adapter.items():
            before, now = self._fingerprints[name], adapter.fingerprints(_pick(tensors, numbers))
            if before != now:
                odd.update(numbers[n] for old, new in zip(before, now, strict=True) for n in _differing(old, new))
                self._fingerprints[name] = now
        held = self._held(tensors, self._aliased - odd)
        if not odd:
            return {}, held
        moved: dict[int, tuple[Part, ...]] = {}
        for number in sorted(odd):
            row = self._rows[number]
            parts, identity = row.view(tensors[number])
            if not row.tied:
                moved[row.leaf] = parts
            if self._identities[number] is not None:
                self._identities[number] = identity
            self._tensors[number] = weakref.ref(tensors[number])
            if number in self._on_device:
                alias = _is_alias(row, tensors[number], parts)
                (self._aliased.add if alias else self._aliased.discard)(number)
        self._check_ties()
        return moved, held

    def _held(self, tensors: list[Any], numbers: set[int]) -> dict[int, Any]:
        """Return by the number of its leaf what owns the memory of each of some tensors on devices, now."""
        held: dict[int, Any] = {}
        for adapter, ours in self._by_adapter.values() if numbers else ():
            wanted = numbers.intersection(ours)
            owners = adapter.aliases([tensors[number] for number in wanted]) if wanted else ()
            held.update(zip([self._leaves[number] for number in wanted], owners, strict=True))
        return held

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

    __slots__ = ("adapter", "cut", "head", "leaf", "path", "tied")

    def __init__(self, one: Visited) -> None:
        self.adapter, self.path, self.leaf, self.tied = one.adapter, one.path, one.leaf, one.tied
        self.cut, self.head = one.cut, one.head

    def view(self, tensor: Any) -> tuple[tuple[Part, ...], Hashable | None]:
        """Return a tensor's parts and identity; raises `Changed` where it has no place in the plan."""
        if self.cut is None:
            view = self.adapter.view(tensor, self.path, target=False)
        elif tuple(tensor.shape) == self.cut.local:
            view = cut_view(self.cut, self.adapter, tensor, self.path, target=False)
        else:
            raise Changed  # the walk that follows says what is wrong with it
        if head_of(view.dtype, view.shape, view.placement, view.parts) != self.head:
            raise Changed
        return view.parts, view.identity


def _is_alias(row: _Row, tensor: Any, parts: Sequence[Part]) -> bool:
    """Whether what owns a tensor's memory on a device is no more than the tensor itself, or what is local of it."""
    if len(parts) != 1 or not isinstance(parts[0].memory, DeviceMemory) or not parts[0].memory.alias:
        return False
    owner = parts[0].memory.owner
    adapter = row.adapter
    return adapter.is_tensor(owner) and adapter.fingerprints([tensor]) == adapter.fingerprints([owner])


def _pick(items: list[Any], numbers: list[int]) -> list[Any]:
    return items if len(numbers) == len(items) else [items[number] for number in numbers]


def _differing(old: Sequence[Any], new: Sequence[Any]) -> list[int]:
    if old == new:
        return []
    return [number for number, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
