"""Coordination of a job that msrun runs, through a store of MindSpore's kind that the job's own ranks share."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import mindspore.mint.distributed as dist
from mindspore.communication import GlobalComm, get_group_size, get_rank

from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.comm.exchange import connect
from ckptengine.comm.keyvalue import poll
from ckptengine.comm.single import ALONE
from ckptengine.errors import CheckpointError, DeadlineError

__all__ = ["MindSporeStore", "from_mindspore"]

_CONNECT_TIMEOUT = 600.0
_CALL_TIMEOUT = timedelta(seconds=30)
_RECONNECT_TIMEOUT = timedelta(seconds=5)
_GONE_SECONDS = 10.0
"""How long a store whose host could not be reached counts as gone before it is tried again."""
_FAILURES = (RuntimeError, ValueError)
_lock = threading.Lock()
_current: Communicator | None = None
_rendezvous: Future[tuple[str, int]] | None = None


def from_mindspore(timeout: float = _CONNECT_TIMEOUT) -> Communicator:
    """Return the communicator of the ranks that `mindspore.communication.init` has brought together.

    Every rank calls it. Once, that is a rendezvous: in a collective of the job, by which rank 0 tells where the store
    is that it hosts. From then on no collective is used. Raises `CheckpointError` where nothing is initialized or the
    store can't be reached, `DeadlineError` naming the ranks that did not come.
    """
    global _current
    if not GlobalComm.INITED:
        raise CheckpointError("MindSpore's communication is not initialized: call mindspore.communication.init() first")
    rank, world_size = get_rank(), get_group_size()
    if world_size == 1:
        return ALONE
    with _lock:
        if _current is None:
            deadline = time.monotonic() + timeout
            store = MindSporeStore(rank, world_size, *_told_address(rank, world_size, timeout))
            left = max(1.0, deadline - time.monotonic())
            _current = connect(store, rank, world_size, left, background=store)
        return _current


def _told_address(rank: int, world_size: int, timeout: float) -> tuple[str, int]:
    """Return what `_agree_on_address` does, or raise `DeadlineError` after `timeout` seconds.

    A collective of MindSpore can't be left: it goes on in its thread, and the next call waits for the same one.
    """
    global _rendezvous
    if _rendezvous is None:
        _rendezvous = Future()

        def meet(future: Future[tuple[str, int]]) -> None:
            try:
                future.set_result(_agree_on_address(rank, world_size))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=meet, args=(_rendezvous,), name="ckptengine-rendezvous", daemon=True).start()
    try:
        address = _rendezvous.result(timeout)
    except TimeoutError:
        raise DeadlineError(
            f"connecting: of the {world_size} ranks some did not come to the rendezvous within {timeout:g} s, as "
            f"rank {rank} did: all ranks must make their Checkpointer, or save or load, at the same point"
        ) from None
    except BaseException:
        _rendezvous = None
        raise
    return address


def _agree_on_address(rank: int, world_size: int) -> tuple[str, int]:
    """Return where rank 0 hosts the store: its address as the scheduler's host sees it, and a free port."""
    own: tuple[str, int] | str | None = None
    if rank == 0:
        try:
            own = _free_address()
        except OSError as error:  # told to all: they are in the collective
            own = str(error)
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, own)
    if isinstance(told[0], str):
        raise CheckpointError(
            f"rank 0 finds no address for the store of the job, on the way to MS_SCHED_HOST "
            f"({os.environ.get('MS_SCHED_HOST')}): {told[0]}"
        )
    host, port = told[0]
    return str(host), int(port)


def _free_address() -> tuple[str, int]:
    """Return the address by which this machine reaches the scheduler (its own: the loopback's), and a free port."""
    scheduler, port = os.environ.get("MS_SCHED_HOST") or "127.0.0.1", int(os.environ.get("MS_SCHED_PORT") or 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((scheduler, port))  # sends nothing
        host = str(probe.getsockname()[0])
    with socket.socket() as server:
        server.bind((host, 0))
        return host, int(server.getsockname()[1])


class MindSporeStore(KeyValueStore):
    """`mint.distributed.TCPStore`, hosted by rank 0; threads may share it.

    Its `get` waits, holding up the caller until its own timeout, for a key that isn't there. So each key has a counter
    beside it, which can be looked at without waiting. A client whose call failed is replaced, for its connection may be
    broken, and the call made once more; only where there is no new one, the host is gone.
    """

    def __init__(self, rank: int, world_size: int, host: str, port: int) -> None:
        self._where = f"{host}:{port}"
        self._lock = threading.Lock()
        self._gone_until = 0.0
        self._place = host, port, world_size
        try:
            self._store: Any = self._connect(rank == 0, _CALL_TIMEOUT)
        except _FAILURES as error:
            raise self._gone("connecting", error) from error
        self._host = self._store if rank == 0 else None  # lives as long as this object, whatever becomes of its client

    def _connect(self, hosts: bool, timeout: timedelta) -> Any:
        host, port, world_size = self._place
        client = dist.TCPStore(host, port, world_size, hosts, timeout=timeout, wait_for_workers=False)
        # Kept to the end of the process: MindSpore's (2.10) crashes now and then in its destructor, which runs beside
        # its own threads; at the exit too, where a job that had done all its work ended with SIGSEGV.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
        return client

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""

        def store() -> None:
            self._store.set(key, b"=" + value)
            self._store.add(_counter(key), 1)

        self._call("set", store)

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        return poll(lambda: self._look(key), timeout)

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""

        def remove() -> None:
            # The counter first: whoever sees it counts on the value.
            self._store.delete_key(_counter(key))
            self._store.delete_key(key)

        self._call("delete", remove)

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one; return the one that it has."""
        # Its own for each value: where the connection breaks and the answer is lost, what stands tells who was first.
        own, sum_of_all = 1 + int.from_bytes(hashlib.sha256(value).digest()[:5], "big"), f"{key}!"

        def is_first() -> bool:
            return bool((self._store.add(sum_of_all, 0) or self._store.add(sum_of_all, own)) == own)

        if self._call("add", is_first):
            self.set(key, value)
        standing = self.get(key, _CALL_TIMEOUT.total_seconds())
        if standing is None:
            raise CheckpointError(
                f"the store of the job at {self._where} has no value for {key!r}: its writer has ended"
            )
        return standing

    def _look(self, key: str) -> bytes | None:
        def look() -> bytes | None:
            if self._store.add(_counter(key), 0) <= 0:
                return None
            value: bytes = self._store.get(key)
            return value[1:]

        found: bytes | None = self._call("get", look)
        return found

    def _call(self, operation: str, call: Callable[[], Any]) -> Any:
        with self._lock:
            try:
                return call()
            except _FAILURES as error:
                broken = error
            if time.monotonic() < self._gone_until:
                raise self._gone(operation, broken) from broken
            try:
                self._store = self._connect(False, _RECONNECT_TIMEOUT)
            except _FAILURES as error:
                self._gone_until = time.monotonic() + _GONE_SECONDS
                raise self._gone(operation, broken) from error
            try:
                return call()
            except _FAILURES as error:
                raise CheckpointError(
                    f"the store of the job at {self._where} failed ({operation}: {_first(error)}), although its host "
                    "can be reached"
                ) from error

    def _gone(self, operation: str, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"the store of the job at {self._where} can't be reached ({operation}: {_first(error)}); rank 0, which "
            "hosts it, has probably ended"
        )


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _counter(key: str) -> str:
    return f"{key}#"
