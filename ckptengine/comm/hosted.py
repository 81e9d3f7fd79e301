"""The store that a rank hosts, as its clients use it."""

from __future__ import annotations

import contextlib
import hmac
import itertools
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptengine.comm.base import KeyValueStore
from ckptengine.comm.wire import MAGIC, NONCE_NBYTES, PROOF_NBYTES, REPLY, REQUEST, Operation, Status, proof, tune
from ckptengine.errors import CheckpointError, RankFailedError
from ckptengine.lifecycle import Living

__all__ = ["HostedStore", "close_all"]

_CALL_SECONDS = 60.0
"""How long a host that is there may take to answer, on a machine that is busy beyond measure."""
_RECONNECT_SECONDS = 5.0
_GONE_SECONDS = 10.0
"""How long a host that could not be reached, or did not answer, counts as gone before it is tried again."""
_FIRST_TRY_SECONDS = 1.0
_TOGETHER = 256
"""Calls on their way at the same time."""
_RECEIVED_NBYTES = 1 << 16
_SILENT = (
    f"the store of the job, which a process of rank 0 serves, has not answered for {_CALL_SECONDS:g} s: that process "
    "is stopped, or its machine is too busy to run it"
)


@dataclass(frozen=True, slots=True)
class _Peer:
    """A connection to the host, and the process that made it."""

    socket: socket.socket
    process: int


@dataclass(frozen=True, slots=True)
class _Request:
    """One call; `deadline` is the moment until which a get waits."""

    operation: Operation
    key: str
    value: bytes
    deadline: float

    def encode(self, seconds: float) -> bytes:
        """Return what travels."""
        name = self.key.encode()
        return REQUEST.pack(self.operation, seconds, len(name), len(self.value)) + name + self.value


