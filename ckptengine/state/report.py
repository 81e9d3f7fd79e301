"""What became of each leaf in a load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["LoadReport"]

_SHOWN = 6
"""Leaves of one kind that a message names; the report itself has all."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """List what a load did with each leaf, by dotted name.

    - `loaded`; of these, `cast` are those whose dtype was converted.
    - `missing`: in the state, but not in the checkpoint. `unexpected`: in the checkpoint, but not in the state.
    - `mismatched`: each name is followed by a colon and the reason. Missing and mismatched leaves keep their values.
    - `other_class`: optimizers and objects that loaded what another class had saved.
    - `lacks_arrays`: whether an array is among the missing or mismatched leaves.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    other_class: tuple[str, ...] = ()
    lacks_arrays: bool = False

    @property
    def complete(self) -> bool:
        """Whether checkpoint and state fitted without exception."""
        return not (self.missing or self.unexpected or self.mismatched or self.other_class)

    def __str__(self) -> str:
        """Return the counts, and a short table of what did not fit below them."""
        parts = [f"{len(self.loaded)} loaded" + (f" ({len(self.cast)} cast)" if self.cast else "")]
        parts += [f"{len(names)} {outcome}" for outcome, names in self._problems()]
        counts = ", ".join(parts)
        return f"{counts}\n{self.table()}" if not self.complete else counts

    def table(self, every: bool = False) -> str:
        """Return a table as text: a row for each part of the state that was loaded, and what was not.

        Of each kind of outcome the first few leaves have a row, and the others are counted, with `every` all have.
        """
        rows = [("outcome", "leaf", "reason")]
        parts = Counter(name.partition(".")[0] for name in self.loaded)
        cast = Counter(name.partition(".")[0] for name in self.cast)
        for part, count in parts.items():
            rows.append(("loaded", part, _leaves(count) + (f", {cast[part]} cast" if cast[part] else "")))
        for outcome, names in self._problems():
            shown = names if every else names[:_SHOWN]
            for name in shown:
                leaf, _, reason = name.partition(": ")
                rows.append((outcome, leaf, reason))
            rows += [
                (outcome, f"{common}…", f"{_leaves(count)} more") for common, count in _groups(names[len(shown) :])
            ]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        lines.insert(1, "-" * min(120, max(map(len, lines))))
        return "\n".join(lines)

    def problem_lines(self) -> list[str]:
        """Return what did not fit: for each kind the count, the first few leaves, and how many more there are where."""
        lines = []
        for outcome, names in self._problems():
            lines.append(f"{outcome} ({_leaves(len(names))}):" if len(names) > _SHOWN else f"{outcome}:")
            lines += [f"  {name}" for name in names[:_SHOWN]]
            lines += [f"  … {_leaves(count)} more in {common}" for common, count in _groups(names[_SHOWN:])]
        if any(len(names) > _SHOWN for _, names in self._problems()):
            lines.append("(all of them are in the error's `report`)")
        return lines

    def _problems(self) -> list[tuple[str, Sequence[str]]]:
        kinds = (
            ("mismatched", self.mismatched),
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("from another class", self.other_class),
        )
        return [(outcome, names) for outcome, names in kinds if names]


def _groups(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return leaves by the part of the state that they are in: what their names have in common, and how many."""
    parts: dict[str, list[str]] = {}
    for name in names:
        leaf = name.partition(": ")[0]
        parts.setdefault(leaf.partition(".")[0], []).append(leaf)
    return [(_common(leaves), len(leaves)) for leaves in parts.values()]


def _common(leaves: Sequence[str]) -> str:
    """Return the keys that the names of leaves begin with, the last one excepted."""
    first, last = (name.split(".") for name in (min(leaves), max(leaves)))
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return ".".join(first[: max(1, min(length, len(first) - 1))])


def _leaves(count: int) -> str:
    return "1 leaf" if count == 1 else f"{count:,} leaves"
