"""A save's way through the background: archive, receipt, commit."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.archive.record import ArchiveRecord
from ckptengine.catalog.commit import attempt_directory, publish
from ckptengine.catalog.lease import Lease
from ckptengine.catalog.listing import Entry, is_later, manifest_name, read_manifest
from ckptengine.catalog.manifest import Manifest
from ckptengine.catalog.receipt import Channel, Outcome, Receipt, StorageStore, collect
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointError, DeadlineError, ReplicaMismatchError, SaveFailedError, StorageError
from ckptengine.save.archive import Archived, Writer
from ckptengine.save.aside import Aside
from ckptengine.save.attempt import Attempt, Committed, Target, Work
from ckptengine.save.coordinator import Coordinator
from ckptengine.save.handle import SaveStats
from ckptengine.save.planner import Plan
from ckptengine.save.shares import Shares
from ckptengine.schema.ranks import name_ranks
from ckptengine.storage.base import join

__all__ = ["Committer"]

# What keeps its class on all ranks; everything else that fails a save is a `SaveFailedError`.
_KINDS: dict[str, type[CheckpointError]] = {kind.__name__: kind for kind in (DeadlineError, ReplicaMismatchError)}

_DRAIN_SECONDS = 10.0
"""How long rank 0 waits, after a failed attempt, for ranks that are still writing, before it cleans up."""

_LOOK_SECONDS = 0.25
"""How often a rank that waits for rank 0's word looks whether rank 0 waits for it."""

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class _Part:
    """What a rank has done for an attempt: its receipt, the archive or what kept it from one, and when it was ready."""

    receipt: Receipt
    archive: Archived | Exception
    ready: float


@dataclass(frozen=True, slots=True)
class _Open:
    """A save whose end another rank may not know: rank 0's word of it, or this rank's doubt."""

    attempt: Attempt
    channel: Channel
    part: _Part
    outcome: Outcome | None = None
    ranks: tuple[int, ...] = ()
    asked: bool = False
    """Whether this rank has waited for rank 0's word in vain: then it goes on without."""


