"""What the objects of a state say of themselves: each is asked once, whoever wants to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ckptengine.errors import CheckpointError, StateError
from ckptengine.frameworks.adapter import Adapter, ModuleEntry
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type

__all__ = ["Asked"]


class Asked:
    """The answers of one reading of a state.

    A `state_dict` may hold a collective of the job, or take long: ranks that called it a different number of times, or
    in another order, would wait for each other for ever. So an answer, an error among them, is kept and given to
    everybody who asks later in the same reading.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[int, bool], tuple[Any, Any, Exception | None]] = {}
        self._entries: dict[int, tuple[Any, list[ModuleEntry]]] = {}

    def state_of(self, target: Any, path: Path) -> Any:
        """Return what `state_dict()` of an object or an optimizer gives.

        Raises `StateError` naming path, class and error where the object raised one.
        """
        return self._once(target, path, target.state_dict, whole=True)

    def values_of(self, module: Any, adapter: Adapter, path: Path) -> Mapping[str, Any]:
        """Return a module's live values by its own keys; raises as `state_of` does."""
        values: Mapping[str, Any] = self._once(module, path, lambda: adapter.module_values(module), whole=False)
        return values

    def entries_of(self, module: Any, adapter: Adapter, path: Path) -> list[ModuleEntry]:
        """Return a module's entries, the same ones each time."""
        if id(module) not in self._entries:
            adapter.check_module(module, path)
            entries = adapter.module_entries(module, path, self.values_of(module, adapter, path))
            self._entries[id(module)] = (module, entries)
        return self._entries[id(module)][1]

    def _once(self, target: Any, path: Path, call: Callable[[], Any], *, whole: bool) -> Any:
        key = (id(target), whole)
        if key not in self._answers:
            answer: Any = None
            error: Exception | None = None
            try:
                answer = call()
            except CheckpointError as problem:
                error = problem
            except Exception as problem:
                error = StateError(
                    f"{dotted(path)}: state_dict() of {describe_type(target)} raised "
                    f"{type(problem).__name__}: {problem}"
                )
                error.__cause__ = problem
            self._answers[key] = (
                target,
                answer,
                error,
            )  # the target is kept: an `id` says something only while it lives
        _, answer, error = self._answers[key]
        if error is not None:
            raise error
        return answer
