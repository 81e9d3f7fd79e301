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
    """Sample batches so that training continues with the next sample, at any world size.

    It is a batch sampler: iterating yields this rank's lists of sample numbers (`int`), and
    `DataLoader(dataset, batch_sampler=sampler)` takes it. `batches` counts what training has consumed; iterating does
    not, since a loader fetches ahead:

        while sampler.epoch < epochs:
            for batch in sampler.batches(loader):
                ...
                ckpt.step(sampler.global_batches, state)  # state has the sampler

    - `length`: number of samples in the data set, up to 2**62.
    - `global_batch`: number of samples that all ranks together use for one optimizer step.
    - `seed`, `shuffle`: with `shuffle`, each epoch has another pseudo-random order, which depends on `seed` (a
      generalized Feistel cipher with cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    - `micro_batch`: cut a global batch into lists of this many samples, the same ones at any world size. A rank has
      several of them for each optimizer step; `complete` is true at the last one.
    - `last`: what happens at the end of an epoch to samples that do not fill a global batch. `"ragged"`: a shorter
      batch, which is joined to the one before if it would leave a rank without samples. `"drop"`: they are left out.
      `"pad"`: the batch is filled up with samples from the start of the epoch.
    - `rank`, `world_size`: by default those of the job. Ranks that use the same samples, as tensor-parallel peers do,
      give the same: their data-parallel rank, and the number of these.

    The state is a few plain values and a ledger of runs. All arguments except `length`, `seed` and `shuffle` may change
    when the job is restarted.

    Raises `ValueError` for arguments that leave a rank without samples or an epoch without batches, `CheckpointError`
    if a launcher has started several ranks and nothing is initialized.
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
        rank, world_size, repeated = place_of(rank, world_size)
        order: Order = Shuffled(length, seed) if shuffle else Sequential(length)
        cursor = Cursor(
            order,
            global_batch,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            last=last,
            repeated=repeated,
        )
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
        """Yield the loader's batches for the rest of the epoch, and count each one when it is handed out.

        `loader` is a `DataLoader(batch_sampler=this sampler)`, or anything else that iterates this sampler and yields
        one batch for each list, in order; without it the lists themselves are yielded. A save in the loop body includes
        the batch of that body. Each call continues where the one before was left, and ends with the epoch. Put a
        prefetcher around the loader, `batches(prefetch(loader))`. Around `batches` it would count batches that a job
        which ends now never trains on; so would leaving the loop before the training of a batch.

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
