"""How checkpoints are named."""

from ckptengine.catalog.naming import checkpoint_path


def test_only_the_last_part_of_a_path_is_taken_for_a_step() -> None:
    assert checkpoint_path("step-1/other") == "step-1/other"
    assert checkpoint_path("runs/step-7/step-8") == "runs/step-7/step-00000008"
    assert checkpoint_path("runs/best-step-8") == "runs/best-step-8"
