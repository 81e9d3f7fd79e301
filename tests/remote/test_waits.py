"""No store keeps a caller for longer than it wants to wait, and what is waited for is told."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest
from servers import KEY, SECRET

import ckptengine as ce
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointError, DeadlineError, StorageError
from ckptengine.storage.connect import connect
from ckptengine.storage.generic import _File
from ckptengine.storage.open import open_storage
from ckptengine.storage.retry import Patience, persist
from ckptengine.storage.within import within

STATE = {"w": np.zeros(100)}


@pytest.fixture(params=["refuses", "is silent"])
def dead(request):
    """Options for a store at a port that refuses connections, or takes them and never says anything."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            held.listen(64)
        port = held.getsockname()[1]
        yield {
            "endpoint_url": f"http://127.0.0.1:{port}",
            "key": KEY,
            "secret": SECRET,
            "client_kwargs": {"region_name": "us-east-1"},
        }


@pytest.mark.parametrize(
    "call",
    [
        lambda url, **more: ce.save(url, STATE, **more),
        lambda url, **more: ce.load(url, **more),
        lambda url, **more: ce.load(url, into=STATE, **more),
        lambda url, **more: ce.Checkpointer(url, every=1, **more),
    ],
    ids=["save", "load arrays", "load", "Checkpointer"],
)
def test_the_callers_timeout_bounds_the_wait_for_a_dead_endpoint_which_is_named(dead, call):
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=dead["endpoint_url"]):
        call("s3://bucket/run", timeout=5, storage_options=dead)
    # Without the bound it is two minutes for each of several requests.
    assert time.monotonic() - began < 60


def test_a_wait_of_more_than_a_few_seconds_is_told_once(dead, caplog, monkeypatch):
    monkeypatch.setattr("ckptengine.storage.remote.Patience", lambda: Patience(request=5))
    with pytest.raises(CheckpointError):
        ce.load("s3://bucket/told", timeout=20, storage_options=dead)
    told = [record for record in caplog.records if "it is tried again for up to" in record.message]
    assert len(told) == 1
    assert dead["endpoint_url"] in told[0].message


def test_what_cleans_up_after_an_outage_does_not_wait_all_over_again(disturbed):
    objects = disturbed.storage()._objects
    patience = Patience(seconds=2, first=0.01, longest=0.05)

    def lost(_: object) -> None:
        raise ConnectionResetError

    def spent(call) -> float:
        began = time.monotonic()
        with pytest.raises(StorageError):
            persist("list", "s3://x", call, patience, objects)
        return time.monotonic() - began

    first = spent(lost)
    assert first >= 1.5
    assert spent(lost) < first
    persist("list", "s3://x", lambda _: None, patience, objects)
    assert objects.outage == -float("inf")


class Several(SingleProcess):
    """One process that says it is one of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.world_size = 2


@pytest.mark.parametrize("url", ["memory://x/run", "dir::memory://x/run"])
def test_the_memory_of_one_process_is_refused_where_several_ranks_are_to_share_it(url):
    for call in (
        lambda: ce.save(url, STATE, comm=Several()),
        lambda: ce.load(url, into=STATE, comm=Several()),
        lambda: ce.Checkpointer(url, every=1, comm=Several()),
    ):
        with pytest.raises(StorageError, match="memory:// is the memory of one process"):
            call()


def mistyped(good):
    client = good["client_kwargs"]
    return {
        "do you mean 'endpoint_url'": {**good, "endpont_url": "http://x"},
        "option 'nonsense'": {**good, "nonsense": 1},
        "option 'retry'": {**good, "config_kwargs": {"retry": 1}},
        "option 'endpoint'": {**good, "client_kwargs": {**client, "endpoint": 1}},
        "endpoint_url='127.0.0.1:9000' is not a URL": {**good, "endpoint_url": "127.0.0.1:9000"},
    }


def test_a_mistyped_option_or_endpoint_is_named(bucket):
    for message, options in mistyped(bucket.options).items():
        with pytest.raises(StorageError, match=message) as caught:
            ce.load(f"{bucket.url}/run", storage_options=options)
        assert SECRET not in str(caught.value)


def test_the_store_is_reached_where_something_else_is_registered_for_s3(bucket, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Other(MemoryFileSystem):
        protocol = "s3"

    monkeypatch.setitem(_registry, "s3", Other)
    ce.save(f"{bucket.url}/run", STATE, storage_options=bucket.options)
    assert (ce.load(f"{bucket.url}/run", storage_options=bucket.options)["w"] == 0).all()
    assert any("manifest" in name for name in bucket.names())


def test_an_upload_that_was_given_up_without_an_answer_is_not_finished_by_the_garbage_collector():
    class File:
        """As fsspec's: what closes it at last uploads what it holds."""

        closed = False

        def discard(self):
            time.sleep(5)

    objects = connect("memory://given-up/run", {})
    objects._in_memory, file = False, File()
    with pytest.raises(TimeoutError):
        _File(objects, file, "archive").abort(0.1)
    assert file.closed


def test_a_storage_call_that_is_cut_off_from_outside_names_the_endpoint_too(dead):
    storage = open_storage("s3://bucket/run", dead, timeout=60)
    with pytest.raises(
        DeadlineError, match=f"listing s3://bucket/run at {dead['endpoint_url']} has not ended after 2 s"
    ):
        within(2, "looking", storage.list)
