"""Batches of records that lie in shard files and are read from front to back, resumable at any world size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ckptengine.data.cursor import Cursor, Last
from ckptengine.data.handing import Handing, Part, place_of
from ckptengine.data.lanes import Lanes
from ckptengine.data.readers import Reader
from ckptengine.data.records import RecordReader
from ckptengine.data.shards import Shards, as_reader
from ckptengine.errors import CheckpointError
from ckptengine.frameworks.registry import framework

__all__ = ["ElasticBatches"]

DEFAULT_LANES = 64
"""Lanes where none are asked for: enough for 64 ranks to read each its own, and as many open files in one process."""


class ElasticBatches(Handing):
    """Batch the records of shard files so that training continues with the next record, at any world size.

    - `shards`: a list of files, or `Shards`, which are counted once and find a record quickly.
    - `open`: a `Reader`, or a function `(path, start) -> iterator of records` from record `start` on. By default
      records are lines of text.
    - `counts`: for a list of files, their numbers of records; without it each rank counts all files at the start.
    - `global_batch`, `micro_batch`, `last`: as for `ElasticSampler`, in records.
    - `seed`, `shuffle`: with `shuffle`, the files have another order in each epoch. Records within a file keep theirs.
    - `lanes`: how many places in the files are read and mixed at a time; by default 64, or `block` if that is less.
    - `block`: the records of a round in which each lane has its turn; by default a global batch. A multiple of the
      loader's workers times a global batch gives each worker lanes of its own; otherwise a worker skips what the others
      read.
    - `collate`: makes a batch of a list of records, in the loader's worker; by default the list itself is the batch.
    - `rank`, `world_size`: by default those of the job. Ranks that use the same samples, as tensor-parallel peers do,
      give the same: their data-parallel rank, and the number of these.

    Files, `seed`, `shuffle`, `lanes` and `block` define the order (`docs/streams.md`): they must stay the same through
    a run.

    Put it into the state, make a loader with `loader`, and loop over `batches(loader)`:

        while data.epoch < epochs:
            for batch in data.batches(loader):
                ...
                ckpt.step(data.global_batches, state)

    Raises `ValueError` or `TypeError` for wrong arguments, `StorageError` if a shard can't be read, `CheckpointError`
    if a launcher has started several ranks and nothing is initialized.
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
        block: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        rank, world_size, repeated = place_of(rank, world_size)
        reader = as_reader(open)
        if isinstance(shards, Shards):
            if counts is not None:
                raise ValueError("counts= goes with a list of files; Shards have their own")
        elif counts is not None:
            shards = Shards.given(shards, counts)
        else:
            shards = Shards.count(shards, reader)
        if global_batch < 1:
            raise ValueError(f"global_batch={global_batch}: records of all ranks together, from 1 on")
        block = global_batch if block is None else block
        order = Lanes(
            shards.counts,
            block=block,
            lanes=min(DEFAULT_LANES, block) if lanes is None else lanes,
            names=shards.digest,
            seed=seed,
            shuffle=shuffle,
        )
        cursor = Cursor(
            order,
            global_batch,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            last=last,
            repeated=repeated,
        )
        super().__init__(cursor, "data")
        self._records = _Records(RecordReader(shards, order, reader), cursor, collate)

    def __getitem__(self, index: object) -> Any:
        # What a DataLoader that was made of this object itself would call.
        raise TypeError("an ElasticBatches is not a dataset: make its DataLoader with .loader(num_workers=...)")

    def loader(self, **options: Any) -> Any:
        """Return a torch DataLoader whose workers read this rank's batches, ahead of training.

        `options` are those of `torch.utils.data.DataLoader` that do not choose samples: `num_workers`,
        `prefetch_factor`, `persistent_workers`, `pin_memory`, `multiprocessing_context`, `worker_init_fn`, `timeout`
        (for a batch from a worker, by default 600 s), ... One loader serves all epochs. It has a random generator of
        its own, from which its workers are seeded anew at each place where an iteration begins.
        Raises `TypeError` for an option that would change which records come, or in which order.
        """
        return framework("torch").make_loader(self._records, _Plan(self), options)

    def batches(self, loader: Any = None) -> Iterator[Any]:
        """Yield this rank's batches to the end of the epoch; a batch counts as consumed when the loop's body gets it.

        `loader` is what `loader` returned; without one the records are read here, when they are due. A save in the
        loop's body includes the batch of that body; what workers have fetched ahead is not counted. Each call goes on
        where the one before was left, and ends with the epoch. Put nothing around it that takes batches ahead of
        training, and leave the loop after the step, not before it: what was handed out counts.

        Raises `ValueError` for a loader that `loader` did not make, `CheckpointError` where the loader gives another
        batch than is due, or where the position is loaded while a loop is under way; and what reading raises.
        """
        if loader is not None and getattr(loader, "dataset", None) is not self._records:
            raise ValueError("this loader was not made by loader() of this ElasticBatches, which knows the next batch")
        return self._hand_out(loader)

    def _hand_out(self, loader: Any) -> Iterator[Any]:
        if loader is None:
            items: Iterator[Any] = map(self._records.__getitem__, self._parts())
        else:
            self._counting = True
            try:
                items = self._start(loader)
            finally:
                self._counting = False
        for part in self._parts():
            found, records = next(items, (None, None))
            if found != part:
                raise CheckpointError(f"the loader gave {found}, due is {part}; use it as loader() has made it")
            self._count(part, self._cursor.samples_of(part.batch, part.begin, part.end))
            yield records
        if next(items, None) is not None:
            raise CheckpointError("the loader gave batches past the end of the epoch; use it as loader() has made it")

    def _drawn(self) -> Iterator[Part]:
        """Yield what a loader asks its workers for; outside of `batches` that marks the position as wrong."""
        parts = self._parts()
        return parts if self._counting else self._astray(parts)

    def _astray(self, parts: Iterator[Part]) -> Iterator[Part]:
        for part in parts:
            self._stray = True
            yield part


class _Records:
    """What a loader's workers hold: reads the part that it is asked for, wherever the position is."""

    def __init__(self, reader: RecordReader, cursor: Cursor, collate: Callable[[list[Any]], Any] | None) -> None:
        self._reader, self._cursor, self._collate = reader, cursor, collate

    def __getitem__(self, part: Part) -> tuple[Part, Any]:
        records = self._reader.read(part.batch.epoch, self._cursor.positions_of(part.batch, part.begin, part.end))
        return part, records if self._collate is None else self._collate(records)


class _Plan:
    """What a loader asks its workers for, in turn: the parts from the position on at which an iteration begins."""

    def __init__(self, batches: ElasticBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Part]:
        return self._batches._drawn()

    def __len__(self) -> int:
        return len(self._batches)
