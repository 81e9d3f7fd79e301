"""Which ranks of a job can share memory with this one, and the memory that they share."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
import select
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckptengine.comm.process import Process
from ckptengine.layout.tiling import Int64s

__all__ = ["Member", "Neighbour", "Offer", "identity", "members"]

_PAGE = mmap.ALLOCATIONGRANULARITY
_GREETING = struct.Struct("<16s16sqqqq")


def identity() -> bytes:
    """Return 16 bytes that are equal on ranks which see one another's processes: same boot, same namespace, same user.

    Memory is shared by opening the other's memory file through /proc, so that is what counts; ranks in containers of
    their own are different nodes. Where it can't be found out, every call returns other bytes.
    """
    process = Process.this()
    try:
        sees_itself = os.readlink("/proc/self") == str(process.pid)
    except OSError:
        sees_itself = False
    if not process.boot or not sees_itself:
        return secrets.token_bytes(16)
    text = f"{process.boot} {process.namespace} {os.geteuid()}"
    return hashlib.sha256(text.encode()).digest()[:16]


@dataclass(frozen=True, slots=True)
class Member:
    """A rank as it presents itself: where its memory file is, how many rows of needs it holds and where they end."""

    rank: int
    node: bytes
    token: bytes
    pid: int
    fd: int
    rows: int
    nbytes: int


def members(greetings: Sequence[bytes]) -> list[list[Member]]:
    """Return the ranks of each node, in the order of ranks."""
    nodes: dict[bytes, list[Member]] = {}
    for rank, greeting in enumerate(greetings):
        node, token, pid, fd, rows, nbytes = _GREETING.unpack(greeting)
        nodes.setdefault(node, []).append(Member(rank, node, token, pid, fd, rows, nbytes))
    return list(nodes.values())


class Offer:
    """A memory file of this rank, for its neighbours: a token, the ranges that it needs, and room for a window.

    It has no name, so nothing stays behind when its processes die, and it isn't limited by the size of /dev/shm, which
    containers keep small. The room takes no memory until it is allocated. `greeting` tells the others where it is. A
    context manager: what has opened the file keeps it.
    """

    def __init__(self, needs: Int64s, room: int) -> None:
        self._token = secrets.token_bytes(16)
        self._fd = -1
        data = self._token + np.ascontiguousarray(needs, np.int64).tobytes()
        self._position = -(-len(data) // _PAGE) * _PAGE
        node = identity()
        try:
            self._fd = os.memfd_create("ckptengine-load", os.MFD_CLOEXEC)
            os.truncate(self._fd, self._position + room)
            if os.pwrite(self._fd, data, 0) != len(data):
                raise OSError
        except OSError:
            # Alone, then: this rank reads for itself.
            node = secrets.token_bytes(16)
        self.greeting = _GREETING.pack(node, self._token, os.getpid(), self._fd, len(needs), self._position + room)

    def allocate(self, nbytes: int) -> None:
        """Give memory to the first bytes of the room; raises `OSError` where there isn't enough."""
        # A file that was only made longer promises memory that may not be there: SIGBUS at the first touch.
        os.posix_fallocate(self._fd, self._position, nbytes)

    def __enter__(self) -> Offer:
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Neighbour:
    """Another rank of the node, or this one: its memory file opened, and its process watched.

    Raises `OSError` where its file can't be opened, or is not the one that it presented.
    """

    def __init__(self, member: Member) -> None:
        self.rank = member.rank
        # Non-blocking: where the number stands for another process after all, it may be a pipe.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
        self._fd = os.open(f"/proc/{member.pid}/fd/{member.fd}", flags)
        self._process = -1
        try:
            status = os.fstat(self._fd)
            length = len(member.token) + member.rows * 24
            data = os.pread(self._fd, length, 0) if stat.S_ISREG(status.st_mode) else b""
            if status.st_size != member.nbytes or len(data) != length or not data.startswith(member.token):
                raise OSError(f"rank {member.rank} is not the process {member.pid} that this rank sees")
            self.needs: Int64s = np.frombuffer(data, np.int64, member.rows * 3, len(member.token)).reshape(-1, 3)
            self._position = -(-length // _PAGE) * _PAGE
            self._room = member.nbytes - self._position
            with contextlib.suppress(OSError):  # an older kernel: only the deadline tells then
                self._process = os.pidfd_open(member.pid)
        except BaseException:
            self.close()
            raise

    def map(self) -> mmap.mmap:
        """Return the room of this neighbour's file as memory, which must not be touched before it is allocated."""
        memory = mmap.mmap(
            self._fd, self._room, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=self._position
        )
        memory.madvise(mmap.MADV_DONTFORK)
        return memory

    def ended(self) -> bool:
        """Return whether its process is known to have ended."""
        if self._process < 0:
            return False
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close its file and stop watching it; what is mapped stays."""
        for fd in (self._fd, self._process):
            if fd >= 0:
                os.close(fd)
        self._fd = self._process = -1
