"""A batch sampler that any number of ranks continues where training was, in mid-epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.comm.select import place
from ckptengine.data.cursor import Cursor, Last
from ckptengine.data.ledger import GlobalBatch
from ckptengine.data.order import Order, Sequential, Shuffled
from ckptengine.data.start import start
from ckptengine.errors import CheckpointError
from ckptengine.state.refusal import Refusal

__all__ = ["ElasticSampler"]

_AHEAD = 64
"""Lists whose samples are computed in one go."""
_END = object()


@dataclass(frozen=True, slots=True)
class _Part:
    """One list of this rank: numbers `begin` to before `end` of a global batch.

    It is number `index` of this rank's lists of the global batch, `left` more follow.
    """

    batch: GlobalBatch
    begin: int
    end: int
    index: int
    left: int


class ElasticSampler:
    """Gives this rank's sample numbers of each further global batch, from where training was, at any world size.

    It is a batch sampler: iterating gives lists of `int`, `DataLoader(dataset, batch_sampler=sampler)` takes it. What
    training has consumed is counted by `batches`, not by iterating, since a loader fetches ahead:

        for epoch in range(sampler.epoch, epochs):
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
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank}, world_size={world_size}: give both, or neither for those of the job")
        if rank is None or world_size is None:
            rank, world_size = place()
        order: Order = Shuffled(length, seed) if shuffle else Sequential(length)
        self._cursor = Cursor(order, global_batch, rank=rank, world_size=world_size, micro_batch=micro_batch, last=last)
        self._handed: _Part | None = None
        self._begun = 0  # lists that were handed out of the cursor's next global batch
        self._stray = False  # lists were drawn past `batches`, and none counted since
        self._counting = False  # a loader is being started for `batches`
        self._drawing: _Drawing | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next global batch, from 0 on; after an epoch's last one it is the next epoch."""
        return self._cursor.epoch

    @property
    def consumed(self) -> int:
        """Samples of that epoch that training has consumed, on all ranks together."""
        return self._cursor.consumed

    @property
    def global_batches(self) -> int:
        """Global batches that training has consumed since the start, over all epochs and restarts."""
        return self._cursor.batches

    @property
    def complete(self) -> bool:
        """Whether the list handed out last was this rank's last of its global batch: the optimizer's step follows."""
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
        """Return how many lists this rank has left in the epoch."""
        cursor = self._cursor
        full, other = cursor.sizes_left()
        lists = full * len(cursor.lists_of(cursor.global_batch)) + (len(cursor.lists_of(other)) if other else 0)
        return lists - self._begun

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's lists of the rest of the epoch; counts nothing."""
        drawing = _Drawing(self, self._counting)
        if self._counting:
            self._drawing = drawing
        return drawing

    def batches(self, loader: Iterable[Any] | None = None) -> Iterator[Any]:
        """Yield what the loader makes of the rest of the epoch, and count each batch when it is handed out.

        `loader` is a `DataLoader(batch_sampler=this sampler)`, or anything else that iterates this sampler and gives
        one batch for each list, in order; without it the lists themselves are given. A save in the loop's body includes
        the batch of that body. Each call goes on where the one before was left, and ends with the epoch.

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
                "in_order=False gives batches as workers finish them, so that nobody knows which ones training has "
                "consumed: make the DataLoader with in_order=True"
            )
        return self._hand_out(loader)

    def _hand_out(self, loader: Iterable[Any]) -> Iterator[Any]:
        self._drawing, self._counting = None, True
        try:
            batches = start(loader, self._place())
            batch = next(batches, _END)
        finally:
            self._counting = False
        drawing = self._drawing
        if drawing is None:
            raise CheckpointError("the loader gave a batch without drawing from this sampler, or none at all")
        while batch is not _END:
            self._count(drawing)
            yield batch
            batch = next(batches, _END)
        drawing.check_end()

    def _place(self) -> list[object]:
        """Return where the next iteration begins: no two ranks, and no two places of a run, have it in common."""
        cursor = self._cursor
        return [cursor.order.describe(), cursor.epoch, cursor.consumed, self._begun, cursor.rank, cursor.world_size]

    def _count(self, drawing: _Drawing) -> None:
        cursor = self._cursor
        part, samples = drawing.hand_out()
        batch = part.batch
        place_now = (cursor.batches, cursor.epoch, cursor.consumed, self._begun)
        if (batch.number, batch.epoch, batch.begin, part.index) != place_now:
            raise CheckpointError(
                f"the cursor is at global batch {cursor.batches}, epoch {cursor.epoch}, sample {cursor.consumed}, the "
                f"loader at global batch {batch.number}, epoch {batch.epoch}, sample {batch.begin}: it was loaded or "
                "counted elsewhere while this loop was under way; begin a new loop over batches() after that"
            )
        cursor.count(batch, part.begin, samples)
        self._handed, self._stray, self._begun = part, False, part.index + 1
        if part.left == 0:
            cursor.complete(batch)
            self._begun = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor's state, which is that of all ranks but for a digest.

        Where lists were drawn and none of them counted, and in the middle of a global batch, it holds a `Refusal`:
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
                "batches were drawn from this sampler that it was not told of as consumed, so its position would be "
                "wrong: loop over `sampler.batches(loader)` instead of `loader` (without a loader: over "
                "`sampler.batches()`)"
            )
        if self._begun and self._handed is not None:
            lists = self._handed.index + 1 + self._handed.left
            return (
                f"global batch {self._cursor.batches} is half used (this rank has handed {self._begun} of its {lists} "
                "micro-batches to training), and gradients are not part of the state: save after the optimizer's step, "
                "when `sampler.complete` is true"
            )
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position; raises `LoadMismatchError` where it is one of another length, seed or order."""
        self._cursor.load_state_dict(state)
        self._handed, self._begun, self._stray = None, 0, False


class _Drawing(Iterator[list[int]]):
    """One pass over the rest of an epoch, as fast as a loader draws it."""

    def __init__(self, sampler: ElasticSampler, counted: bool) -> None:
        self._sampler, self._cursor, self._counted = sampler, sampler._cursor, counted
        self._parts = islice(self._all_parts(), sampler._begun, None)
        self._ready: deque[tuple[_Part, NDArray[np.int64]]] = deque()
        self._drawn: deque[tuple[_Part, NDArray[np.int64]]] = deque()

    def _all_parts(self) -> Iterator[_Part]:
        for batch in self._cursor.plan():
            lists = self._cursor.lists_of(batch.size)
            for index, (begin, end) in enumerate(lists):
                yield _Part(batch, begin, end, index, len(lists) - 1 - index)

    def __next__(self) -> list[int]:
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

    def hand_out(self) -> tuple[_Part, NDArray[np.int64]]:
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
