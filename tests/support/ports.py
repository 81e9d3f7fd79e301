"""A port for a server that is told its port, and takes it a little later."""

import contextlib
import random
import socket
from pathlib import Path

__all__ = ["free_port"]

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a port at which nobody listens, none of those that the system itself gives to whoever asks for any."""
    first, last = map(int, _RANGE.read_text().split()) if _RANGE.exists() else (32_768, 60_999)
    ports = [*range(10_000, first), *range(last + 1, 65_536)] or range(10_000, 65_536)
    while True:
        port = random.SystemRandom().choice(ports)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
