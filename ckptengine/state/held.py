"""About what a save of a state will copy, without asking any of its objects."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter
from ckptengine.frameworks.registry import at_rest
from ckptengine.schema.leaf import ArrayLeaf, Placement
from ckptengine.schema.path import Path
from ckptengine.state.kinds import SCALARS, Inspector, Kind, children
from ckptengine.state.tree import sharded_parts
from ckptengine.state.values import MAX_DEPTH

__all__ = ["held_arrays"]


def held_arrays(state: Mapping[str, Any]) -> list[ArrayLeaf]:
    """Return the arrays that can be seen in a state: those of modules, optimizers and the attributes of objects.

    No `state_dict` is called: it may hold a collective, or take long, and this is no save. So this is an estimate, good
    for reserving memory. Of an object's attributes those count that have the shape of a module's tensor, as averages
    have; a dataset in memory has not. What can't be looked at is left out, since the save will say what is wrong.
    """
    if not isinstance(state, Mapping):
        return []
    look = _Look()
    with at_rest():
        held = list(look.items(state, (), False))
        shapes = {leaf.shape for leaf in held}
        objects, look.objects = look.objects, []
        for target, path, per_rank in objects:
            items = look.items(getattr(target, "__dict__", {}), path, per_rank)
            held += [leaf for leaf in items if leaf.shape in shapes]
    return held


class _Look:
    """One look over a state; counts what is tied once."""

    def __init__(self) -> None:
        self._inspector = Inspector()
        self._seen: set[Hashable] = set()
        self.objects: list[tuple[Any, Path, bool]] = []
        """The objects that were met, to be looked at when everything else is known."""

    def items(self, value: Any, path: Path, per_rank: bool) -> Iterator[ArrayLeaf]:
        """Yield what lies in a dict or sequence."""
        for key, item in children(value, path):
            if type(item) not in SCALARS:
                yield from self._value(item, (*path, key), per_rank)

    def _value(self, value: Any, path: Path, per_rank: bool) -> Iterator[ArrayLeaf]:
        if len(path) > MAX_DEPTH:
            return
        try:
            found = self._inspector.inspect(value, path)
            if found.kind is Kind.PER_RANK:
                yield from self._value(value.value, (*path, ""), True)
            elif found.kind is Kind.DECLARED:
                yield from self._value(value.value, path, per_rank)
            elif found.kind is Kind.TENSOR:
                yield from self._array(value, found.adapter, path, per_rank)
            elif found.kind is Kind.SHARDED:
                view = sharded_parts(value, path, target=False)
                yield ArrayLeaf(path, view.dtype, view.shape, view.placement, view.parts, "")
            elif found.kind is Kind.MODULE:
                for number, tensor in enumerate(found.adapter.module_tensors(value)):
                    yield from self._array(tensor, found.adapter, (*path, number), per_rank)
            elif found.kind is Kind.OPTIMIZER:
                for group in found.adapter.optimizer_groups(value):
                    for number, parameter in enumerate(group["params"]):
                        yield from self.items(
                            found.adapter.optimizer_state(value, parameter) or {}, (*path, number), per_rank
                        )
            elif found.kind is Kind.OBJECT:
                self.objects.append((value, path, per_rank))
            elif found.kind in (Kind.DICT, Kind.SEQUENCE):
                yield from self.items(value, path, per_rank)
        except StateError:
            return

    def _array(self, tensor: Any, adapter: Adapter, path: Path, per_rank: bool) -> Iterator[ArrayLeaf]:
        view = adapter.view(tensor, path, target=False)
        if view.identity is not None and view.identity in self._seen:
            return
        self._seen.add(view.identity)
        placement = Placement.PER_RANK if per_rank else view.placement
        yield ArrayLeaf(path, view.dtype, view.shape, placement, view.parts, adapter.name)
