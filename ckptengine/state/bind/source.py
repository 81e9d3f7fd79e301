"""The checkpoint that a state is filled from."""

from __future__ import annotations

from collections.abc import Callable

from ckptengine.schema.path import Path, dotted
from ckptengine.state.bind.members import members_of
from ckptengine.state.binding import Left
from ckptengine.state.outside import outside_digest
from ckptengine.state.saved import Node, Saved, SavedArray, own_tree, shared_tree
from ckptengine.state.select import Selection

__all__ = ["Source"]


class Source:
    """A checkpoint's leaves as two trees, under the names that they have in the state.

    `shared` has what all ranks share, `own` what this rank has of its own: at another world size than the one that
    saved (`resized`), what rank 0 had. `dropped` are leaves that no rank can take any more, by their paths. `shapes`
    has the shapes of shared arrays by name, None for a name that two of them have. `tells_empty` says whether the
    checkpoint tells an optimizer's empty state from none. `members` are the parameters in optimizers' groups, and
    `had` has the paths of the leaves that this rank's objects had, where others had different ones, by the object's
    path. `regrouped` has, by the path of an optimizer's groups, the saved parameters that this rank's groups have.
    """

    def __init__(self, saved: Saved, rank: int, world_size: int, rename: Callable[[Path], Path]) -> None:
        self.saved, self.rename = saved, rename
        self.resized = world_size != saved.world_size
        self.shared = shared_tree(saved, rename)
        self.own = own_tree(saved, 0 if self.resized else rank, rename)
        had = {} if self.resized or not saved.rank_items else saved.rank_items[rank]
        self._outside = saved.rank_outside[rank] if had else ""
        self.had = {rename(path): frozenset(map(rename, leaves)) for path, leaves in had.items()}
        self.tells_empty = saved.outline is not None and saved.outline.empty is not None
        self.dropped: list[tuple[Path, Node]] = []
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        # Counted before optimizers' groups are joined: all ranks number the leaves alike.
        self._count, self._own_count = (sum(1 for _ in tree.leaves()) for tree in (self.shared, self.own))
        # With flat names the tree depends on this rank's state, and there are no groups.
        self.members = [] if saved.flat else members_of(self.shared)
        self.regrouped: dict[Path, frozenset[str]] = {}
        for path, node in self.shared.leaves():
            if isinstance(node.entry, SavedArray):
                name = dotted(path)  # of two leaves that it may be, as of the keys 0 and "0", it tells no shape
                self.shapes[name] = None if name in self.shapes else node.entry.leaf.shape

    def is_split_alike(self) -> bool:
        """Whether this rank's state, outside of objects and optimizers, has taken what this rank had saved.

        It is asked when all but these is bound.
        """
        saved = self.saved
        taken = {path for path, node in self.shared.leaves() if node.used}
        stored = (path for path in (*saved.leaves, *saved.aliases, *saved.values) if self.rename(path) in taken)
        return outside_digest(stored, () if saved.outline is None else saved.outline.containers) == self._outside

    def left(self, selection: Selection) -> Left:
        """Return what of the selection this rank's state did not take."""
        found = [
            [(node.number, dotted(path)) for path, node in leaves if not node.used and selection.holds(path)]
            for leaves in ([*self.shared.leaves(), *self.dropped], self.own.leaves())
        ]
        others = dict(found[0])
        told_by = {}
        for number, member in enumerate(self.members, self._count):
            taken = self.regrouped.get(member.groups)
            if not member.owners.isdisjoint(others) or (taken is not None and member.name not in taken):
                others[number], told_by[number] = member.problem, member.told_by
        count = self._count + len(self.members)
        if self.resized:  # all ranks look at what rank 0 had of its own
            others |= {count + number: name for number, name in found[1]}
            return Left(count + self._own_count, others, (), told_by)
        return Left(count, others, tuple(name for _, name in found[1]), told_by)
