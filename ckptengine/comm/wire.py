"""What the host of a store and its clients say to each other over TCP.

The host greets with `MAGIC` and a nonce. The client answers with a nonce of its own and a proof that it knows the job's
secret, the host with its proof: HMAC-SHA-256 (RFC 2104) over who speaks and both nonces, so that no proof serves twice
or for the other side. Then each request has one reply, in the order of the requests; several may be on their way, but
none may follow one that waits for a value. Nothing is encrypted, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
from enum import IntEnum

__all__ = [
    "HELLO_NBYTES",
    "LARGEST_KEY_NBYTES",
    "LARGEST_VALUE_NBYTES",
    "MAGIC",
    "NONCE_NBYTES",
    "PROOF_NBYTES",
    "REPLY",
    "REQUEST",
    "SECRET_NBYTES",
    "Operation",
    "Status",
    "proof",
    "tune",
]

MAGIC = b"ckptkv1\n"
SECRET_NBYTES = NONCE_NBYTES = PROOF_NBYTES = 32
HELLO_NBYTES = NONCE_NBYTES + PROOF_NBYTES
REQUEST = struct.Struct("<BdIQ")
"""Operation, seconds that a get waits, bytes of the key, bytes of the value; both follow."""
REPLY = struct.Struct("<BQ")
"""Status, bytes of the value, which follows."""
LARGEST_KEY_NBYTES, LARGEST_VALUE_NBYTES = 1 << 12, 1 << 26


class Operation(IntEnum):
    """What is asked."""

    SET = 1
    GET = 2
    DELETE = 3
    CLAIM = 4


class Status(IntEnum):
    """What is answered."""

    DONE = 1
    FOUND = 2
    ABSENT = 3


def proof(secret: bytes, who: bytes, host_nonce: bytes, client_nonce: bytes) -> bytes:
    """Return what only one who knows the secret can say; `who` is b"host" or b"rank"."""
    return hmac.new(secret, who + host_nonce + client_nonce, hashlib.sha256).digest()


def tune(connection: socket.socket) -> None:
    """Send what is there at once, and notice within half a minute that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
