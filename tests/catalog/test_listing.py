"""What is listed, in which order, and what a fallback follows."""

import os

import pytest
from checkpoints import manifest_of, signed_document, write_checkpoint, write_data

from ckptengine.catalog.commit import publish
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.listing import (
    Entry,
    Problem,
    committed,
    lineage,
    newest,
    next_generation,
    read_manifest,
)
from ckptengine.errors import CheckpointDamagedError, FormatVersionError, SaveFailedError


def line(storage):
    """Return (generation, step) of what the lineage yields; of problems, with the generation negative."""
    return [
        (-item.entry.generation, item.entry.step) if isinstance(item, Problem) else (item[0].generation, item[0].step)
        for item in lineage(storage)
    ]


def spoil(storage, step, generation):
    with open(storage.location(f"step-{step:08d}/manifest-{generation:04d}.json"), "r+b") as file:
        file.write(b"spoilt")


def test_an_empty_or_missing_run_lists_nothing(storage, tmp_path):
    assert committed(storage) == []
    assert newest(storage) is None
    assert list(lineage(storage)) == []
    assert next_generation(storage) == 1


def test_the_order_is_generation_then_step(storage):
    for step, generation, parent in [(10, 1, None), (30, 1, None), (20, 2, (1, 10)), (30, 2, (1, 10))]:
        write_checkpoint(storage, step, generation, parent)
    assert [entry.order for entry in committed(storage)] == [(1, 10), (1, 30), (2, 20), (2, 30)]
    assert newest(storage) == Entry(30, 2, "step-00000030")
    assert newest(storage).manifest == "step-00000030/manifest-0002.json"


def test_nothing_but_manifests_is_listed(storage):
    write_data(storage, manifest_of(10))
    storage.make_directory("step-00000020/data-abc-1")
    for name in (
        "step-00000020/manifest-1.json",
        "step-00000020/manifest-0000.json",
        "step-00000020/manifest-00001.json",
        "step-00000020/.tmp-manifest-0001.json.0123456789ab",
        "step-20/manifest-0001.json",
        "step-٠٠٠٠٠٠٢٠/manifest-0001.json",
        "other/manifest-0001.json",
    ):
        storage.write_bytes(name, b"{}")
    assert committed(storage) == []


def test_a_step_that_is_named_as_a_file_is_no_step(storage):
    storage.write_bytes("step-00000010", b"")
    write_checkpoint(storage, 20)
    assert [entry.step for entry in committed(storage)] == [20]


def test_a_checkpoint_outside_of_a_run_falls_back_to_what_it_replaced(storage):
    write_checkpoint(storage, None, 1)
    write_checkpoint(storage, None, 2)
    assert newest(storage) == Entry(None, 2, "")
    assert line(storage) == [(2, None), (1, None)]
    assert next_generation(storage) == 3


def test_the_lineage_follows_the_parents_and_leaves_abandoned_branches_out(storage):
    for step in (10, 20, 30, 40):
        write_checkpoint(storage, step, 1)
    for step in (30, 40, 50):
        write_checkpoint(storage, step, 2, (1, 20))
    write_checkpoint(storage, 45, 3, (2, 40))
    assert line(storage) == [(3, 45), (2, 40), (2, 30), (1, 20), (1, 10)]


def test_a_life_that_was_not_restored_has_no_parents(storage):
    write_checkpoint(storage, 10, 1)
    write_checkpoint(storage, 5, 2, None)
    assert line(storage) == [(2, 5)]


def test_a_spoilt_manifest_is_a_problem_on_the_way(storage):
    for step in (10, 20, 30):
        write_checkpoint(storage, step, 1)
    for step in (40, 50):
        write_checkpoint(storage, step, 2, (1, 20))
    spoil(storage, 50, 2)
    spoil(storage, 20, 1)
    assert line(storage) == [(-2, 50), (2, 40), (-1, 20), (1, 10)]


def test_the_parent_is_taken_from_the_claim_where_no_manifest_tells_it(storage):
    assert claim_generation(storage, None) == 1
    write_checkpoint(storage, 10, 1)
    write_checkpoint(storage, 20, 1)
    assert claim_generation(storage, (1, 10)) == 2
    write_checkpoint(storage, 30, 2, (1, 10))
    spoil(storage, 30, 2)
    assert line(storage) == [(-2, 30), (1, 10)]


def test_the_parent_is_taken_from_a_later_manifest_of_the_same_life(storage):
    write_checkpoint(storage, 10, 1)
    write_checkpoint(storage, 20, 1)
    write_checkpoint(storage, 30, 2, (1, 10))
    write_checkpoint(storage, 40, 2, (1, 10))
    write_checkpoint(storage, 50, 3, (2, 30))
    spoil(storage, 30, 2)
    assert line(storage) == [(3, 50), (-2, 30), (1, 10)]


def test_where_the_parent_is_unknown_the_generation_below_follows_from_its_newest(storage):
    write_checkpoint(storage, 10, 1)
    write_checkpoint(storage, 20, 1)
    write_checkpoint(storage, 30, 3, (1, 10))
    spoil(storage, 30, 3)
    storage.write_bytes("generation-0003.json", b"spoilt too")
    assert line(storage) == [(-3, 30), (1, 20), (1, 10)]


def test_parents_that_lead_in_a_circle_come_to_an_end(storage):
    write_checkpoint(storage, 10, 1, (2, 20))
    write_checkpoint(storage, 20, 2, (2, 20))
    write_checkpoint(storage, 30, 3, (7, 5))
    assert line(storage) == [(3, 30), (2, 20), (1, 10)]


def test_a_manifest_of_another_place_is_damaged(storage):
    write_checkpoint(storage, 10, 1)
    storage.make_directory("step-00000020")
    os.rename(
        storage.location("step-00000010/manifest-0001.json"),
        storage.location("step-00000020/manifest-0001.json"),
    )
    with pytest.raises(CheckpointDamagedError, match="is that of generation 1, step 10"):
        read_manifest(storage, newest(storage))


def test_a_newer_version_is_a_problem_on_the_way(storage):
    write_checkpoint(storage, 10, 1)
    storage.write_bytes("step-00000020/manifest-0001.json", signed_document(format_version=7))
    first, second = lineage(storage)
    assert isinstance(first.error, FormatVersionError)
    assert second[0].step == 10


def test_a_commit_wants_all_files(storage):
    manifest = manifest_of(10)
    write_data(storage, manifest)
    os.truncate(storage.location("step-00000010/data-000000000001-10/rank-00001.zarr.zip"), 4096)
    with pytest.raises(SaveFailedError, match=r"rank-00001\.zarr\.zip has 4096 bytes instead of 8192"):
        publish(storage, "step-00000010", manifest)
    os.unlink(storage.location("step-00000010/data-000000000001-10/rank-00001.zarr.zip"))
    with pytest.raises(SaveFailedError, match=r"rank-00001\.zarr\.zip is missing"):
        publish(storage, "step-00000010", manifest)
    assert committed(storage) == []


def test_of_two_attempts_the_first_wins_and_the_other_is_told(storage):
    first = write_checkpoint(storage, 10, attempt="first-1")
    with pytest.raises(SaveFailedError, match="attempt first-1 has committed this step"):
        write_checkpoint(storage, 10, attempt="second-1")
    assert read_manifest(storage, newest(storage)) == first
    # The reply to the publication was lost: it is tried again, and is its own winner.
    publish(storage, "step-00000010", first)
