"""What obstore has read, counted by tests."""

from __future__ import annotations

import pytest

from ckptengine.storage.ranges import RangeReads

__all__ = ["counted_reads"]


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Return the list to which each read that obstore makes is added from now on, as (key, position, bytes)."""
    made, get = [], RangeReads.get

    async def counted(self, fs, prefix, key, position, nbytes):
        data = await get(self, fs, prefix, key, position, nbytes)
        if data is not None:
            made.append((prefix + key, position, len(data)))
        return data

    monkeypatch.setattr(RangeReads, "get", counted)
    return made
