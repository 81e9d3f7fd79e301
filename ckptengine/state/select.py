"""Which leaves of a state are meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptengine.errors import LoadMismatchError
from ckptengine.schema.path import Path, dotted
from ckptengine.state.kinds import ROOT, Inspector, Kind, children

__all__ = ["Selection", "module_names", "refuse_unknown"]


class Selection:
    """The parts of a state that `only` names; remembers which prefixes named something."""

    def __init__(self, only: Iterable[str] | None) -> None:
        self._prefixes = None if only is None else tuple(only)
        self._matched: set[str] = set()

    def holds(self, path: Path) -> bool:
        """Whether a leaf, or everything under a path, is meant."""
        if self._prefixes is None:
            return True
        name = dotted(path)
        matches = [p for p in self._prefixes if name == p or name.startswith(f"{p}.")]
        self._matched.update(matches)
        return bool(matches)

    def reaches(self, path: Path) -> bool:
        """Whether what lies at a path is meant, or something inside of it."""
        inside = [p for p in self._prefixes or () if p.startswith(f"{dotted(path)}.")]
        self._matched.update(inside)
        return self.holds(path) or bool(inside)

    def touches(self, path: Path) -> bool:
        """Whether what lies at a path may be meant, or something inside of it; remembers nothing."""
        name = dotted(path)
        prefixes = (name,) if self._prefixes is None else self._prefixes
        return any(name == p or name.startswith(f"{p}.") or p.startswith(f"{name}.") for p in prefixes)

    def refuse_part(self, path: Path) -> None:
        """Raise where something inside is meant of what can only be loaded as a whole."""
        name = dotted(path)
        for prefix in self._prefixes or ():
            if prefix.startswith(f"{name}."):
                raise LoadMismatchError(f"only={prefix!r}: {name} can only be loaded as a whole; pass {name!r}")

    @property
    def matched(self) -> list[str]:
        """The prefixes that have named something."""
        return [prefix for prefix in self._prefixes or () if prefix in self._matched]

    @property
    def unmatched(self) -> list[str]:
        """The prefixes that have named nothing."""
        return [prefix for prefix in self._prefixes or () if prefix not in self._matched]

    def check(self) -> None:
        """Raise where a prefix has named nothing."""
        refuse_unknown(self.unmatched)


def refuse_unknown(unknown: Sequence[str]) -> None:
    """Raise `LoadMismatchError` where there are prefixes that have named nothing."""
    if unknown:
        raise LoadMismatchError(f"only={list(unknown)}: the state has nothing with that name; names are dotted paths")


def module_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the dotted names of the modules in a state, those in dicts, lists and `PerRank` included."""
    inspector = Inspector()
    names: list[str] = []

    def look(value: Any, path: Path) -> None:
        found = ROOT if path == () else inspector.inspect(value, path)
        if found.kind is Kind.MODULE:
            names.append(dotted(path))
        elif found.kind in (Kind.PER_RANK, Kind.DECLARED):
            look(value.value, path)
        elif found.kind in (Kind.DICT, Kind.SEQUENCE):
            for key, item in children(value, path):
                look(item, (*path, key))

    look(state, ())
    return tuple(names)
