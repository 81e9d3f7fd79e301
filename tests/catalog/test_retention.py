"""What is deleted, and above all what is not."""

import errno
import os
import re

import pytest
from checkpoints import manifest_of, signed_document, write_checkpoint, write_data

import ckptengine as ce
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.keep import KeepEvery, KeepLast, KeepSteps
from ckptengine.catalog.lease import LEASE_SECONDS, Lease
from ckptengine.catalog.listing import committed
from ckptengine.catalog.retention import remove_leftovers, replace_older, retain
from ckptengine.errors import StorageError
from ckptengine.storage.local import LocalStorage


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
    assert retain(storage, [KeepLast(2)]) == []
    assert orders(storage) == [(1, 30), (1, 40)]
    assert storage.list() == ["step-00000030", "step-00000040"]
    assert storage.list("step-00000030") == ["data-000000000001-30", "manifest-0001.json"]


def test_multiples_are_kept_too(storage):
    for step in (10, 20, 30, 40, 50):
        write_checkpoint(storage, step)
    assert retain(storage, [KeepLast(1), KeepEvery(20)]) == []
    assert orders(storage) == [(1, 20), (1, 40), (1, 50)]


def test_abandoned_branches_go_and_the_lineage_stays(storage):
    for step in (10, 20, 30):
        write_checkpoint(storage, step)
    write_checkpoint(storage, 20, 2, (1, 10))
    write_checkpoint(storage, 25, 2, (1, 10))
    assert retain(storage, [KeepLast(3)]) == []
    assert orders(storage) == [(1, 10), (2, 20), (2, 25)]
    assert storage.list("step-00000020") == ["data-000000000002-20", "manifest-0002.json"]


def test_what_a_new_life_was_restored_from_stays_until_it_has_saved(storage):
    for step in (10, 20, 30):
        write_checkpoint(storage, step)
    assert claim_generation(storage, (1, 10)) == 2
    assert retain(storage, [KeepLast(1)]) == []
    assert orders(storage) == [(1, 10), (1, 30)]
    write_checkpoint(storage, 15, 2, (1, 10))
    assert retain(storage, [KeepLast(1)]) == []
    assert orders(storage) == [(2, 15)]


def test_what_cannot_be_read_stays(storage):
    for step in (10, 20, 30, 40):
        write_checkpoint(storage, step)
    storage.write_bytes("step-00000010/manifest-0001.json", b"spoilt")
    storage.write_bytes("step-00000020/manifest-0001.json", signed_document(format_version=2))
    make_old(storage)
    assert retain(storage, [KeepLast(1)]) == []
    problems = remove_leftovers(storage)
    assert len(problems) == 2
    assert "step-00000010 was not swept" in problems[0]
    assert orders(storage) == [(1, 10), (1, 20), (1, 40)]
    assert storage.exists("step-00000010/data-000000000001-10/layout.zarr.zip")
    assert storage.exists("step-00000020/data-000000000001-20/layout.zarr.zip")


def test_at_least_one_checkpoint_is_kept(storage):
    write_checkpoint(storage, 10)
    write_checkpoint(storage, 20)
    with pytest.raises(ValueError, match="count=0"):
        KeepLast(0)
    with pytest.raises(ValueError, match="no rule says what to keep"):
        retain(storage, [])
    assert retain(storage, [KeepSteps([7])]) == []
    assert orders(storage) == [(1, 20)]
    assert retain(storage, [KeepLast(1)]) == []


def test_a_delete_that_fails_is_told_and_not_raised(storage):
    for step in (10, 20):
        write_checkpoint(storage, step)
    # Not even root can delete a mount point.
    directory = storage.location("step-00000010/data-000000000001-10")
    if os.geteuid() != 0 or os.system(f"mount --bind {directory} {directory} 2>/dev/null") != 0:
        pytest.skip("mounting needs root")
    try:
        problems = retain(storage, [KeepLast(1)])
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


