"""What a load is to read and to do, as one walk over a state finds it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptengine.schema.leaf import ArrayLeaf
from ckptengine.schema.path import Path, dotted
from ckptengine.state.bind.found import Found
from ckptengine.state.binding import Action, Read
from ckptengine.state.extents import Extent, Taken, extents, overlap, sharing

__all__ = ["CONVERT", "FRAMEWORK", "OBJECTS", "SET", "Same", "Work"]

Same = Callable[[Sequence[Read], bool], bool]
"""Whether reads bring the same bytes: to shared memory, or as wholes."""

# The order in which actions are done: each may use what those before have set.
CONVERT, SET, FRAMEWORK, OBJECTS = range(4)


@dataclass(slots=True)
class Work:
    """What is read into which memory, and what is done afterwards.

    `converted` has, for the number of a read whose bytes are converted, the memory that they end in, and the action.
    `filled` leads from a memory's identity to the first read into it, and `ties` are further reads into the same.
    `taken` is the memory of all reads from when objects are built; before that it is None. `made` is what was built of
    each array of the checkpoint in the object that is being built: its names stay tied.
    """

    reads: list[Read] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    converted: dict[int, tuple[ArrayLeaf, Action]] = field(default_factory=dict)
    filled: dict[Hashable, int] = field(default_factory=dict)
    ties: list[tuple[int, int]] = field(default_factory=list)
    taken: Taken | None = None
    made: dict[tuple[Path, int | None], list[Any]] = field(default_factory=dict)

    def act(self, phase: int, action: Callable[[], Any]) -> None:
        """Do something after everything is read, in its phase."""
        self.actions.append((phase, action))

    def convert(self, action: Callable[[], Any], memory: ArrayLeaf) -> None:
        """Have the next read converted, into `memory`."""
        self.act(CONVERT, action)
        self.converted[len(self.reads)] = memory, self.actions[-1]

    def note_taken(self) -> None:
        """From now on know which memory is read into."""
        self.taken = Taken()
        for number, read in enumerate(self.reads):
            self.taken.add(number, read.places)
        for number, (leaf, _) in self.converted.items():
            self.taken.add(number, extents(leaf))

    def separate(self, same: Same, found: Found) -> None:
        """Keep one read for each memory. Where the checkpoint has two leaves that differ, the later is a mismatch."""
        dropped: set[int] = set()
        ties = [([first, later], True) for first, later in self.ties]
        for group, tied in [*ties, *((group, False) for group in sharing([read.places for read in self.reads]))]:
            left = [number for number in group if number not in dropped]
            dropped.update(self._separate(left, same, tied, found))
        dropped.update(self._shared_casts(dropped, found))
        for number in dropped & self.converted.keys():
            self.actions.remove(self.converted[number][1])  # there is nothing to convert
        self.reads = [read for number, read in enumerate(self.reads) if number not in dropped]

    def _separate(self, group: list[int], same: Same, tied: bool, found: Found) -> list[int]:
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
            found.mismatch(
                path,
                f"the same memory as {others} here, and another tensor with other contents in the checkpoint; "
                "give each its own memory, or load into a state in which they are not tied",
                None,
            )
            found.unload(path)
        return [group[number] for number in (*again, *refused, *(kept[1:] if tied else ()))]

    def _shared_casts(self, dropped: set[int], found: Found) -> list[int]:
        """Return the reads that share memory with an earlier one, where either is converted: none of these is done.

        What is converted is read elsewhere first: what the two bring can't be compared in the memory that they share.
        """
        if not self.converted:
            return []
        left = [number for number in range(len(self.reads)) if number not in dropped]
        places = {n: extents(self.converted[n][0]) if n in self.converted else self.reads[n].places for n in left}
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
                found.mismatch(path, f"{reason}; give each its own memory", None)
                found.unload(path)
                refused.append(number)
        return refused

    def _undo(self, one: int, other: int, places: Mapping[int, Sequence[Extent]]) -> bool:
        """Whether two reads, of which one is converted, would write different things into one memory."""
        if self.converted.keys().isdisjoint((one, other)):
            return False
        a, b = self.reads[one], self.reads[other]
        if (a.path, a.rank) == (b.path, b.rank) and list(places[one]) == list(places[other]):
            return False
        return any(overlap(x, y) for x in places[one] for y in places[other])
