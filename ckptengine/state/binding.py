"""What a load is to do, worked out before it changes anything."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckptengine.frameworks.adapter import TensorView
from ckptengine.schema.leaf import ArrayLeaf
from ckptengine.schema.path import Path, is_inside
from ckptengine.state.bind.extras import Extra, Items
from ckptengine.state.extents import Extent, extents
from ckptengine.state.report import LoadReport
from ckptengine.state.saved import Node, SavedArray, SavedValue

__all__ = ["Action", "Binding", "Left", "Promise", "Read"]

Action = tuple[int, Callable[[], object]]
"""A phase, lower ones first, and what is to be done in it."""


@dataclass(frozen=True)
class Read:
    """One array to read: its path in the checkpoint, the rank that it belongs to (None: all), target.

    `live` is the tensor whose memory that is, and its view; None where the bytes are converted on their way there.
    """

    path: Path
    rank: int | None
    target: ArrayLeaf
    live: tuple[Any, TensorView] | None = None

    @functools.cached_property
    def places(self) -> tuple[Extent, ...]:
        """Where it is read to: asked for several times, and worked out once."""
        return tuple(extents(self.target))


@dataclass(frozen=True, slots=True)
class Promise:
    """What the state must be once everything is set.

    `leaves` are the entries of the checkpoint that are loaded, by their paths in the state, and `containers` the nodes
    that hold them, or are objects. `built` are the optimizers and objects by their paths: what lies there is built from
    the checkpoint.
    `before` is what the objects' `state_dict` gave before. `derived` are the paths of what is not taken over as it was
    saved, `refused` of what did not fit, `other_class` of what takes over what another class had saved. `wanted` tells,
    given a value and its path, whether it was asked for. `spread` are the paths of what was read into sharded memory,
    `given` of what was spread in the checkpoint and was read into a whole tensor that an object had. `empty` are the
    paths of parameters' states in optimizers that are there and hold nothing.
    """

    leaves: Mapping[Path, SavedArray | SavedValue]
    containers: Mapping[Path, Node]
    built: Mapping[Path, Any]
    optimizers: frozenset[Path]
    before: Mapping[Path, Any]
    derived: frozenset[Path]
    cast: frozenset[Path]
    wanted: Callable[[Any, Path], bool]
    parameter_name: Callable[[str], str]
    refused: frozenset[Path]
    other_class: frozenset[Path]
    saved_world_size: int
    spread: frozenset[Path]
    given: frozenset[Path]
    empty: frozenset[Path]


@dataclass(frozen=True, slots=True)
class Left:
    """What of a checkpoint a rank's state did not take, though it was asked for.

    `others` are names by number, out of `count`: the same leaf has the same number on all ranks, and what any rank has
    taken is not unexpected. `own` are names of what is this rank's alone. Some numbers stand for no leaf but for a
    parameter in an optimizer's groups: `told_by` has the numbers of the leaves that tell of it, too.
    """

    count: int
    others: Mapping[int, str]
    own: tuple[str, ...]
    told_by: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def names(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """Return the names of what nobody took, each thing once."""
        found = list(numbers)
        leaves = frozenset(found)
        return tuple(self.others[one] for one in found if leaves.isdisjoint(self.told_by.get(one, ())))


class Binding:
    """A state and a checkpoint that fit; nothing has been changed yet.

    `items` are what the checkpoint has for objects, all of which they are handed unless `leave_out` says otherwise.
    `known` are the prefixes of `only` that name something in this rank's state, `unknown` those that name nothing.
    `reads` are filled in place first. `report` says what fits, `promise` what must be there in the end. `finish` is
    called once, after all ranks have read and verified everything. `give_up` is called where that
    failed on any rank.
    """

    def __init__(
        self,
        reads: list[Read],
        report: LoadReport,
        actions: list[Action],
        promise: Promise,
        left: Left,
        take_memory: Callable[[], None],
        items: Sequence[Items],
        left_out: dict[Path, list[Path]],
        known: Sequence[str],
        unknown: Sequence[str],
    ) -> None:
        self.reads = reads
        self.report = report
        self.promise = promise
        self.left = left
        self._actions: list[Action] | None = actions
        self._take_memory = take_memory
        self.items = items
        self._left_out = left_out
        self.known, self.unknown = known, unknown

    def leave_out(self, path: Path, extras: Iterable[Extra]) -> None:
        """Hand the object at a path nothing of some of its items."""
        self._left_out[path] = [one.keys for one in extras]
        others = {(*path, *keys) for keys in self._left_out[path]}
        if others:
            leaves = {path: one for path, one in self.promise.leaves.items() if not is_inside(path, others)}
            self.promise = replace(self.promise, leaves=leaves, refused=self.promise.refused | others)

    def finish(self) -> None:
        """Set plain values, optimizers' state and groups, and call `load_state_dict` of objects."""
        if self._actions is None:
            raise RuntimeError("finish() was called already; bind again")
        actions, self._actions = self._actions, None
        for _, action in sorted(actions, key=operator.itemgetter(0)):
            action()

    def give_up(self) -> None:
        """Put tensors that were given memory to be read into back where they have none: it holds nothing."""
        self.reads.clear()
        if self._take_memory is not None:
            self._take_memory()
