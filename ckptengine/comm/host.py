"""A key-value store that one rank holds in memory and serves to the others over TCP."""

from __future__ import annotations

import contextlib
import heapq
import hmac
import itertools
import logging
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

from ckptengine.comm.hosted import close_all
from ckptengine.comm.keyvalue import MemoryStore
from ckptengine.comm.wire import (
    HELLO_NBYTES,
    LARGEST_KEY_NBYTES,
    LARGEST_VALUE_NBYTES,
    MAGIC,
    NONCE_NBYTES,
    REPLY,
    REQUEST,
    Operation,
    Status,
    proof,
    tune,
)
from ckptengine.errors import CheckpointError
from ckptengine.lifecycle import Living

__all__ = ["StoreHost"]

_HELLO_SECONDS = 10.0
"""How long a connection may take to show that it knows the secret."""
_STRANGERS = 1024
"""Connections that have yet to show it; while there are so many, others wait in the kernel's queue."""
_LINGER_SECONDS = 10.0
"""How long the end of the process waits for the other ranks, which may still be reading how the last save ended."""
_ACCEPT_PAUSE = 0.5
_TELL_SECONDS = 60.0
_LONGEST_PAUSE = 3600.0  # far below what epoll takes
_RECEIVED_NBYTES = 1 << 18

_log = logging.getLogger("ckptengine")


class StoreHost(MemoryStore):
    """The store of the process that makes it, served to those who know the secret by a thread of its own.

    One thread serves all connections and never waits for one of them. This process's own calls use the memory. In a
    process that is forked from it the store can't be used.
    """

    def __init__(self, servers: Sequence[socket.socket], secret: bytes) -> None:
        super().__init__()
        self._process = os.getpid()
        self.addresses: tuple[tuple[str, int], ...] = tuple(server.getsockname()[:2] for server in servers)
        self._service = _Service(self, servers, secret)
        self._finish = weakref.finalize(self, self._service.stop, 0.0)
        self._finish.atexit = False
        threading.Thread(target=self._service.run, name="ckptengine-store", daemon=True).start()
        _hosts.add(self)

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._check_process()
        super().set(key, value)
        self._service.arrived(key)

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        self._check_process()
        return super().get(key, timeout)

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        self._check_process()
        super().delete(key)

    def close(self) -> None:
        """Stop serving once the others have gone, after 10 seconds at most."""
        self._service.stop(_LINGER_SECONDS)

    def forked(self) -> None:
        """Let go, in a process that was forked, of what serves the store."""
        self._service.forked()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise CheckpointError(
                f"process {os.getpid()} was forked from rank 0's process {self._process}, which hosts the store of the "
                "job: only that process can use it"
            )


class _Connection:
    """One client: what came of its request, what is still to be sent to it, and the key that it waits for."""

    def __init__(self, peer: socket.socket, name: str) -> None:
        self.peer, self.name = peer, name
        self.nonce = secrets.token_bytes(NONCE_NBYTES)
        self.known = self.closed = False
        self.received, self.unsent = bytearray(), bytearray(MAGIC + self.nonce)
        self.events = selectors.EVENT_READ
        self.key: str | None = None
        self.turn = 0
        """Counts its requests, so that the deadline of an earlier one is told from that of this."""


