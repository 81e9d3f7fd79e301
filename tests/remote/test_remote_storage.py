"""What a storage promises, kept by object stores."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import uuid

import numpy as np
import pytest
from buckets import QUICK, SMALL, Bucket
from contract import StorageContract, write_archive

from ckptengine.catalog.lease import Lease
from ckptengine.catalog.retention import remove_leftovers
from ckptengine.errors import StorageError
from ckptengine.storage.budget import Budget
from ckptengine.storage.remote import RemoteStorage, _requests
from ckptengine.storage.s3 import S3Objects
from ckptengine.storage.upload import part_nbytes_for


@pytest.fixture(params=["memory", "s3"])
def storage(request: pytest.FixtureRequest) -> RemoteStorage:
    if request.param == "s3":
        # Through the proxy: moto alone lets several conditional writes pass at the same time.
        return request.getfixturevalue("disturbed").storage()
    return RemoteStorage(f"memory://{uuid.uuid4().hex}/run", budget=SMALL, patience=QUICK)


class TestContract(StorageContract):
    """The list that all storages keep."""


def some_bytes(nbytes: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, nbytes, np.uint8)


def test_an_archive_that_is_given_up_leaves_nothing(bucket):
    storage, data = bucket.storage(), some_bytes(11 << 20)
    with pytest.raises(RuntimeError), storage.create_archive("data/archive", data.nbytes) as archive:
        archive.write(data.ctypes.data, data.nbytes, 0)
        assert len(bucket.uploads()) == 1
        raise RuntimeError
    assert bucket.uploads() == []
    assert bucket.names() == []


def test_an_upload_takes_no_more_memory_than_its_parts_in_flight(bucket):
    storage, data = bucket.storage(), some_bytes(64 << 20)
    write_archive(storage, "warm", data[: 6 << 20])
    tracemalloc.start()
    try:
        write_archive(storage, "archive", data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= SMALL.requests * SMALL.part_nbytes
    assert storage.read_range("archive", 60 << 20, 4 << 20) == data[60 << 20 :].tobytes()


def test_parts_stay_within_the_stores_limits():
    for nbytes in (1, 1 << 30, 1 << 40, 40 << 40):
        part = part_nbytes_for(nbytes, Budget(), S3Objects)  # type: ignore[arg-type]
        assert nbytes // part + 1 <= S3Objects.most_parts
        assert S3Objects.least_part_nbytes <= part <= S3Objects.most_part_nbytes
        assert nbytes < 512 << 20 or part >= 64 << 20
    # What comes in small pieces goes in smaller parts, several of each piece at once.
    assert part_nbytes_for(1 << 30, Budget(), S3Objects, 64 << 20) == 8 << 20  # type: ignore[arg-type]
    assert part_nbytes_for(1 << 30, Budget(), S3Objects, 4 << 20) == 5 << 20  # type: ignore[arg-type]
    assert 8 << 20 < part_nbytes_for(1 << 40, Budget(), S3Objects, 64 << 20) < 128 << 20  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="use more ranks"):
        part_nbytes_for(50 << 40, Budget(), S3Objects)  # type: ignore[arg-type]


def test_reads_are_joined_over_small_gaps_and_cut_to_the_budget():
    assert _requests([[0, 10], [12, 5], [100, 30]], 20, 2) == [
        [(0, 10), (12, 5)],
        [(100, 20)],
        [(120, 10)],
    ]


def test_uploads_of_dead_attempts_are_swept_and_those_of_living_ones_are_not(bucket: Bucket):
    storage, data = bucket.storage(), some_bytes(11 << 20)
    dead, living = "step-00000001/data-0123456789ab-1", "step-00000001/data-0123456789ac-2"
    archives = [storage.create_archive(f"{place}/rank-00000.zarr.zip", data.nbytes) for place in (dead, living)]
    other = storage.create_archive("data-of-mine/model.bin", data.nbytes)
    for archive in (*archives, other):
        archive.write(data.ctypes.data, data.nbytes, 0)
    with Lease(storage, living):
        assert remove_leftovers(storage) == []
        left = sorted(item["Key"] for item in bucket.uploads())
        assert left == ["run/data-of-mine/model.bin", f"run/{living}/rank-00000.zarr.zip"]
    storage.delete_tree(living)
    assert [item["Key"] for item in bucket.uploads()] == ["run/data-of-mine/model.bin"]
    other.close()


def test_a_store_without_conditional_writes_is_recognized_and_told_of(bucket, monkeypatch, caplog):
    monkeypatch.setattr(S3Objects, "create", lambda self, key, data, seconds: self.put(key, data, seconds))
    storage = bucket.storage()
    storage.create()
    assert "let only one job at a time write to this run" in caplog.text
    assert storage.put_if_absent("m", b"first")
    assert not storage.put_if_absent("m", b"second")
    assert storage.read_bytes("m", 9) == b"first"
    assert storage.list() == ["m"]


def test_a_missing_bucket_is_named(bucket):
    storage = RemoteStorage("s3://no-such-bucket-here/run", bucket.options, patience=QUICK)
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here/run.*: 404 NoSuchBucket; check the bucket"):
        storage.create()


MISSING = """
import sys
import ckptengine as ce
from ckptengine.errors import StorageError
assert not {"fsspec", "s3fs", "aiohttp", "botocore"} & set(sys.modules)
for package, advice in (("s3fs", "pip install s3fs"), ("fsspec", "pip install fsspec")):
    sys.modules[package] = None
    try:
        ce.load("s3://bucket/run")
    except StorageError as error:
        assert advice in str(error), error
    else:
        raise AssertionError
"""


def test_nothing_is_imported_before_it_is_needed_and_what_is_missing_is_named():
    subprocess.run([sys.executable, "-c", MISSING], check=True, timeout=60)
