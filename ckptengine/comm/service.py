"""The process that serves a job's key-value store over TCP; `comm/host.py` starts it, and may be all that does.

It is a process and no thread of rank 0, because other ranks may wait for the store while rank 0 keeps the interpreter's
lock: in a long computation, or in a collective operation of a library that keeps the lock while it waits for those same
ranks (mpi4py's first `allreduce` of objects on a communicator does).

It imports the standard library only, and starts within some 50 ms.
"""

from __future__ import annotations

import contextlib
import heapq
import hmac
import itertools
import os
import resource
import secrets
import selectors
import socket
import time
import traceback
from collections.abc import Sequence

from ckptengine.comm.wire import (
    HELLO_NBYTES,
    LARGEST_KEY_NBYTES,
    LARGEST_VALUE_NBYTES,
    MAGIC,
    NONCE_NBYTES,
    REPLY,
    REQUEST,
    SECRET_NBYTES,
    Operation,
    Status,
    proof,
    tune,
)

__all__ = ["LINGER_SECONDS", "STOP", "Service", "main"]

STOP = b"."
"""What the owner sends when it will end, and others may still be reading how the last save ended."""
LINGER_SECONDS = 10.0
"""How long the service then waits for them."""
_HELLO_SECONDS = 10.0
"""How long a connection may take to show that it knows the secret."""
_STRANGERS = 1024
"""Connections that have yet to show it; while there are so many, others wait in the kernel's queue."""
_ACCEPT_PAUSE = 0.5
_TELL_SECONDS = 60.0
_LONGEST_PAUSE = 3600.0  # far below what epoll takes
_RECEIVED_NBYTES = 1 << 18


