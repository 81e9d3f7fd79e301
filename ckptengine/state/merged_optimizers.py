"""Several optimizers of one class as one: those of the chunks of a pipeline that one rank has."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter
from ckptengine.schema.path import Path, dotted
from ckptengine.state.union import NAMED

__all__ = ["merging_optimizers"]

_PLAIN = frozenset({type(None), bool, int, float, str})


class _Group(dict[str, Any]):
    """Groups of several optimizers with equal hyperparameters as one; what is set reaches each of them."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups[0])
        for key in NAMED:
            if key in self:
                super().__setitem__(key, [one for group in groups for one in group[key]])
        self._groups = groups

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        rest = iter(value) if key in NAMED else None
        for group in self._groups:
            group[key] = value if rest is None else list(itertools.islice(rest, len(group["params"])))


def _hyperparameters(group: Mapping[str, Any]) -> str | None:
    """Return text that is equal for groups that may be one; None for one that holds tensors or objects."""
    found = {key: value for key, value in group.items() if key not in NAMED}
    for value in found.values():
        if not all(type(one) in _PLAIN for one in (value if type(value) in (tuple, list) else (value,))):
            return None
    return repr((sorted(found.items()), [key in group for key in NAMED]))


@functools.cache
def merging_optimizers(kind: type[Adapter]) -> type[Adapter]:
    """Return a framework's adapter for which what has `optimizers` is an optimizer."""

    class Merging(kind):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            self._owners: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()

        def check_optimizer(self, optimizer: Any, path: Path) -> None:
            classes = {type(super(Merging, self).bare_optimizer(one)) for one in optimizer.optimizers}
            if len(classes) > 1:
                names = ", ".join(sorted(one.__name__ for one in classes))
                raise StateError(f"{dotted(path)}: merged optimizers of several classes ({names}); merge those of one")
            seen: set[int] = set()
            for one in optimizer.optimizers:
                super().check_optimizer(one, path)
                if super().saves_itself(one) or super().loads_itself(one):
                    raise StateError(
                        f"{dotted(path)}: {type(one).__name__} has a `state_dict` or `load_state_dict` of its own, or "
                        "hooks for them, so it can't be merged; use one optimizer over the parameters of all chunks"
                    )
                own = {id(p) for group in super().optimizer_groups(one) for p in group["params"]}
                if not seen.isdisjoint(own):
                    raise StateError(f"{dotted(path)}: two merged optimizers have a parameter in common; one must do")
                seen |= own

        def saves_itself(self, optimizer: Any) -> bool:
            return False

        def loads_itself(self, optimizer: Any) -> bool:
            return False

        def bare_optimizer(self, optimizer: Any) -> Any:
            return super().bare_optimizer(optimizer.optimizers[0])

        def optimizer_groups(self, optimizer: Any) -> list[dict[str, Any]]:
            joined: list[list[dict[str, Any]]] = []
            places: dict[str, list[int]] = {}
            owners = self._owners[optimizer] = {}
            for one in optimizer.optimizers:
                free = {key: list(numbers) for key, numbers in places.items()}
                for group in super().optimizer_groups(one):
                    owners.update((id(parameter), one) for parameter in group["params"])
                    key = _hyperparameters(group)
                    if key is not None and free.get(key):
                        joined[free[key].pop(0)].append(group)
                        continue
                    if key is not None:
                        places.setdefault(key, []).append(len(joined))
                    joined.append([group])
            return [_Group(groups) if len(groups) > 1 else groups[0] for groups in joined]

        def _owner(self, optimizer: Any, parameter: Any) -> Any:
            if optimizer not in self._owners:
                self.optimizer_groups(optimizer)
            return self._owners[optimizer].get(id(parameter))

        def states_elsewhere(self, optimizer: Any, parameters: Iterable[Any]) -> frozenset[int]:
            own = self._by_owner(optimizer, list(parameters))
            return frozenset().union(*(super(Merging, self).states_elsewhere(one, some) for one, some in own))

        def finish_states(self, optimizer: Any, groups: Sequence[dict[str, Any]], path: Path) -> None:
            for one in optimizer.optimizers:
                super().finish_states(one, super().optimizer_groups(one), path)

        def optimizer_state(self, optimizer: Any, parameter: Any) -> dict[str, Any] | None:
            one = self._owner(optimizer, parameter)
            state: dict[str, Any] | None = None if one is None else super().optimizer_state(one, parameter)
            return state

        def optimizer_states(self, optimizer: Any, parameters: Sequence[Any]) -> list[dict[str, Any] | None] | None:
            found: dict[int, Any] = {}
            for one, some in self._by_owner(optimizer, parameters):
                states = super().optimizer_states(one, some)
                if states is None:
                    return None
                found.update(zip(map(id, some), states, strict=True))
            return [found[id(parameter)] for parameter in parameters]

        def _by_owner(self, optimizer: Any, parameters: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
            found: dict[int, list[Any]] = {id(one): [] for one in optimizer.optimizers}
            for parameter in parameters:
                found[id(self._owner(optimizer, parameter))].append(parameter)
            return [(one, found[id(one)]) for one in optimizer.optimizers]

        def set_optimizer_state(self, optimizer: Any, parameter: Any, state: dict[str, Any] | None) -> None:
            super().set_optimizer_state(self._owner(optimizer, parameter), parameter, state)

    return Merging
