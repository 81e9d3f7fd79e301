"""How messages name ranks."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["name_ranks"]

_MOST = 16


def name_ranks(ranks: Iterable[int]) -> str:
    """Return `rank 3`, `ranks 1, 3` or, above 16 of them, `ranks 0, 1, … and 84 more`."""
    numbers = sorted({int(rank) for rank in ranks})
    text = ", ".join(map(str, numbers[:_MOST]))
    more = f" and {len(numbers) - _MOST} more" if len(numbers) > _MOST else ""
    return f"rank{'' if len(numbers) == 1 else 's'} {text}{more}"
