"""What is deleted, and above all what is not."""

import os

import pytest
from checkpoints import manifest_of, signed_document, write_checkpoint, write_data

from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.lease import LEASE_SECONDS, Lease
from ckptengine.catalog.listing import committed
from ckptengine.catalog.retention import remove_leftovers, replace_older, retain


def orders(storage):
    return [entry.order for entry in committed(storage)]


def make_old(storage):
    """Set all times of modification back beyond every lease."""
    then = storage.now() - LEASE_SECONDS - 60
    for path in storage.root.rglob("*"):
        os.utime(path, (then, then))


def test_the_newest_are_kept_and_the_others_go_with_their_directories(storage):
    for step in (10, 20, 30, 40):
        write_checkpoint(storage, step)
    assert retain(storage, 2) == []
    assert orders(storage) == [(1, 30), (1, 40)]
    assert storage.list() == ["step-00000030", "step-00000040"]
    assert storage.list("step-00000030") == ["data-000000000001-30", "manifest-0001.json"]


def test_multiples_are_kept_too(storage):
    for step in (10, 20, 30, 40, 50):
        write_checkpoint(storage, step)
    assert retain(storage, 1, keep_every=20) == []
    assert orders(storage) == [(1, 20), (1, 40), (1, 50)]


def test_abandoned_branches_go_and_the_lineage_stays(storage):
    for step in (10, 20, 30):
        write_checkpoint(storage, step)
    write_checkpoint(storage, 20, 2, (1, 10))
    write_checkpoint(storage, 25, 2, (1, 10))
    assert retain(storage, 3) == []
    assert orders(storage) == [(1, 10), (2, 20), (2, 25)]
    assert storage.list("step-00000020") == ["data-000000000002-20", "manifest-0002.json"]


def test_what_a_new_life_was_restored_from_stays_until_it_has_saved(storage):
    for step in (10, 20, 30):
        write_checkpoint(storage, step)
    assert claim_generation(storage, (1, 10)) == 2
    assert retain(storage, 1) == []
    assert orders(storage) == [(1, 10), (1, 30)]
    write_checkpoint(storage, 15, 2, (1, 10))
    assert retain(storage, 1) == []
    assert orders(storage) == [(2, 15)]


def test_what_cannot_be_read_stays(storage):
    for step in (10, 20, 30, 40):
        write_checkpoint(storage, step)
    storage.write_bytes("step-00000010/manifest-0001.json", b"spoilt")
    storage.write_bytes("step-00000020/manifest-0001.json", signed_document(format_version=2))
    make_old(storage)
    assert retain(storage, 1) == []
    problems = remove_leftovers(storage)
    assert len(problems) == 2
    assert "step-00000010 was not swept" in problems[0]
    assert orders(storage) == [(1, 10), (1, 20), (1, 40)]
    assert storage.exists("step-00000010/data-000000000001-10/layout.zarr.zip")
    assert storage.exists("step-00000020/data-000000000001-20/layout.zarr.zip")


def test_at_least_one_checkpoint_is_kept(storage):
    with pytest.raises(ValueError, match="keep_last=0"):
        retain(storage, 0)
    assert retain(storage, 1) == []


def test_a_delete_that_fails_is_told_and_not_raised(storage):
    for step in (10, 20):
        write_checkpoint(storage, step)
    # Not even root can delete a mount point.
    directory = storage.location("step-00000010/data-000000000001-10")
    if os.geteuid() != 0 or os.system(f"mount --bind {directory} {directory} 2>/dev/null") != 0:
        pytest.skip("mounting needs root")
    try:
        problems = retain(storage, 1)
        assert len(problems) == 1
        assert "step-00000010 was not deleted" in problems[0]
        assert orders(storage) == [(1, 20)]
    finally:
        os.system(f"umount {directory}")


def test_a_replaced_checkpoint_goes(storage):
    for generation in (1, 2, 3):
        write_checkpoint(storage, None, generation)
    assert replace_older(storage, 3) == []
    assert storage.list() == ["data-000000000003-0", "manifest-0003.json"]


def test_leftovers_of_dead_attempts_go(storage):
    write_checkpoint(storage, 10)
    for name in (
        "step-00000010/data-deaddeaddead-1/rank-00000.zarr.zip",
        "step-00000020/data-deaddeaddead-2/receipts/x",
        "data-deaddeaddead-3/lease.json",
    ):
        storage.write_bytes(name, b"{}")
    storage.make_directory("step-00000030")
    for name in (".tmp-generation-0001.json.0123456789ab", "step-00000010/.tmp-manifest-0001.json.0123456789ac"):
        with open(storage.location(name), "w"):
            pass
    make_old(storage)
    assert remove_leftovers(storage) == []
    found = sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*"))
    assert found == [
        "step-00000010",
        "step-00000010/data-000000000001-10",
        "step-00000010/data-000000000001-10/layout.zarr.zip",
        "step-00000010/data-000000000001-10/rank-00000.zarr.zip",
        "step-00000010/data-000000000001-10/rank-00001.zarr.zip",
        "step-00000010/manifest-0001.json",
    ]


def test_attempts_under_way_stay(storage):
    write_data(storage, manifest_of(10))
    storage.make_directory("step-00000030")
    with open(storage.location(".tmp-generation-0001.json.0123456789ab"), "w"):
        pass
    with Lease(storage, "step-00000020/data-a11fea11fea1-1"):
        assert remove_leftovers(storage) == []
        make_old(storage)
        storage.touch("step-00000010/data-000000000001-10")
        assert storage.exists("step-00000020/data-a11fea11fea1-1/lease.json")
        remove_leftovers(storage)
        assert storage.exists("step-00000020/data-a11fea11fea1-1/lease.json")
        assert storage.exists("step-00000010/data-000000000001-10/layout.zarr.zip")


def test_other_peoples_directories_stay(storage):
    write_checkpoint(storage, None)
    files = ["data-train/rank-00000.zarr.zip", "data-my-set/images.tar", "step-notes/x", "data-x-1"]
    files += [".tmp-notes", "data-train-x/.tmp-cache/keep"]
    for name in files:
        storage.write_bytes(name, b"precious")
    storage.make_directory("data-empty")
    storage.make_directory("data-train-2024")
    make_old(storage)
    assert remove_leftovers(storage) == []
    assert all(map(storage.exists, [*files, "data-empty", "data-train-2024"]))
