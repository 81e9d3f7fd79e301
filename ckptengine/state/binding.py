"""What a load is to do, worked out before it changes anything."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from ckptengine.state.leaf import ArrayLeaf, Path
from ckptengine.state.report import LoadReport

__all__ = ["Action", "Binding", "Read"]

Action = tuple[int, Callable[[], object]]
"""A phase, lower ones first, and what is to be done in it."""


@dataclass(frozen=True, slots=True)
class Read:
    """One array to read: its path in the checkpoint, the rank that it belongs to (None: all), target."""

    path: Path
    rank: int | None
    target: ArrayLeaf


class Binding:
    """A state and a checkpoint that fit; nothing has been changed yet.

    `reads` are filled in place first. `report` says what fits. `finish` is called once, after all ranks have
    read and verified everything.
    """

    def __init__(self, reads: list[Read], report: LoadReport, actions: list[Action]) -> None:
        self.reads = reads
        self.report = report
        self._actions: list[Action] | None = actions

    def finish(self) -> None:
        """Set plain values, optimizers' state and groups, and call `load_state_dict` of objects."""
        if self._actions is None:
            raise RuntimeError("finish() was called before; bind again")
        actions, self._actions = self._actions, None
        for _, action in sorted(actions, key=operator.itemgetter(0)):
            action()
