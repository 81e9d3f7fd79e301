"""How often the objects of a state are asked, and in which order."""

from __future__ import annotations

from pathlib import Path

from launch import launch


def test_each_object_is_asked_once_per_save_on_every_rank_whatever_differs_between_the_ranks(tmp_path: Path) -> None:
    first, second = launch("asked_job.py", 2, tmp_path, timeout=200)
    assert first["calls"] == second["calls"]
    nothing, *saves, checked, loaded = first["calls"]
    order = ["first", "module", "second"]
    assert nothing == []  # there was no checkpoint to restore, and memory is reserved without asking
    assert saves == [order] * 7
    assert checked == order
    assert loaded == order * 2  # to find what fits, and to look at what has come back
