"""What became of each leaf in a load."""

from __future__ import annotations

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
        parts = [f"{len(self.loaded)} loaded" + (f" ({len(self.cast)} cast)" if self.cast else "")]
        parts += [f"{len(names)} {title}" for title, names in self._problems()]
        return "\n".join([", ".join(parts), *self.problem_lines()])

    def problem_lines(self) -> list[str]:
        """Return one line for each leaf that did not fit, under a line for each kind."""
        lines = []
        for title, names in self._problems():
            lines.append(f"{title}:")
            lines += [f"  {name}" for name in names]
        return lines

    def _problems(self) -> list[tuple[str, Sequence[str]]]:
        kinds = (
            ("mismatched", self.mismatched),
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
        )
        return [(title, names) for title, names in kinds if names]
