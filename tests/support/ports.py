"""Ports for servers that are told theirs before they start, seconds before they take it."""

from __future__ import annotations

import random
import socket
from pathlib import Path

__all__ = ["free_port"]

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_MOST = 12_000
_locks: list[socket.socket] = []  # until this process ends


def free_port() -> int:
    """Return a free port of 127.0.0.1 that nobody else is given as long as this process lives.

    One that the system has chosen would be anybody's again: it is given to what binds to port 0 or connects, here or in
    a test beside this one. So it is one below those that the system chooses from, and held by a lock of that number.
    """
    low = int(_RANGE.read_text().split()[0])
    ports = range(max(1024, low - _MOST), low) or range(1024, 65536)
    for port in random.SystemRandom().sample(ports, len(ports)):
        lock = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                lock.bind(f"\0ckptengine-test-port-{port}")
                probe.bind(("127.0.0.1", port))
            except OSError:
                lock.close()
                continue
        _locks.append(lock)
        return port
    raise OSError(f"no port of {ports} is free")
