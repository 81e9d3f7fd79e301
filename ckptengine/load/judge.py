"""What of a checkpoint no rank's state has taken: each tells what it did not take, along with its offer."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ckptengine.state.bind import Binding, nothing_fits
from ckptengine.state.report import LoadReport

__all__ = ["Verdict", "judge", "said_of"]

_SIZE = struct.Struct("<Q")
_DIGEST_NBYTES = 8
_FITS = bytes(_DIGEST_NBYTES)
"""What stands for the problems of a rank that has none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`refused` tells whether any rank is to raise, since what it asked for does not fit; `tells` whether this rank is
    the first with its problems."""

    refused: bool
    tells: bool


def said_of(binding: Binding, strict: bool) -> bytes:
    """Return what a rank says: whether misfits are errors to it (with `strict`, or where nothing fits), its problems as
    a digest, and a bit for each leaf that it did not take, compressed; no bits where it took all. The same of each leaf
    that an object would be handed beyond the state that it has."""
    report = binding.report
    own = (report.missing, report.mismatched, report.other_class, binding.left.own)
    digest = _FITS
    if any(own):
        digest = hashlib.sha256(json.dumps(own).encode()).digest()[:_DIGEST_NBYTES]
    extras = frozenset().union(*(one.numbers for one in binding.extras))
    left, extra = (_bits(numbers, binding.left.count) for numbers in (binding.left.others, extras))
    return bytes([strict or nothing_fits(binding)]) + digest + _SIZE.pack(len(left)) + left + extra


def judge(binding: Binding, said: Sequence[bytes], rank: int) -> Verdict:
    """Set what is unexpected in a binding's report, given what each rank said; return what all ranks conclude alike."""
    told = [_told_bits(message) for message in said]
    every, left = {one for one, _ in told}, binding.left
    common: list[int] = []
    if b"" not in every:
        common = np.flatnonzero(np.logical_and.reduce([_unpacked(bits, left.count) for bits in every])).tolist()
    if binding.extras:
        binding.leave_to_others(_of_others(binding, {one for number, one in enumerate(told) if number != rank}))
    report: LoadReport = binding.report
    binding.report = replace(report, unexpected=(*left.names(common), *left.own))
    problems = [message[1 : 1 + _DIGEST_NBYTES] for message in said]
    refused = any(message[0] and (common or problem != _FITS) for message, problem in zip(said, problems, strict=True))
    tells = rank == 0 or (problems[rank] != _FITS and problems.index(problems[rank]) == rank)
    return Verdict(refused, tells)


def _of_others(binding: Binding, told: Collection[tuple[bytes, bytes]]) -> set[int]:
    """Return the extra leaves that the objects of other ranks have, by what these were before the load.

    A rank whose object has only more than the one here is no other stage: that object is to be what this one becomes.
    """
    found: set[int] = set()
    count = binding.left.count
    for left, extra in told:
        lacking = _unpacked(extra, count)
        theirs = ~_unpacked(left, count) & ~lacking
        for one in binding.extras:
            if lacking[list(one.has)].any():
                found.update(number for number in one.numbers if theirs[number])
    return found


def _bits(numbers: Collection[int], count: int) -> bytes:
    if not numbers:
        return b""
    bits = np.zeros(count, np.bool_)
    bits[list(numbers)] = True
    return zlib.compress(np.packbits(bits).tobytes())


def _unpacked(bits: bytes, count: int) -> NDArray[np.bool_]:
    if not bits:
        return np.zeros(count, np.bool_)
    return np.unpackbits(np.frombuffer(zlib.decompress(bits), np.uint8), count=count).astype(np.bool_)


def _told_bits(message: bytes) -> tuple[bytes, bytes]:
    """Return the bits of what a rank did not take, and of what is extra there."""
    start = 1 + _DIGEST_NBYTES + _SIZE.size
    (length,) = _SIZE.unpack_from(message, 1 + _DIGEST_NBYTES)
    return message[start : start + length], message[start + length :]
