"""How tests wait for what comes by itself: they look until it is there."""

import time
from collections.abc import Callable

__all__ = ["until"]


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until something holds, for a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"in a minute it did not come to this: {what}"
        time.sleep(0.01)
