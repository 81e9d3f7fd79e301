"""A batch sampler that any number of ranks continues where training was, in mid-epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.data.cursor import Cursor, Last
from ckptengine.data.handing import Handing, Part, place_of
from ckptengine.data.order import Order, Sequential, Shuffled
from ckptengine.data.start import seeded
from ckptengine.errors import CheckpointError

__all__ = ["ElasticSampler"]

_AHEAD = 64
"""Lists whose samples are computed in one go."""
_END = object()


class ElasticSampler(Handing):
    """Gives this rank's sample numbers of each further global batch, from where training was, at any world size.

    It is a batch sampler: iterating gives lists of `int`, `DataLoader(dataset, batch_sampler=sampler)` takes it. What
    training has consumed is counted by `batches`, not by iterating, since a loader fetches ahead:

        while sampler.epoch < epochs:
            for batch in sampler.batches(loader):
                ...
                ckpt.step(sampler.global_batches, state)  # state has the sampler

    `length` is the number of samples of the data set, `global_batch` the samples that all ranks together use for one
    step of the optimizer. With `micro_batch`, a global batch is cut into lists of so many samples, the same ones
    whatever the world size, and a rank has several of them for each step of the optimizer: `complete` tells when.
    `shuffle` gives another pseudo-random order in each epoch, from `seed`. `last` says what becomes of the samples at
    an epoch's end that are no whole global batch: a shorter batch (`"ragged"`; joined to the one before where it would
    leave a rank without samples), none (`"drop"`), or one that is filled up from the epoch's start (`"pad"`). `rank`
    and `world_size` are the job's by default.

    The state is a few plain values and a ledger of runs; the arguments but for `length`, `seed` and `shuffle` may
    change from one life of the job to the next.

    Raises `ValueError` for arguments that leave a rank without samples or an epoch without batches, `CheckpointError`
    where a launcher has started several ranks and nothing is initialized.
    """

    def __init__(
        self,
        length: int,
        global_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        micro_batch: int | None = None,
        last: Last = "ragged",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        rank, world_size = place_of(rank, world_size)
        order: Order = Shuffled(length, seed) if shuffle else Sequential(length)
        cursor = Cursor(order, global_batch, rank=rank, world_size=world_size, micro_batch=micro_batch, last=last)
        super().__init__(cursor, "sampler")
        self._drawing: _Drawing | None = None
        self._starting: Iterable[Any] | None = (
            None  # a loader that makes its iterator when its first batch is asked for
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's lists of the rest of the epoch; counts nothing."""
        late = None
        if self._starting is not None:  # a DataLoader with workers asks twice
            late = seeded(self._starting, self._here()) if self._drawing is None else self._drawing.late
        drawing = _Drawing(self, self._counting, late)
        if self._counting:
            self._drawing = drawing
        return drawing

    def batches(self, loader: Iterable[Any] | None = None) -> Iterator[Any]:
        """Yield what the loader makes of the rest of the epoch, and count each batch when it is handed out.

        `loader` is a `DataLoader(batch_sampler=this sampler)`, or anything else that iterates this sampler and gives
        one batch for each list, in order; without it the lists themselves are given. A save in the loop's body includes
        the batch of that body. Each call goes on where the one before was left, and ends with the epoch. What takes
        batches ahead of training belongs around the loader, `batches(prefetch(loader))`: around `batches` it would have
        batches counted that a job which ends now never trains on; so would leaving the loop before it trains.

        Raises `ValueError` for a loader that draws from another sampler or gives batches out of order,
        `CheckpointError` where it gives more or fewer batches than it draws lists, or where the cursor is loaded while
        it is under way.
        """
        if loader is None:
            return self._hand_out(self)
        drawn_from = getattr(loader, "batch_sampler", self)
        if drawn_from is not self:
            raise ValueError(
                f"the loader draws from {type(drawn_from).__name__}, not from this sampler: make it with "
                "DataLoader(dataset, batch_sampler=sampler)"
            )
        if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
            raise ValueError(
                "in_order=False gives batches as workers finish them, so it is unknown which ones training has "
                "consumed: make the DataLoader with in_order=True"
            )
        return self._hand_out(loader)

    def _hand_out(self, loader: Iterable[Any]) -> Iterator[Any]:
        self._drawing, self._counting = None, True
        try:
            batches = self._start(loader)
            if self._drawing is None:  # a generator around a DataLoader, which will draw a seed with its first batch
                self._starting = loader
            batch = next(batches, _END)
        finally:
            self._counting, self._starting = False, None
            if self._drawing is not None:
                self._drawing.started()
        drawing = self._drawing
        if drawing is None:
            raise CheckpointError("the loader gave a batch without drawing from this sampler, or none at all")
        while batch is not _END:
            self._count(*drawing.hand_out())
            yield batch
            batch = next(batches, _END)
        drawing.check_end()


class _Drawing(Iterator[list[int]]):
    """One pass over the rest of an epoch, as fast as a loader draws it.

    `late` sets the random streams back that were seeded for a loader's iterator, before its first draw.
    """

    def __init__(self, sampler: ElasticSampler, counted: bool, late: Callable[[], None] | None = None) -> None:
        self.late = late
        self._sampler, self._cursor, self._counted = sampler, sampler._cursor, counted
        self._parts = sampler._parts()
        self._ready: deque[tuple[Part, NDArray[np.int64]]] = deque()
        self._drawn: deque[tuple[Part, NDArray[np.int64]]] = deque()

    def started(self) -> None:
        """Set the random streams back: the loader's iterator is made."""
        late, self.late = self.late, None
        if late is not None:
            late()

    def __next__(self) -> list[int]:
        self.started()
        if not self._ready:
            self._fill()
        part, samples = self._ready.popleft()
        if self._counted:
            self._drawn.append((part, samples))
        else:
            self._sampler._stray = True
        numbers: list[int] = samples.tolist()
        return numbers

    def _fill(self) -> None:
        """Compute the samples of the next lists; raises `StopIteration` where there are none."""
        parts = list(islice(self._parts, _AHEAD))
        if not parts:
            raise StopIteration
        positions = [self._cursor.positions_of(part.batch, part.begin, part.end) for part in parts]
        samples = self._cursor.order.at(parts[0].batch.epoch, np.concatenate(positions))
        ends = np.cumsum([len(those) for those in positions])[:-1]
        self._ready.extend(zip(parts, np.split(samples, ends), strict=True))

    def hand_out(self) -> tuple[Part, NDArray[np.int64]]:
        """Return the list that the next batch was made of."""
        if not self._drawn:
            raise CheckpointError("the loader gave more batches than it drew lists from the sampler")
        return self._drawn.popleft()

    def check_end(self) -> None:
        """Check, where the loader has ended, that it gave a batch for each list and drew all of them."""
        left = len(self._drawn) + len(self._ready) + sum(1 for _ in self._parts)
        if left:
            raise CheckpointError(
                f"the loader ended with {left} lists of the epoch not handed out: it must give one batch for each list"
            )
