"""Parameters that are one tensor here and two in the checkpoint, or the reverse.

So is a tied weight of which the first and the last stage of a pipeline have one each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from ckptengine.schema.path import Path, dotted

__all__ = ["TiedNames"]


class TiedNames:
    """By which names of an optimizer's parameters in the checkpoint a parameter here is known.

    `further` leads from each further name of a parameter here to the one that its optimizer knows it by, `known` are
    the names of all parameters here. `aliases` leads from each further path of a tensor of the checkpoint to its first,
    both as they are in the state.
    """

    def __init__(self, further: Mapping[str, str], known: Iterable[str], aliases: Mapping[Path, Path]) -> None:
        self._here = dict(further)
        self._several = frozenset(further.values())
        self._known = {*known, *further}
        self._tied: dict[str, list[str]] = defaultdict(list)
        by_first: dict[str, list[str]] = {}
        for path, first in aliases.items():
            by_first.setdefault(dotted(first), [dotted(first)]).append(dotted(path))
        for names in by_first.values():
            for name in names:
                self._tied[name] += names

    def look_for(self, names: Iterable[str], stored: Iterable[str]) -> None:
        """Have parameters `names` that an optimizer has not `stored` known by a name that they were tied to there.

        Not where that is the name of another parameter here: it takes that itself.
        """
        there = set(stored)
        for name in names:
            if name in there:
                continue
            other = next((one for one in self._tied.get(name, ()) if one in there and one not in self._known), None)
            if other is not None:
                self._here.setdefault(other, name)

    def is_tied(self, name: str) -> bool:
        """Whether a parameter here is known by several names."""
        return name in self._several

    def name_of(self, stored: str) -> str:
        """Return the name that a parameter of the checkpoint has here."""
        return self._here.get(stored, stored)
