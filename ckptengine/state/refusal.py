"""A state that must not be saved as it is now."""

from __future__ import annotations

__all__ = ["Refusal"]


class Refusal:
    """Stands in an object's `state_dict` where saving now would save something wrong.

    Saving it raises `StateError` with the `reason`; the other ranks' save fails, naming this one. `load_state_dict` may
    still follow: loading looks at the state that was there without taking anything from it.
    """

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return f"Refusal({self.reason!r})"
