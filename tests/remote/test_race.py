"""Several writers and one step: the store decides, and all know how it ended."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from buckets import QUICK, SMALL

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory, publish
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.listing import committed, manifest_name, read_manifest, step_directory
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import SaveFailedError
from ckptengine.storage.base import join
from ckptengine.storage.remote import RemoteStorage

WRITERS = 8


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.long)])
def make(request):
    """Return a call that gives each writer a storage of its own, in the same place."""
    # Who is last of eight at a server that takes turns waits, longer on a busy machine.
    patience = replace(QUICK, seconds=120, request=60)
    if request.param == "s3":
        bucket = request.getfixturevalue("disturbed")
        return lambda: bucket.storage(patience=patience)
    url = f"memory://{uuid.uuid4().hex}/run"
    return lambda: RemoteStorage(url, budget=SMALL, patience=patience)


def manifest_of(step: int, attempt: str) -> Manifest:
    names = "layout.zarr.zip", "rank-00000.zarr.zip"
    layout, archive = (ArchiveRecord(name, 4, 0, "0" * 64) for name in names)
    return Manifest(
        step=step,
        generation=1,
        parent=None,
        attempt=attempt,
        world_size=1,
        block_nbytes=1 << 16,
        archives=(archive,),
        layout=layout,
        metadata={},
    )


def race(
    make: Callable[[], RemoteStorage], rounds: int, write: Callable[[RemoteStorage, Manifest, threading.Barrier], bool]
) -> None:
    """Have all writers come to each step at the same time, and compare who says that he has won with what is there."""
    storages = [make() for _ in range(WRITERS)]
    storages[0].create()
    meet = threading.Barrier(WRITERS)
    winners: list[list[str]] = [[] for _ in range(rounds)]
    broken: list[BaseException] = []

    def work(writer: int) -> None:
        try:
            for step in range(rounds):
                manifest = manifest_of(step, f"{writer:012x}-{step}")
                if write(storages[writer], manifest, meet):
                    winners[step].append(manifest.attempt)
        except BaseException as error:
            broken.append(error)
            meet.abort()

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broken == []
    entries = committed(storages[0])
    assert [entry.step for entry in entries] == list(range(rounds))
    assert winners == [[read_manifest(storages[0], entry).attempt] for entry in entries]


def test_in_a_hundred_races_of_eight_writers_exactly_one_publishes(make):
    def write(storage: RemoteStorage, manifest: Manifest, meet: threading.Barrier) -> bool:
        assert manifest.step is not None
        name = join(step_directory(manifest.step), manifest_name(1))
        meet.wait(60)
        return storage.put_if_absent(name, manifest.encode())

    race(make, 100, write)


def test_the_losers_of_a_race_for_the_commit_are_told_who_has_won(make):
    def write(storage: RemoteStorage, manifest: Manifest, meet: threading.Barrier) -> bool:
        assert manifest.step is not None
        directory = step_directory(manifest.step)
        for record in (manifest.layout, *manifest.archives):
            storage.write_bytes(join(attempt_directory(directory, manifest.attempt), record.name), b"data")
        meet.wait(60)
        try:
            publish(storage, directory, manifest)
            return True
        except SaveFailedError as error:
            told = str(error)
        assert "has committed this step in this generation" in told
        return False

    race(make, 5, write)


def test_no_two_lives_claim_the_same_generation(make):
    claimed: list[int] = []
    storage = make()
    storage.create()
    threads = [threading.Thread(target=lambda: claimed.append(claim_generation(storage, None))) for _ in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, WRITERS + 1))
