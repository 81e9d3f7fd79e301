"""What is to go from a store goes, whatever way of deleting the store knows."""

from __future__ import annotations

import numpy as np
import pytest

import ckptengine as ce

REFUSALS = ["400 MissingContentMD5", "501 NotImplemented", "405 MethodNotAllowed"]


def train(bucket, steps: int) -> None:
    with ce.Checkpointer(f"{bucket.url}/run", every=1, keep_last=1, storage_options=bucket.options) as ckpt:
        ckpt.restore(state := {"w": np.zeros(10)})
        for step in range(steps):
            ckpt.step(step, state)


def steps_of(bucket) -> set[str]:
    return {name.split("/")[1] for name in bucket.names() if "/step-" in name}


def test_old_steps_go_from_a_store_that_wants_content_md5(disturbed, proxy, quick):
    refused = proxy.fault("400 MissingContentMD5", r"POST .*\?delete", 10**6, unless="Content-MD5: ")
    train(disturbed, 3)
    assert steps_of(disturbed) == {"step-00000002"}
    assert refused.done == 0
    assert any("?delete" in line for line in proxy.seen)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_old_steps_go_from_a_store_without_bulk_deletion_which_is_found_out_once(disturbed, proxy, quick, refusal):
    refused = proxy.fault(refusal, r"POST .*\?delete", 10**6)
    train(disturbed, 4)
    assert steps_of(disturbed) == {"step-00000003"}
    assert refused.done == 1


def test_gc_frees_what_a_store_without_bulk_deletion_holds(disturbed, proxy, quick, in_environment, monkeypatch, call):
    monkeypatch.setenv("AWS_ENDPOINT_URL", disturbed.options["endpoint_url"])
    url = f"{disturbed.url}/run"
    with ce.Checkpointer(url, every=1, storage_options=disturbed.options) as ckpt:
        for step in range(3):
            ckpt.step(step, {"w": np.zeros(10)})
    proxy.fault("501 NotImplemented", r"POST .*\?delete", 10**6)
    result = call("gc", url, "--keep-last", 1)
    assert result.exit_code == 0, result.output
    assert steps_of(disturbed) == {"step-00000002"}


def test_a_deletion_that_is_not_permitted_is_not_tried_in_other_ways(disturbed, proxy):
    storage = disturbed.storage()
    for name in ("d/x", "d/y"):
        storage.write_bytes(name, b"1")
    refused = proxy.fault("403 AccessDenied", r"POST .*\?delete", 10**6)
    with pytest.raises(ce.errors.StorageError, match="403 AccessDenied"):
        storage.delete_tree("d")
    assert refused.done == 1
    assert not [line for line in proxy.seen if line.startswith("DELETE ")]


def test_more_keys_than_one_request_takes_are_deleted(bucket):
    storage = bucket.storage()
    storage._objects.most_deleted = 2
    for number in range(5):
        storage.write_bytes(f"d/{number}", b"1")
    storage.delete_tree("d")
    assert bucket.names() == []