@pytest.fixture
def unreadable(storage, monkeypatch):
    """Have the first so many reads of a file fail."""
    failing = {}
    original = type(storage).read_bytes

    def read_bytes(self, name, limit):
        if failing.get(name, 0) > 0:
            failing[name] -= 1
            raise StorageError(errno.EIO, f"cannot read {self.location(name)}: {os.strerror(errno.EIO)}")
        return original(self, name, limit)

    monkeypatch.setattr(type(storage), "read_bytes", read_bytes)
    return failing


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_checkpoint_that_could_not_be_read_once_is_not_deleted(storage, unreadable, keep_last):
    for step in (10, 20, 30):
        write_checkpoint(storage, step)
    unreadable["step-00000030/manifest-0001.json"] = 1
    (problem,) = retain(storage, [KeepLast(keep_last)])
    assert "step-00000030 was not deleted" in problem
    assert "Input/output error" in problem
    assert orders(storage)[-1] == (1, 30)
    assert retain(storage, [KeepLast(1)]) == []
    assert orders(storage) == [(1, 30)]


@pytest.mark.parametrize("also", ["step-00000015/manifest-0002.json", "step-00000025/manifest-0002.json"])
def test_nothing_of_earlier_lives_is_deleted_where_the_line_could_not_be_read(storage, unreadable, also):
    for step in (10, 20):
        write_checkpoint(storage, step)
    assert claim_generation(storage, (1, 10)) == 2
    for step in (15, 25):
        write_checkpoint(storage, step, 2, (1, 10))
    unreadable.update(dict.fromkeys(("step-00000025/manifest-0002.json", also, "generation-0002.json"), 9))
    retain(storage, [KeepLast(3)])
    assert (1, 10) in orders(storage)
    unreadable.clear()
    assert retain(storage, [KeepLast(3)]) == []
    assert orders(storage) == [(1, 10), (2, 15), (2, 25)]


def test_nothing_is_deleted_where_no_parent_of_a_generation_can_be_told(storage, unreadable):
    for step in (10, 20):
        write_checkpoint(storage, step)
    assert claim_generation(storage, (1, 10)) == 2
    write_checkpoint(storage, 25, 2, (1, 10))
    # It falls between two reads of the same file, so that what is read last is sound.
    unreadable.update({"step-00000025/manifest-0002.json": 1, "generation-0002.json": 1})
    problems = retain(storage, [KeepLast(1)])
    assert "its parent is unknown" in problems[0]
    assert orders(storage) == [(1, 10), (1, 20), (2, 25)]


def test_what_was_just_committed_is_never_deleted(storage):
    for step in (10, 20):
        write_checkpoint(storage, step)
    assert retain(storage, [KeepLast(1)], protected={"000000000001-10"}) == []
    assert orders(storage) == [(1, 10), (1, 20)]


def test_a_life_never_deletes_what_it_has_just_committed_also_where_another_branch_is_newer(tmp_path):
    run = LocalStorage(tmp_path / "run")
    with ce.Checkpointer(tmp_path / "run", keep_last=1, preemption=None) as ckpt:
        ckpt.save(10, {"step": 10}).durable.result()
        ckpt.save(20, {"step": 20}).durable.result()
        ckpt._saver.settle(60)
        assert orders(run) == [(1, 20)]
        # Another job has taken the run over meanwhile, and its line does not lead through what this one has saved.
        assert claim_generation(run, None) == 2
        write_checkpoint(run, 30, 2, (1, 10))
        ckpt._tiers.cleaning.clean(run, [KeepLast(1)])
        assert orders(run) == [(1, 20), (2, 30)]


def test_a_lease_that_cannot_be_read_once_protects_its_attempt(storage, unreadable):
    write_data(storage, manifest_of(10))
    data = "step-00000010/data-000000000001-10"
    with Lease(storage, data):
        make_old(storage)
        unreadable[f"{data}/lease.json"] = 1
        remove_leftovers(storage)
        assert storage.exists(f"{data}/layout.zarr.zip")


@pytest.fixture
def other(tmp_path):
    """Another run, whose newest step a link leads to."""
    other = LocalStorage(tmp_path / "other")
    other.create()
    write_checkpoint(other, 40)
    return other


def everything(storage):
    return sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*"))


