"""A disturbed network between the engine and a real S3 server: nothing is lost, nothing is half committed."""

from __future__ import annotations

import errno
import logging
from dataclasses import replace

import numpy as np
import pytest
from buckets import QUICK, Bucket
from servers import SECRET, Proxy

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError, StorageError
from ckptengine.storage.remote import RemoteStorage
from ckptengine.storage.retry import Patience

WRITES = {
    "a part of the archive": r"PUT .*partNumber=2",
    "the beginning of the upload": r"POST .*\?uploads",
    "the end of the upload": r"POST .*\?uploadId",
    "the layout": r"PUT .*layout",
    "the lease": r"PUT .*lease",
    "the manifest": r"PUT .*manifest",
    "a look before the commit": r"HEAD .*rank-00000",
    "a listing": r"GET .*list-type=2",
}
READS = {
    "the data": r"GET .*rank-00000",
    "the manifest": r"GET .*manifest",
    "the layout": r"GET .*layout",
    "a listing": r"GET .*list-type=2",
    "the size": r"HEAD .*rank-00000",
}
KINDS = ["500 InternalError", "503 SlowDown", "reset before", "reset after"]


def state(seed: int = 1) -> dict:
    return {"w": np.random.default_rng(seed).standard_normal(1_500_000), "step": seed}


