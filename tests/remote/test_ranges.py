"""Large reads of s3:// through obstore: the same bytes, errors and credentials as through s3fs alone."""

from __future__ import annotations

import errno
import logging
from dataclasses import replace

import numpy as np
import pytest
from buckets import QUICK, Bucket
from contract import StorageContract
from forkserver import fork
from obstore_reads import counted_reads
from servers import KEY, SECRET

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError, StorageError
from ckptengine.storage.ranges import _FAILURES
from ckptengine.storage.remote import RemoteStorage

pytest.importorskip("obstore")

STATE = {"w": np.random.default_rng(5).standard_normal(1_500_000), "step": 3}
DATA = r"GET .*rank-00000"
ONLY_OBSTORE = "User-Agent: aiobotocore"  # s3fs' requests are spared


@pytest.fixture
def read(monkeypatch):
    """The reads that obstore has made, as (key, position, bytes)."""
    return counted_reads(monkeypatch)


def check(bucket: Bucket, **more: object) -> None:
    found = ce.load(f"{bucket.url}/run", storage_options={**bucket.options, **more})
    assert (found["w"] == STATE["w"]).all()


class TestContract(StorageContract):
    @pytest.fixture
    def storage(self, disturbed) -> RemoteStorage:
        return disturbed.storage()  # moto alone lets several conditional writes pass at the same time


def test_the_data_of_a_load_comes_through_obstore_and_small_files_through_s3fs(bucket, quick, read):
    ce.save(f"{bucket.url}/run", STATE, storage_options=bucket.options)
    check(bucket)
    assert sum(nbytes for _, _, nbytes in read) >= STATE["w"].nbytes
    assert all("rank-00000" in key for key, _, _ in read)


@pytest.mark.parametrize(
    "kind", ["500 InternalError", "503 SlowDown", "reset before", "reset after", "truncated", "wrong length", "silence"]
)
def test_a_load_survives_faults_in_its_data(bucket, disturbed, proxy, quick, kind, read):
    ce.save(f"{bucket.url}/run", STATE, storage_options=bucket.options)
    fault = proxy.fault(kind, DATA, 3, ONLY_OBSTORE)
    check(disturbed)
    assert fault.done == 3
    assert read


def test_what_only_obstore_can_not_read_s3fs_reads_and_it_is_told(bucket, disturbed, proxy, quick, caplog):
    ce.save(f"{bucket.url}/run", STATE, storage_options=bucket.options)
    fault = proxy.fault("503 SlowDown", DATA, 10**6, ONLY_OBSTORE)
    check(disturbed)
    assert _FAILURES <= fault.done < 2 * _FAILURES
    assert "obstore failed to read what s3fs then read, 8 times in a row: s3fs reads everything for 60 s" in caplog.text


@pytest.mark.parametrize(("kind", "number"), [("403 AccessDenied", errno.EACCES), ("503 SlowDown", errno.EIO)])
def test_an_error_of_the_store_is_told_in_the_same_words(bucket, disturbed, proxy, kind, number):
    bucket.storage().write_bytes("x", bytes(1 << 20))
    storage = disturbed.storage(patience=replace(QUICK, seconds=6))
    proxy.fault(kind, "GET .*x", 10**6)
    with pytest.raises(StorageError, match=f"cannot read s3://.*/run/x: {kind}") as caught:
        storage.read_range("x", 0, 1 << 20)
    assert caught.value.errno == number
    assert SECRET not in str(caught.value)


def test_what_is_missing_or_ends_before_is_told_as_that(bucket, read):
    storage = bucket.storage()
    storage.write_bytes("x", bytes(range(256)) * 1024)
    assert storage.read_range("x", 5, 200_000) == (bytes(range(256)) * 1024)[5:200_005]
    assert len(read) == 1
    for position in (100_000, 1 << 20):
        with pytest.raises(CheckpointDamagedError, match="ends at byte"):
            storage.read_range("x", position, 200_000)
    with pytest.raises(StorageError, match="404 NoSuchKey"):
        storage.read_range("y", 0, 200_000)


def test_what_the_environment_says_of_another_store_is_not_taken(bucket, disturbed, proxy, quick, read, monkeypatch):
    ce.save(f"{bucket.url}/run", STATE, storage_options=bucket.options)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAOTHER",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "token",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_REGION": "eu-north-1",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
    }.items():
        monkeypatch.setenv(name, value)
    sent, forward = [], proxy._next

    def noted(line, headers):
        if "rank-00000" in line and "aiobotocore" not in headers["User-Agent"]:
            sent.append(headers)
        return forward(line, headers)

    monkeypatch.setattr(proxy, "_next", noted)
    check(disturbed)
    assert read
    assert len(sent) == len(read)
    for headers in sent:
        assert f"Credential={KEY}/" in headers["Authorization"]
        assert "/us-east-1/s3/" in headers["Authorization"]
        assert "x-amz-security-token" not in headers


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"requester_pays": True}, "requester_pays"),
        ({"s3_additional_kwargs": {"ExpectedBucketOwner": "123456789012"}}, "s3_additional_kwargs"),
        ({"config_kwargs": {"signature_version": "s3"}}, "a signature other than version 4"),
        ({"config_kwargs": {"proxies": {"https": "http://127.0.0.1:1"}}}, "a proxy"),
    ],
)
def test_what_obstore_can_not_be_told_leaves_the_reads_to_s3fs_and_is_logged(bucket, quick, read, caplog, more, word):
    caplog.set_level(logging.INFO, "ckptengine")
    ce.save(f"{bucket.url}/run", STATE, storage_options=bucket.options)
    check(bucket, **more)
    assert read == []
    assert f"reads go only through s3fs: obstore does not support {word}" in caplog.text


def test_damage_is_found(bucket, quick, read):
    ce.save(f"{bucket.url}/run", STATE, storage_options=bucket.options)
    key = next(key for key in bucket.names() if "rank-00000" in key)
    data = bytearray(bucket.fs.cat_file(f"{bucket.url}/{key}"))
    data[len(data) // 2] ^= 1
    bucket.fs.pipe_file(f"{bucket.url}/{key}", bytes(data))
    with pytest.raises(CheckpointError, match=r"s3://.*rank-00000.*bytes \d+ to \d+"):
        check(bucket)
    assert read


def test_a_forked_process_reads_too(bucket, in_environment):
    bucket.storage("x").write_bytes("y", bytes(1 << 20))
    code = (
        "import os, sys; from ckptengine.storage.open import open_storage\n"
        "storage = open_storage(sys.argv[1]); read = lambda: storage.read_range('y', 0, 1 << 20) == bytes(1 << 20)\n"
        "assert read()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if read() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0 and read()\n"
    )
    with fork(["-c", code, f"{bucket.url}/x"]) as process:
        assert process.wait(100) == 0
