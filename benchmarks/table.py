"""Targets beside their figures, and tables."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "ckptengine"


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised, the figure that was measured (None: it could not be), and the bound, all in one unit.

    `at_most`: the figure must not exceed the bound; else it must reach it.
    """

    what: str
    figure: float | None
    bound: float
    unit: str = "×"
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the figure keeps the promise; None where there is none."""
        if self.figure is None:
            return None
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound

    def as_json(self) -> dict[str, Any]:
        """Return the target as plain values."""
        return {**asdict(self), "met": self.met}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Target":
        """Return the target that `as_json` made plain."""
        return cls(**{name: plain[name] for name in ("what", "figure", "bound", "unit", "at_most") if name in plain})


def verdict(met: bool | None) -> str:
    """Return how a target stands, in words."""
    return {True: "[green]met[/]", False: "[red]not met[/]", None: "not measured"}[met]


def show_targets(console: Console, targets: Iterable[Target], title: str = "targets") -> None:
    """Print each target beside its figure."""
    rows = []
    for target in targets:
        figure = "–" if target.figure is None else f"{target.figure:.3g} {target.unit}"
        bound = f"{'≤' if target.at_most else '≥'} {target.bound:.3g} {target.unit}"
        rows.append((target.what, figure, bound, verdict(target.met)))
    show_table(console, title, ("what", "figure", "target", ""), rows)


def show_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], footnote: str = ""
) -> None:
    """Print a table; the row of ckptengine stands out."""
    table = Table(title=title, title_justify="left", caption=footnote or None, caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith(OURS) else None)
    console.print(table)
