"""Calls of their own, on ranks that each hold a part."""

from __future__ import annotations

from pathlib import Path

from launch import launch


def test_sharded_optimizers_and_modules_with_calls_of_their_own_go_on_bit_for_bit(tmp_path: Path) -> None:
    for outcome in launch("own_calls_job.py", 2, tmp_path, timeout=250):
        assert len(outcome) == 5
        for name, result in outcome.items():
            assert result == {"equal": True, "sharded": True, "loads": 1}, name
