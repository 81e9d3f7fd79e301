"""What all ranks say, where most say the same: digests travel, and each distinct document once."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ckptengine.comm.base import Communicator

__all__ = ["Distinct", "gather_distinct"]

_DIGEST_NBYTES = 32
_SIZE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Distinct:
    """The distinct documents, in the order of the lowest rank that has each, and the number of each rank's."""

    documents: tuple[bytes, ...]
    of_rank: tuple[int, ...]


def gather_distinct(
    comm: Communicator, note: bytes, documents: Sequence[bytes], timeout: float
) -> tuple[list[bytes], list[Distinct]]:
    """Return every rank's short note, and for each of the documents (as many on all ranks) the distinct ones.

    One exchange of notes and digests; a second one only where any document differs between ranks, in which the
    lowest rank of each distinct document sends it.
    """
    digests = [hashlib.sha256(document).digest() for document in documents]
    replies = comm.all_gather(b"".join([*digests, note]), timeout)
    end = len(documents) * _DIGEST_NBYTES
    first_ranks: list[dict[bytes, int]] = []
    for start in range(0, end, _DIGEST_NBYTES):
        first: dict[bytes, int] = {}
        for rank, reply in enumerate(replies):
            first.setdefault(reply[start : start + _DIGEST_NBYTES], rank)
        first_ranks.append(first)
    differing = [len(first) > 1 for first in first_ranks]
    sent: list[list[bytes]] = []
    if any(differing):
        mine = [
            document if differs and first[digest] == comm.rank else b""
            for document, digest, first, differs in zip(documents, digests, first_ranks, differing, strict=True)
        ]
        sizes = (_SIZE.pack(len(document)) for document in mine)
        message = b"".join([*sizes, *mine]) if any(mine) else b""
        sent = [_split(reply, len(documents)) for reply in comm.all_gather(message, timeout)]
    result = []
    for number, (document, first) in enumerate(zip(documents, first_ranks, strict=True)):
        numbers = {digest: place for place, digest in enumerate(first)}
        start = number * _DIGEST_NBYTES
        result.append(
            Distinct(
                tuple(sent[rank][number] for rank in first.values()) if differing[number] else (document,),
                tuple(numbers[reply[start : start + _DIGEST_NBYTES]] for reply in replies),
            )
        )
    return [reply[end:] for reply in replies], result


def _split(message: bytes, count: int) -> list[bytes]:
    if not message:
        return [b""] * count
    documents, position = [], count * _SIZE.size
    for number in range(count):
        (nbytes,) = _SIZE.unpack_from(message, number * _SIZE.size)
        documents.append(message[position : position + nbytes])
        position += nbytes
    return documents
