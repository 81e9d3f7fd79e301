"""The parameters in an optimizer's saved groups: where they have no state, no leaf tells whether a rank took them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptengine.schema.path import Path, dotted
from ckptengine.state.bind.groups import saved_groups
from ckptengine.state.own_state import GROUPS, STATE
from ckptengine.state.saved import Node

__all__ = ["Member", "members_of"]


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter in the saved groups of an optimizer.

    `groups` is the path of the groups in the state, `name` the parameter's name in the checkpoint. `owners` are the
    numbers of the leaves that name it, `told_by` those by which it is seen, too, that no rank took it: its state, and
    `owners`.
    """

    groups: Path
    name: str
    owners: frozenset[int]
    told_by: frozenset[int]

    @property
    def problem(self) -> str:
        """What is said where no rank took it."""
        return f"{dotted(self.groups)}: {self.name} is in no group of any rank"


def members_of(root: Node) -> list[Member]:
    """Return the parameters of all optimizers in a checkpoint's tree: the same ones, in one order, on all ranks."""
    return [member for path, node in root.nodes() if path[-1:] == (GROUPS,) for member in _members(root, path, node)]


def _members(root: Node, path: Path, place: Node) -> Iterator[Member]:
    states = root.find((*path[:-1], STATE)) or Node()
    by_name = {str(key): child for key, child in states.children.items()}
    owners: dict[str, set[int]] = {}
    for group in saved_groups(place) or ():
        node = place.children.get(group.number)
        number = place.number if node is None else node.children["params"].number
        for name in group.params:
            owners.setdefault(str(name), set()).add(number)
    for name, numbers in owners.items():
        state = by_name.get(name)
        leaves = () if state is None else [node.number for _, node in state.leaves()]
        yield Member(path, name, frozenset(numbers), frozenset((*numbers, *leaves)))
