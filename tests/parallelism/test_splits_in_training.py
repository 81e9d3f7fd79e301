"""A training that is killed under one split and goes on under another has the losses of one that did not change."""

from pathlib import Path

import pytest

pytest.importorskip("torch")
from split_lives import live, worst


@pytest.mark.long
def test_with_zero_at_2_and_4_ranks_and_a_plain_optimizer_every_loss_is_equal_bit_for_bit(tmp_path: Path) -> None:
    alone = live(tmp_path / "alone", [("plain-fixed", 1, 0)])
    changed = live(tmp_path / "changed", [("zero-fixed", 2, 5), ("zero-fixed", 4, 8), ("plain-fixed", 1, 0)])
    assert {step: {tuple(losses) for losses in times} for step, times in changed.items()} == {
        step: {tuple(losses) for losses in times} for step, times in alone.items()
    }


@pytest.mark.long
@pytest.mark.parametrize("mode", ["fsdp1", "fsdp1-orig"])
def test_with_fsdp1_at_the_same_number_of_ranks_every_loss_is_equal_bit_for_bit(tmp_path: Path, mode: str) -> None:
    alone = live(tmp_path / "alone", [(mode, 2, 0)])
    killed = live(tmp_path / "killed", [(mode, 2, 5), (mode, 2, 0)])
    assert all(times == alone[step] * len(times) for step, times in killed.items())


def test_from_fsdp1_at_2_ranks_over_3_and_fsdp2_to_one_process_losses_are_equal_to_the_order_of_sums(
    tmp_path: Path,
) -> None:
    alone = live(tmp_path / "alone", [("plain", 1, 0)])
    lives = [("fsdp1", 2, 4), ("fsdp1-orig", 3, 7), ("fsdp2", 2, 10), ("plain", 1, 0)]
    assert worst(live(tmp_path / "changed", lives), alone) < 1e-5
