"""Coordination of a job that torch.distributed runs, through its own key-value store."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.comm.exchange import connect
from ckptengine.comm.gloo import settle_at_exit
from ckptengine.comm.keyvalue import poll
from ckptengine.comm.single import ALONE
from ckptengine.errors import CheckpointError
from ckptengine.lifecycle import at_exit

__all__ = ["TorchStore", "from_torch", "join_job"]

_CONNECT_TIMEOUT = 600.0
_CALL_TIMEOUT = timedelta(seconds=30)
_RECONNECT_TIMEOUT = timedelta(seconds=5)
_GONE_SECONDS = 10.0
"""How long a store whose host could not be reached counts as gone before it is tried again."""
_GONE = (
    "the store of torch.distributed can't be reached any more ({}: {}); the process that hosts it, rank 0 or "
    "torchrun's agent, has probably ended"
)
_lock = threading.Lock()
# Of the default process group that was seen last: its store, which no other group shares.
_current: tuple[weakref.ref[Any], Communicator] | None = None


def from_torch(timeout: float = _CONNECT_TIMEOUT) -> Communicator:
    """Return the communicator of the default process group; every rank calls it, and meets the others once.

    It uses the group's store only, never the group: no device, no backend, and nothing that a training thread
    waits for. Where the store can't be cloned, the background has to go through the checkpoint's storage
    (`store()` is None). Raises `CheckpointError` where there is no group or it has no store (backend `mpi`),
    `DeadlineError` naming the ranks that did not come.
    """
    global _current
    if not dist.is_initialized():
        raise CheckpointError("torch.distributed is not initialized: call init_process_group first")
    settle_at_exit()
    if dist.get_world_size() == 1:
        return ALONE
    store = c10d._get_default_store()
    if store is None:
        raise CheckpointError(
            f"the default process group (backend {dist.get_backend()}) has no store: use gloo, nccl or "
            "another backend that has one"
        )
    with _lock:
        if _current is None or _current[0]() is not store:
            own = TorchStore(store)
            background = own if own.cloned else None
            communicator = connect(own, dist.get_rank(), dist.get_world_size(), timeout, background=background)
            _current = (weakref.ref(store), communicator)
        return _current[1]


def join_job(timeout: float) -> None:
    """Make the default process group of what torchrun's variables tell, until the process ends."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    at_exit(dist.destroy_process_group)


class TorchStore(KeyValueStore):
    """A c10d store, by clones of which each serves one call at a time.

    A client that waits blocks every other thread that uses it, through `PrefixStore` too; clones don't. They are kept
    for the next call of any thread: each connects to the store's host, and both ends ask for the other's name, for
    which all ranks wait where that takes long. One whose call failed is not used again: its connection may be
    broken, and the call is made once more by a new one. Only where none can be had, the host is gone; that is told at
    once for some seconds, then looked at again. `cloned` says whether a clone was possible (a store written in Python
    has no `clone`): else it polls the given store and is for the thread that owns it.
    """

    def __init__(self, store: Any) -> None:
        self._lock = threading.Lock()
        self._idle: list[Any] = []  # clients that no call uses
        self._gone_until = 0.0
        try:
            # Kept for cloning only.
            self._base = store.clone()
            # Clones take it over: how long connecting may take, 30 minutes by default.
            self._base.set_timeout(_CALL_TIMEOUT)
            self.cloned = True
        except RuntimeError:
            self._base = store
            self.cloned = False
        while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
            store = store.underlying_store
        # The other stores' `wait` polls in steps of up to a second, or blocks writers.
        self.blocks = self.cloned and isinstance(store, dist.TCPStore)  # type: ignore[attr-defined]

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""

        def set_value(client: Any) -> None:
            # Never an empty one: FileStore takes that for a deleted key.
            client.set(key, b"=" + value)
            if self.blocks:
                # A TCPStore's `set` waits for no answer: where the connection breaks just then, the value is lost
                # without a word. The host answers in order, so an answer to any question says that it has come.
                client.check([key])

        self._call("set", set_value)

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        if not self.blocks or timeout <= 0:
            return poll(lambda: self._look(key), timeout)
        deadline = time.monotonic() + timeout
        while (value := self._look(key)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._wait(key, left)
        return value

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        self._call("delete", lambda client: client.delete_key(key))

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value, ASCII text, unless the key has one; return the one that it has."""
        text = f"={value.decode()}"
        standing: bytes = self._call("compare_set", lambda client: client.compare_set(key, "", text))
        return standing[1:]

    def _look(self, key: str) -> bytes | None:
        """Return a key's value; None where it isn't there. Every key has one deleter, its last reader."""
        value: bytes | None = self._call("get", lambda client: client.get(key) if client.check([key]) else None)
        return None if value is None else value[1:]

    def _wait(self, key: str, seconds: float) -> None:
        def wait(client: Any) -> None:
            try:
                # At least a millisecond: zero means for ever.
                client.wait([key], timedelta(milliseconds=max(1, round(seconds * 1000))))
            except dist.DistNetworkError:
                raise
            except dist.DistStoreError:
                # The time is up; a store that is gone shows at the next look.
                return

        self._call("wait", wait)

    def _call(self, operation: str, call: Any) -> Any:
        if not self.cloned:
            try:
                return call(self._base)
            except RuntimeError as error:
                raise CheckpointError(
                    f"the store of torch.distributed failed ({operation}: {_first(error)})"
                ) from error
        if time.monotonic() < self._gone_until:
            raise CheckpointError(_GONE.format(operation, "it was not there a moment ago"))
        try:
            with self._client() as client:
                return call(client)
        except RuntimeError as error:
            # Every call can be made twice: values are set, looked at and deleted.
            broken = error
        try:
            client = self._connect(_RECONNECT_TIMEOUT)
        except RuntimeError as error:
            self._gone_until = time.monotonic() + _GONE_SECONDS
            raise CheckpointError(_GONE.format(operation, _first(broken))) from error
        try:
            result = call(client)
        except RuntimeError as error:
            raise CheckpointError(
                f"the store of torch.distributed failed ({operation}: {_first(error)}), although its host can be "
                "reached"
            ) from error
        self._idle.append(client)
        return result

    def _connect(self, timeout: timedelta = _CALL_TIMEOUT) -> Any:
        """Return a new client; raises `RuntimeError` where the host can't be reached in time."""
        with self._lock:
            # Clones take it over, also for connecting.
            self._base.set_timeout(timeout)
            try:
                client = self._base.clone()
            finally:
                self._base.set_timeout(_CALL_TIMEOUT)
        client.set_timeout(_CALL_TIMEOUT)
        return client

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """Have a client for one call; one whose call fails is left to be closed."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = self._connect()
        yield client
        self._idle.append(client)


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
