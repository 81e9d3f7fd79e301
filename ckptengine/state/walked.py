"""What one walk over a state has met so far."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from ckptengine.frameworks.adapter import Adapter, TensorKind
from ckptengine.schema.leaf import ArrayLeaf, DeviceMemory
from ckptengine.schema.path import Path
from ckptengine.state.cut import Cut
from ckptengine.state.forms import Form
from ckptengine.state.outline import Container, Outline
from ckptengine.state.steps import Step
from ckptengine.state.trace import Trace, Visited

__all__ = ["Leaves", "Side"]


@dataclass(slots=True)
class Side:
    """What ranks share of a state, or what one has of its own: plain values, and how it is built, by path.

    `empty` are parameters' states that hold nothing, None where no optimizer was met.
    """

    values: dict[Path, Any] = field(default_factory=dict)
    forms: dict[Path, Form] = field(default_factory=dict)
    containers: list[Container] = field(default_factory=list)
    orders: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[Path, Any] = field(default_factory=dict)
    spreads: dict[Path, str] = field(default_factory=dict)
    kinds: dict[Path, TensorKind] = field(default_factory=dict)
    empty: list[Path] | None = None

    def outline(self) -> Outline:
        """Return how it is built."""
        empty = None if self.empty is None else tuple(self.empty)
        return Outline(
            tuple(self.containers), self.orders, self.shapes, self.metadata, self.spreads, empty, kinds=self.kinds
        )


@dataclass(slots=True)
class Leaves:
    """The tensors, in the order in which they are met, and the leaves that they are; tied ones are one leaf.

    `aliases` leads from each further path of a leaf to its first. `free` are the numbers of tensors that are in no
    module, `stepped` the ids of parameters that an optimizer changes, and `states` the numbers of optimizers' leaves.
    """

    arrays: list[ArrayLeaf] = field(default_factory=list)
    visited: list[Visited] = field(default_factory=list)
    aliases: dict[Path, Path] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    stepped: set[int] = field(default_factory=set)
    states: set[int] = field(default_factory=set)
    _first: dict[Hashable, int] = field(default_factory=dict)

    def add(
        self,
        tensor: Any,
        adapter: Adapter,
        leaf: ArrayLeaf,
        identity: Hashable | None,
        cut: Cut | None,
        head: tuple[Any, ...],
    ) -> None:
        """Add a tensor, and the leaf that it is where its memory, told by `identity`, is not that of another one.

        `cut` and `head` are those of `Visited`.
        """
        last = len(self.arrays)
        number = last if identity is None else self._first.setdefault(identity, last)
        tied = number < last
        on_device = any(isinstance(part.memory, DeviceMemory) for part in leaf.parts)
        # The tensors are kept: an `id` says something only while its object lives.
        self.visited.append(
            Visited(tensor, adapter, leaf.path, number, tied, identity, cut, head, leaf.parts, on_device)
        )
        if tied:
            self.aliases[leaf.path] = self.arrays[number].path
        else:
            self.arrays.append(leaf)

    def fence(self) -> None:
        """Mark the leaves that an optimizer's step changes: it waits for their copies.

        Scalars on the CPU, such as the step that Adam keeps there, are copied at once: waiting would cost more.
        """
        changed = self.states | {one.leaf for one in self.visited if id(one.tensor) in self.stepped}
        on_device = {one.leaf for one in self.visited if one.on_device}
        for number in changed:
            if self.arrays[number].shape or number in on_device:
                self.arrays[number] = replace(self.arrays[number], fenced=True)

    def trace(self, root: Step) -> Trace:
        """Return what was met, by which the next state is compared with this one."""
        fenced = [number for number, one in enumerate(self.visited) if self.arrays[one.leaf].fenced and not one.tied]
        return Trace(root, self.visited, fenced, self.free)
