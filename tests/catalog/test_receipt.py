"""Receipts and outcomes, and the channel on which they travel."""

import contextlib
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.receipt import Channel, Outcome, Receipt, StorageStore, collect
from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.counters import counters
from ckptengine.errors import CheckpointError, DeadlineError, SaveFailedError

RECORD = ArchiveRecord("rank-00001.zarr.zip", 8192, 4096, "0" * 64)
GOOD = Receipt(
    rank=1,
    archive=RECORD,
    value_paths=(("a", 1), ("b.c",)),
    digests=bytes(range(16)),
    replica_crcs=((("model", "w"), 2**32 - 1),),
    rows=b"\0rows\xff" * 300_000,
    alone=True,
)


def soon(seconds):
    return time.monotonic() + seconds


@pytest.fixture(params=["memory", "storage"])
def store(request, storage):
    return MemoryStore() if request.param == "memory" else StorageStore(storage, "step/data-x")


def is_empty(store):
    return not (store._values if isinstance(store, MemoryStore) else store._storage.list("step/data-x"))


def test_a_receipt_comes_back_equal():
    assert Receipt.decode(GOOD.encode()) == GOOD
    failed = Receipt(rank=3, archive=None, error="the disk is full")
    assert Receipt.decode(failed.encode()) == failed
    for outcome in (Outcome(), Outcome("why", True, "DeadlineError")):
        assert Outcome.decode(outcome.encode()) == outcome


def test_receipts_are_collected_and_the_outcome_is_told(store):
    channels = [Channel(store, "attempt-1", rank, 3) for rank in range(3)]
    receipts = [Receipt(rank, RECORD, rows=GOOD.rows) for rank in range(3)]
    threading.Timer(0.2, channels[2].send, (receipts[2],)).start()
    channels[1].send(receipts[1])
    assert collect(channels[0], receipts[0], soon(30)) == receipts
    channels[0].announce(Outcome(plan_together=True))
    for channel in channels[1:]:
        assert channel.outcome(soon(30)) == Outcome(plan_together=True)
    assert is_empty(store)


def test_rank_0_sees_when_all_others_have_heard_the_outcome(store):
    channels = [Channel(store, "attempt-1", rank, 3) for rank in range(3)]
    channels[0].announce(Outcome("the disk is full", True, "SaveFailedError"))
    channels[1].outcome(soon(30))
    assert not channels[0].heard(soon(0.1))
    threading.Timer(0.2, channels[2].outcome, (soon(30),)).start()
    assert channels[0].heard(soon(30))


def test_messages_in_the_storage_cost_no_sync(storage):
    before = counters().syncs
    store = StorageStore(storage, "data-x")
    storage.make_directory("data-x")
    made = counters().syncs
    Channel(store, "attempt-1", 1, 2).send(GOOD)
    collect(Channel(store, "attempt-1", 0, 2), Receipt(0, RECORD), soon(30))
    assert counters().syncs == made > before
    assert storage.list("data-x") == []


def test_a_message_that_is_taken_while_somebody_looks_at_it_is_gone(storage, monkeypatch):
    """Rank 0 looks whether an outcome was taken, and cleans up then."""
    storage.make_directory("data-x")
    store = StorageStore(storage, "data-x")
    Channel(store, "attempt-1", 0, 2).announce(Outcome("why"))
    read = storage.read_bytes

    def taken(name, limit):
        storage.delete(name)
        return read(name, limit)

    monkeypatch.setattr(storage, "read_bytes", taken)
    assert Channel(store, "attempt-1", 0, 2).heard(soon(30))


def test_an_error_is_raised_at_once_though_other_ranks_are_missing(store):
    for rank in (3, 5):
        Channel(store, "attempt-1", rank, 6).send(Receipt(rank, None, error="the disk is full"))
    started = time.monotonic()
    with pytest.raises(SaveFailedError, match=r"rank 3: the disk is full; rank 5: the disk is full"):
        collect(Channel(store, "attempt-1", 0, 6), Receipt(0, RECORD), soon(100))
    assert time.monotonic() - started < 50


def test_missing_ranks_are_named(store):
    Channel(store, "attempt-1", 2, 4).send(Receipt(2, RECORD))
    with pytest.raises(DeadlineError, match="ranks 1, 3 did not report"):
        collect(Channel(store, "attempt-1", 0, 4), Receipt(0, RECORD), soon(0.3))


def test_a_dead_rank_0_is_named(monkeypatch):
    monkeypatch.setattr("ckptengine.catalog.receipt._GRACE", 0.1)
    with pytest.raises(DeadlineError, match="rank 0"):
        Channel(MemoryStore(), "attempt-1", 1, 2).outcome(soon(0.1))


def test_attempts_do_not_hear_each_other():
    store = MemoryStore()
    Channel(store, "attempt-1", 1, 2).send(Receipt(1, RECORD))
    with pytest.raises(DeadlineError):
        collect(Channel(store, "attempt-2", 0, 2), Receipt(0, RECORD), soon(0.1))


def test_every_truncated_receipt_is_damaged():
    data = Receipt(1, RECORD, value_paths=(("a",),), digests=bytes(8)).encode()
    for length in range(len(data)):
        with pytest.raises(SaveFailedError, match="damaged"):
            Receipt.decode(data[:length])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages_give_nothing_but_our_errors(data):
    whole = bytearray(Receipt(1, RECORD, value_paths=(("a", 2),), digests=bytes(8)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for kind, message in ((Receipt, bytes(whole)), (Outcome, data.draw(st.binary(max_size=50)))):
        with contextlib.suppress(CheckpointError):
            kind.decode(message)


def test_of_those_who_claim_a_key_one_gets_it_and_all_hear_what_it_is(store):
    assert [store.claim("key", b"first"), store.claim("key", b"second")] == [b"first"] * 2
    assert store.get("key", 0.0) == b"first"
