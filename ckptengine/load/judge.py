"""What of a checkpoint no rank's state has taken: each tells what it did not take, along with its offer."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckptengine.state.bind import Binding, nothing_fits
from ckptengine.state.report import LoadReport

__all__ = ["Verdict", "judge", "said_of"]

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
    a digest, and a bit for each leaf that it did not take, compressed; no bits where it took all."""
    report = binding.report
    own = (report.missing, report.mismatched, report.other_class, binding.left.own)
    digest = _FITS
    if any(own):
        digest = hashlib.sha256(json.dumps(own).encode()).digest()[:_DIGEST_NBYTES]
    bits = b""
    if binding.left.others:
        left = np.zeros(binding.left.count, np.bool_)
        left[list(binding.left.others)] = True
        bits = zlib.compress(np.packbits(left).tobytes())
    return bytes([strict or nothing_fits(binding)]) + digest + bits


def judge(binding: Binding, said: Sequence[bytes], rank: int) -> Verdict:
    """Set what is unexpected in a binding's report, given what each rank said; return what all ranks conclude alike."""
    every = {message[1 + _DIGEST_NBYTES :] for message in said}
    left = binding.left
    common: list[int] = []
    if b"" not in every:
        found = [np.frombuffer(zlib.decompress(bits), np.uint8) for bits in every]
        bits = np.bitwise_and.reduce(np.stack(found))
        common = np.flatnonzero(np.unpackbits(bits, count=left.count)).tolist()
    report: LoadReport = binding.report
    binding.report = replace(report, unexpected=(*left.names(common), *left.own))
    problems = [message[1 : 1 + _DIGEST_NBYTES] for message in said]
    refused = any(message[0] and (common or problem != _FITS) for message, problem in zip(said, problems, strict=True))
    tells = rank == 0 or (problems[rank] != _FITS and problems.index(problems[rank]) == rank)
    return Verdict(refused, tells)