class Committer:
    """Has this rank's archives written and, on rank 0, commits everybody's. Works in the thread of one save at a time.

    `write` makes an attempt's archive. `plan_together` is called where the ranks are to exchange their plans at the
    next save, which all of them know from the same outcome. `tier` tells this committer's messages from those of
    another one that commits the same attempt elsewhere.
    """

    def __init__(
        self,
        comm: Communicator,
        write: Writer,
        plan_together: Callable[[], None],
        tier: str = "",
    ) -> None:
        self._comm, self._write_archive, self._plan_together, self._tier = comm, write, plan_together, tier
        self._coordinator = Coordinator(comm.world_size)  # at work on rank 0
        self._reported: Plan | None = None  # whose rows rank 0 has
        self._reported_form: tuple[Shares, str] | None = None  # and what it knows of the form since that exchange
        self._open: _Open | None = None
        self._given_up: set[str] = set()  # attempts whose publication failed; it may have come all the same
        self._places: list[Channel] = []  # rank 0: of failed attempts, of which a rank may not know

    def left_out(self, attempt: str, directory: str) -> bool:
        """Return whether this rank comes to an attempt in which the others save, or saved, something else.

        Then it has left that out: the others are told, so that it fails for them at once, and all plan together. Where
        theirs is a later step, it is they who are ahead, and the receipts tell all. Only where the job has a key-value
        store; without one, it shows when the receipts don't come.
        """
        store = self._comm.store()
        if store is None or not self._tells_place:
            return False
        channel = Channel(store, attempt, self._comm.rank, self._comm.world_size)
        place = None
        with contextlib.suppress(CheckpointError):  # whatever ails the store, the save itself finds out
            place = channel.place()
        if place is None or place == directory or is_later(place, directory):
            return False
        text = f"it has left {place or 'this save'} out, and is at {directory or 'the next one'}"
        if self._comm.rank == 0:
            outcome = Outcome(f"rank 0: {text}", plan_together=True, kind="SaveFailedError", directory=place)
            channel.announce(outcome)
            for rank in range(1, self._comm.world_size):
                channel.receive(rank, 0.0)
            self._places.append(channel)
        elif channel.hear(0.0) is None:
            channel.send(Receipt(self._comm.rank, None, error=text))
        return True

    @property
    def _tells_place(self) -> bool:
        """Whether the ranks tell each other where an attempt goes: by the job's store, for the checkpoint itself."""
        return self._comm.world_size > 1 and not self._tier and self._comm.store() is not None

    @property
    def in_doubt(self) -> bool:
        """Whether this rank does not know how the last save ended, so that only `settle` tells what comes next."""
        return self._comm.rank != 0 and self._open is not None and not self._open.asked

    def settle(self, timeout: float, directory: str = "") -> None:
        """Bring the ranks to one mind about the last save, before the next one begins; mostly there is nothing to do.

        Rank 0 tells again whom it could not tell; a rank that has not heard asks. What turns out to be committed is
        told as such, whatever was told before. Raises `DeadlineError` where rank 0 is not heard of in `timeout`
        seconds, and where the store fails `CheckpointError`. `directory` is where the next save goes: raises
        `SaveFailedError` where rank 0 was in that one already, as where it has left one out, and has failed.
        """
        open_, self._open = self._open, None
        if open_ is None:
            return
        try:
            if open_.outcome is not None:
                for rank, error in open_.channel.announce(open_.outcome, open_.ranks).items():
                    raise CheckpointError(f"rank {rank} can't be told how the last save ended: {error}")
                return
            outcome, awaited = self._ask(open_, timeout)
        except CheckpointError:
            self._open = open_
            raise
        if outcome is None:
            self._open = replace(open_, asked=True)
            if open_.asked:
                return
            if awaited:
                self._plan_together()  # as the others do, who are at it
                return
            raise DeadlineError(
                f"rank 0 has not said within {timeout:g} s how the save before ended, {open_.attempt.target.location}"
            )
        self._heard(open_, outcome)
        if outcome.error and directory == outcome.directory != open_.attempt.target.directory:
            raise SaveFailedError(f"rank 0 has skipped a save, and this one has failed: {outcome.error}")

    @property
    def certain(self) -> bool:
        """Whether this rank knows that the save about which the ranks have to come to one mind is committed."""
        if self._open is None:
            return False
        durable = self._open.attempt.handle.durable
        return durable.done() and durable.error is None

    def _ask(self, open_: _Open, timeout: float) -> tuple[Outcome | None, bool]:
        """Wait for rank 0's word, or until it waits for this rank elsewhere; return the word and whether it does."""
        deadline = time.monotonic() + (0.0 if open_.asked else timeout)
        while True:
            left = deadline - time.monotonic()
            outcome = open_.channel.hear(max(0.0, min(left, _LOOK_SECONDS)))
            awaited = outcome is None and self._comm.awaited()
            if outcome is not None or awaited or left <= 0:
                return outcome, awaited

    def _heard(self, open_: _Open, outcome: Outcome) -> None:
        """Take the outcome of a save that was in doubt."""
        attempt = open_.attempt
        if outcome.plan_together and not open_.asked:
            self._plan_together()
        if outcome.error:
            self._reported = self._reported_form = None
            return
        self._copy_manifest(attempt, open_.channel)
        if attempt.handle.durable.error is not None:
            _log.warning(
                "%s is committed: rank %d did not learn that in time, and had reported it as failed",
                attempt.target.location,
                self._comm.rank,
            )
            attempt.handle.durable.correct(_stats(attempt, open_.part))

    def commit(
        self, attempt: Attempt, held: ExitStack, told: Callable[[], object] = lambda: None
    ) -> tuple[Committed, SaveStats]:
        """Bring a snapshot to the storage and through the commit; returns when the outcome is known.

        `held` is closed by the caller, after it has told the outcome: it lets go of the attempt's lease. `told` is
        called when the other ranks need no word of this one any more. Raises what has kept this rank from its archive,
        or what rank 0 says.
        """
        target = attempt.target
        data = attempt_directory(target.directory, attempt.name)
        store = self._comm.store() or StorageStore(*(target.rendezvous or (target.storage, data)))
        channel = Channel(store, attempt.name + self._tier, self._comm.rank, self._comm.world_size)
        part: _Part | None = None
        try:
            if self._tells_place:
                with contextlib.suppress(CheckpointError):  # only a rank that leaves this out would miss it
                    channel.enter(target.directory)
            aside = Aside(lambda: self._begin(attempt, data, held))
            part = self._write(attempt, data)
            if self._comm.rank == 0:
                outcome, manifest = self._coordinate(attempt, data, channel, part, aside, held, told)
            else:
                aside.settle()
                outcome, manifest = self._follow(attempt, channel, part, told), None
        except BaseException:
            self._reported = self._reported_form = None  # whether rank 0 has the rows is not known
            if part is not None and isinstance(part.archive, Exception):
                raise part.archive from part.archive.__cause__
            raise
        if self._comm.rank == 0 and self._tells_place:
            self._leave(channel, outcome)
        if outcome.plan_together:
            self._plan_together()
        if outcome.error:
            self._reported = self._reported_form = None
            if isinstance(part.archive, Exception):
                raise part.archive
            raise _KINDS.get(outcome.kind, SaveFailedError)(f"{target.location} was not committed: {outcome.error}")
        return Committed(target.directory, attempt.generation, attempt.name, manifest), _stats(attempt, part)

    def _leave(self, channel: Channel, outcome: Outcome) -> None:
        """Rank 0: forget where attempts went, once all ranks have come to a later one, or to the end of this."""
        self._places.append(channel)
        if not outcome.error:
            while self._places:
                self._places.pop().leave()

    def _follow(self, attempt: Attempt, channel: Channel, part: _Part, told: Callable[[], object]) -> Outcome:
        """Another rank than 0: send the receipt, hear how it ended; the first of a node keeps its manifest."""
        try:
            channel.send(part.receipt)
            told()
            outcome = channel.outcome(attempt.deadline)
        except CheckpointError:
            # Also a receipt that could not be sent may have come to rank 0. What came of it is asked for before the
            # next save: the ranks must do the same then.
            self._open = _Open(attempt, channel, part)
            # Rank 0 may have published and then lost its voice: our own attempt in the manifest means success.
            if part.receipt.error or not self._published(attempt):
                raise
            outcome = Outcome()
        if not outcome.error:
            self._copy_manifest(attempt, channel)
        return outcome

    def _copy_manifest(self, attempt: Attempt, channel: Channel) -> None:
        """Give this node its copy of the manifest, where this rank acts for a node that does not see the storage."""
        if not attempt.target.leads:
            return
        try:
            manifest = channel.handed()
            if manifest is not None:
                name = join(attempt.target.directory, manifest_name(attempt.generation))
                attempt.target.storage.put_if_absent(name, manifest)
        except CheckpointError as problem:
            _log.warning("%s: this node has no copy of the manifest: %s", attempt.target.location, problem)

    def _begin(self, attempt: Attempt, data: str, held: ExitStack) -> ArchiveRecord | None:
        """Show that the attempt is alive, where this rank is the first that sees the storage; rank 0 also prepares."""
        if self._comm.rank == 0:
            return self._prepare(attempt, data, held)
        if attempt.target.leads:
            held.enter_context(Lease(attempt.target.storage, data))
        return None

    def _published(self, attempt: Attempt) -> bool:
        target = attempt.target
        entry = Entry(step=target.step, generation=attempt.generation, directory=target.directory)
        try:
            return read_manifest(target.storage, entry).attempt == attempt.name
        except CheckpointError:
            return False

    def _write(self, attempt: Attempt, data: str) -> _Part:
        """Write this rank's archive; what goes wrong is in what is returned."""
        try:
            if isinstance(attempt.work, Exception):
                raise attempt.work
            plan, values = attempt.work.plan, attempt.work.values
            archived = self._write_archive(attempt, plan.image, data)
            stored = archived.snapshot.tail.stored
            receipt = Receipt(
                rank=self._comm.rank,
                archive=archived.record,
                value_paths=plan.shares.compared(values.paths),
                digests=values.digests,
                stores=plan.shares.stores and bool(stored.document),
                fresh=stored.fresh,
                form_digest=stored.form_digest,
                form=b"" if self._reported_form == (plan.shares, stored.form_digest) else stored.form,
                replica_crcs=archived.snapshot.replica_crcs,
                rows=b"" if self._reported is plan else plan.rows.encode(),
                alone=plan.alone,
                directory=attempt.target.directory,
            )
        except Exception as problem:
            receipt = Receipt(self._comm.rank, None, error=f"{problem}" or type(problem).__name__)
            self._note(attempt, receipt.error)
            return _Part(receipt, problem, time.monotonic())
        self._reported, self._reported_form = plan, (plan.shares, stored.form_digest)
        return _Part(receipt, archived, time.monotonic())

    def _coordinate(
        self,
        attempt: Attempt,
        data: str,
        channel: Channel,
        part: _Part,
        aside: Aside[ArchiveRecord | None],
        held: ExitStack,
        told: Callable[[], object],
    ) -> tuple[Outcome, Manifest | None]:
        """Rank 0: collect, compare, publish; whatever happens, all ranks hear of it. Return what was published."""
        target, storage = attempt.target, attempt.target.storage
        doubtful, manifest = False, None
        try:
            receipts = collect(channel, part.receipt, attempt.deadline)
            early = aside.result()
            assert isinstance(attempt.work, Work)  # else this rank's receipt has told an error
            layout, layout_record, value_ranks = self._coordinator.put_together(receipts, attempt.work.plan.shares)
            if early != layout_record:
                storage.write_bytes(join(data, layout_record.name), layout)
            manifest = Manifest(
                step=target.step,
                generation=attempt.generation,
                parent=target.parent,
                attempt=attempt.name,
                world_size=self._comm.world_size,
                block_nbytes=BLOCK_NBYTES,
                archives=tuple(item.archive for item in receipts if item.archive is not None),
                layout=layout_record,
                metadata=dict(target.metadata),
                metrics=dict(target.metrics),
                created=attempt.created,
                value_ranks=value_ranks,
            )
            doubtful = True
            site = target.site
            here = None if site is None or site.shared else site.ranks
            publish(storage, target.directory, manifest, here, self._given_up)
            together = self._coordinator.untold or any(item.alone for item in receipts)
            outcome = Outcome(plan_together=together)
            if site is not None and not site.shared:
                self._hand_out(target, manifest, channel, site.leaders[1:])
        except Exception as problem:
            aside.settle()
            kind = type(problem).__name__
            code = problem.errno if doubtful and isinstance(problem, StorageError) else None
            if code is not None:
                self._given_up.add(attempt.name)
            # A store that did not answer may still carry it out: then the data must be there. Swept later if not.
            doubtful = code == errno.ETIMEDOUT
            outcome = Outcome(f"{problem}" or kind, plan_together=True, kind=kind, directory=target.directory)
            self._note(attempt, outcome.error)
        untold = channel.announce(outcome)
        told()
        if untold:
            # What is published is durable, whoever hears of it. They are told once more before the next save.
            why = next(iter(untold.values()))
            _log.warning("%s: %s could not be told how the save ended: %s", target.location, name_ranks(untold), why)
            self._open = _Open(attempt, channel, part, outcome, tuple(untold))
        if outcome.error:
            held.close()
            if not doubtful:
                self._discard(attempt, data, channel)
        return outcome, manifest

    def _note(self, attempt: Attempt, error: str) -> None:
        """Note why an attempt fails: who waits for it may ask before all have been told."""
        if not self._tier:
            attempt.handle.durable.failing = error

    def _hand_out(self, target: Target, manifest: Manifest, channel: Channel, leaders: Sequence[int]) -> None:
        try:
            channel.hand_out(manifest.encode(), leaders)
        except CheckpointError as problem:
            # What is published is durable, whoever has a copy.
            _log.warning("%s: other nodes did not get a copy of the manifest: %s", target.location, problem)

    def _prepare(self, attempt: Attempt, data: str, held: ExitStack) -> ArchiveRecord | None:
        """Take the lease, and write the layout that this save will have unless the receipts bring other rows.

        Returns the record of that layout. All of it goes on while the state is copied and the archive written.
        """
        storage = attempt.target.storage
        storage.make_directory(data)
        held.enter_context(Lease(storage, data))
        expected = self._coordinator.expected()
        if expected is None:
            return None
        storage.write_bytes(join(data, expected[1].name), expected[0])
        return expected[1]

    def _discard(self, attempt: Attempt, data: str, channel: Channel) -> None:
        """Give back the room that a failed attempt takes, once no rank writes into it: the next one may need it."""
        target, storage = attempt.target, attempt.target.storage
        deadline = min(attempt.deadline, time.monotonic() + _DRAIN_SECONDS)
        try:
            if not channel.drain(deadline):
                return  # a rank may still be writing, or is dead: swept as a leftover
            if self._comm.store() is None and not channel.heard(deadline):
                return  # the outcome lies in there
            # A publication whose own sync failed may have come all the same.
            if not storage.exists(join(target.directory, manifest_name(attempt.generation))):
                storage.delete_tree(data)
                if target.directory:
                    storage.remove_directory(target.directory)
        except CheckpointError as problem:
            _log.warning("%s: what the failed save left is deleted later: %s", target.location, problem)


def _stats(attempt: Attempt, part: _Part) -> SaveStats:
    """Return what this rank has seen of a save that is committed, now; raises what kept it from its archive."""
    if isinstance(part.archive, Exception):
        raise part.archive
    commit, snapshot = attempt.phase("commit", part.ready), part.archive.snapshot
    phases = (*attempt.phases, snapshot.copied, part.archive.written, commit)
    return SaveStats(
        step=attempt.target.step,
        path=attempt.target.location,
        nbytes=part.archive.record.nbytes,
        waited_seconds=attempt.waited,
        stall_seconds=snapshot.stall,
        written_seconds=part.archive.written.seconds,
        durable_seconds=time.monotonic() - attempt.started,
        phases=tuple(sorted(phases, key=lambda phase: phase.began)),
    )
