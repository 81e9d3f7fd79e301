"""What of a checkpoint no rank's state has taken: each tells what it did not take, along with its offer."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ckptengine.state.bind import Binding, nothing_fits
from ckptengine.state.report import LoadReport
from ckptengine.state.select import refuse_unknown

__all__ = ["Verdict", "judge", "said_of"]

_SIZES = struct.Struct("<4Q")
_Told = tuple[bytes, ...]
_STRICT, _VERIFY = 1, 2
_DIGEST_NBYTES = 8
_FITS = bytes(_DIGEST_NBYTES)
"""What stands for the problems of a rank that has none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`refused` tells whether any rank is to raise, since what it asked for does not fit; `tells` whether this rank is
    the first with its problems; `verifies` whether any rank compares its state after the load: then all must do it."""

    refused: bool
    tells: bool
    verifies: bool


def said_of(binding: Binding, strict: bool, verify: bool) -> bytes:
    """Return what a rank says: whether misfits are errors to it (with `strict`, or where nothing fits) and whether it
    is to verify the load; its problems as a digest; and bits for leaves, compressed; none where they are all 0.
    They stand for the leaves that it did not take, for those that objects would be handed beyond the state that they
    have here, and for those that they have here and had not when they were saved. The last is what `only` names: what
    the rank has of it, and what it has not."""
    report = binding.report
    own = (report.missing, report.mismatched, report.other_class, binding.left.own)
    digest = _FITS
    if any(own):
        digest = hashlib.sha256(json.dumps(own).encode()).digest()[:_DIGEST_NBYTES]
    extras = frozenset().union(*(extra.numbers for one in binding.items for extra in one.extras))
    fresh = frozenset().union(*(one.fresh for one in binding.items))
    bits = [_bits(numbers, binding.left.count) for numbers in (binding.left.others, extras, fresh)]
    asked = json.dumps([binding.known, binding.unknown]).encode() if binding.known or binding.unknown else b""
    sizes = _SIZES.pack(*map(len, bits), len(asked))
    wishes = (_STRICT if strict or nothing_fits(binding) else 0) | (_VERIFY if verify else 0)
    return b"".join([bytes([wishes]), digest, sizes, *bits, asked])


def judge(binding: Binding, said: Sequence[bytes], rank: int) -> Verdict:
    """Set what is unexpected in a binding's report, and what objects are not handed, given what each rank said; return
    what all ranks conclude alike.

    Raises `LoadMismatchError` on all ranks where `only` names something that no rank has.
    """
    told = [_told_bits(message) for message in said]
    refuse_unknown(_unknown(told))
    every, left = {one for one, *_ in told}, binding.left
    common: list[int] = []
    if b"" not in every:
        common = np.flatnonzero(np.logical_and.reduce([_unpacked(bits, left.count) for bits in every])).tolist()
    if binding.items:
        _share_items(binding, set(told))
    report: LoadReport = binding.report
    binding.report = replace(report, unexpected=(*left.names(common), *left.own))
    problems = [message[1 : 1 + _DIGEST_NBYTES] for message in said]
    refused = any(
        message[0] & _STRICT and (common or problem != _FITS) for message, problem in zip(said, problems, strict=True)
    )
    tells = rank == 0 or (problems[rank] != _FITS and problems.index(problems[rank]) == rank)
    return Verdict(refused, tells, any(message[0] & _VERIFY for message in said))


def _share_items(binding: Binding, told: Collection[_Told]) -> None:
    """Settle what of the checkpoint each object is not handed.

    An object gets again what this rank had saved of it, where the checkpoint says that and no rank's object has
    anything now that it had not then. Else the ranks may be split in another way, and what their objects have before
    the load decides, where each of two has something that the other lacks. Else all get all: objects that fill
    themselves later have nothing yet, and a rank that has evaluated before the load has more.
    """
    if not any(extra or fresh for _, extra, fresh, _ in told):
        return  # every object has what the checkpoint has for it
    numbers_of = [np.asarray(sorted(one.numbers), np.int64) for one in binding.items]
    distinct = {one[:3] for one in told}
    # Only what lies in objects is kept of each rank's bits: of all leaves it may be much.
    count = binding.left.count
    unpacked = [[[bits[n] for n in numbers_of] for bits in (_unpacked(b, count) for b in one)] for one in distinct]
    for place, (one, numbers) in enumerate(zip(binding.items, numbers_of, strict=True)):
        if one.unsaved is not None and not any(fresh[place].any() for _, _, fresh in unpacked):
            binding.leave_out(one.path, one.unsaved)
            continue
        have = [~left[place] & ~extra[place] for left, extra, _ in unpacked]
        if _nested(have):
            continue
        anywhere = set(numbers[np.logical_or.reduce(have)].tolist())
        binding.leave_out(one.path, [extra for extra in one.extras if not extra.numbers.isdisjoint(anywhere)])


def _unknown(told: Sequence[_Told]) -> list[str]:
    """Return what `only` names on any rank, and no rank has."""
    asked = [json.loads(one[-1]) for one in dict.fromkeys(told) if one[-1]]
    known = {name for names, _ in asked for name in names}
    return list(dict.fromkeys(name for _, names in asked for name in names if name not in known))


def _nested(sets: Sequence[NDArray[np.bool_]]) -> bool:
    """Whether of any two sets, given as bits, one has all of the other."""
    ordered = sorted(sets, key=lambda one: int(one.sum()))
    return not any((smaller & ~larger).any() for smaller, larger in itertools.pairwise(ordered))


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


def _told_bits(message: bytes) -> _Told:
    """Return the bits that `said_of` told, and what follows them."""
    start = 1 + _DIGEST_NBYTES
    end = start + _SIZES.size
    starts = [end, *(end + size for size in itertools.accumulate(_SIZES.unpack_from(message, start)))]
    return tuple(message[one:other] for one, other in itertools.pairwise(starts))
