"""What every part of the walk over a state to be filled uses: the checkpoint, the options, what was found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from ckptengine.state.adapters import Layouts
from ckptengine.state.binding import Action, Read
from ckptengine.state.kinds import Inspector
from ckptengine.state.leaf import Path, dotted
from ckptengine.state.loaders import is_stateful_loader
from ckptengine.state.report import LoadReport
from ckptengine.state.saved import Node, Saved, SavedArray, own_tree, shared_tree
from ckptengine.state.select import Selection, renamer

__all__ = ["CONVERT", "FRAMEWORK", "OBJECTS", "SET", "BinderBase", "Put"]

Put = Callable[[Any], None]
"""Puts a new value where a plain one lies."""

# The order in which `finish` acts: each may use what those before have set.
CONVERT, SET, FRAMEWORK, OBJECTS = range(4)


class BinderBase(ABC):
    """A state, a checkpoint, and what one walk over the state has found so far."""

    def __init__(
        self,
        state: Mapping[str, Any],
        saved: Saved,
        rank: int,
        world_size: int,
        selection: Selection,
        rename: Mapping[str, str] | None,
        cast: bool,
    ) -> None:
        self.reads: list[Read] = []
        self.actions: list[Action] = []
        self._state = state
        self._layouts: dict[str, Layouts | None] = {}
        self._optimizer_states: set[Path] = set()
        self._saved, self._rank, self._world_size = saved, rank, world_size
        self._resized = world_size != saved.world_size
        self._selection, self._may_cast = selection, cast
        self._rename = renamer(rename, state)
        self._shared = shared_tree(saved, self._rename)
        self._own = own_tree(saved, 0 if self._resized else rank, self._rename)
        self._saved_shapes = {
            dotted(path): node.entry.leaf.shape
            for path, node in self._shared.leaves()
            if isinstance(node.entry, SavedArray)
        }
        self._inspector = Inspector()
        self._inspector.ask(state, wanted=lambda value, path: selection.touches(path) and not is_stateful_loader(value))
        self._names = self._inspector.parameter_names(state)
        self._loaded: list[str] = []
        self._missing: list[tuple[str, Hashable | None]] = []
        self._mismatched: list[str] = []
        self._cast: list[str] = []
        self._filled: set[Hashable] = set()

    def report(self) -> LoadReport:
        """Return what fits and what doesn't."""
        unexpected = [
            dotted(path)
            for root in (self._shared, self._own)
            for path, node in root.leaves()
            if not node.used and self._selection.holds(path)
        ]
        # A tied tensor that is missing under its first name is none once another of its names has filled it.
        missing = tuple(name for name, identity in self._missing if identity is None or identity not in self._filled)
        return LoadReport(tuple(self._loaded), missing, tuple(unexpected), tuple(self._mismatched), tuple(self._cast))

    @abstractmethod
    def _bind(self, value: Any, put: Put | None, path: Path, node: Node | None, *, per_rank: bool) -> None:
        """Bind one value of the state, whatever its kind, to what the checkpoint has for it."""

    # What doesn't fit.

    def _mismatch(self, path: Path, reason: str, node: Node | None) -> None:
        self._mismatched.append(f"{dotted(path)}: {reason}")
        if node is not None:
            node.use()

    def _absent(self, path: Path, per_rank: bool, identity: Hashable | None = None) -> None:
        own = None if per_rank else self._own.find(path)
        if own is not None:
            self._mismatch(path, "each rank has its own in the checkpoint; wrap it in ce.PerRank", own)
        else:
            self._missing.append((dotted(path), identity))

    def _act(self, phase: int, action: Callable[[], Any]) -> None:
        self.actions.append((phase, action))
