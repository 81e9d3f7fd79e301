"""The simulation of a large job, at a size that tests can afford."""

from benchmarks import split
from benchmarks.scale import run, table


def test_the_simulation_runs_and_its_counts_meet_their_targets() -> None:
    result = run(ranks=64, leaves=30)
    assert result["chunks"] == 64 * 30
    assert result["layout_bytes_per_chunk"] <= 8  # of a file this small most is headers
    assert result["first_plan_bytes"] <= 100 * 64
    assert result["packed_bytes"] <= 64 * 600
    assert "64 ranks × 30 leaves, 1,920 chunks" in table(result)


def test_ranks_of_four_kinds_of_splits_plan_together_and_tell_few_boxes() -> None:
    result = split.run(split.Mesh(stages=4, data=4, tensor=2), leaves=80)
    assert result["ranks"] == 32
    few = split.run(split.Mesh(stages=4, data=4, tensor=2), leaves=40)
    # What a rank hears grows with the leaves in the tables of the four stages, not with what each rank tells.
    assert result["first_plan_bytes"] < 2 * few["first_plan_bytes"]
