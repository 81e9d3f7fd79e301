"""Of two ranks one does not learn how a save ended, or not in time: they come together again, and nothing is lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing_store import FailingStore
from waiting import until

import ckptengine as ce
from ckptengine.catalog import receipt
from ckptengine.catalog.listing import committed
from ckptengine.comm.exchange import StoreCommunicator
from ckptengine.errors import CheckpointError, DeadlineError
from ckptengine.storage.disk import Disk
from ckptengine.storage.local import LocalStorage

TIMEOUT = 3.0


class Pair:
    """Two ranks in threads, each with its Checkpointer."""

    def __init__(self, run: Path) -> None:
        self.run, self.store = run, FailingStore()
        self.pools = [ThreadPoolExecutor(1) for _ in range(2)]
        self.ranks = self.both(self._open)

    def _open(self, rank: int) -> ce.Checkpointer:
        comm = StoreCommunicator(self.store, rank, 2, "run", self.store)
        return ce.Checkpointer(self.run, comm=comm, timeout=TIMEOUT, max_failures=100, preemption=None)

    def both(self, call: Any) -> list[Any]:
        def run(rank: int) -> Any:
            try:
                return call(rank)
            except CheckpointError as error:
                return error

        calls = [pool.submit(run, rank) for rank, pool in enumerate(self.pools)]
        return [call.result(120) for call in calls]

    def save(self, step: int) -> list[Any]:
        """Save a step on both ranks; return the handles or what was raised."""
        state = {"w": np.full(100, float(step)), "step": step}
        return self.both(lambda rank: self.ranks[rank].save(step, state))

    def ends(self, handles: list[Any]) -> list[str]:
        def end(rank: int) -> str:
            if isinstance(handles[rank], Exception):
                return str(handles[rank])
            try:
                handles[rank].durable.result(60)
            except CheckpointError as error:
                return str(error)
            return ""

        return self.both(end)

    def steps(self) -> list[int | None]:
        return [entry.step for entry in committed(LocalStorage(self.run))]

    def close(self) -> None:
        assert self.both(lambda rank: self.ranks[rank].close()) == [None, None]
        for pool in self.pools:
            pool.shutdown()


@pytest.fixture
def pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(receipt, "_GRACE", 1.0)
    pair = Pair(folder / "run")
    assert pair.ends(pair.save(1)) == ["", ""]
    return pair


def stall_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rank 0 stand still before its next publication, for longer than the other waits for it."""
    publish, stalled = Disk.publish, threading.Event()

    def stall(self: Disk, source: str, target: str) -> bool:
        if "manifest" in target and not stalled.is_set():
            stalled.set()
            time.sleep(TIMEOUT + 4)
        return publish(self, source, target)

    monkeypatch.setattr(Disk, "publish", stall)


def test_a_rank_0_that_stalls_before_its_commit_costs_no_later_save_and_what_it_committed_is_told(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stall_once(monkeypatch)
    handles = pair.save(2)
    assert pair.ends(handles)[1].startswith("rank 0 did not report in time")
    assert pair.ends(handles)[0] == ""
    for step in (3, 4, 5):
        assert pair.ends(pair.save(step)) == ["", ""]
    assert pair.steps() == [1, 2, 3, 4, 5]
    assert pair.ends(handles) == ["", ""]
    assert [len(rank.history) for rank in pair.ranks] == [4, 4]  # the last one is not accounted for yet
    assert "rank 1 did not learn that in time" in caplog.text
    pair.close()


@pytest.fixture
def told_as_failed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Rank 0 has committed step 2, and rank 1 has accounted for it as failed."""
    stall_once(monkeypatch)
    handles = pair.save(2)
    ends = pair.ends(handles)
    assert ends[0] == ""
    assert ends[1].startswith("rank 0 did not report in time")
    pair.both(lambda rank: pair.ranks[rank].wait())
    assert [len(rank.history) for rank in pair.ranks] == [2, 1]
    return pair


def test_a_step_that_only_rank_0_knows_as_committed_is_saved_again_by_nobody(told_as_failed: Pair) -> None:
    pair = told_as_failed
    assert pair.ends(pair.save(2)) == ["", ""]
    assert [len(rank.history) for rank in pair.ranks] == [2, 2]
    assert pair.ends(pair.save(3)) == ["", ""]
    assert pair.steps() == [1, 2, 3]
    pair.close()


def test_a_last_step_that_only_rank_0_knows_as_committed_fails_no_rank_at_the_end(told_as_failed: Pair) -> None:
    told_as_failed.close()
    assert told_as_failed.steps() == [1, 2]


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("part", ["receipt/1", "outcome/1"])
@pytest.mark.parametrize("call", ["set", "get", "delete"])
def test_a_call_of_the_store_that_fails_once_costs_one_save_at_most(
    pair: Pair, call: str, part: str, done: bool
) -> None:
    pair.store.fails[call, part] = done
    handles = pair.save(2)
    pair.ends(handles)
    assert not pair.store.fails, "the call was never made"
    for step in (3, 4):
        assert pair.ends(pair.save(step)) == ["", ""]
    # A rank never goes on thinking that a step failed which is there.
    assert all((end == "") == (2 in pair.steps()) for end in pair.ends(handles))
    assert pair.steps()[-2:] == [3, 4]
    pair.close()


def test_a_missing_rank_is_named_though_the_others_are_told_late(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    announce, told = receipt.Channel.announce, threading.Event()
    monkeypatch.setattr(receipt.Channel, "announce", lambda self, *given: told.wait(60) and announce(self, *given))
    handle = pair.ranks[0].save(2, {"w": np.full(100, 2.0), "step": 2})
    try:
        with pytest.raises(DeadlineError, match="step-00000002 was not reached within 3 s: rank 1 did not report in"):
            handle.durable.result()
    finally:
        told.set()
    until(handle.durable.done, "the save has ended")
    assert pair.ends(pair.save(3)) == ["", ""]
    pair.close()


@pytest.mark.parametrize("later", [True, False], ids=["after the others have failed", "while they wait for it"])
@pytest.mark.parametrize("skipper", [0, 1])
def test_a_rank_that_leaves_a_save_out_is_named_and_the_next_save_is_made(
    pair: Pair, skipper: int, later: bool
) -> None:
    other = 1 - skipper
    state = {"w": np.full(100, 2.0), "step": 2}

    def alone(rank: int) -> Any:
        return None if rank == skipper else pair.ranks[rank].save(2, state)

    handle = pair.both(alone)[other]
    if later:
        with pytest.raises(CheckpointError, match=f"rank {skipper} did not"):
            handle.durable.result(60)
    else:
        until(lambda: list(pair.run.glob("step-00000002/data-*")), "the other one's thread has told where it is")
    began = time.monotonic()
    assert pair.ends(pair.save(3)) == ["", ""]
    if not later:
        # It was told so at once, and not when the time was up.
        assert time.monotonic() - began < TIMEOUT
        with pytest.raises(CheckpointError, match=f"rank {skipper}: it has left step-00000002 out"):
            handle.durable.result(60)
    assert pair.ends(pair.save(4)) == ["", ""]
    assert pair.steps() == [1, 3, 4]
    pair.close()
    assert not [key for key in pair.store._values if "/place" in key]
