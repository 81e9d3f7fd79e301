"""From a checkpoint's leaves to a state's: what is read into which memory, and what is set afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.frameworks.registry import at_rest
from ckptengine.schema.type_name import describe_type
from ckptengine.state.bind.walk import Binder
from ckptengine.state.bind.work import Same
from ckptengine.state.binding import Binding, Read
from ckptengine.state.rename import Rename
from ckptengine.state.report import LoadReport
from ckptengine.state.saved import Saved, SavedLeaf
from ckptengine.state.select import Selection, refuse_unknown

__all__ = ["Binding", "LoadReport", "Read", "Saved", "SavedLeaf", "bind", "check_fit", "match", "nothing_fits"]


def bind(
    state: Mapping[str, Any],
    saved: Saved,
    rank: int,
    world_size: int,
    *,
    only: Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    same: Same | None = None,
) -> Binding:
    """Return what to read and to set so that the state becomes what was saved.

    `only` are dotted prefixes of the state, `rename` leads from prefixes of the checkpoint to those of the
    state, `cast` allows leaves to change their dtype. `same` tells whether reads into shared memory bring the same
    bytes; without it, different arrays of the checkpoint never do.

    Raises `LoadMismatchError` saying which leaves do not fit (its `report` has all); with `strict=False` these are left
    as they are and reported, but that nothing fits is an error. Raises `StateError` where the state can't be filled.
    """
    binding = match(state, saved, rank, world_size, only=only, rename=rename, strict=strict, cast=cast, same=same)
    try:
        refuse_unknown(binding.unknown)
        check_fit(binding, strict)
    except LoadMismatchError:
        binding.give_up()
        raise
    return binding


def match(
    state: Mapping[str, Any],
    saved: Saved,
    rank: int,
    world_size: int,
    *,
    only: Iterable[str] | None,
    rename: Rename | None,
    strict: bool,
    cast: bool,
    same: Same | None,
) -> Binding:
    """Return what `bind` does, whatever does not fit: its `report` says it, in which `unexpected` is what this rank did
    not take, and `unknown` what `only` names and this rank does not have; other ranks may."""
    if not isinstance(state, Mapping):
        raise StateError(f"the state is {describe_type(state)}; pass a dict such as {{'model': model}}")
    with at_rest():
        binder = Binder(state, saved, rank, world_size, Selection(only), rename, cast, strict)
        return binder.binding(same or (lambda reads, tied: False))


def nothing_fits(binding: Binding) -> bool:
    """Whether nothing, or no array of those that there are, would be loaded."""
    report = binding.report
    return not (report.loaded and (binding.reads or not report.lacks_arrays))


def check_fit(binding: Binding, strict: bool) -> None:
    """Raise `LoadMismatchError` where a checkpoint and a state don't fit; without `strict` where nothing does."""
    report = binding.report
    if strict and not report.complete:
        raise LoadMismatchError(
            "the checkpoint and the state don't match\n"
            + "\n".join(report.problem_lines())
            + "\n(`strict=False` loads what fits; `rename` maps names, `cast=True` allows other dtypes)",
            report,
        )
    if not report.complete and nothing_fits(binding):
        raise LoadMismatchError(
            "nothing in the checkpoint matches the state\n"
            + "\n".join(report.problem_lines())
            + "\n(is it the checkpoint of another model? `rename` maps names, `only` selects what to load)",
            report,
        )
