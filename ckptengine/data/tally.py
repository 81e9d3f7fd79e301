"""The digest that one rank keeps, and what those of all ranks sum up to where several hand out the same samples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ckptengine.data.digest import DIGEST_BITS, parse_digest, write_digest

__all__ = ["Tally", "total_of"]

_MODULUS = 1 << DIGEST_BITS
_SHARED = re.compile(r"([^+]*)\+([^@]*)@(0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True)
class Tally:
    """A rank's digest. `own` counts for this rank alone, and holds what ranks before it have left it.

    `shared` is of samples that other ranks may have handed out as well: those that say the same `share`, as the
    tensor-parallel peers of one data-parallel rank. Of these the lowest rank's counts. None: there are no such samples.
    """

    own: int = 0
    shared: int = 0
    share: int | None = None

    @property
    def digest(self) -> int:
        """The digest of all that this rank has handed out, and of what was left to it."""
        return (self.own + self.shared) % _MODULUS

    def plus(self, digest: int, shared: bool) -> Tally:
        """Return the tally with further samples."""
        return replace(self, shared=self.shared + digest) if shared else replace(self, own=self.own + digest)

    def write(self) -> str:
        """Return the tally as text: a digest, and where samples are shared `DIGEST+DIGEST@SHARE`."""
        own = write_digest(self.own)
        return own if self.share is None else f"{own}+{write_digest(self.shared)}@{self.share}"

    @classmethod
    def parse(cls, text: object) -> Tally:
        """Return the tally that `write` wrote; raises `ValueError` for anything else."""
        found = _SHARED.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            return cls(parse_digest(text))
        return cls(parse_digest(found[1]), parse_digest(found[2]), int(found[3]))


def total_of(texts: Iterable[object]) -> tuple[int, list[int]]:
    """Return the digest of what all ranks together have used, from their tallies in the order of the ranks.

    And the ranks that were handed other samples than the first rank of the same share.
    """
    total, apart = 0, []
    first: dict[int, int] = {}
    for rank, tally in enumerate(map(Tally.parse, texts)):
        total += tally.own
        if tally.share is None:
            continue
        if tally.share not in first:
            total += tally.shared
        if first.setdefault(tally.share, tally.shared) != tally.shared:
            apart.append(rank)
    return total % _MODULUS, apart
