"""An error on any rank is one on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ckptengine.comm.agree import from_all, from_first, on_all
from ckptengine.comm.base import Communicator
from ckptengine.comm.exchange import StoreCommunicator
from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.errors import CheckpointDamagedError, RankFailedError, StateError

WORLD = 3


def on_ranks(function: Callable[[Communicator], Any]) -> list[Any]:
    """Run a function on a thread for each rank; return results or exceptions by rank."""
    store = MemoryStore()

    def run(rank: int) -> Any:
        try:
            return function(StoreCommunicator(store, rank, WORLD, "run"))
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(run, range(WORLD)))


def failing(rank: int, error: Exception, result: Any) -> Any:
    if rank == 1:
        raise error
    return result


def test_each_rank_gets_what_came_of_its_own_part() -> None:
    assert on_ranks(lambda comm: on_all(comm, lambda: comm.rank * 10, 30, "working")) == [0, 10, 20]


def test_each_rank_gets_what_all_parts_gave() -> None:
    found = on_ranks(lambda comm: from_all(comm, lambda: bytes([comm.rank]), 30, "telling"))
    assert found == [[b"\0", b"\1", b"\2"]] * WORLD


def test_what_the_first_rank_gives_is_done_there_only() -> None:
    done: list[int] = []

    def work(comm: Communicator) -> bytes:
        done.append(comm.rank)
        return b"word"

    assert on_ranks(lambda comm: from_first(comm, lambda: work(comm), 30, "choosing")) == [b"word"] * WORLD
    assert done == [0]


@pytest.mark.parametrize("helper", [on_all, from_all])
def test_the_error_of_one_rank_is_raised_on_all_and_names_it(helper: Callable[..., Any]) -> None:
    error = CheckpointDamagedError("file x is damaged")
    found = on_ranks(lambda comm: helper(comm, lambda: failing(comm.rank, error, b""), 30, "reading"))
    assert found[1] is error
    for other in (found[0], found[2]):
        assert type(other) is CheckpointDamagedError
        assert str(other) == "reading failed on rank(s) 1: rank 1: file x is damaged"


def test_the_error_of_the_first_rank_is_raised_on_all() -> None:
    def work() -> bytes:
        raise StateError("nothing there")

    found = on_ranks(lambda comm: from_first(comm, work, 30, "choosing"))
    assert [type(error) for error in found] == [StateError] * WORLD
    assert str(found[2]) == "choosing failed on rank 0: nothing there"


def test_errors_of_several_kinds_become_one_kind_on_all() -> None:
    def work(rank: int) -> None:
        raise (StateError("a"), ValueError("b"), KeyError("c"))[rank]

    found = on_ranks(lambda comm: on_all(comm, lambda: work(comm.rank), 30, "working"))
    assert [type(error) for error in found] == [RankFailedError] * WORLD
