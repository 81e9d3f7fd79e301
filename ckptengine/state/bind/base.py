"""What every part of the walk over a state to be filled uses: the checkpoint, the options, what was found."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from ckptengine.frameworks.adapter import Layouts
from ckptengine.frameworks.registry import adapter_of_loader
from ckptengine.schema.leaf import Placement
from ckptengine.schema.path import Path, dotted, is_inside
from ckptengine.state.bind.found import Found, Rebuilt
from ckptengine.state.bind.meta import GivenMemory
from ckptengine.state.bind.options import Options
from ckptengine.state.bind.source import Source
from ckptengine.state.bind.tied import TiedNames
from ckptengine.state.bind.work import Same, Work
from ckptengine.state.binding import Binding, Promise
from ckptengine.state.kinds import Inspector
from ckptengine.state.outline import class_name, is_of_class
from ckptengine.state.rename import Rename, renamer
from ckptengine.state.saved import Node, Saved, SavedArray, SavedValue
from ckptengine.state.select import Selection

__all__ = ["BinderBase", "Put"]

Put = Callable[[Any], None]
"""Puts a new value where a plain one lies."""


class BinderBase(ABC):
    """A state, a checkpoint, and what one walk over the state has found so far."""

    def __init__(
        self,
        state: Mapping[str, Any],
        saved: Saved,
        rank: int,
        world_size: int,
        selection: Selection,
        rename: Rename | None,
        cast: bool,
        strict: bool = True,
    ) -> None:
        self._state, self._selection = state, selection
        self._options = Options(rank, world_size, cast, strict)
        self._source = Source(saved, rank, world_size, renamer(rename, state, saved.flat))
        self._found, self._rebuilt, self._work = Found(), Rebuilt(), Work()
        self._inspector = Inspector()
        self._inspector.ask(state, wanted=self._is_asked)
        self._inspector.declare(state)
        self._names = self._inspector.parameter_names(state)
        aliases = {self._source.rename(path): self._source.rename(one) for path, one in saved.aliases.items()}
        self._tied = TiedNames(self._inspector.further_names(state, self._names), self._names.values(), aliases)
        self._memory = GivenMemory(self._inspector, selection, self._source.shared, cast)
        self._layouts: dict[str, Layouts | None] = {}
        self._optimizer_states: set[Path] = set()
        self._adopted: frozenset[str] = frozenset()
        self._late: list[Callable[[], None]] = []

    def binding(self, same: Same) -> Binding:
        """Return what is to be done so that a state becomes what was saved; takes back all memory where that fails.

        `same` tells of reads into memory that two leaves have whether they bring the same.
        """
        try:
            self.walk(self._state)
            self._work.separate(same, self._found)
            left = self._source.left(self._selection)
            report = self._found.report(left, self._work.filled)
            self._memory.keep(frozenset(report.loaded))
        except BaseException:
            self._memory.take_back()
            raise
        work = self._work
        built, take_back = self._rebuilt, self._memory.take_back
        asked = self._selection
        return Binding(
            work.reads, report, work.actions, self._promise(), left, take_back, built.items, built.left_out,
            asked.matched, asked.unmatched,
        )  # fmt: skip

    @abstractmethod
    def walk(self, state: Mapping[str, Any]) -> None:
        """Bind everything in a state."""

    def _promise(self) -> Promise:
        """Return what the state must be once everything is read and set."""
        refused = frozenset((*self._found.refused, *self._found.elsewhere))
        leaves: dict[Path, SavedArray | SavedValue] = {}
        containers: dict[Path, Node] = {}
        empty: set[Path] = set()
        for root in (self._source.shared, self._source.own):
            for path, node in root.nodes():
                where = self._path_here(path)
                if is_inside(where, refused):
                    continue
                if node.entry is not None and node.used:
                    leaves[where] = node.entry
                known = where in containers and containers[where].kind is not None
                if not known and (node.entry is None or node.cls):
                    containers[where] = node
                if node.entry is None and node.used and not node.children:
                    empty.add(where)
        return Promise(
            leaves=leaves,
            containers=containers,
            built=self._rebuilt.objects,
            optimizers=frozenset(self._rebuilt.optimizers),
            before=self._rebuilt.before,
            derived=frozenset(self._rebuilt.derived),
            cast=frozenset(self._found.cast),
            wanted=self._is_asked,
            parameter_name=self._parameter_name,
            refused=refused,
            other_class=frozenset(self._found.of_other_class),
            saved_world_size=self._source.saved.world_size,
            spread=frozenset(
                read.target.path for read in self._work.reads if read.target.placement is Placement.SHARDED
            ),
            given=frozenset(self._rebuilt.given),
            empty=frozenset(empty),
        )

    def _is_asked(self, value: Any, path: Path) -> bool:
        """Whether a value is looked at: a loader would start its workers, a tensor without memory shows nothing."""
        if path in self._found.without_memory:
            return False
        return self._selection.touches(path) and adapter_of_loader(value) is None

    def _path_here(self, path: Path) -> Path:
        """Return a path with the name that an optimizer's parameter has in the state."""
        for depth in range(len(path) - 2):
            if path[: depth + 1] in self._rebuilt.optimizers and path[depth + 1] == "state":
                return (*path[: depth + 2], self._parameter_name(str(path[depth + 2])), *path[depth + 3 :])
        return path

    @functools.cached_property
    def _in_modules(self) -> frozenset[str]:
        """The names of the parameters in modules."""
        return frozenset(self._inspector.module_parameter_names(self._state).values())

    def _parameter_name(self, name: str) -> str:
        """A parameter's name is itself a dotted path, so `rename` holds for it too, unless it is that here already."""
        if name in self._adopted:
            return name
        renamed = self._source.rename((name,))
        return self._tied.name_of(name if renamed == (name,) else dotted(renamed))

    @abstractmethod
    def _bind(self, value: Any, put: Put | None, path: Path, node: Node | None, *, per_rank: bool) -> None:
        """Bind one value of the state, whatever its kind, to what the checkpoint has for it."""

    # What doesn't fit.

    def _mismatch(self, path: Path, reason: str, node: Node | None) -> None:
        self._found.mismatch(path, reason, node)

    def _absent(self, path: Path, per_rank: bool, identity: Hashable | None = None) -> None:
        own = None if per_rank else self._source.own.find(path)
        if own is not None:
            self._mismatch(path, "each rank has its own in the checkpoint; wrap it in ce.PerRank", own)
        else:
            self._found.missing.append((dotted(path), identity))

    def _as_a_whole(self, path: Path, node: Node | None, per_rank: bool) -> Node | None:
        """Return what the checkpoint has for something that is taken as a whole; None where there is nothing to take.

        That a part of it was asked for, or that it is missing, is noted.
        """
        if not self._selection.holds(path):
            self._selection.refuse_part(path)
            return None
        if node is None:
            self._absent(path, per_rank)
        return node

    def _another_class(self, value: Any, path: Path, node: Node) -> bool:
        """Whether what was saved here belongs to another class; then nothing of it is taken, unless `strict` is off."""
        if node.cls is None or is_of_class(value, node.cls):
            return False
        reason = f"{node.cls} in the checkpoint, {class_name(value)} here"
        if self._options.strict:
            self._mismatch(path, reason, node)
            return True
        taken = ", ".join(str(key) for key in list(node.children)[:12])
        taken += f" and {len(node.children) - 12} more" if len(node.children) > 12 else ""
        self._found.of_other_class.add(path)
        self._found.other_class.append(f"{dotted(path)}: {reason}; taken over all the same: {taken or 'its value'}")
        return False
