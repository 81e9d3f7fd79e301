"""What every part of the walk over a state to be filled uses: the checkpoint, the options, what was found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ckptengine.frameworks.adapter import Layouts
from ckptengine.frameworks.registry import adapter_of_loader
from ckptengine.schema.leaf import ArrayLeaf, Placement
from ckptengine.schema.path import Path, dotted, is_inside
from ckptengine.state.bind.members import members_of
from ckptengine.state.bind.meta import GivenMemory
from ckptengine.state.binding import Action, Left, Promise, Read
from ckptengine.state.extents import Extent, Taken, extents, overlap, sharing
from ckptengine.state.kinds import Inspector
from ckptengine.state.outline import class_name, is_of_class
from ckptengine.state.rename import Rename, renamer
from ckptengine.state.report import LoadReport
from ckptengine.state.saved import Node, Saved, SavedArray, SavedValue, own_tree, shared_tree
from ckptengine.state.select import Selection

__all__ = ["CONVERT", "FRAMEWORK", "OBJECTS", "SET", "BinderBase", "Put", "Same"]

Same = Callable[[Sequence[Read], bool], bool]

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
        rename: Rename | None,
        cast: bool,
        strict: bool = True,
    ) -> None:
        self.reads: list[Read] = []
        self.actions: list[Action] = []
        self._state = state
        self._layouts: dict[str, Layouts | None] = {}
        self._optimizer_states: set[Path] = set()
        self._adopted: frozenset[str] = frozenset()
        self._saved, self._rank, self._world_size = saved, rank, world_size
        self._resized = world_size != saved.world_size
        self._selection, self._may_cast, self._strict = selection, cast, strict
        self._rename = renamer(rename, state, saved.flat)
        self._shared = shared_tree(saved, self._rename)
        self._own = own_tree(saved, 0 if self._resized else rank, self._rename)
        self._tells_empty = saved.outline is not None and saved.outline.empty is not None
        self._count, self._own_count = (sum(1 for _ in tree.leaves()) for tree in (self._shared, self._own))
        # With flat names the tree depends on this rank's state, and there are no groups.
        self._members = [] if saved.flat else members_of(self._shared)
        self._regrouped: dict[Path, frozenset[str]] = {}
        """By the path of an optimizer's groups: the saved parameters that this rank's groups have."""
        self._dropped: list[tuple[Path, Node]] = []
        self._saved_shapes: dict[str, tuple[int, ...] | None] = {}
        for path, node in self._shared.leaves():
            if isinstance(node.entry, SavedArray):
                name = dotted(path)  # of two leaves that it may be, as of the keys 0 and "0", it tells no shape
                self._saved_shapes[name] = None if name in self._saved_shapes else node.entry.leaf.shape
        self._inspector = Inspector()
        self._inspector.ask(
            state, wanted=lambda value, path: selection.touches(path) and adapter_of_loader(value) is None
        )
        self._inspector.declare(state)
        self._declared = self._inspector.declared
        self.memory = GivenMemory(self._inspector, selection, self._shared, cast)
        self._names = self._inspector.parameter_names(state)
        self._loaded: list[str] = []
        self._missing: list[tuple[str, Hashable | None]] = []
        self._mismatched: list[str] = []
        self._other_class: list[str] = []
        self._of_other_class: set[Path] = set()
        self._lacks_arrays = False
        self._left_without_memory: set[Path] = set()
        self.refused: list[Path] = []
        """The paths of what does not fit, and of everything inside."""
        self.elsewhere: list[Path] = []
        """The paths of what other ranks have, and not this one."""
        self.derived: list[Path] = []
        """The paths of what is made anew from what was saved, by a `resize`."""
        self.built: dict[Path, Any] = {}
        """The optimizers and objects by their paths: what lies there is built from the checkpoint."""
        self.optimizers: set[Path] = set()
        self.given: set[Path] = set()
        """The paths of what was spread over the ranks and is read into a whole tensor that an object had."""
        self.before: dict[Path, Any] = {}
        """What the objects' `state_dict` gave before."""
        self._cast: list[Path] = []
        self._filled: dict[Hashable, int] = {}
        self._ties: list[tuple[int, int]] = []
        self._converted: dict[int, tuple[ArrayLeaf, Action]] = {}
        self._taken: Taken | None = None
        self._made: dict[tuple[Path, int | None], list[Any]] = {}
        """What was built of each array of the checkpoint in the object that is being built: its names stay tied."""
        self._late: list[Callable[[], None]] = []

    def left(self) -> Left:
        """Return what this rank's state did not take."""
        found = [
            [(node.number, dotted(path)) for path, node in leaves if not node.used and self._selection.holds(path)]
            for leaves in ([*self._shared.leaves(), *self._dropped], self._own.leaves())
        ]
        others = dict(found[0])
        told_by = {}
        for number, member in enumerate(self._members, self._count):
            taken = self._regrouped.get(member.groups)
            if not member.owners.isdisjoint(others) or (taken is not None and member.name not in taken):
                others[number], told_by[number] = member.problem, member.told_by
        count = self._count + len(self._members)
        if self._resized:  # all ranks look at what rank 0 had of its own
            others |= {count + number: name for number, name in found[1]}
            return Left(count + self._own_count, others, (), told_by)
        return Left(count, others, tuple(name for _, name in found[1]), told_by)

    def report(self) -> LoadReport:
        """Return what fits and what doesn't."""
        left = self.left()
        # A tied tensor that is missing under its first name is none once another of its names has filled it.
        missing = tuple(name for name, identity in self._missing if identity is None or identity not in self._filled)
        return LoadReport(
            loaded=tuple(self._loaded),
            missing=missing,
            unexpected=(*left.names(left.others), *left.own),
            mismatched=tuple(self._mismatched),
            cast=tuple(map(dotted, self._cast)),
            other_class=tuple(self._other_class),
            lacks_arrays=self._lacks_arrays,
        )

    def promise(self) -> Promise:
        """Return what the state must be once everything is read and set."""
        refused = frozenset((*self.refused, *self.elsewhere))
        leaves: dict[Path, SavedArray | SavedValue] = {}
        containers: dict[Path, Node] = {}
        empty: set[Path] = set()
        for root in (self._shared, self._own):
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
            built=self.built,
            optimizers=frozenset(self.optimizers),
            before=self.before,
            derived=frozenset(self.derived),
            cast=frozenset(self._cast),
            wanted=self._is_asked,
            parameter_name=self._parameter_name,
            refused=refused,
            other_class=frozenset(self._of_other_class),
            saved_world_size=self._saved.world_size,
            spread=frozenset(read.target.path for read in self.reads if read.target.placement is Placement.SHARDED),
            given=frozenset(self.given),
            empty=frozenset(empty),
        )

    def _is_asked(self, value: Any, path: Path) -> bool:
        """Whether a value is looked at: a loader would start its workers, a tensor without memory shows nothing."""
        if path in self._left_without_memory:
            return False
        return self._selection.touches(path) and adapter_of_loader(value) is None

    def _path_here(self, path: Path) -> Path:
        """Return a path with the name that an optimizer's parameter has in the state."""
        for depth in range(len(path) - 2):
            if path[: depth + 1] in self.optimizers and path[depth + 1] == "state":
                return (*path[: depth + 2], self._parameter_name(str(path[depth + 2])), *path[depth + 3 :])
        return path

    def _parameter_name(self, name: str) -> str:
        """A parameter's name is itself a dotted path, so `rename` holds for it too, unless it is that here already."""
        if name in self._adopted:
            return name
        renamed = self._rename((name,))
        return name if renamed == (name,) else dotted(renamed)

    @abstractmethod
    def _bind(self, value: Any, put: Put | None, path: Path, node: Node | None, *, per_rank: bool) -> None:
        """Bind one value of the state, whatever its kind, to what the checkpoint has for it."""

    # What doesn't fit.

    def _mismatch(self, path: Path, reason: str, node: Node | None) -> None:
        self._mismatched.append(f"{dotted(path)}: {reason}")
        self.refused.append(path)
        if node is not None:
            node.use()

    def _absent(self, path: Path, per_rank: bool, identity: Hashable | None = None) -> None:
        own = None if per_rank else self._own.find(path)
        if own is not None:
            self._mismatch(path, "each rank has its own in the checkpoint; wrap it in ce.PerRank", own)
        else:
            self._missing.append((dotted(path), identity))

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
        if self._strict:
            self._mismatch(path, reason, node)
            return True
        taken = ", ".join(str(key) for key in list(node.children)[:12])
        taken += f" and {len(node.children) - 12} more" if len(node.children) > 12 else ""
        self._of_other_class.add(path)
        self._other_class.append(f"{dotted(path)}: {reason}; taken over all the same: {taken or 'its value'}")
        return False

    # Memory that two leaves would be read into.

    def separate(self, same: Same) -> None:
        """Keep one read for each memory. Where the checkpoint has two leaves that differ, the later is a mismatch.

        `same` tells whether reads bring the same bytes: to shared memory, or as wholes (`tied`).
        """
        dropped: set[int] = set()
        ties = [([first, later], True) for first, later in self._ties]
        for group, tied in [*ties, *((group, False) for group in sharing([read.places for read in self.reads]))]:
            left = [number for number in group if number not in dropped]
            dropped.update(self._separate(left, same, tied))
        dropped.update(self._shared_casts(dropped))
        for number in dropped & self._converted.keys():
            self.actions.remove(self._converted[number][1])  # there is nothing to convert
        self.reads = [read for number, read in enumerate(self.reads) if number not in dropped]

    def _separate(self, group: list[int], same: Same, tied: bool) -> list[int]:
        """Return which reads of a group are not to be done."""
        reads = [self.reads[number] for number in group]
        if len(group) < 2:
            return []
        kept, refused = [0], []
        sources = {(read.path, read.rank, read.places) for read in reads}
        if len(sources) == 1 or same(reads, tied):
            kept = list(range(len(group)))
        else:
            for number in range(1, len(group)):
                if same([reads[one] for one in kept] + [reads[number]], tied):
                    kept.append(number)
                else:
                    refused.append(number)
        first: dict[object, int] = {}
        again = [n for n in kept if first.setdefault(reads[n].places, n) != n]
        for number in refused:
            path = reads[number].target.path
            others = dotted(reads[0].target.path)
            self._mismatch(
                path,
                f"the same memory as {others} here, and another tensor with other contents in the checkpoint; "
                "give each its own memory, or load into a state in which they are not tied",
                None,
            )
            name = dotted(path)
            if name in self._loaded:
                self._loaded.remove(name)
        return [group[number] for number in (*again, *refused, *(kept[1:] if tied else ()))]

    def _shared_casts(self, dropped: set[int]) -> list[int]:
        """Return the reads that share memory with an earlier one, where either is converted: none of these is done.

        What is converted is read elsewhere first: what the two bring can't be compared in the memory that they share.
        """
        if not self._converted:
            return []
        left = [number for number in range(len(self.reads)) if number not in dropped]
        places = {n: extents(self._converted[n][0]) if n in self._converted else self.reads[n].places for n in left}
        refused = []
        for group in sharing([places[number] for number in left]):
            kept: list[int] = []
            for number in (left[member] for member in group):
                first = next((one for one in kept if self._undo(one, number, places)), None)
                if first is None:
                    kept.append(number)
                    continue
                path, other = self.reads[number].target.path, self.reads[first].target.path
                reason = f"shares memory with {dotted(other)} here, and `cast` converts one of them or both"
                self._mismatch(path, f"{reason}; give each its own memory", None)
                if dotted(path) in self._loaded:
                    self._loaded.remove(dotted(path))
                if path in self._cast:
                    self._cast.remove(path)
                refused.append(number)
        return refused

    def _undo(self, one: int, other: int, places: Mapping[int, Sequence[Extent]]) -> bool:
        """Whether two reads, of which one is converted, would write different things into one memory."""
        if self._converted.keys().isdisjoint((one, other)):
            return False
        a, b = self.reads[one], self.reads[other]
        if (a.path, a.rank) == (b.path, b.rank) and list(places[one]) == list(places[other]):
            return False
        return any(overlap(x, y) for x in places[one] for y in places[other])

    def _act(self, phase: int, action: Callable[[], Any]) -> None:
        self.actions.append((phase, action))
