"""The network addresses of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

__all__ = ["addresses", "listen", "machine"]

# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915
_UP, _LOOPBACK = 0x1, 0x8
# /proc/net/if_inet6 (net/ipv6/addrconf.c): scope and flags of an address, linux/if_addr.h
_GLOBAL = 0x00
_UNUSABLE = 0x08 | 0x40  # duplicate, or not yet known not to be
_BACKLOG = 4096


def machine() -> str:
    """Return a name that two processes share only where they reach each other through the loopback interface."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"


def addresses(interface: str = "") -> list[str]:
    """Return the addresses at which other machines may reach this one, of one interface or of all that are up.

    IPv4 before IPv6; those of the loopback interface only where it is asked for by name.
    """
    names = [name for _, name in socket.if_nameindex() if interface in ("", name)]
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in list(names):
            request = struct.pack("256s", name.encode()[:15])
            flags = 0
            with contextlib.suppress(OSError):  # it has just gone
                flags = struct.unpack_from("H", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)[0]
            if not flags & _UP or (flags & _LOOPBACK and not interface):
                names.remove(name)
                continue
            with contextlib.suppress(OSError):  # it has none of IPv4
                found.append(socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]))
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, state, name = line.split()
            usable = (int(scope, 16) == _GLOBAL or interface) and not int(state, 16) & _UNUSABLE
            address = ipaddress.IPv6Address(bytes.fromhex(digits))
            if name in names and usable and not address.is_link_local:
                found.append(str(address))
    return found


def listen(address: str) -> socket.socket:
    """Return a socket that listens at an address of this machine, at a free port; raises `OSError`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.bind((address, 0))
        server.listen(_BACKLOG)
        server.setblocking(False)
    except OSError:
        server.close()
        raise
    return server