def test_a_linked_step_of_another_run_is_neither_deleted_nor_counted(storage, other):
    for step in (10, 20):
        write_checkpoint(storage, step)
    os.symlink(other.location("step-00000040"), storage.location("step-00000005"))
    os.symlink(other.location("step-00000040"), storage.location("step-00000040"))
    write_data(other, manifest_of(40, attempt="deaddeaddead-1"))
    with open(other.location("step-00000040/.tmp-manifest-0001.json.0123456789ab"), "w"):
        pass
    make_old(other)
    make_old(storage)
    before = everything(other)
    assert retain(storage, [KeepLast(1)]) == []
    assert remove_leftovers(storage) == []
    assert everything(other) == before
    assert orders(storage) == [(1, 5), (1, 20), (1, 40)]
    assert os.path.islink(storage.location("step-00000005"))


def test_data_that_is_a_link_stays_with_what_it_points_to(storage, other):
    for step in (10, 20):
        write_checkpoint(storage, step)
    data = storage.location("step-00000010/data-000000000001-10")
    os.rename(data, other.location("moved"))
    os.symlink(other.location("moved"), data)
    before = everything(other)
    (problem,) = retain(storage, [KeepLast(1)])
    assert "data-000000000001-10 is a symbolic link, which is not followed" in problem
    assert everything(other) == before


@pytest.mark.parametrize("delete", ["delete", "delete_tree", "remove_directory"])
def test_nothing_that_deletes_follows_a_link(storage, other, delete):
    os.symlink(other.root, storage.location("link"))
    before = everything(other)
    with pytest.raises(StorageError, match="link is a symbolic link, which is not followed"):
        getattr(storage, delete)("link/step-00000040/data-000000000001-40")
    assert everything(other) == before


def test_what_a_killed_upload_has_left_inside_a_committed_attempt_goes(storage):
    write_checkpoint(storage, 10)
    name = "step-00000010/data-000000000001-10/.tmp-rank-00000.zarr.zip.0123456789ab"
    with open(storage.location(name), "w"):
        pass
    remove_leftovers(storage)
    assert os.path.exists(storage.location(name)), "it may be of an upload under way"
    make_old(storage)
    assert remove_leftovers(storage) == []
    assert not os.path.exists(storage.location(name))
    assert storage.exists("step-00000010/data-000000000001-10/layout.zarr.zip")


def test_what_is_dated_in_the_future_goes_a_lease_later(storage):
    write_data(storage, manifest_of(10))
    storage.write_bytes("step-00000010/data-000000000001-10/lease.json", b"{}")
    with open(storage.location(".tmp-generation-0001.json.0123456789ab"), "w"):
        pass
    storage.make_directory("step-00000030")
    then = storage.now() + 1e6
    for path in storage.root.rglob("*"):
        os.utime(path, (then, then))
    assert remove_leftovers(storage) == []
    assert storage.exists("step-00000010/data-000000000001-10/layout.zarr.zip"), "its writer may be alive"
    for path in storage.root.rglob("*"):
        os.utime(path, (os.stat(path).st_mtime - LEASE_SECONDS - 1,) * 2)
    assert remove_leftovers(storage) == []
    assert everything(storage) == []


class _Answers:
    """A rule that gives the answer that a test makes."""

    def __init__(self, answer):
        self.answer = answer

    def kept(self, line):
        return self.answer(line)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda line: [entry.step for entry, _ in line], "_Answers.* returned 30: `kept` returns entries"),
        (lambda line: line, "_Answers.* returned .*: `kept` returns entries"),
        (lambda line: None, "_Answers.* failed: TypeError"),
        (lambda line: line[99], "_Answers.* failed: IndexError"),
    ],
)
def test_a_rule_whose_answer_makes_no_sense_deletes_nothing_and_is_named(storage, answer, message):
    for step in (10, 20, 30):
        write_checkpoint(storage, step)
    (problem,) = retain(storage, [KeepLast(1), _Answers(answer)])
    assert re.search(f"nothing was deleted: the rule .*{message}", problem)
    assert orders(storage) == [(1, 10), (1, 20), (1, 30)]
