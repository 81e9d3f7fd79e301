"""Several writers and one step: the store decides, and all know how it ended."""

from __future__ import annotations

import threading
import uuid

import pytest
from buckets import QUICK, SMALL

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory, publish
from ckptengine.catalog.generation import claim_generation
from ckptengine.catalog.listing import committed, read_manifest, step_directory
from ckptengine.catalog.manifest import Manifest
from ckptengine.errors import SaveFailedError
from ckptengine.storage.base import join
from ckptengine.storage.remote import RemoteStorage

WRITERS, ROUNDS = 8, 100


@pytest.fixture(params=["memory", "s3"])
def make(request):
    """Return a call that gives each writer a storage of its own, in the same place."""
    if request.param == "s3":
        return request.getfixturevalue("disturbed").storage
    url = f"memory://{uuid.uuid4().hex}/run"
    return lambda: RemoteStorage(url, budget=SMALL, patience=QUICK)


def test_of_eight_writers_exactly_one_commits_and_the_others_are_told(make):
    storages = [make() for _ in range(WRITERS)]
    storages[0].create()
    meet = threading.Barrier(WRITERS)
    outcomes: list[list[str]] = [[] for _ in range(ROUNDS)]
    broken: list[BaseException] = []

    def write(writer: int) -> None:
        storage = storages[writer]
        try:
            for step in range(ROUNDS):
                attempt, directory = f"{writer:012x}-{step}", step_directory(step)
                record = ArchiveRecord("layout.zarr.zip", 4, 0, "0" * 64)
                storage.write_bytes(join(attempt_directory(directory, attempt), record.name), b"data")
                manifest = Manifest(
                    step=step,
                    generation=1,
                    parent=None,
                    attempt=attempt,
                    world_size=1,
                    block_nbytes=1 << 16,
                    archives=(record,),
                    layout=record,
                    metadata={},
                )
                meet.wait(60)
                try:
                    publish(storage, directory, manifest)
                    outcomes[step].append(attempt)
                except SaveFailedError as error:
                    assert "has committed this step in this generation" in str(error)
        except BaseException as error:
            broken.append(error)
            meet.abort()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broken == []
    entries = committed(storages[0])
    assert [entry.step for entry in entries] == list(range(ROUNDS))
    for step in {0, ROUNDS // 2, ROUNDS - 1}:
        assert outcomes[step] == [read_manifest(storages[0], entries[step]).attempt]
    assert all(len(winners) == 1 for winners in outcomes)


def test_no_two_lives_claim_the_same_generation(make):
    claimed: list[int] = []
    storage = make()
    storage.create()
    threads = [
        threading.Thread(target=lambda: claimed.append(claim_generation(storage, None))) for _ in range(WRITERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, WRITERS + 1))
