"""Batches of records that lie in shard files and are read from front to back, resumable at any world size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.comm.select import current
from ckptengine.data.cursor import Cursor, Last
from ckptengine.data.lanes import Lanes
from ckptengine.data.ledger import GlobalBatch
from ckptengine.data.mix import mix64
from ckptengine.data.readers import Reader
from ckptengine.data.records import RecordReader
from ckptengine.data.shards import Shards, as_reader

__all__ = ["ElasticBatches"]

DEFAULT_LANES = 64
"""Lanes where none are asked for: enough for 64 ranks to read each its own, and as many open files in one process."""


@dataclass(frozen=True, slots=True)
class _Part:
    """This rank's share of a global batch, or one micro-batch of it: from `begin` to before `end` in the batch.

    It travels to a loader's worker, which reads it, and comes back with its records.
    """

    batch: GlobalBatch
    begin: int
    end: int
    last: bool


class ElasticBatches:
    """Batches of records of shard files; its position counts the records of all ranks, so any world size continues it.

    `shards` are a list of files, or `Shards` (counted once, with what finds a record quickly). `open` is a `Reader`, or
    a function `(path, start) -> iterator of records` from number `start` on; by default records are lines of text. With
    a list of files `counts` gives their numbers of records; without it each rank counts all files at the start.

    A global batch has `global_batch` records over all ranks, `micro_batch` cuts it into parts of so many, `last` says
    what becomes of an epoch's rest: all as in `Cursor`. The order of an epoch, a function of (seed, epoch), is that of
    `Lanes`: with `shuffle` the files come in another order in each epoch; records of one file stay in theirs, `lanes`
    files are mixed. `cycle` spreads the lanes over so many global batches: with a multiple of the loader's workers each
    worker reads lanes of its own; else it passes by what the others read. Files, `seed`, `shuffle`, `lanes`, `cycle`
    and (as it is set at first) `global_batch` make the order: they must stay the same through a run.

    `collate` makes a batch of a list of records, in the loader's worker; by default the list itself is the batch.
    `rank` and `world_size` are by default those of the job.

    Put it into the state, build a loader with `loader`, and iterate over `batches(loader)`. Raises `ValueError` or
    `TypeError` for wrong arguments, `StorageError` where a shard can't be read.
    """

    def __init__(
        self,
        shards: Shards | Iterable[str | os.PathLike[str]],
        global_batch: int,
        *,
        open: Reader | Callable[[str, int], Iterator[Any]] | None = None,
        counts: Sequence[int] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        micro_batch: int | None = None,
        last: Last = "ragged",
        lanes: int | None = None,
        cycle: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if cycle < 1 or global_batch < 1:
            raise ValueError(f"global_batch={global_batch}, cycle={cycle}: records and global batches, from 1 on")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank}, world_size={world_size}: give both or none")
        if rank is None or world_size is None:
            comm = current()
            rank, world_size = comm.rank, comm.world_size
        reader = as_reader(open)
        if isinstance(shards, Shards):
            if counts is not None:
                raise ValueError("counts= goes with a list of files; Shards have their own")
        elif counts is not None:
            shards = Shards.given(shards, counts)
        else:
            shards = Shards.count(shards, reader)
        block = global_batch * cycle
        self.shards = shards
        order = Lanes(
            shards.counts,
            block=block,
            lanes=min(DEFAULT_LANES, block) if lanes is None else lanes,
            names=shards.digest,
            seed=seed,
            shuffle=shuffle,
        )
        self.cursor = Cursor(order, global_batch, rank=rank, world_size=world_size, micro_batch=micro_batch, last=last)
        self._seed = seed
        self._records = _Parts(RecordReader(shards, order, reader), order.length, collate)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0 on."""
        return self.cursor.epoch

    def __len__(self) -> int:
        """Return how many batches (micro-batches) this rank has left of the epoch."""
        full, rest = self.cursor.sizes_left()
        parts = full * len(self.cursor.lists_of(self.cursor.global_batch)) if full else 0
        return parts + (len(self.cursor.lists_of(rest)) if rest else 0)

    def __getitem__(self, index: object) -> Any:
        raise TypeError("an ElasticBatches is no dataset by itself: make its DataLoader with .loader(num_workers=...)")

    def loader(self, **options: Any) -> Any:
        """Return a torch DataLoader whose workers read this rank's batches, ahead of training.

        `options` are those of `torch.utils.data.DataLoader` that do not choose samples: `num_workers`,
        `prefetch_factor`, `persistent_workers`, `pin_memory`, `multiprocessing_context`, `worker_init_fn`, `timeout`,
        ... One loader serves all epochs. The loader has a random generator of its own: torch would draw from
        the global one at each start, so that a restart in the middle of an epoch changed what training draws.
        Raises `TypeError` for an option that would change which records come, or in which order.
        """
        from ckptengine.torch.loader import OWN_OPTIONS, make_loader

        odd = sorted(OWN_OPTIONS & set(options))
        if odd or not options.get("in_order", True):
            name = odd[0] if odd else "in_order"
            hint = "give collate= to ElasticBatches" if name == "collate_fn" else "ElasticBatches decides that itself"
            raise TypeError(f"loader({name}=...): {hint}")
        return make_loader(self._records, _Plan(self), options)

    def batches(self, loader: Any = None) -> Iterator[Any]:
        """Yield this rank's batches to the end of the epoch; a batch counts as consumed when the loop's body gets it.

        `loader` is what `loader` returned; without one the records are read here, when they are due. What workers have
        fetched ahead is not counted. Each batch is checked to be the one that is due. A global batch of several
        micro-batches is consumed with its last one. Raises `RuntimeError` where the loader gives anything else, or
        where the position is changed during the loop (`restore` before it).
        """
        if loader is not None and getattr(loader, "dataset", None) is not self._records:
            raise TypeError("batches(loader): this loader is not one that .loader() of this ElasticBatches made")
        cursor = self.cursor
        given: list[tuple[int, NDArray[np.int64]]] = []  # of the global batch, counted when it is complete
        if loader is None:
            items: Iterator[Any] = map(self._records.__getitem__, self._parts())
        else:
            loader.generator.manual_seed(self._workers_seed())
            items = iter(loader)
        for part in self._parts():
            if (cursor.epoch, cursor.batches) != (part.batch.epoch, part.batch.number):
                raise RuntimeError(
                    f"the position is global batch {cursor.batches} of epoch {cursor.epoch}, this loop is at "
                    f"{part.batch.number} of epoch {part.batch.epoch}: it was changed by a restore, or by another "
                    "loop, while this one ran; begin a new loop"
                )
            found, records = next(items, (None, None))
            if found != part:
                raise RuntimeError(
                    f"the loader gave {found}, due is {part}; make it with .loader() and leave it as it is"
                )
            given.append((part.begin, cursor.samples_of(part.batch, part.begin, part.end)))
            if part.last:
                for begin, samples in given:
                    cursor.count(part.batch, begin, samples)
                cursor.complete(part.batch)
                given.clear()
            yield records
        if next(items, None) is not None:
            raise RuntimeError("the loader gave more batches than the epoch has left; make it with .loader()")

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the position: that of `Cursor`."""
        return self.cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position, of any world size; raises `LoadMismatchError` where it is that of another order."""
        self.cursor.load_state_dict(state)

    def _workers_seed(self) -> int:
        """Return from what torch seeds the workers: another number for each rank and each place where a loop begins."""
        key = self._seed
        for number in (self.cursor.epoch, self.cursor.consumed, self.cursor.rank, self.cursor.world_size):
            key = mix64(mix64(key) + number)
        return key >> 1

    def _parts(self) -> Iterator[_Part]:
        """Yield what this rank has left of the epoch."""
        for batch in self.cursor.plan():
            parts = self.cursor.lists_of(batch.size)
            for begin, end in parts:
                yield _Part(batch, begin, end, (begin, end) == parts[-1])


class _Parts:
    """What a loader's workers hold: reads the part that it is asked for, and knows nothing of a position."""

    def __init__(self, reader: RecordReader, length: int, collate: Callable[[list[Any]], Any] | None) -> None:
        self._reader, self._length, self._collate = reader, length, collate

    def __getitem__(self, part: _Part) -> tuple[_Part, Any]:
        records = self._reader.read(part.batch.epoch, self._positions(part))
        return part, records if self._collate is None else self._collate(records)

    def _positions(self, part: _Part) -> NDArray[np.int64]:
        """Return positions in the epoch; those past the batch's end are padding, from the epoch's start on."""
        batch = part.batch
        positions = np.arange(batch.begin + part.begin, batch.begin + part.end, dtype=np.int64)
        return np.where(positions < batch.end, positions, (positions - batch.end) % self._length)


class _Plan:
    """What a loader asks its workers for, in turn: the parts from the position on at which an iteration begins."""

    def __init__(self, batches: ElasticBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[_Part]:
        return self._batches._parts()

    def __len__(self) -> int:
        return len(self._batches)
