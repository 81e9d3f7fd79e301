"""What one walk over a state finds: what fits, what doesn't, and what is built anew."""

from __future__ import annotations

from collections.abc import Container, Hashable
from dataclasses import dataclass, field
from typing import Any

from ckptengine.schema.path import Path, dotted
from ckptengine.state.bind.extras import Items
from ckptengine.state.binding import Left
from ckptengine.state.report import LoadReport
from ckptengine.state.saved import Node

__all__ = ["Found", "Rebuilt"]


@dataclass(slots=True)
class Found:
    """What fits, and what doesn't.

    `missing` has the identity of a tensor's memory beside its name, None where it has none. `refused` are the paths of
    what does not fit, and of everything inside; `elsewhere` of what other ranks have, and not this one; `cast` of what
    is converted. `other_class` says what is taken over from objects of other classes, `of_other_class` where.
    `without_memory` are the paths of tensors that stay without it.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[tuple[str, Hashable | None]] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    refused: list[Path] = field(default_factory=list)
    elsewhere: list[Path] = field(default_factory=list)
    cast: list[Path] = field(default_factory=list)
    other_class: list[str] = field(default_factory=list)
    of_other_class: set[Path] = field(default_factory=set)
    lacks_arrays: bool = False
    without_memory: set[Path] = field(default_factory=set)

    def mismatch(self, path: Path, reason: str, node: Node | None) -> None:
        """Note that what lies at a path does not fit, and why; `node` is what the checkpoint has there."""
        self.mismatched.append(f"{dotted(path)}: {reason}")
        self.refused.append(path)
        if node is not None:
            node.use()

    def unload(self, path: Path) -> None:
        """Take back that something is loaded."""
        if dotted(path) in self.loaded:
            self.loaded.remove(dotted(path))
        if path in self.cast:
            self.cast.remove(path)

    def report(self, left: Left, filled: Container[Hashable]) -> LoadReport:
        """Return the report, given what was left, and the identities of the memory that is read into."""
        # A tied tensor that is missing under its first name is none once another of its names has filled it.
        missing = tuple(name for name, identity in self.missing if identity is None or identity not in filled)
        return LoadReport(
            loaded=tuple(self.loaded),
            missing=missing,
            unexpected=(*left.names(left.others), *left.own),
            mismatched=tuple(self.mismatched),
            cast=tuple(map(dotted, self.cast)),
            other_class=tuple(self.other_class),
            lacks_arrays=self.lacks_arrays,
        )


@dataclass(slots=True)
class Rebuilt:
    """What is built from the checkpoint.

    `objects` are the optimizers and objects by their paths, `before` what their `state_dict` gave before, and
    `optimizers` the paths of optimizers. `derived` are the paths of what is made anew of what was saved, by a `resize`.
    `given` are the paths of what was spread over the ranks and is read into a whole tensor that an object had.
    `items` is what the checkpoint has for objects, `left_out` the keys, by object, of what these are not handed of it:
    known when all ranks have told, before anything is handed over.
    """

    objects: dict[Path, Any] = field(default_factory=dict)
    before: dict[Path, Any] = field(default_factory=dict)
    optimizers: set[Path] = field(default_factory=set)
    derived: list[Path] = field(default_factory=list)
    given: set[Path] = field(default_factory=set)
    items: list[Items] = field(default_factory=list)
    left_out: dict[Path, list[Path]] = field(default_factory=dict)
