"""How a job comes into its run: what lies there, whether it may write, and who else does."""

from __future__ import annotations

import errno
import logging
import secrets

from ckptengine.catalog.foreign import Foreign, foreign_checkpoint
from ckptengine.catalog.life import Life
from ckptengine.catalog.listing import committed, manifest_name
from ckptengine.catalog.retention import remove_leftovers
from ckptengine.comm.agree import from_first, on_all
from ckptengine.comm.alike import all_alike
from ckptengine.comm.base import Communicator
from ckptengine.comm.select import place
from ckptengine.errors import CheckpointError, CheckpointNotFoundError, DeadlineError, StorageError
from ckptengine.policy.asked import asked_of
from ckptengine.policy.settings import Settings
from ckptengine.storage.within import within
from ckptengine.tiers.tiers import Tiers

__all__ = ["Opening"]

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

_log = logging.getLogger("ckptengine")


class Opening:
    """One job's way into its run. Methods marked "all ranks" are called by all, in one order."""

    def __init__(self, settings: Settings, tiers: Tiers, comm: Communicator) -> None:
        self._run, self._tiers, self._comm, self._timeout = settings.run, tiers, comm, settings.timeout
        self._chosen, self._arguments = settings.comm is None, asked_of(settings)
        self._storage = tiers.places.persistent
        self._life = Life(self._storage, self._run)
        self._begun = False
        self._restore_called = False  # or the lack of it was told
        self._refusal: StorageError | None = None
        self._foreign: Foreign | None = None
        self.found: int | None = None
        """On rank 0: the newest step that was there."""

    def open(self) -> str:
        """Make the run's directory and sweep what dead attempts left, on rank 0; all ranks.

        Returns a name that only this life has, the same on all ranks. A run that can be read only is opened all the
        same; `begin` then says what is wrong. Raises `ValueError` on all ranks where their arguments differ.
        """
        doing = f"opening {self._run}"

        def prepare() -> bytes:
            self._tiers.places.check_apart()
            if self._comm.rank != 0:
                return b""
            within(self._timeout, doing, self._prepare)
            return secrets.token_hex(8).encode()

        name = all_alike(self._comm, prepare, "Checkpointer", self._arguments, self._timeout, doing)[0].decode()
        self.found = self._tiers.open(name, self.found)
        if self._comm.rank == 0:
            newest = "no checkpoint yet" if self.found is None else f"the newest is step {self.found}"
            _log.info("%s: opened by %d rank(s); %s", self._run, self._comm.world_size, newest)
        return name

    def _prepare(self) -> None:
        storage = self._storage
        entries = committed(storage)
        self._refuse_checkpoint(entries[-1].generation if entries and entries[-1].step is None else None)
        try:
            storage.create()
        except StorageError as error:
            if error.errno not in _READ_ONLY or not entries:
                raise
            self._refusal = error
            _log.warning(
                "%s is read-only for this job: it can be restored from, but not saved to: %s", self._run, error
            )
        else:
            for problem in remove_leftovers(storage):
                _log.warning("%s: %s", self._run, problem)
        self.found = self._tiers.places.newest()
        if self.found is None:
            self._foreign = foreign_checkpoint(storage)

    def _refuse_checkpoint(self, generation: int | None) -> None:
        if generation is not None:
            raise StorageError(
                errno.EEXIST,
                f"{self._run} is a single checkpoint ({manifest_name(generation)} lies in it), not a run of many: load "
                "it with ckptengine.load and give the run a directory of its own",
            )

    def check_place(self) -> None:
        """Raise where this process was alone when the Checkpointer was made, and is one of several ranks by now.

        Each would take itself for the only one, and they would fight over the run.
        """
        if not self._chosen:
            return
        rank, world_size = place()
        if world_size != self._comm.world_size:
            raise CheckpointError(
                f"{self._run}: this Checkpointer was made for {self._comm.world_size} rank(s), and now there are "
                f"{world_size}, of which this is rank {rank}: make it after the ranks have been initialized "
                "(torch.distributed.init_process_group, or mindspore.communication.init), on all of them. Where each "
                "process is to save by itself, pass comm=ckptengine.SingleProcess() and a directory of its own"
            )

    def restoring(self) -> None:
        """Note that the job has asked for what is there."""
        self._restore_called = True
        self.check_place()

    def tell_foreign(self) -> None:
        """Where nothing was restored: say what another library has left there; all ranks.

        Raises `CheckpointNotFoundError` for a checkpoint that a job could have gone on with; weights, which a job may
        begin with, are told as a warning.
        """

        def tell() -> bytes:
            found = self._foreign
            if found is not None and found.training:
                raise CheckpointNotFoundError(found.tell(self._run))
            if found is not None:
                _log.warning("%s: the job starts over", found.tell(self._run))
            return b""

        from_first(self._comm, tell, self._timeout, "restoring")

    def begin(self) -> None:
        """Become the one who writes to the run, at the first step of a life; all ranks.

        Raises `RunInUseError` where another job that lives does, `StorageError` where nobody may write there.
        """
        if self._begun:
            return
        self.check_place()
        self._warn_unrestored()
        doing = f"beginning to write to {self._run}"

        def take() -> None:
            if self._comm.rank != 0:
                return
            if self._refusal is not None:
                raise StorageError(
                    self._refusal.errno, f"{self._run} was opened only to restore from it: {self._refusal.strerror}"
                )
            within(self._timeout, doing, lambda: self._life.take(self._timeout / 2))

        on_all(self._comm, take, self._timeout, doing)
        self._begun = True

    def _warn_unrestored(self) -> None:
        """Say, once, that a job which finds checkpoints begins without them."""
        called, self._restore_called = self._restore_called, True
        if called or self._comm.rank != 0:
            return
        if self.found is not None:
            _log.warning(
                "%s has checkpoints, the newest of step %d, but restore() was not called before the first step: this "
                "job starts over, and its saves become the newest. Call restore(state) before the first "
                "step, or give the job a directory of its own",
                self._run,
                self.found,
            )
        elif self._foreign is not None:
            _log.warning("%s", self._foreign.tell(self._run))

    def close(self) -> None:
        """Let go of the run; what a storage that does not answer leaves of that expires by itself, and is logged."""
        try:
            within(self._timeout, f"letting go of {self._run}", self._life.close)
        except DeadlineError as error:
            _log.warning("%s", error)

    def let_go(self) -> None:
        """Let go of the run, for a Checkpointer that is collected as garbage: no thread can be waited for then."""
        self._life.close()