def check(bucket: Bucket, seed: int = 1) -> None:
    found = ce.load(f"{bucket.url}/run", storage_options=bucket.options)
    assert found["step"] == seed
    assert (found["w"] == state(seed)["w"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_survives_a_fault_in_any_of_its_requests(bucket, disturbed, proxy, quick, kind):
    faults = {name: proxy.fault(kind, pattern) for name, pattern in WRITES.items()}
    ce.save(f"{disturbed.url}/run", state(), storage_options=disturbed.options)
    assert [name for name, fault in faults.items() if fault.done == 0] == []
    check(bucket)
    # What a lost reply to the beginning of an upload has left holds no bytes, and is swept when its time has come.
    assert len(bucket.uploads()) <= (1 if kind == "reset after" else 0)
    assert len([key for key in bucket.names() if "manifest" in key]) == 1
    assert len(bucket.names()) == 3


@pytest.mark.parametrize("kind", [*KINDS, "truncated", "wrong length"])
def test_a_load_survives_a_fault_in_any_of_its_requests(bucket, disturbed, proxy, quick, kind):
    ce.save(f"{bucket.url}/run", state(), storage_options=bucket.options)
    patterns = READS if kind not in ("truncated", "wrong length") else {"the data": READS["the data"]}
    faults = {name: proxy.fault(kind, pattern, 2) for name, pattern in patterns.items()}
    check(disturbed)
    assert [name for name, fault in faults.items() if fault.done == 0] == []


def test_requests_without_a_reply_are_given_up_and_made_again(bucket, disturbed, proxy, quick):
    faults = [proxy.fault("silence", pattern) for pattern in (WRITES["a part of the archive"], READS["the data"])]
    ce.save(f"{disturbed.url}/run", state(), storage_options=disturbed.options)
    check(disturbed)
    assert [fault.done for fault in faults] == [1, 1]
    assert bucket.uploads() == []


@pytest.mark.parametrize("pattern", [WRITES["a part of the archive"], WRITES["the end of the upload"]])
def test_a_save_that_can_not_be_done_commits_nothing_and_leaves_nothing(
    bucket, disturbed, proxy, quick, monkeypatch, pattern
):
    ce.save(f"{bucket.url}/run", state(1), storage_options=bucket.options)
    disturbed.storage().list()  # so that the connection is there
    monkeypatch.setattr("ckptengine.storage.remote.Patience", lambda: replace(QUICK, seconds=8))
    proxy.fault("503 SlowDown", pattern, 10**6)
    with pytest.raises(CheckpointError, match=r"upload .*s3://.*rank-00000.*: 503 SlowDown \(\d+ tries in"):
        ce.save(f"{disturbed.url}/run", state(2), storage_options=disturbed.options)
    check(bucket, 1)
    assert bucket.uploads() == []
    assert len(bucket.names()) == 3


def test_a_refusal_is_not_repeated(disturbed, proxy, quick):
    refused = proxy.fault("403 AccessDenied", "PUT .*rank-00000", 10**6)
    with pytest.raises(CheckpointError, match="403 AccessDenied; check the credentials and what they permit"):
        ce.save(f"{disturbed.url}/run", {"w": np.ones(10)}, storage_options=disturbed.options)
    assert refused.done == 1


@pytest.mark.parametrize(
    ("kind", "number"),
    [("500 InternalError", errno.EIO), ("reset before", errno.EIO), ("silence", errno.ETIMEDOUT)],
)
def test_what_does_not_get_better_ends_at_the_deadline(disturbed, proxy, kind, number):
    storage = disturbed.storage()
    storage.list()  # so that the connection is there
    storage._patience = Patience(seconds=1, first=0.01, longest=0.05, request=0.3, slowest=1 << 40)
    proxy.fault(kind, "HEAD", 10**6)
    with pytest.raises(StorageError, match=r"cannot look up s3://.*/run/x: .*tries in") as caught:
        storage.size("x")
    assert caught.value.errno == number


def test_our_own_manifest_after_a_lost_reply_is_success_and_anothers_is_not(disturbed, proxy):
    storage = disturbed.storage()
    proxy.fault("reset after", "PUT .*/m1")
    assert storage.put_if_absent("m1", b"ours")
    storage.write_bytes("m2", b"theirs")
    proxy.fault("reset before", "PUT .*/m2")
    assert not storage.put_if_absent("m2", b"ours")
    assert storage.read_bytes("m2", 9) == b"theirs"


def test_a_conflict_is_tried_again_and_a_taken_name_is_not(disturbed, proxy):
    storage = disturbed.storage()
    storage.create()
    conflict = proxy.fault("409 ConditionalRequestConflict", "PUT .*/m", 2)
    assert storage.put_if_absent("m", b"1")
    assert conflict.done == 2
    proxy.seen.clear()
    assert not storage.put_if_absent("m", b"2")
    assert len([line for line in proxy.seen if line.startswith("PUT")]) == 1


def test_a_store_that_answers_not_implemented_is_one_without_conditional_writes(bucket, caplog):
    storage = bucket.storage()
    storage._objects.create = lambda *_: (_ for _ in ()).throw(_NotImplemented())  # type: ignore[method-assign]
    assert storage.put_if_absent("m", b"1")
    assert not storage.put_if_absent("m", b"2")
    assert "can't decide which of two writers is first" in caplog.text


class _NotImplemented(Exception):
    response = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}  # noqa: RUF012


def test_damage_in_the_store_is_found_and_named(bucket, quick):
    ce.save(f"{bucket.url}/run", state(), storage_options=bucket.options)
    key = next(key for key in bucket.names() if "rank-00000" in key)
    data = bytearray(bucket.fs.cat_file(f"{bucket.url}/{key}"))
    data[len(data) // 2] ^= 1
    bucket.fs.pipe_file(f"{bucket.url}/{key}", bytes(data))
    with pytest.raises(CheckpointDamagedError, match=r"s3://.*rank-00000.*bytes \d+ to \d+"):
        ce.load(f"{bucket.url}/run", storage_options=bucket.options)


def test_credentials_and_the_stores_words_appear_nowhere(bucket, disturbed, proxy, quick, caplog):
    caplog.set_level(logging.DEBUG, "ckptengine")
    url, options = f"{disturbed.url}/run", disturbed.options
    texts = []
    with ce.Checkpointer(url, every=1, storage_options=options) as ckpt:
        texts += [repr(ckpt), repr(vars(ckpt)), repr(ckpt._tiers.places.persistent)]
        ckpt.step(1, state())
    for kind, pattern in (
        ("403 AccessDenied", "PUT"),
        ("403 InvalidAccessKeyId", "GET"),
        ("501 NotImplemented", "PUT"),
    ):
        fault = proxy.fault(kind, pattern, 10**6)
        for call in (
            lambda: ce.save(url, state(), storage_options=options),
            lambda: ce.load(url, storage_options=options),
        ):
            try:
                call()
            except CheckpointError as error:
                texts += _all_of(error)
        fault.times = 0
    for storage in (
        RemoteStorage(
            url, {**options, "endpoint_url": f"http://key:{SECRET}@store.invalid"}, patience=replace(QUICK, seconds=1)
        ),
    ):
        with pytest.raises(StorageError) as caught:
            storage.list()
        texts += _all_of(caught.value)
    with pytest.raises(StorageError) as caught:
        ce.load(f"s3://key:{SECRET}@bucket/run")
    texts += _all_of(caught.value)
    texts.append(caplog.text)
    for key in bucket.names():
        texts.append(bucket.fs.cat_file(f"{bucket.url}/{key}").decode("latin-1"))
    assert len(texts) > 12
    for text in texts:
        assert SECRET not in text
        assert options["key"] not in text


def _all_of(error: BaseException) -> list[str]:
    """Everything that a traceback would print of an error."""
    import traceback

    return [repr(error), *traceback.format_exception(error)]


def test_the_proxy_itself_passes_things_on(disturbed: Bucket, proxy: Proxy):
    disturbed.storage().write_bytes("x", b"1")
    assert proxy.seen


def test_a_publication_whose_outcome_is_not_known_keeps_its_data(bucket, disturbed, proxy, quick, monkeypatch):
    ce.save(f"{bucket.url}/run", state(1), storage_options=bucket.options)
    disturbed.storage().list()  # so that the connection is there
    monkeypatch.setattr("ckptengine.storage.remote.Patience", lambda: replace(QUICK, seconds=8))
    proxy.fault("reset before", WRITES["the manifest"], 10**6)
    with pytest.raises(CheckpointError, match="it is not known whether the store carried it out"):
        ce.save(f"{disturbed.url}/run", state(2), storage_options=disturbed.options)
    check(bucket, 1)
    # Were the manifest to come after all, what it names would be there.
    assert len([name for name in bucket.names() if "rank-00000" in name]) == 2


def test_without_the_permission_to_see_uploads_all_else_works_and_it_is_told_once(disturbed, proxy, quick, caplog):
    proxy.fault("403 AccessDenied", r"GET .*\?uploads", 10**6)
    with ce.Checkpointer(f"{disturbed.url}/run", every=1, keep_last=1, storage_options=disturbed.options) as ckpt:
        for step in (1, 2):
            ckpt.step(step, {"w": np.ones(10)})
    assert [name for name in disturbed.names() if "step-" in name and "manifest" in name] == [
        "run/step-00000002/manifest-0001.json"
    ]
    assert caplog.text.count("s3:ListBucketMultipartUploads") == 1


def test_a_publication_of_which_nothing_can_be_learned_is_not_taken_for_one_that_failed(bucket, disturbed, proxy):
    storage = disturbed.storage(patience=replace(QUICK, seconds=1))
    storage.create()
    lost = proxy.fault("reset after", "PUT .*generation-0001", times=10_000)
    proxy.fault("403 AccessDenied", "GET .*generation-0001", times=1)
    with pytest.raises(StorageError, match="can't be read") as caught:
        storage.put_if_absent("generation-0001.json", b'{"id": "mine"}')
    assert caught.value.errno == errno.ETIMEDOUT
    lost.times = 0
    assert storage.put_if_absent("generation-0001.json", b'{"id": "mine"}')
    assert not storage.put_if_absent("generation-0001.json", b'{"id": "other"}')


def test_a_claim_whose_reply_is_lost_is_read_back_and_the_local_tier_does_not_make_another(
    bucket, disturbed, proxy, tmp_path, quick
):
    proxy.fault("reset after", "PUT .*generation-0001", times=10_000)
    proxy.fault("403 ExpiredToken", "GET .*generation-0001", times=2)
    with ce.Checkpointer(
        f"{bucket.url}/run", local=tmp_path / "ckpt", storage_options=disturbed.options, preemption=None
    ) as ckpt:
        ckpt.save(1, state(1)).durable.result()
    claim = (tmp_path / "ckpt" / "generation-0001.json").read_bytes()
    assert bucket.storage().read_bytes("generation-0001.json", 4096) == claim
    check(bucket)
