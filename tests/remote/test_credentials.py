"""Credentials that run out are read anew; what they do not permit is told as that."""

from __future__ import annotations

import errno
import logging

import numpy as np
import pytest
from buckets import QUICK
from servers import KEY, SECRET

import ckptengine as ce
from ckptengine.errors import CheckpointError, StorageError
from ckptengine.storage.remote import RemoteStorage

NEW = "AKIANEWNEWNEWNEWNEW0"
SIGNED_ANEW = f"Authorization: AWS4-HMAC-SHA256 Credential={NEW}"
STATE = {"w": np.zeros(3_000_000)}


@pytest.fixture
def options(in_environment, disturbed, monkeypatch):
    """What a job has that takes its credentials from the environment."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    return {"endpoint_url": disturbed.options["endpoint_url"]}


@pytest.mark.parametrize(
    "refusal", ["400 ExpiredToken", "400 InvalidToken", "403 AccessDenied", "403 InvalidAccessKeyId"]
)
def test_a_job_goes_on_when_its_token_expires_and_new_ones_lie_in_the_environment(
    options, disturbed, proxy, quick, monkeypatch, caplog, refusal
):
    with ce.Checkpointer(f"{disturbed.url}/run", every=1, max_failures=1, storage_options=options) as ckpt:
        ckpt.step(1, STATE).durable.result()
        proxy.fault(refusal, ".*", 10**6, unless=SIGNED_ANEW)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", NEW)
        ckpt.step(2, STATE).durable.result()
    assert [stats.step for stats in ckpt.history] == [1, 2]
    assert caplog.text.count("the credentials were read again") == 1


def test_an_upload_goes_on_where_the_token_expires_in_its_midst(options, disturbed, proxy, quick, monkeypatch):
    storage = RemoteStorage(f"{disturbed.url}/run", options, patience=QUICK)
    data = np.random.default_rng(1).integers(0, 256, 16 << 20, np.uint8)
    with storage.create_archive("archive", data.nbytes) as archive:
        archive.write(data.ctypes.data, 8 << 20, 0)
        proxy.fault("400 ExpiredToken", ".*", 10**6, unless=SIGNED_ANEW)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", NEW)
        archive.write(data.ctypes.data + (8 << 20), 8 << 20, 8 << 20)
        archive.finish()
    assert storage.read_range("archive", 0, data.nbytes) == data.tobytes()


def test_credentials_that_have_not_changed_are_refused_after_one_request(options, disturbed, proxy, caplog):
    storage = RemoteStorage(f"{disturbed.url}/run", options, patience=QUICK)
    refused = proxy.fault("400 ExpiredToken", "HEAD|GET", 10**6)
    with pytest.raises(StorageError, match="ExpiredToken; check the credentials"):
        storage.read_bytes("x", 9)
    assert refused.done == 1
    assert "read anew" not in caplog.text


@pytest.fixture
def read_only(bucket, disturbed, proxy, quick):
    """A run with checkpoints in a bucket that can't be written to."""
    with ce.Checkpointer(f"{bucket.url}/run", every=1, storage_options=bucket.options) as ckpt:
        for step in (1, 2):
            ckpt.step(step, {"w": np.full(10, float(step))})
    proxy.fault("403 AccessDenied", "PUT|POST|DELETE", 10**6)
    return disturbed


def test_a_run_in_a_read_only_bucket_is_restored(read_only, caplog):
    caplog.set_level(logging.WARNING)
    state = {"w": np.zeros(10)}
    url, options = f"{read_only.url}/run", read_only.options
    with ce.Checkpointer(url, every=1, on_error="raise", storage_options=options) as ckpt:
        assert ckpt.restore(state) == 2
        assert state["w"][0] == 2
        assert "it can be restored from, but not saved to" in caplog.text
        with pytest.raises(CheckpointError, match="opened only to restore from it: .*403 AccessDenied"):
            ckpt.step(3, state)


def test_a_place_that_can_not_be_written_to_and_has_nothing_to_restore_is_refused(disturbed, proxy, quick):
    proxy.fault("403 AccessDenied", "PUT|POST|DELETE", 10**6)
    with pytest.raises(StorageError, match="403 AccessDenied") as caught:
        ce.Checkpointer(f"{disturbed.url}/new", every=1, storage_options=disturbed.options)
    assert caught.value.errno == errno.EACCES


def test_the_audit_tells_a_refusal_from_damage(bucket, disturbed, proxy, quick, in_environment, monkeypatch, call):
    sampler = ce.ElasticSampler(20, 4, seed=1)
    with ce.Checkpointer(f"{bucket.url}/run", every=1, storage_options=bucket.options) as ckpt:
        for step, _ in enumerate(sampler.batches(), 1):
            ckpt.step(step, {"data": sampler})
    monkeypatch.setenv("AWS_ENDPOINT_URL", disturbed.options["endpoint_url"])
    assert call("audit", f"{disturbed.url}/run").exit_code == 0
    proxy.fault("403 AccessDenied", "(GET|HEAD) .*rank-00000", 10**6)
    result = call("audit", f"{disturbed.url}/run")
    assert result.exit_code == 2, result.output
    assert "403" in result.output
    assert "damage" not in result.output
    assert KEY not in result.output
    assert SECRET not in result.output
