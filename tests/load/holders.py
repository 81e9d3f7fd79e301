"""Objects of a state, as small as they can be, for the tests of what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Holder:
    """An object that keeps what it is given."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Changing(Holder):
    """An object that does something to what it is given, or to something else."""

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]], **state: Any) -> None:
        super().__init__(**state)
        self.change = change

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = self.change(state)
