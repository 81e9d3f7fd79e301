"""What became of each leaf in a load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LoadReport"]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Dotted names of leaves: `loaded`; `missing` in the checkpoint; `unexpected` there; `mismatched`, each
    with its reason.

    What is missing or mismatched was left as it was. `cast` names those of `loaded` whose dtype was
    converted.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether checkpoint and state fitted without exception."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        """Return the counts, and a table of what did not fit below them."""
        parts = [f"{len(self.loaded)} loaded" + (f" ({len(self.cast)} cast)" if self.cast else "")]
        parts += [f"{len(names)} {outcome}" for outcome, names in self._problems()]
        counts = ", ".join(parts)
        return f"{counts}\n{self.table()}" if not self.complete else counts

    def table(self) -> str:
        """Return a table as text: a row for each part of the state that was loaded, one for each leaf that was not."""
        rows = [("outcome", "leaf", "reason")]
        parts = Counter(name.partition(".")[0] for name in self.loaded)
        cast = Counter(name.partition(".")[0] for name in self.cast)
        for part, count in parts.items():
            rows.append(("loaded", part, _leaves(count) + (f", {cast[part]} cast" if cast[part] else "")))
        for outcome, names in self._problems():
            for name in names:
                leaf, _, reason = name.partition(": ")
                rows.append((outcome, leaf, reason))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(lines)

    def problem_lines(self) -> list[str]:
        """Return one line for each leaf that did not fit, under a line for each kind."""
        lines = []
        for outcome, names in self._problems():
            lines.append(f"{outcome}:")
            lines += [f"  {name}" for name in names]
        return lines

    def _problems(self) -> list[tuple[str, Sequence[str]]]:
        kinds = (
            ("mismatched", self.mismatched),
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
        )
        return [(outcome, names) for outcome, names in kinds if names]


def _leaves(count: int) -> str:
    return "1 leaf" if count == 1 else f"{count} leaves"
