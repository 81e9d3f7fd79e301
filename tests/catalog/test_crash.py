"""Every state that a crash may leave while a checkpoint is committed and an older one deleted."""

import os

import pytest
from checkpoints import write_checkpoint
from crash import ModelDisk, QuickDisk, RecordingDisk, crash_states

from ckptengine.catalog.commit import attempt_directory
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.keep import KeepLast
from ckptengine.catalog.lease import LEASE_SECONDS, Lease
from ckptengine.catalog.listing import committed, read_manifest
from ckptengine.catalog.retention import remove_leftovers, replace_older, retain
from ckptengine.storage.base import join
from ckptengine.storage.local import LocalStorage


def check_whole(storage, entry):
    """Check that a listed checkpoint has every byte that was written."""
    manifest = read_manifest(storage, entry)
    fill = bytes([(entry.generation * 16 + (entry.step or 0)) % 256])
    for record in (manifest.layout, *manifest.archives):
        name = join(attempt_directory(entry.directory, manifest.attempt), record.name)
        assert storage.read_bytes(name, 1 << 20) == fill * record.nbytes


def save_next_step(storage):
    generation = claim_generation(storage, (1, 10))
    with Lease(storage, "step-00000020/data-000000000002-20"):
        write_checkpoint(storage, 20, generation, (1, 10))
    return (2, 20), lambda: retain(storage, [KeepLast(1)])


def save_same_step_again(storage):
    write_checkpoint(storage, 10, 2, (1, 5))
    return (2, 10), lambda: retain(storage, [KeepLast(1)])


def replace_a_checkpoint(storage):
    write_checkpoint(storage, None, 2)
    return (2, -1), lambda: replace_older(storage, 2)


@pytest.mark.parametrize(
    ("first", "save"),
    [(10, save_next_step), (10, save_same_step_again), (None, replace_a_checkpoint)],
    ids=["next step", "same step", "replaced"],
)
def test_a_crash_leaves_the_old_checkpoint_or_the_new_one_and_nothing_partial(tmp_path, first, save):
    root = tmp_path / "run"
    write_checkpoint(LocalStorage(root), first)
    old = committed(LocalStorage(root))[0].order
    model = ModelDisk(root)
    disk = RecordingDisk()
    new, clean = save(LocalStorage(root, disk))
    done = len(disk.operations)
    assert clean() == []
    assert [entry.order for entry in committed(LocalStorage(root))] == [new]

    seen = set()
    for count in crash_states(disk.operations, model, tmp_path / "after"):
        storage = LocalStorage(tmp_path / "after", QuickDisk())
        entries = committed(storage)
        for entry in entries:
            check_whole(storage, entry)
        orders = [entry.order for entry in entries]
        assert orders in ([old], [old, new], [new]), (count, orders)
        if count >= done:
            # The commit has returned: no crash may take the new one away.
            assert orders[-1] == new
        if count < done:
            assert old in orders
        seen.add(tuple(orders))
        # The lease of this very process would count as long as it lives.
        (storage.root / "step-00000020/data-000000000002-20/lease.json").unlink(missing_ok=True)
        then = storage.now() - LEASE_SECONDS - 60
        for path in storage.root.rglob("*"):
            os.utime(path, (then, then))
        assert remove_leftovers(storage) == []
        assert [entry.order for entry in committed(storage)] == orders
        for entry in entries:
            check_whole(storage, entry)
        names = {path.name for path in storage.root.rglob("*")}
        assert sum(name.startswith("data-") for name in names) == len(entries)
        assert not any(name.startswith(".tmp-") for name in names)
    assert seen == {(old,), (old, new), (new,)}


def test_the_model_finds_a_missing_sync(tmp_path):
    """The test above can fail: without the syncs of files, or of directories, it finds partial checkpoints."""
    for missing in ("sync", "sync_directory"):
        root = tmp_path / missing
        write_checkpoint(LocalStorage(root), 10)
        model, disk = ModelDisk(root), RecordingDisk()
        write_checkpoint(LocalStorage(root, disk), 20)
        operations = [operation for operation in disk.operations if operation[0] != missing]
        failures = 0
        for count in crash_states(operations, model, tmp_path / "after"):
            storage = LocalStorage(tmp_path / "after", QuickDisk())
            try:
                entries = committed(storage)
                for entry in entries:
                    check_whole(storage, entry)
                assert count < len(operations) or len(entries) == 2
            except Exception:
                failures += 1
        assert failures > 0
