"""Buffers of modules that are declared as split by hand, of which the declaration says nothing.

One of them is stored and comes back to all ranks, as the running statistics of DDP do. Where a program counts or scales
something for its own part in one, the ranks have different ones, and that must be said.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from ckptengine.save.replicas import whole_crcs
from ckptengine.schema.leaf import ArrayLeaf
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.ranks import name_ranks

__all__ = ["note_of", "tell_differing", "undeclared_crcs"]

_NAMED = 4
_DIGEST_NBYTES = 8

_log = logging.getLogger("ckptengine")


def undeclared_crcs(leaves: Iterable[ArrayLeaf]) -> tuple[tuple[Path, int], ...]:
    """Return path and CRC32 of each such buffer."""
    return whole_crcs(leaf for leaf in leaves if leaf.undeclared)


def note_of(crcs: Sequence[tuple[Path, int]]) -> bytes:
    """Return what a rank tells of them: a digest of the paths, and 4 bytes for each; nothing where it has none."""
    if not crcs:
        return b""
    names = hashlib.sha256("\0".join(dotted(path) for path, _ in crcs).encode()).digest()[:_DIGEST_NBYTES]
    return names + np.asarray([crc for _, crc in crcs], "<u4").tobytes()


def tell_differing(crcs: Sequence[tuple[Path, int]], notes: Sequence[bytes], rank: int) -> None:
    """Log once which buffers differ between ranks that have the same ones, on the lowest of these ranks."""
    mine = notes[rank]
    ranks = [one for one, note in enumerate(notes) if mine and note[:_DIGEST_NBYTES] == mine[:_DIGEST_NBYTES]]
    others = [one for one in ranks if notes[one] != mine]
    if not others or ranks[0] != rank:
        return
    rows = np.stack([np.frombuffer(notes[one], "<u4", offset=_DIGEST_NBYTES) for one in ranks])
    paths = [path for (path, _), differs in zip(crcs, (rows != rows[0]).any(axis=0), strict=True) if differs]
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    _log.warning(
        "%s%s: buffers in what ce.Sharded declares that no pattern fits, and not rank %d's on %s: one rank's is saved, "
        "and all get that back. If each has its own, or a part, name them in the patterns (ce.PerRank, ce.Shard)",
        ", ".join(map(dotted, paths[:_NAMED])),
        more,
        rank,
        name_ranks(others),
    )
