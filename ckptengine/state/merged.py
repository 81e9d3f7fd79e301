"""Several modules, optimizers or schedulers that are parts of one: of the chunks of a pipeline that one rank has."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter, ModuleEntry
from ckptengine.frameworks.registry import adapters
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import StandsFor, describe_type
from ckptengine.state.merged_objects import common_state, hand_to_all
from ckptengine.state.merged_optimizers import merging_optimizers

__all__ = ["Merged"]


class Merged(StandsFor):
    """Save and load several modules as one: `{"model": ce.Merged([chunk0, chunk1])}`.

    Use it on a rank that has several chunks of a pipeline whose parameters have the names of the whole model, as with
    `torch.distributed.pipelining.pipeline()` and torchtitan. The state gets the parameters and buffers of all of them;
    an optimizer of any of them has its state under the same names. Make it once, and put the same object into the state
    of every save.

    If each chunk has an optimizer, `ce.Merged([optimizer0, optimizer1])` is one optimizer over the parameters of all;
    groups with equal hyperparameters become one. If each optimizer has a scheduler, `ce.Merged([scheduler0,
    scheduler1])` is one scheduler: their states are the same, and a restore gives it to each.

    `parts` are modules of one framework, optimizers of one class, or other objects of one class that have `state_dict`
    and `load_state_dict`. Raises `StateError` for anything else and, when the state is read, for two modules that have
    something of the same name, two optimizers with the same parameter, or objects whose states differ.
    """

    __slots__ = ("__weakref__", "adapter", "modules", "objects", "optimizers")

    def __init__(self, parts: Iterable[Any]) -> None:
        given = tuple(parts)
        self.modules: tuple[Any, ...] = ()
        self.optimizers: tuple[Any, ...] = ()
        self.objects: tuple[Any, ...] = ()
        self.adapter: Adapter | None = None
        if _are_objects(given):
            self.objects = given
            return
        found = [next((one for one in adapters() if one.is_module(part)), None) for part in given]
        of_optimizers = bool(given) and not any(found)
        if of_optimizers:
            found = [next((one for one in adapters() if one.is_optimizer(part)), None) for part in given]
        first = found[0] if found else None
        if first is None or any(one is not first for one in found):
            odd = next((part for part, one in zip(given, found, strict=True) if one is None), None)
            what = "no modules" if not found else describe_type(odd) if odd is not None else "several frameworks'"
            raise StateError(
                f"Merged: takes one or more modules, or optimizers, of one framework, or schedulers of one class, not "
                f"{what}"
            )
        if of_optimizers:
            self.optimizers = given
        else:
            self.modules = given
        kind: Any = type(first)
        self.adapter = merging_optimizers(kind)() if of_optimizers else _merging(kind)()

    def __repr__(self) -> str:
        parts = (*self.modules, *self.optimizers, *self.objects)
        return f"Merged([{', '.join(map(describe_type, parts))}])"

    @property
    def first(self) -> Any:
        """The first of the parts: schedulers are saved as this one would be."""
        return (*self.modules, *self.optimizers, *self.objects)[0]

    def state_dict(self) -> Any:
        """Return the state that all schedulers have; raises `StateError` naming what differs."""
        return common_state(self._schedulers())

    def load_state_dict(self, state: Any) -> None:
        """Give each scheduler the state."""
        hand_to_all(self._schedulers(), state)

    def _schedulers(self) -> Sequence[Any]:
        if not self.objects:
            raise StateError("Merged: modules and optimizers have no state_dict here; put the Merged into the state")
        return self.objects


def _are_objects(parts: Sequence[Any]) -> bool:
    """Whether all are objects of one class that save themselves, and neither modules nor optimizers."""
    return len({type(part) for part in parts}) == 1 and not any(
        isinstance(part, (type, Mapping, Merged))
        or not (callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None)))
        or any(one.is_module(part) or one.is_optimizer(part) for one in adapters())
        for part in parts
    )


class _Values(dict[str, Any]):
    """The values of all modules by their keys; `parts` are those of each."""

    parts: Sequence[Mapping[str, Any]]


@functools.cache
def _merging(kind: type[Adapter]) -> type[Adapter]:
    """Return a framework's adapter for which `Merged` is a module."""

    class Merging(kind):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            self._keys: weakref.WeakKeyDictionary[Merged, list[frozenset[str]]] = weakref.WeakKeyDictionary()

        def check_module(self, module: Merged, path: Path) -> None:
            for part in module.modules:
                super().check_module(part, path)

        def module_values(self, module: Merged) -> Mapping[str, Any]:
            values = _Values()
            values.parts = [super(Merging, self).module_values(part) for part in module.modules]
            for part in values.parts:
                twice = sorted(values.keys() & part.keys())
                if twice:
                    raise StateError(_twice(twice))
                values.update(part)
            self._keys[module] = [frozenset(part) for part in values.parts]
            return values

        def module_entries(self, module: Merged, path: Path, values: Mapping[str, Any]) -> list[ModuleEntry]:
            assert isinstance(values, _Values)
            found: dict[str, ModuleEntry] = {}
            for part, own in zip(module.modules, values.parts, strict=True):
                entries = super().module_entries(part, path, own)
                twice = [entry.name for entry in entries if entry.name in found]
                if twice:
                    raise StateError(f"{dotted(path)}: {_twice(twice)}")
                found.update((entry.name, entry) for entry in entries)
            return list(found.values())

        def module_tensors(self, module: Merged) -> Iterable[Any]:
            return [tensor for part in module.modules for tensor in super(Merging, self).module_tensors(part)]

        def unsaved_without_memory(self, module: Merged) -> list[str]:
            return [name for part in module.modules for name in super(Merging, self).unsaved_without_memory(part)]

        def module_loading(self, module: Merged) -> frozenset[str] | None:
            found = [super(Merging, self).module_loading(part) for part in module.modules]
            own = [names for names in found if names is not None]
            return frozenset().union(*own) if own else None

        def load_module(self, module: Merged, entries: Mapping[str, Any]) -> Sequence[str]:
            refused: list[str] = []
            keys = self._keys[module]
            last = len(keys) - 1
            of_part: list[dict[str, Any]] = [{} for _ in keys]
            for key, item in entries.items():
                # What a module's own code makes only when it is loaded goes to the part that has its owner.
                owner = key.rpartition(".")[0]
                place = next((n for n, own in enumerate(keys) if key in own), None)
                if place is None:
                    place = next((n for n, own in enumerate(keys) if any(k.startswith(f"{owner}.") for k in own)), last)
                of_part[place][key] = item
            for part, own in zip(module.modules, of_part, strict=True):
                if own or super().module_loading(part) is not None:
                    refused += super().load_module(part, own)
            return refused

    return Merging


def _twice(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"two of the merged modules have {', '.join(names[:4])}{more}: parts of one model have names of their own, "
        "those that they have in the whole model; put modules that are numbered from 0 each under a key of its own"
    )
