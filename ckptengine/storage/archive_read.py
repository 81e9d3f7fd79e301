"""What a load asks of a storage: which bytes of an archive, how they are verified, and where they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptengine.native.tables import ScatterPlan

__all__ = ["ArchiveRead"]


@dataclass(frozen=True, slots=True)
class ArchiveRead:
    """Ranges of an archive's fixed region, and what is done with their bytes. A storage only brings these.

    `ranges` are rows of position and bytes, int64, shape (count, 2), sorted, disjoint, of whole blocks of
    `block_nbytes` or up to `fixed_nbytes`. `block_crcs` is the CRC32 of each block of the region, uint32, None where
    nothing can be verified. `plan` says where the bytes go.
    """

    fixed_nbytes: int
    block_nbytes: int
    block_crcs: NDArray[np.uint32] | None
    ranges: NDArray[np.int64]
    plan: ScatterPlan

    def from_file(self, fd: int, request_nbytes: int, threads: int) -> int:
        """Read an open file, verify and scatter, `threads` requests in flight; raises `OSError`.

        Returns the number of the first damaged block, or -1. Done again, it has the same effect.
        """
        import ckptengine._native as _native

        ops, index = self.plan.ops, self.plan.index
        return _native.load(
            fd, self.fixed_nbytes, self.block_nbytes, self.block_crcs, self.ranges, ops, index, request_nbytes, threads
        )

    def from_memory(self) -> Callable[[NDArray[np.uint8], int, int, int], int]:
        """Return what verifies and scatters bytes that have come, from several threads at once.

        It takes the bytes, uint8, the position in the file of the first, and position and number of those of them that
        are meant, a range or a part of one that is cut at a block. It returns the number of the first damaged block in
        there, or -1.
        """
        import ckptengine._native as _native

        ops, starts = self.plan.ops, self.plan.index
        begins = ops[starts[:-1]]
        # The highest end of the operations so far: those before the first that reaches into a range are left out.
        reach = np.maximum.accumulate(begins + ops[starts[:-1] + 1]) if begins.size else begins

        def scatter(data: NDArray[np.uint8], start: int, position: int, nbytes: int) -> int:
            first = int(np.searchsorted(reach, position, side="right"))
            last = max(first, int(np.searchsorted(begins, position + nbytes)))
            return _native.scatter(
                data.ctypes.data + position - start,
                position,
                nbytes,
                self.fixed_nbytes,
                self.block_nbytes,
                self.block_crcs,
                ops,
                np.ascontiguousarray(starts[first : last + 1]),
                1,
            )

        return scatter
