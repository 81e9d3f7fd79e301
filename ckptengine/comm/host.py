"""A key-value store that one rank hosts: a process of its own serves it to this rank and to the others over TCP."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ckptengine.comm.base import KeyValueStore
from ckptengine.comm.hosted import HostedStore, close_all
from ckptengine.comm.service import LINGER_SECONDS, STOP
from ckptengine.errors import CheckpointError, RankFailedError
from ckptengine.lifecycle import Living

__all__ = ["StoreHost"]

_START = (
    "import sys; sys.path[:1] = []; sys.path.append(sys.argv[1]); "
    "from ckptengine.comm.service import main; main(*map(int, sys.argv[3:]))"
)
_NAME = "ckptengine-store"
"""How the process is found in a list of processes: the second argument of its program."""
_ENDING_SECONDS = 5.0
"""How long the process may take to end when it has nothing more to do."""
_REAPED_SECONDS = 0.5
_LOGGED_NBYTES = 1 << 12

_T = TypeVar("_T")

_log = logging.getLogger("ckptengine")


class StoreHost(KeyValueStore):
    """The store of the process that makes it, served to those who know the secret.

    What serves it is a process that this one starts, which ends with this one: the others are answered whatever
    this process does, and see its end at once. This process's own calls go there too. One that is forked from it may
    use the store; the store ends without it.
    """

    blocks = True

    def __init__(self, servers: Sequence[socket.socket], secret: bytes, timeout: float) -> None:
        """Take over sockets that listen; raises `CheckpointError` where nothing serves them within `timeout` seconds.

        `secret` has 32 bytes.
        """
        self.addresses: tuple[tuple[str, int], ...] = tuple(server.getsockname()[:2] for server in servers)
        try:
            self._service = _Service(servers, secret)
        except (OSError, RuntimeError) as error:  # no process, no descriptor, or no thread
            raise CheckpointError(
                f"the process that serves the store of the job can't be started with {sys.executable!r}: {error}"
            ) from error
        finally:
            for server in servers:
                server.close()
        self._finish = weakref.finalize(self, self._service.end)
        self._finish.atexit = False
        try:
            self._client = self._asked(lambda: HostedStore(self.addresses, secret, timeout))
        except BaseException:
            self._finish()
            raise
        _hosts.add(self)

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._asked(lambda: self._client.set(key, value))

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        return self._asked(lambda: self._client.get(key, timeout))

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        self._asked(lambda: self._client.delete(key))

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one; return the one that it has."""
        return self._asked(lambda: self._client.claim(key, value))

    def set_each(self, values: Mapping[str, bytes]) -> None:
        """Store several values."""
        self._asked(lambda: self._client.set_each(values))

    def get_each(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of several keys, None for each that is not there now."""
        return self._asked(lambda: self._client.get_each(keys))

    def delete_each(self, keys: Sequence[str]) -> None:
        """Remove several keys."""
        self._asked(lambda: self._client.delete_each(keys))

    def close(self) -> None:
        """Stop serving once the others have gone, after 10 seconds at most."""
        self._client.close()
        self._service.end(LINGER_SECONDS)

    def _asked(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except RankFailedError as error:
            code = self._service.code()
            if code is None:
                raise
            how = f"was killed by signal {-code}" if code < 0 else "has ended"
            how += f" with exit code {code}" if code > 0 else ""  # 0 also where a handler of SIGCHLD has taken the code
            raise RankFailedError(
                f"process {self._service.number}, which serves the store of the job for rank 0, {how}: no rank can "
                "save any more; restart the job"
            ) from error


class _Service:
    """The process that serves a store, as the one that started it sees it."""

    def __init__(self, servers: Sequence[socket.socket], secret: bytes) -> None:
        if not sys.executable:
            raise OSError("this Python was started by another program, and sys.executable does not name one to start")
        if getattr(sys, "frozen", False):  # sys.executable would start the job once more
            raise OSError("it is a program with Python inside, and no interpreter: start the job's script with Python")
        own, its = socket.socketpair()
        self._own = own
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with its:
                self._process = _start(its, servers)
            self.number = self._process.pid
            with contextlib.suppress(OSError):  # it has ended already, as the first call will find
                own.sendall(secret)
            threading.Thread(target=_log_lines, args=[own], name=_NAME, daemon=True).start()
        except BaseException:
            self.end()
            own.close()
            raise
        _services.add(self)

    def code(self) -> int | None:
        """Return the exit code of a process that has ended, None for one that lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Its sockets are closed a moment before it has ended.
            return None if self._process is None else self._process.wait(_REAPED_SECONDS)
        return None

    def end(self, seconds: float = 0.0) -> None:
        """Have the process end when no client is left, after so many seconds at most; return when it has ended."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):  # it has ended
            if seconds:
                self._own.send(STOP)
            else:
                self._own.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(seconds + _ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forked(self) -> None:
        """Leave the process to the one that started it: as long as its socket is open here, nobody sees that end."""
        self._process = None
        self._own.close()


def _start(own: socket.socket, servers: Sequence[socket.socket]) -> subprocess.Popen[bytes]:
    """Start the process with one end of a pair of sockets, and with those that listen."""
    # Numbers from 3 on: a job whose standard streams are closed has others at theirs, which the process gets anew.
    numbers = [fcntl.fcntl(held.fileno(), fcntl.F_DUPFD_CLOEXEC, 3) for held in (own, *servers)]
    # Nothing but the standard library, and this package behind it: whatever else is on the path.
    package = str(Path(__file__).parents[2])
    command = [sys.executable, "-s", "-S", "-c", _START, package, _NAME, str(os.getpid()), *map(str, numbers)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name == "PYTHONHOME"}
    # A launcher, or Ctrl-C, may signal all processes of the job. The service has to outlive the ranks' last save: it
    # inherits that these signals are blocked, and ends when this process does.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FATAL)
    try:
        return subprocess.Popen(
            command, cwd="/", env=kept, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=numbers
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number in numbers:
            os.close(number)


_FATAL = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
"""Signals of a process's own faults, which it dies of."""


def _log_lines(own: socket.socket) -> None:
    """Log what the service says, until it ends."""
    rest = b""
    try:
        while data := own.recv(_LOGGED_NBYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _log.warning("%s", line.decode(errors="replace"))
    except OSError:
        pass  # closed here
    finally:
        own.close()


def _end(host: StoreHost) -> None:
    close_all()  # first what other processes host: each of two could wait for the other
    host.close()


_services: Living[_Service] = Living(_Service.forked)
_hosts: Living[StoreHost] = Living(lambda host: None, _end, last=True)
