"""What ranks of a node do to each other's images in memory, at whatever speed each of them goes."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.listing import claim_name, claimed_generations, committed, manifest_name
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import StorageError
from ckptengine.snapshot.shared_arena import SharedArena, remove_unused
from ckptengine.storage.local import LocalStorage
from ckptengine.tiers.memory import MemoryTier

NBYTES = 1 << 20
SERIES = "0123456789ab"


@pytest.fixture
def root() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"ckptengine-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder / "user" / "run"
    shutil.rmtree(folder)


def tier(root: Path, rank: int) -> MemoryTier:
    made = MemoryTier(str(root), rank)
    made.open()
    return made


def archive(rank: int) -> str:
    return f"rank-{rank:05d}.zarr.zip"


def data(step: int) -> str:
    return f"step-{step:08d}/data-{SERIES}-{step}"


def publish(memory: MemoryTier, rank: int, step: int) -> SharedArena:
    arena = memory.take(NBYTES)
    assert arena is not None
    memory.storage.make_directory(data(step))
    arena.publish(memory.storage.location(f"{data(step)}/{archive(rank)}"), NBYTES, bytes(4096))
    return arena


def commit(memory: MemoryTier, step: int, ranks: int = 2) -> None:
    record = ArchiveRecord("layout.zarr.zip", 0, 0, "0" * 64)
    archives = tuple(ArchiveRecord(archive(rank), NBYTES + 4096, NBYTES, "0" * 64) for rank in range(ranks))
    manifest = Manifest(step, 1, None, f"{SERIES}-{step}", ranks, 65536, archives, record)
    memory.storage.put_if_absent(f"step-{step:08d}/{manifest_name(1)}", manifest.encode())


def files(root: Path, step: int) -> set[str]:
    return {path.name for path in (root / data(step)).glob("rank-*")}


def test_cleaning_up_after_a_commit_spares_what_a_faster_rank_has_of_the_next_attempt(root):
    ranks = [tier(root, rank) for rank in range(2)]
    for step in (1, 2):
        for rank, memory in enumerate(ranks):
            memory.kept(publish(memory, rank, step))
        commit(ranks[0], step)
        if step == 1:
            ranks[0].tidy(f"{SERIES}-1")
    publish(ranks[1], 1, 3)
    ranks[0].tidy(f"{SERIES}-2")
    assert files(root, 3) == {archive(1)}
    assert files(root, 2) == {archive(0), archive(1)}
    assert not (root / "step-00000001").exists()


def test_the_newest_image_is_not_overwritten_while_this_nodes_copy_of_its_manifest_is_on_its_way(root):
    memory = tier(root, 0)
    memory.kept(publish(memory, 0, 1))
    commit(memory, 1, 1)
    memory.kept(publish(memory, 0, 2))  # committed by rank 0 on another node
    publish(memory, 0, 3)
    assert files(root, 2) == {archive(0)}


def test_an_arena_is_never_a_file_that_somebody_has_just_removed(root):
    memory, ended = tier(root, 0), threading.Event()
    path = str(root / "arenas" / "rank-00000-a")

    def clean_up() -> None:
        while not ended.is_set():
            remove_unused(path)

    cleaner = threading.Thread(target=clean_up)
    cleaner.start()
    try:
        opened = 0
        while opened < 2000:
            try:
                arena = SharedArena(path)
            except StorageError as error:
                if error.errno != errno.EBUSY:
                    raise
                continue
            opened += 1
            assert arena.is_file(path)
            arena.close()
    finally:
        ended.set()
        cleaner.join()
    memory.close(remove=True)


def test_memory_that_was_cut_off_for_a_smaller_image_is_pinned_anew_for_a_larger_one(root):
    # A device that has pinned pages goes on to write to them when the file has others in their place.
    arena = SharedArena(str(tier(root, 0).storage.root / "arenas" / "rank-00000-a"))
    pinned: list[str] = []

    def pin(address: int, nbytes: int):
        assert (address, nbytes) == (arena.address, arena.nbytes)
        pinned.append("pin")
        return lambda: pinned.append("unpin")

    arena.reserve(8 * NBYTES)
    for number, nbytes in enumerate((8, 8, 2, 2, 8, 8)):
        arena.begin(nbytes * NBYTES)
        arena.pin(pin)
        arena.publish(str(root / f"published-{number}"), nbytes * NBYTES, bytes(4096))
    assert pinned == ["pin", "unpin", "pin"]
    arena.close()


def test_a_job_that_ends_leaves_the_memory_of_one_that_took_its_run_over(root):
    old, new = tier(root, 0), tier(root, 0)
    publish(old, 0, 1)
    commit(old, 1, 1)
    publish(new, 0, 2)
    commit(new, 2, 1)
    new.note_claims({1: b"first", 2: b"second"})
    old.close(remove=True)
    old.clear()
    assert [entry.step for entry in committed(LocalStorage(root))] == [2]
    assert files(root, 2) == {archive(0)}
    assert claimed_generations(new.storage) == [1, 2]
    new.close(remove=True)
    new.clear()
    assert os.listdir(root.parent.parent) == []


@pytest.mark.parametrize(
    ("here", "run", "other"),
    [
        ({1: b"a"}, {1: b"a", 2: b"b"}, False),
        ({1: b"a", 2: b"b"}, {2: b"b"}, False),  # the run's directory was lost, and the job went on from memory
        ({1: b"a", 2: b"b"}, {1: b"a"}, False),  # the second claim has not come home
        ({1: b"a"}, {1: b"other"}, True),
        ({1: b"a", 2: b"b"}, {1: b"other", 2: b"another"}, True),
        ({1: b"a"}, {}, False),
    ],
)
def test_whose_the_memory_is_tells_the_newest_claim_that_it_shares_with_the_run(root, here, run, other):
    memory = tier(root, 0)
    for generation, claim in here.items():
        memory.storage.put_if_absent(claim_name(generation), claim)
    publish(memory, 0, 1)
    commit(memory, 1, 1)
    memory.close(remove=False)
    assert tier(root, 0).note_claims(run) is other
    assert [entry.step for entry in committed(LocalStorage(root))] == ([] if other else [1])


def test_nothing_stays_in_memory_after_ranks_that_end_at_the_same_moment(root):
    for _ in range(60):
        killed = [tier(root, rank) for rank in range(4)]
        killed[0].note_claims({1: b"{}"})
        for step in (1, 2):
            for rank, memory in enumerate(killed):
                memory.kept(publish(memory, rank, step))
            commit(killed[0], step, 4)
        for memory in killed:
            memory.close(remove=False)
        ranks, together = [tier(root, rank) for rank in range(4)], threading.Barrier(4)

        def end(memory: MemoryTier, together: threading.Barrier, first: bool) -> None:
            memory.prepare(NBYTES)
            together.wait(60)
            memory.close(remove=True)
            if first:
                memory.clear()

        with ThreadPoolExecutor(4) as threads:
            for ended in [threads.submit(end, memory, together, memory is ranks[0]) for memory in ranks]:
                ended.result(60)
        assert not root.parent.exists(), sorted(map(str, root.rglob("*")))