def main(parent: int, owner: int, *servers: int) -> None:
    """Serve at sockets that listen, given as file descriptors, until the owner of the store ends.

    `parent` is the owner's process, `owner` one end of a pair of sockets. The other end sends the secret, and `STOP`
    before it closes its end if the clients are to be waited for; it receives lines of UTF-8 text to log.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # as many clients as the system allows, whatever rank 0 may open
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    control = socket.socket(fileno=owner)
    life = _life_of(parent)
    secret = control.recv(SECRET_NBYTES, socket.MSG_WAITALL)
    if len(secret) == SECRET_NBYTES:  # otherwise the owner has ended already
        Service(control, [socket.socket(fileno=server) for server in servers], secret, life).run()


def _life_of(parent: int) -> int | None:
    """Return a descriptor that is readable when a process has ended, None where the system has none."""
    try:
        return os.pidfd_open(parent)
    except (OSError, AttributeError):  # an older kernel, or a Python that was built for one
        return None


class _Connection:
    """One client: what came of its request, what is still to be sent to it, and the key that it waits for."""

    def __init__(self, peer: socket.socket, name: str) -> None:
        self.peer, self.name = peer, name
        self.nonce = secrets.token_bytes(NONCE_NBYTES)
        self.known = self.closed = False
        self.held_back = False  # while more may come that goes out together
        self.received, self.unsent = bytearray(), bytearray(MAGIC + self.nonce)
        self.events = selectors.EVENT_READ
        self.key: str | None = None
        self.turn = 0
        """Counts its requests, so that the deadline of an earlier one is told from that of this."""


class Service:
    """The loop that serves a store, and the values in it.

    It has many attributes: sockets, clients, their waits and deadlines meet in one loop, and only there.
    """

    def __init__(
        self, owner: socket.socket, servers: Sequence[socket.socket], secret: bytes, life: int | None = None
    ) -> None:
        self._owner, self._servers, self._secret, self._life = owner, list(servers), secret, life
        owner.setblocking(False)
        self._values: dict[str, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._strangers = 0
        self._waiting: dict[str, set[_Connection]] = {}
        self._deadlines: list[tuple[float, int, _Connection, int]] = []
        self._counter = itertools.count()
        self._accepts = False
        self._accept_after = 0.0
        self._told_at = -float("inf")
        self._stop_at: float | None = None

    def run(self) -> None:
        """Serve until the owner has ended, or has said that it will and no client is left."""
        self._selector.register(self._owner, selectors.EVENT_READ, self._hear_owner)
        if self._life is not None:
            # Its socket may live on in a process that a library has forked.
            self._selector.register(self._life, selectors.EVENT_READ, self._see_end)
        try:
            while not self._over():
                self._set_accepting()
                for found, events in self._selector.select(self._patience()):
                    found.data(events)
                self._answer_late()
        except Exception:
            failed = (
                f"the store of the job has failed: no rank can save any more; restart the job\n{traceback.format_exc()}"
            )
            self._log(failed)
        finally:
            for connection in list(self._connections):
                self._close(connection)
            for held in (*self._servers, self._owner):
                held.close()
            self._selector.close()

    def _hear_owner(self, events: int) -> None:
        try:
            word = self._owner.recv(len(STOP))
        except BlockingIOError:
            return
        except ConnectionError:
            word = b""
        self._stop_at = time.monotonic() + (LINGER_SECONDS if word == STOP else 0.0)

    def _see_end(self, events: int) -> None:
        self._stop_at = time.monotonic()

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
            self._tell(f"rank 0 can't take another connection to the store of the job: {error}")
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
        """Do what has come whole, and answer it in one piece."""
        connection.held_back = True
        while not connection.closed and self._take_one(connection):
            pass
        connection.held_back = False
        if not connection.closed:
            self._flush(connection)

    def _take_one(self, connection: _Connection) -> bool:
        """Do the next of what has come, if it is whole; return whether it was. No request may follow one that waits."""
        received = connection.received
        if not connection.known:
            if len(received) < HELLO_NBYTES:
                return False
            nonce, said = bytes(received[:NONCE_NBYTES]), bytes(received[NONCE_NBYTES:HELLO_NBYTES])
            del received[:HELLO_NBYTES]
            if not hmac.compare_digest(said, proof(self._secret, b"rank", connection.nonce, nonce)):
                self._refuse(connection, "it does not know the secret of the job")
                return False
            connection.known = True
            connection.turn += 1
            self._strangers -= 1
            self._send(connection, proof(self._secret, b"host", connection.nonce, nonce))
        if connection.key is not None and received:
            self._refuse(connection, "it sent a request while it waits for a value")
            return False
        if len(received) < REQUEST.size:
            return False
        operation, seconds, key_nbytes, nbytes = REQUEST.unpack_from(received)
        if (
            operation not in tuple(Operation)
            or not seconds >= 0
            or key_nbytes > LARGEST_KEY_NBYTES
            or nbytes > LARGEST_VALUE_NBYTES
        ):
            self._refuse(connection, "it sent what is no request")
            return False
        end = REQUEST.size + key_nbytes + nbytes
        if len(received) < end:
            return False
        key = bytes(received[REQUEST.size : REQUEST.size + key_nbytes]).decode(errors="replace")
        value = bytes(received[REQUEST.size + key_nbytes : end])
        del received[:end]
        self._do(connection, Operation(operation), key, value, seconds)
        return True

    def _do(self, connection: _Connection, operation: Operation, key: str, value: bytes, seconds: float) -> None:
        connection.turn += 1
        if operation is Operation.GET:
            found = self._values.get(key)
            if found is not None:
                self._reply(connection, Status.FOUND, found)
            elif seconds > 0:
                connection.key = key
                self._waiting.setdefault(key, set()).add(connection)
                self._expire(connection, seconds)
            else:
                self._reply(connection, Status.ABSENT)
            return
        new = operation is Operation.SET or (operation is Operation.CLAIM and key not in self._values)
        if new:
            self._values[key] = value
        if operation is Operation.DELETE:
            self._values.pop(key, None)
        if operation is Operation.CLAIM:
            self._reply(connection, Status.FOUND, self._values[key])
        else:
            self._reply(connection, Status.DONE)
        if new:
            for waiting in list(self._waiting.get(key, ())):
                self._reply(waiting, Status.FOUND, value)

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
        if not connection.held_back:
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
        self._tell(f"rank 0 refused a connection from {connection.name} to the store of the job: {why}")
        self._close(connection)

    def _tell(self, text: str) -> None:
        """Have the owner log a text, one a minute: a port scan may cause thousands."""
        now = time.monotonic()
        if now - self._told_at > _TELL_SECONDS:
            self._told_at = now
            self._log(text)

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the owner has ended, or does not listen
            self._owner.send(f"{text}\n".encode())

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

    def __init__(self, service: Service, server: socket.socket) -> None:
        self._service, self._server = service, server

    def __call__(self, events: int) -> None:
        self._service.accept(self._server)


class _Serving:
    """What the selector calls for a connection."""

    def __init__(self, service: Service, connection: _Connection) -> None:
        self._service, self._connection = service, connection

    def __call__(self, events: int) -> None:
        self._service.serve(self._connection, events)
