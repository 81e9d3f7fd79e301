"""What of an order this rank hands to training: the common part of everything that has a cursor in its state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.comm.select import place
from ckptengine.data.cursor import Cursor
from ckptengine.data.ledger import GlobalBatch
from ckptengine.data.start import start
from ckptengine.errors import CheckpointError
from ckptengine.state.refusal import Refusal

__all__ = ["Handing", "Part", "place_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """One batch of this rank: numbers `begin` to before `end` of a global batch.

    It is number `index` of this rank's batches (micro-batches, where they are given) of the global batch, `left` more
    follow.
    """

    batch: GlobalBatch
    begin: int
    end: int
    index: int
    left: int


def place_of(rank: int | None, world_size: int | None) -> tuple[int, int, bool]:
    """Return rank and world size, where none is given those of the job, and whether other ranks may have the same.

    Raises `ValueError` where only one is given, `CheckpointError` where a launcher has started several ranks and
    nothing is initialized.
    """
    if rank is not None and world_size is not None:
        with contextlib.suppress(CheckpointError):
            return rank, world_size, world_size != place()[1]
        return rank, world_size, True
    if rank is not None or world_size is not None:
        raise ValueError(f"rank={rank}, world_size={world_size}: give both, or neither for those of the job")
    return *place(), False


class Handing:
    """A cursor, and how far this rank is in its next global batch; what draws from it marks what isn't counted.

    `name` is what the object is called in messages: `name.batches(loader)`.
    """

    def __init__(self, cursor: Cursor, name: str) -> None:
        self._cursor, self._name = cursor, name
        self._handed: Part | None = None
        self._begun = 0  # parts that were handed out of the cursor's next global batch
        self._stray = False  # parts were drawn past `batches`, and none counted since
        self._counting = False  # a loader is being started for `batches`

    @property
    def epoch(self) -> int:
        """The epoch of the next global batch, from 0 on; after an epoch's last one it is the next epoch."""
        return self._cursor.epoch

    @property
    def consumed(self) -> int:
        """Samples (records) of that epoch that training has consumed, on all ranks together."""
        return self._cursor.consumed

    @property
    def global_batches(self) -> int:
        """Global batches that training has consumed since the start, over all epochs and restarts."""
        return self._cursor.batches

    @property
    def complete(self) -> bool:
        """Whether the batch handed out last was this rank's last of its global batch: the optimizer's step follows."""
        return self._begun == 0

    @property
    def size(self) -> int:
        """Samples, over all ranks, of the global batch that was handed out last: what a sum of losses is divided by.

        Raises `ValueError` where none was handed out yet.
        """
        if self._handed is None:
            raise ValueError("no batch has been handed out yet")
        return self._handed.batch.size

    def __len__(self) -> int:
        """Return how many batches (micro-batches, where they are given) this rank has left of the epoch."""
        cursor = self._cursor
        full, other = cursor.sizes_left()
        parts = full * len(cursor.lists_of(cursor.global_batch)) + (len(cursor.lists_of(other)) if other else 0)
        return parts - self._begun

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor's state, which is that of all ranks but for a digest.

        Where batches were drawn and none of them counted, and in the middle of a global batch, it holds a `Refusal`:
        saving it then raises `StateError` that says what to do.
        """
        state = self._cursor.state_dict()
        reason = self._reason()
        if reason is not None:
            state["cursor"] = Refusal(reason)
        return state

    def _reason(self) -> str | None:
        """Return why this must not be saved now, None where it may."""
        if self._stray:
            return (
                f"batches were drawn from this {type(self).__name__} that it was not told of as consumed, so its "
                f"position would be wrong: loop over `{self._name}.batches(loader)` instead of `loader` (without a "
                f"loader: over `{self._name}.batches()`)"
            )
        if self._begun and self._handed is not None:
            parts = self._handed.index + 1 + self._handed.left
            return (
                f"global batch {self._cursor.batches} is half used (this rank has handed {self._begun} of its {parts} "
                "micro-batches to training), and gradients are not part of the state: save after the optimizer's step, "
                f"when `{self._name}.complete` is true"
            )
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position.

        Raises `LoadMismatchError` where it is one of another order: of another length or seed, of other files.
        """
        self._cursor.load_state_dict(state)
        self._handed, self._begun, self._stray = None, 0, False

    def _start(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Begin an iteration of a loader here: no two ranks, and no two places of a run, seed its workers alike."""
        return start(loader, self._here())

    def _here(self) -> list[Any]:
        """Return the place of this rank's next batch in the run, as plain values."""
        cursor = self._cursor
        return [cursor.order.describe(), cursor.epoch, cursor.consumed, self._begun, cursor.rank, cursor.world_size]

    def _parts(self) -> Iterator[Part]:
        """Yield what this rank has left of the epoch; counts nothing."""
        return islice(self._all_parts(), self._begun, None)

    def _all_parts(self) -> Iterator[Part]:
        for batch in self._cursor.plan():
            parts = self._cursor.lists_of(batch.size)
            for index, (begin, end) in enumerate(parts):
                yield Part(batch, begin, end, index, len(parts) - 1 - index)

    def _count(self, part: Part, samples: NDArray[np.int64]) -> None:
        """Count a part as consumed, and its sample numbers into the digest: the loop's body gets it now.

        Raises `CheckpointError` where another one is due.
        """
        cursor, batch = self._cursor, part.batch
        due = (cursor.batches, cursor.epoch, cursor.consumed, self._begun)
        if (batch.number, batch.epoch, batch.begin, part.index) != due:
            raise CheckpointError(
                f"the cursor is at global batch {cursor.batches}, epoch {cursor.epoch}, position {cursor.consumed}, "
                f"this loop at global batch {batch.number}, epoch {batch.epoch}, position {batch.begin}: it was "
                "loaded, or moved by another loop, while this one was running; begin a new loop over batches() "
                "after that"
            )
        cursor.count(batch, part.begin, samples)
        self._handed, self._stray, self._begun = part, False, part.index + 1
        if part.left == 0:
            cursor.complete(batch)
            self._begun = 0