class HostedStore(KeyValueStore):
    """A store that rank 0 hosts (`StoreHost`), reached at one of its addresses; threads may share it.

    Each connection serves one call at a time, and is kept for the next one of any thread. A call whose connection
    breaks is made once more by a new one, for every call can be made twice. Only where there is none, rank 0 is gone:
    `RankFailedError`, which names it; that is told at once for some seconds, then looked at again.
    """

    blocks = True

    def __init__(self, addresses: Sequence[tuple[str, int]], secret: bytes, timeout: float) -> None:
        """Connect within `timeout` seconds; raises `RankFailedError` where none of the addresses leads to the host."""
        self._addresses, self._secret = tuple(addresses), secret
        self._idle: list[_Peer] = []
        self._open: set[socket.socket] = set()
        self._closed = False
        self._gone_until = -float("inf")
        self._silent_until = -float("inf")
        self._gone_text = ""
        self._met = False
        self._idle.append(self._connect(timeout))
        _stores.add(self)

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._call(Operation.SET, key, value)

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        return self._call(Operation.GET, key, seconds=max(0.0, timeout))

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        self._call(Operation.DELETE, key)

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one; return the one that it has."""
        standing = self._call(Operation.CLAIM, key, value)
        return value if standing is None else standing

    def set_each(self, values: Mapping[str, bytes]) -> None:
        """Store several values."""
        self._call_each(Operation.SET, list(values), list(values.values()))

    def get_each(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of several keys, None for each that is not there now."""
        return self._call_each(Operation.GET, keys)

    def delete_each(self, keys: Sequence[str]) -> None:
        """Remove several keys."""
        self._call_each(Operation.DELETE, keys)

    def close(self) -> None:
        """End all calls: at the end of the process, for rank 0 waits at its own until no connection is left."""
        self._closed = True
        self._idle.clear()
        for peer in list(self._open):
            with contextlib.suppress(OSError):  # it is not connected any more
                peer.shutdown(socket.SHUT_RDWR)

    def forked(self) -> None:
        """Let go, in a process that was forked, of the parent's connections: what both send would mix."""
        self._idle.clear()
        while self._open:
            self._open.pop().close()

    def _call(self, operation: Operation, key: str, value: bytes = b"", seconds: float = 0.0) -> bytes | None:
        return self._made([_Request(operation, key, value, time.monotonic() + seconds)])[0]

    def _call_each(self, operation: Operation, keys: Sequence[str], values: Sequence[bytes] = ()) -> list[bytes | None]:
        found: list[bytes | None] = []
        for begin in range(0, len(keys), _TOGETHER):
            some = itertools.zip_longest(
                keys[begin : begin + _TOGETHER], values[begin : begin + _TOGETHER], fillvalue=b""
            )
            found += self._made([_Request(operation, str(key), bytes(value), 0.0) for key, value in some])
        return found

    def _made(self, requests: Sequence[_Request]) -> list[bytes | None]:
        """Make one call, or several of which none waits; return what each has found."""
        if time.monotonic() < self._silent_until:  # a caller who makes several calls waits once
            raise RankFailedError(_SILENT)
        while self._idle:
            try:
                peer = self._idle.pop()
            except IndexError:  # another thread has taken it
                break
            try:
                return self._ask(peer, requests)
            except OSError as error:
                if _is_silence(error):
                    raise self._silent() from error
                # The connections that are kept may all be broken: the last word is a new one's.
        if self._closed:
            raise CheckpointError("this process is ending and has left the job's store")
        if time.monotonic() < self._gone_until:
            raise RankFailedError(self._gone_text)
        peer = self._connect(_RECONNECT_SECONDS)
        try:
            return self._ask(peer, requests)
        except OSError as error:
            raise (self._silent() if _is_silence(error) else self._gone(f"{error}")) from error

    def _ask(self, peer: _Peer, requests: Sequence[_Request]) -> list[bytes | None]:
        """Make calls on a connection, and keep it where that goes well."""
        found: list[bytes | None] = []
        try:
            seconds = max(0.0, requests[0].deadline - time.monotonic())
            peer.socket.settimeout(seconds + _CALL_SECONDS)
            peer.socket.sendall(b"".join(request.encode(seconds) for request in requests))
            replies = _Replies(peer.socket)
            for _ in requests:
                status, nbytes = REPLY.unpack(replies.take(REPLY.size))
                value = replies.take(nbytes)
                found.append(value if status == Status.FOUND else None)
        except BaseException:
            self._drop(peer.socket)
            raise
        if peer.process == os.getpid() and not self._closed:
            self._idle.append(peer)
        return found

    def _connect(self, timeout: float) -> _Peer:
        """Return a connection whose other end has shown that it is the host.

        Each address is tried for a second, then for twice as long, and so on: what is behind one may not answer at all.
        A host that was met before, and takes the connection without a word, is busy: it has as long as for a call.
        """
        began, patience = time.monotonic(), _FIRST_TRY_SECONDS
        deadline = began + timeout
        while True:
            failures, final, busy = [], True, False
            for host, port in self._addresses:
                seconds = min(patience, max(0.1, deadline - time.monotonic()))
                try:
                    peer = _Peer(self._reach(host, port, seconds), os.getpid())
                    self._met = True
                    return peer
                except OSError as error:
                    busy = busy or (self._met and isinstance(error, _WordlessError))
                    failures.append(f"{_place(host, port)}: {error.strerror or error}")
                    final = final and isinstance(error, ConnectionRefusedError | _StrangerError)
            if busy:
                deadline = max(deadline, began + _CALL_SECONDS)
            if final or time.monotonic() >= deadline:
                raise self._silent() if busy else self._gone("; ".join(failures))
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
            patience *= 2

    def _reach(self, host: str, port: int, seconds: float) -> socket.socket:
        deadline = time.monotonic() + seconds
        peer = socket.create_connection((host, port), seconds)
        self._open.add(peer)
        try:
            tune(peer)
            try:
                greeting = _receive(peer, len(MAGIC) + NONCE_NBYTES, deadline)
            except TimeoutError:
                raise _WordlessError("it takes the connection and says nothing") from None
            if not greeting.startswith(MAGIC):
                raise _StrangerError("another program listens there")
            theirs, own = greeting[len(MAGIC) :], secrets.token_bytes(NONCE_NBYTES)
            peer.sendall(own + proof(self._secret, b"rank", theirs, own))
            try:
                said = _receive(peer, PROOF_NBYTES, deadline)
            except ConnectionError:
                raise _StrangerError("it refused the secret of this job, so it is another job's") from None
            if not hmac.compare_digest(said, proof(self._secret, b"host", theirs, own)):
                raise _StrangerError("it does not know the secret of this job")
        except BaseException:
            self._drop(peer)
            raise
        return peer

    def _drop(self, peer: socket.socket) -> None:
        self._open.discard(peer)
        peer.close()

    def _gone(self, why: str) -> RankFailedError:
        self._gone_text = (
            f"the store of the job, which rank 0 hosts, can't be reached ({why}): rank 0 has ended, its process "
            "that serves the store was killed, or the network between the nodes keeps the connections away"
        )
        self._gone_until = time.monotonic() + _GONE_SECONDS
        return RankFailedError(self._gone_text)

    def _silent(self) -> CheckpointError:
        self._silent_until = time.monotonic() + _GONE_SECONDS
        return RankFailedError(_SILENT)


class _StrangerError(OSError):
    """What listens is not the host."""


class _WordlessError(OSError):
    """Something listens, and does not answer."""


def _is_silence(error: OSError) -> bool:
    """Return whether the host is there and does not answer; the kernel's own word of a lost peer has a number."""
    return isinstance(error, TimeoutError) and error.errno is None


class _Replies:
    """What comes on a connection, received in large pieces: a reply has some ten bytes."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer, self._rest = peer, b""

    def take(self, nbytes: int) -> bytes:
        """Return exactly so many bytes; raises `ConnectionError` where the other end closes before."""
        if len(self._rest) < nbytes and nbytes < _RECEIVED_NBYTES:
            self._rest += self._peer.recv(_RECEIVED_NBYTES)
        data, self._rest = self._rest[:nbytes], self._rest[nbytes:]
        return data if len(data) == nbytes else data + _receive(self._peer, nbytes - len(data))


def _receive(peer: socket.socket, nbytes: int, deadline: float | None = None) -> bytes:
    """Return exactly so many bytes; raises `ConnectionError` where the other end closes before."""
    data = bytearray(nbytes)
    view, position = memoryview(data), 0
    while position < nbytes:
        if deadline is not None:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
        count = peer.recv_into(view[position:])
        if not count:
            raise ConnectionResetError("the other end closed the connection")
        position += count
    return bytes(data)


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_stores: Living[HostedStore] = Living(HostedStore.forked, HostedStore.close, last=True)


def close_all() -> None:
    """Close the stores that other processes host for this one."""
    for store in _stores:
        store.close()
