"""What training has consumed of an order, on all ranks alike, and what comes next."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ckptengine.data.digest import digest_of, write_digest
from ckptengine.data.ledger import GlobalBatch, Ledger
from ckptengine.data.order import Order
from ckptengine.data.tally import Tally, total_of
from ckptengine.errors import LoadMismatchError
from ckptengine.state.per_rank import PerRank

__all__ = ["MARKER", "Cursor", "Last"]

MARKER = "ckptengine.data.cursor/1"
"""What a cursor's state has under the key `cursor`: by it `ckptengine audit` finds cursors in a checkpoint."""

Last = Literal["ragged", "drop", "pad"]
_MOST_UNCOUNTED = 256
_KEYS = ("order", "epoch", "consumed", "batches", "life", "ledger", "digest")


class Cursor:
    """Where training is in its data: counted in global samples, so that any world size can go on from there.

    Each epoch's order is cut into global batches of `global_batch` positions, from where the epoch was entered or
    continued. `micro_batch` cuts a global batch further: into micro-batches of so many samples, the same ones at every
    world size (the last one of a global batch may be shorter). What is left at an epoch's end is, as `last` says,

    - `"ragged"`: a shorter global batch; where it would have fewer samples (micro-batches) than there are ranks, it is
      joined to the one before it, so that no rank has nothing to do;
    - `"drop"`: left out, and the ledger says so;
    - `"pad"`: filled up from the epoch's start, and the ledger says so.

    Of a global batch of S samples rank r of N has numbers r·S//N to before (r+1)·S//N; with `micro_batch`, of M
    micro-batches those from r·M//N to before (r+1)·M//N.

    The state is replicated, but for a running digest of the samples that this rank has handed to training. `repeated`
    tells that other ranks of the job may be given the same `rank`, as tensor-parallel peers are: of their digests one
    counts.

    Raises `ValueError` where the arguments leave a rank without samples, or an epoch without global batches.
    """

    def __init__(
        self,
        order: Order,
        global_batch: int,
        *,
        rank: int,
        world_size: int,
        micro_batch: int | None = None,
        last: Last = "ragged",
        repeated: bool = False,
    ) -> None:
        self.order = order
        self.global_batch = operator.index(global_batch)
        self.micro_batch = None if micro_batch is None else operator.index(micro_batch)
        self.last: Last = last
        self.rank, self.world_size = operator.index(rank), operator.index(world_size)
        self._check_arguments()
        self.epoch = 0
        """The epoch of the next global batch, from 0 on."""
        self.consumed = 0
        """Positions of that epoch that training has consumed."""
        self.batches = 0
        """Global batches that training has consumed since the start, all epochs together."""
        self.life = 0
        """How often the cursor has been loaded: what its next global batches are counted to."""
        self.ledger = Ledger()
        self._repeated = repeated
        self._tally = self._new_tally()
        self._uncounted: list[
            tuple[int, bool, NDArray[np.int64]]
        ] = []  # samples that the digest lacks, with their tags
        self._loaded: dict[str, Any] | None = None  # the state that was loaded, until a batch is handed out

    def _new_tally(self, own: int = 0) -> Tally:
        return Tally(own, share=self.rank) if self._repeated else Tally(own)

    def _check_arguments(self) -> None:
        if self.global_batch < 1:
            raise ValueError(f"global_batch={self.global_batch}: samples of all ranks together, from 1 on")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.global_batch:
            raise ValueError(f"micro_batch={self.micro_batch}: from 1 to global_batch={self.global_batch} samples")
        if self.last not in get_args(Last):
            raise ValueError(f'last={self.last!r}: "ragged", "drop" or "pad"')
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}, world_size={self.world_size}: ranks are from 0 to world_size - 1")
        if self._units(self.global_batch) < self.world_size:
            raise ValueError(
                f"{self._describe(self.global_batch)} for {self.world_size} ranks: each needs at least one; use fewer "
                "ranks, a greater global_batch or a smaller micro_batch"
            )
        if self.last == "drop" and self.order.length < self.global_batch:
            raise ValueError(
                f'last="drop" leaves nothing of an epoch of {self.order.length} samples: global_batch is '
                f'{self.global_batch}; use "ragged" or "pad", or a smaller global_batch'
            )
        if self.last == "ragged" and self._units(self.order.length) < self.world_size:
            raise ValueError(
                f"the epoch: {self._describe(self.order.length)} for {self.world_size} ranks: each needs at least "
                'one; use fewer ranks, or last="pad"'
            )

    def _units(self, samples: int) -> int:
        """Return into how many parts, of which each rank has whole ones, so many samples can be cut."""
        return samples if self.micro_batch is None else -(-samples // self.micro_batch)

    def _describe(self, samples: int) -> str:
        if self.micro_batch is None:
            return f"a global batch of {samples} samples"
        return (
            f"a global batch of {samples} samples, that is {self._units(samples)} micro-batches of {self.micro_batch},"
        )

    # What comes next.

    def plan(self) -> Iterator[GlobalBatch]:
        """Yield the global batches that are left of the epoch, in order; none where it is over."""
        number, epoch, begin = self.batches, self.epoch, self.consumed
        while (batch := self._batch_at(number, epoch, begin)) is not None:
            yield batch
            number, begin = number + 1, batch.end

    def _batch_at(self, number: int, epoch: int, begin: int) -> GlobalBatch | None:
        """Return the global batch that begins at a position, None where the epoch has no further one."""
        rest, size = self.order.length - begin, self.global_batch
        if rest <= 0 or (self.last == "drop" and rest < size):
            return None
        if self.last == "pad" and rest < size:
            return GlobalBatch(number, epoch, begin, self.order.length, size - rest)
        after = rest - size
        if after <= 0 or (self.last == "ragged" and self._units(after) < self.world_size):
            size = rest
        return GlobalBatch(number, epoch, begin, begin + size)

    def sizes_left(self) -> tuple[int, int]:
        """Return how many global batches of the full size are left of the epoch, and the size of one more, or 0."""
        # All but the last two are full: a rest is joined to the one before it at most.
        skipped = max((self.order.length - self.consumed) // self.global_batch - 1, 0)
        begin = self.consumed + skipped * self.global_batch
        sizes = []
        while (batch := self._batch_at(self.batches, self.epoch, begin)) is not None:
            sizes.append(batch.size)
            begin = batch.end
        full = sizes.count(self.global_batch)
        return skipped + full, sum(sizes) - full * self.global_batch

    def lists_of(self, size: int) -> list[tuple[int, int]]:
        """Return this rank's parts of a global batch of so many samples, as (begin, end) within it, none empty.

        One part, or with `micro_batch` one for each of its micro-batches.
        """
        units, rank, ranks = self._units(size), self.rank, self.world_size
        first, stop = rank * units // ranks, (rank + 1) * units // ranks
        if self.micro_batch is None:
            return [(first, stop)]
        return [(n * self.micro_batch, min((n + 1) * self.micro_batch, size)) for n in range(first, stop)]

    def positions_of(self, batch: GlobalBatch, begin: int, end: int) -> NDArray[np.int64]:
        """Return the positions of a part (`lists_of`) of a global batch, int64; padding comes last."""
        positions = np.arange(batch.begin + begin, batch.begin + end, dtype=np.int64)
        if batch.begin + end > batch.end:
            padding = positions >= batch.end
            positions[padding] = (positions[padding] - batch.end) % self.order.length
        return positions

    def samples_of(self, batch: GlobalBatch, begin: int, end: int) -> NDArray[np.int64]:
        """Return the global sample numbers at `positions_of` a part of a global batch, int64."""
        return self.order.at(batch.epoch, self.positions_of(batch, begin, end))

    # What was consumed.

    def count(self, batch: GlobalBatch, begin: int, samples: NDArray[np.int64]) -> None:
        """Add samples that were handed to training to the digest: those of a part that starts at `begin`."""
        self._loaded = None
        real = max(0, batch.end - batch.begin - begin)
        if real:
            self._uncounted.append((batch.epoch, False, samples[:real]))
        if real < len(samples):
            self._uncounted.append((batch.epoch, True, samples[real:]))
        if len(self._uncounted) >= _MOST_UNCOUNTED:
            self._count_all()

    def _count_all(self) -> None:
        """Hash what has been handed out: in one go, which for small batches is many times as fast."""
        together: dict[tuple[int, bool], list[NDArray[np.int64]]] = {}
        for epoch, padding, samples in self._uncounted:
            together.setdefault((epoch, padding), []).append(samples)
        for (epoch, padding), parts in together.items():
            digest = digest_of(epoch, np.concatenate(parts), padding=padding)
            self._tally = self._tally.plus(digest, self._repeated)
        self._uncounted.clear()

    @property
    def digest(self) -> int:
        """The digest of all samples that this rank has handed to training, and of what ranks before it have left it."""
        self._count_all()
        return self._tally.digest

    def complete(self, batch: GlobalBatch) -> None:
        """Note that this rank has handed its whole share of a global batch to training: the cursor moves past it."""
        self._loaded = None
        self.ledger.add(batch, self.world_size, self.life)
        self.consumed = batch.end
        self.batches = batch.number + 1
        self._close_if_over()

    def _close_if_over(self) -> None:
        """Go to the next epoch's start where this one has no further global batch."""
        if self._batch_at(self.batches, self.epoch, self.consumed) is not None:
            return
        if self.consumed < self.order.length:
            place = self.batches, self.epoch, self.consumed, self.order.length
            self.ledger.leave_out(*place, self.world_size, self.life)
        self.ledger.close_epoch()
        self.epoch += 1
        self.consumed = 0

    # The state.

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the place, the ledger, and how the order and the batches are made; `digest` is per rank.

        `global_batch`, `micro_batch` and `last` are there for the record: on loading those of the constructor hold.
        Until a batch is handed out it is the state that was loaded: nothing has been done in the new life yet.
        """
        self._count_all()
        # Which ranks are peers may change at a restart, also of as many ranks: then rank 0 takes the sum each time.
        digest = PerRank(self._tally.write(), resize=_joined, ranks=_for_first if self._repeated else None)
        if self._loaded is not None:
            return {**self._loaded, "digest": digest}
        return {
            "cursor": MARKER,
            "order": self.order.describe(),
            "global_batch": self.global_batch,
            "micro_batch": self.micro_batch,
            "last": self.last,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "batches": self.batches,
            "life": self.life,
            "ledger": self.ledger.plain(),
            "digest": digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where a cursor was, of any world size and global batch.

        Raises `LoadMismatchError` where the state is no cursor's, where its order is another one (length, seed,
        shuffling), or where the ranks are more than the samples that are left of the epoch.
        """
        missing = [key for key in _KEYS if key not in state]
        if state.get("cursor") != MARKER or missing:
            found = f"{state.get('cursor')!r}" + (f", without {', '.join(missing)}" if missing else "")
            raise LoadMismatchError(f"this is not the state of a data cursor ({MARKER}): {found}")
        here, there = self.order.describe(), state["order"]
        if here != there:
            saved = there if isinstance(there, Mapping) else {}
            keys = sorted(key for key in {*here, *saved} if here.get(key) != saved.get(key))
            odd = "; ".join(f"{key} {here.get(key)!r} here, {saved.get(key)!r} there" for key in keys)
            raise LoadMismatchError(
                f"the checkpoint's data cursor is that of another order of samples ({odd}), so its position means "
                "nothing here. Make the sampler with the arguments of the checkpoint; or, to start anew with other "
                "data, restore the other parts only (`only=[...]` without the cursor)"
            )
        try:
            place = [_natural(state[key], key) for key in ("epoch", "consumed", "batches", "life")]
            ledger, tally = Ledger.from_plain(state["ledger"]), Tally.parse(_value(state["digest"]))
            if place[1] > self.order.length:
                raise ValueError(f"consumed {place[1]} of {self.order.length} samples")
        except ValueError as error:
            raise LoadMismatchError(f"the state of the data cursor is damaged: {error}") from None
        self._check_rest(place[0], self.order.length - place[1])
        self.epoch, self.consumed, self.batches, self.life = place
        self.life += 1
        if self._repeated and tally.share != self.rank:
            tally = self._new_tally(tally.digest)
        self.ledger, self._tally = ledger, tally
        self._loaded = copy.deepcopy({**state, "digest": None})
        self._uncounted.clear()
        self._close_if_over()

    def _check_rest(self, epoch: int, rest: int) -> None:
        if self.last == "ragged" and rest > 0 and self._units(rest) < self.world_size:
            raise LoadMismatchError(
                f"of epoch {epoch} {self._describe(rest)} is left for {self.world_size} ranks: not every rank would "
                f"have one. Go on with at most {self._units(rest)} ranks, or make the sampler with "
                'last="drop" (leaves them out) or last="pad" (fills up from the epoch\'s start)'
            )


def _joined(saved: list[Any], rank: int, world_size: int) -> str:
    """Give the sum of all ranks' digests to rank 0 of another number of ranks."""
    return write_digest(total_of(saved)[0] if rank == 0 else 0)


def _for_first(saved_world_size: int, rank: int, world_size: int) -> range:
    """Return whose digests a rank gets: all of them on rank 0, none on the others."""
    return range(saved_world_size if rank == 0 else 0)


def _value(digest: Any) -> Any:
    return digest.value if isinstance(digest, PerRank) else digest


def _natural(value: Any, key: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {value!r:.60}, not a count")
    return value
