"""What a save sees of the state: walked once, then only compared with what was there before."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptengine.schema.leaf import ArrayLeaf, Part
from ckptengine.schema.path import Path, dotted
from ckptengine.state.asked import Asked
from ckptengine.state.beside import Beside
from ckptengine.state.kinds import Inspector
from ckptengine.state.trace import Trace
from ckptengine.state.tree import FlatState, flatten_traced

__all__ = ["Reading", "StateReader", "Structure", "structure_of"]

_log = logging.getLogger("ckptengine")

Structure = tuple[tuple[Any, ...], ...]
"""What of a state a plan depends on: everything but addresses and bytes."""


class Reading:
    """A state at one moment.

    `plain` has its plain values, aliases and containers. `moved` has the new parts of the leaves, by number, whose
    memory is elsewhere than in the reading before; it is None where all may be. `held` has, of others that are on a
    device, what owns their memory.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        plain: FlatState,
        structure: Structure,
        leaves: tuple[ArrayLeaf, ...] | None,
        moved: dict[int, tuple[Part, ...]] | None,
        trace: Trace,
        tensors: list[Any],
        asked: Asked,
        held: Mapping[int, Any],
    ) -> None:
        self.plain, self.structure, self.moved, self.held = plain, structure, moved, held
        self._state, self._leaves, self._trace = state, leaves, trace
        self._asked = asked
        self._tensors = tensors  # they stay where they are for as long as this lives

    @property
    def leaves(self) -> tuple[ArrayLeaf, ...]:
        """The arrays, in the order of the structure; walks the state where it was only compared."""
        if self._leaves is None:
            self._leaves = flatten_traced(self._state, self._asked)[0].arrays
        return self._leaves

    @property
    def fenced(self) -> list[Path]:
        """The paths of what only an optimizer's step changes, in the order of `versions`."""
        return self._trace.fenced

    def versions(self) -> list[Any]:
        """Return numbers that change when what is fenced is written to, as far as its framework counts that."""
        return self._trace.versions(self._tensors)


class StateReader:
    """Reads the states of successive saves; keeps no tensor alive in between."""

    def __init__(self) -> None:
        self._trace: Trace | None = None
        self._plain: FlatState | None = None
        self._structure: Structure = ()
        self._told_empty: set[Path] = set()
        self._beside: Beside | None = Beside()

    def forget(self) -> None:
        """Walk the next state from the beginning, as in a forked process."""
        self._trace, self._plain, self._structure = None, None, ()

    def tell_empty(self, reading: Reading, rank: int) -> None:
        """Log once, on rank 0, what has nothing to save: who put it into the state may have expected otherwise."""
        new = {path: kind for path, kind in reading.plain.empty.items() if path not in self._told_empty}
        self._told_empty.update(new)
        if new and rank == 0:
            names = _listed([f"{dotted(path)} ({kind})" for path, kind in new.items()])
            _log.warning("nothing of %s is saved: its state_dict() is empty", names)

    def tell_beside(self, state: Mapping[str, Any], reading: Reading) -> None:
        """Log once which counters go on as the job trains and lie beside what is saved; on rank 0."""
        if self._beside is None:
            return
        try:
            new = self._beside.changed(state, reading.plain)
        except Exception:  # classes may answer anything, and no save fails because of a hint
            self._beside = None
            _log.debug("attributes beside the state are not looked at any more", exc_info=True)
            return
        if new:
            _log.warning(
                "changed since an earlier save, but not saved, because no state_dict() holds it: %s. If training "
                "depends on it, keep it in a buffer of the module or in the optimizer's param_groups, or put it into "
                "the state as a value of the same name",
                _listed([f"{name} ({before} before, now {now})" for name, (before, now) in new.items()]),
            )

    def read(self, state: Mapping[str, Any]) -> Reading:
        """Return a reading; raises `StateError` naming what can't be saved.

        Every module and object has then been asked for its state once, in the state's order, whatever was found.
        """
        asked = Asked()
        try:
            return self._read(state, asked)
        except Exception:
            # Other ranks may have found nothing wrong, and have asked them all.
            if isinstance(state, Mapping):
                Inspector(asked).ask(state)
            raise

    def _read(self, state: Mapping[str, Any], asked: Asked) -> Reading:
        trace, self._trace = self._trace, None  # where it raises, the next reading walks
        before = self._plain
        if trace is None or before is None or (again := trace.again(state, asked)) is None:
            return self._walk(state, asked)
        self._trace = trace
        plain = replace(before, values=again.values, rank_values=again.rank_values)
        return Reading(state, plain, self._structure, None, again.moved, trace, again.tensors, asked, again.held)

    def _walk(self, state: Mapping[str, Any], asked: Asked) -> Reading:
        flat, trace = flatten_traced(state, asked)
        self._trace = trace
        structure = structure_of(flat)
        if structure != self._structure:
            self._structure = structure
        self._plain = replace(flat, arrays=(), values={}, rank_values={})
        plain = replace(flat, arrays=())
        return Reading(state, plain, self._structure, flat.arrays, None, trace, trace.tensors(), asked, {})


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def structure_of(flat: FlatState) -> Structure:
    """Return what of a flattened state a plan depends on."""
    return tuple(
        (
            leaf.path,
            leaf.dtype,
            leaf.shape,
            leaf.placement,
            leaf.container,
            tuple(part.box for part in leaf.parts),
        )
        for leaf in flat.arrays
    )