class _Service:
    """The loop that serves a store; all but `arrived` and `stop` is for its thread.

    It has many attributes: sockets, clients, their waits and deadlines meet in one loop, and only there.
    """

    def __init__(self, store: MemoryStore, servers: Sequence[socket.socket], secret: bytes) -> None:
        self._store = weakref.ref(store)
        self._servers, self._secret = list(servers), secret
        self._selector = selectors.DefaultSelector()
        self._bell, self._rung = socket.socketpair()
        self._bell.setblocking(False)
        self._rung.setblocking(False)
        self._connections: set[_Connection] = set()
        self._strangers = 0
        self._waiting: dict[str, set[_Connection]] = {}
        self._arrived: deque[str] = deque()
        self._deadlines: list[tuple[float, int, _Connection, int]] = []
        self._counter = itertools.count()
        self._accepts = False
        self._accept_after = 0.0
        self._told_at = -float("inf")
        self._stop_at: float | None = None
        self._stopped = threading.Event()
        self._thread = 0

    # From any thread.

    def arrived(self, key: str) -> None:
        """Wake the clients that wait for a key."""
        if key in self._waiting:
            self._arrived.append(key)
            self._ring()

    def stop(self, seconds: float) -> None:
        """End the service when no connection is left, after `seconds` at most; return when it has ended."""
        self._stop_at = time.monotonic() + seconds
        self._ring()
        if threading.get_ident() != self._thread:
            self._stopped.wait(seconds + 1.0)

    def forked(self) -> None:
        """Let go of the sockets in a process that was forked: as long as it has them, nobody sees this rank's end."""
        for held in (*self._servers, self._bell, self._rung, *(item.peer for item in list(self._connections))):
            held.close()
        self._selector.close()  # no more than that: what is registered there is the parent's too
        self._stopped = threading.Event()
        self._stopped.set()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it rings already, or the service has ended
            self._bell.send(b"x")

    # The loop.

    def run(self) -> None:
        """Serve until `stop`."""
        self._thread = threading.get_ident()
        self._selector.register(self._rung, selectors.EVENT_READ, self._hear_bell)
        try:
            while not self._over():
                self._set_accepting()
                for found, events in self._selector.select(self._patience()):
                    found.data(events)
                self._answer_arrived()
                self._answer_late()
        except Exception:
            _log.exception("the store that rank 0 hosts has failed: no rank can save any more; restart the job")
        finally:
            for connection in list(self._connections):
                self._close(connection)
            for held in (*self._servers, self._bell, self._rung):
                held.close()
            self._selector.close()
            self._stopped.set()

    def _over(self) -> bool:
        # Strangers are not waited for.
        left = len(self._connections) > self._strangers
        return self._stop_at is not None and (not left or time.monotonic() >= self._stop_at)

    def _patience(self) -> float | None:
        moments = [self._deadlines[0][0]] if self._deadlines else []
        if self._stop_at is not None:
            moments.append(self._stop_at)
        if not self._accepts and self._strangers < _STRANGERS:
            moments.append(self._accept_after)
        return min(max(0.0, min(moments) - time.monotonic()), _LONGEST_PAUSE) if moments else None

    def _hear_bell(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._rung.recv(4096):
                pass

    def _set_accepting(self) -> None:
        due = self._strangers < _STRANGERS and time.monotonic() >= self._accept_after
        if due and not self._accepts:
            for server in self._servers:
                self._selector.register(server, selectors.EVENT_READ, _Accepting(self, server))
        elif not due and self._accepts:
            for server in self._servers:
                self._selector.unregister(server)
        self._accepts = due

    def accept(self, server: socket.socket) -> None:
        """Take one connection that waits."""
        try:
            peer, address = server.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptors are left, most likely
            self._tell("rank 0 can't take another connection to the store of the job: %s", error)
            self._accept_after = time.monotonic() + _ACCEPT_PAUSE
            return
        peer.setblocking(False)
        tune(peer)
        connection = _Connection(peer, f"{address[0]}")
        self._connections.add(connection)
        self._strangers += 1
        self._selector.register(peer, selectors.EVENT_READ, _Serving(self, connection))
        self._expire(connection, _HELLO_SECONDS)
        self._flush(connection)

    def serve(self, connection: _Connection, events: int) -> None:
        """Send and take what a connection is ready for."""
        if connection.closed:
            return
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if events & selectors.EVENT_READ and not connection.closed:
            try:
                data = connection.peer.recv(_RECEIVED_NBYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._close(connection)
                return
            connection.received += data
            self._take(connection)

    def _take(self, connection: _Connection) -> None:
        """Do what has come whole. A client sends a request when it has the reply to the one before."""
        received = connection.received
        if not connection.known:
            if len(received) < HELLO_NBYTES:
                return
            nonce, said = bytes(received[:NONCE_NBYTES]), bytes(received[NONCE_NBYTES:HELLO_NBYTES])
            del received[:HELLO_NBYTES]
            if not hmac.compare_digest(said, proof(self._secret, b"rank", connection.nonce, nonce)):
                self._refuse(connection, "it does not know the secret of the job")
                return
            connection.known = True
            connection.turn += 1
            self._strangers -= 1
            self._send(connection, proof(self._secret, b"host", connection.nonce, nonce))
        if len(received) < REQUEST.size or connection.closed:
            return
        operation, seconds, key_nbytes, nbytes = REQUEST.unpack_from(received)
        if (
            operation not in tuple(Operation)
            or not seconds >= 0
            or key_nbytes > LARGEST_KEY_NBYTES
            or nbytes > LARGEST_VALUE_NBYTES
        ):
            self._refuse(connection, "it sent what is no request")
            return
        end = REQUEST.size + key_nbytes + nbytes
        if len(received) < end:
            return
        if len(received) > end or connection.key is not None:
            self._refuse(connection, "it sent a request before it had the reply to the last one")
            return
        key = bytes(received[REQUEST.size : REQUEST.size + key_nbytes]).decode(errors="replace")
        value = bytes(received[REQUEST.size + key_nbytes :])
        received.clear()
        self._do(connection, Operation(operation), key, value, seconds)

    def _do(self, connection: _Connection, operation: Operation, key: str, value: bytes, seconds: float) -> None:
        store = self._store()
        if store is None:
            self._close(connection)
            return
        connection.turn += 1
        if operation is Operation.SET:
            store.set(key, value)
            self._reply(connection, Status.DONE)
            return
        if operation is Operation.DELETE:
            store.delete(key)
            self._reply(connection, Status.DONE)
            return
        if seconds > 0:
            # Before looking, so that a value that comes meanwhile rings.
            connection.key = key
            self._waiting.setdefault(key, set()).add(connection)
        found = store.get(key, 0.0)
        if found is not None:
            self._reply(connection, Status.FOUND, found)
        elif seconds > 0:
            self._expire(connection, seconds)
        else:
            self._reply(connection, Status.ABSENT)

    def _answer_arrived(self) -> None:
        store = self._store()
        while self._arrived:
            key = self._arrived.popleft()
            value = None if store is None else store.get(key, 0.0)
            if value is not None:
                for connection in list(self._waiting.get(key, ())):
                    self._reply(connection, Status.FOUND, value)

    def _answer_late(self) -> None:
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, connection, turn = heapq.heappop(self._deadlines)
            if connection.closed or connection.turn != turn:
                continue
            if connection.known:
                self._reply(connection, Status.ABSENT)
            else:
                self._refuse(connection, f"it said nothing for {_HELLO_SECONDS:g} s")

    def _expire(self, connection: _Connection, seconds: float) -> None:
        entry = time.monotonic() + seconds, next(self._counter), connection, connection.turn
        heapq.heappush(self._deadlines, entry)

    def _reply(self, connection: _Connection, status: Status, value: bytes = b"") -> None:
        connection.turn += 1
        self._wait_no_more(connection)
        self._send(connection, REPLY.pack(status, len(value)) + value)

    def _wait_no_more(self, connection: _Connection) -> None:
        if connection.key is not None:
            waiting = self._waiting.get(connection.key, set())
            waiting.discard(connection)
            if not waiting:
                self._waiting.pop(connection.key, None)
            connection.key = None

    def _send(self, connection: _Connection, data: bytes) -> None:
        connection.unsent += data
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            while connection.unsent:
                del connection.unsent[: connection.peer.send(connection.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        if events != connection.events:
            connection.events = events
            self._selector.modify(connection.peer, events, _Serving(self, connection))

    def _refuse(self, connection: _Connection, why: str) -> None:
        # Told first: who sees that it is closed may look for what is said of it.
        self._tell("rank 0 refused a connection from %s to the store of the job: %s", connection.name, why)
        self._close(connection)

    def _tell(self, text: str, *values: object) -> None:
        """Log a warning, one a minute: a port scan may cause thousands."""
        now = time.monotonic()
        if now - self._told_at > _TELL_SECONDS:
            self._told_at = now
            _log.warning(text, *values)

    def _close(self, connection: _Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        self._wait_no_more(connection)
        self._strangers -= not connection.known
        self._connections.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.peer)
        connection.peer.close()


class _Accepting:
    """What the selector calls for a socket that listens."""

    def __init__(self, service: _Service, server: socket.socket) -> None:
        self._service, self._server = service, server

    def __call__(self, events: int) -> None:
        self._service.accept(self._server)


class _Serving:
    """What the selector calls for a connection."""

    def __init__(self, service: _Service, connection: _Connection) -> None:
        self._service, self._connection = service, connection

    def __call__(self, events: int) -> None:
        self._service.serve(self._connection, events)


def _end(host: StoreHost) -> None:
    close_all()  # first what other processes host: each of two could wait for the other
    host.close()


_hosts: Living[StoreHost] = Living(StoreHost.forked, _end, last=True)
