"""The ranks of a node read together: each byte once for all of them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptengine.comm.agree import gather
from ckptengine.comm.base import Communicator
from ckptengine.errors import DeadlineError, StorageError
from ckptengine.load.fill import Filling, read_ranges
from ckptengine.load.node import Member, Neighbour, Offer, members
from ckptengine.load.schedule import Request, Schedule, make_schedule, needed_nbytes
from ckptengine.load.window import LOOK, MOST_RANKS, MOST_SLOTS, StoppedElsewhere, Window, window_nbytes
from ckptengine.storage.stuck import operation_of

__all__ = ["Counts", "Together", "make_offer", "read", "together"]

IN_FLIGHT = 12
"""Shared requests in flight on a node, spread over its ranks, each of which has two at least."""
LEAST_SLOTS = 2
"""With one, nobody could read while the others scatter."""

_CONSUMERS = 2  # threads of each rank that scatter what has come
_MOMENT_SECONDS = 1.0

_log = logging.getLogger("ckptengine")
_told = threading.Event()  # this process has said that its node's ranks can't share memory


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes of archives that this rank read and that it needs, in whole blocks, and those that its node needs."""

    read: int
    needed: int
    node_needed: int


@dataclass(frozen=True, slots=True)
class Together:
    """What the ranks of a node read, as number `rank` of them sees it; `window` is None where they share nothing."""

    schedule: Schedule
    window: Window | None
    rank: int


def make_offer(comm: Communicator, filling: Filling) -> Offer:
    """Return what this rank shows its neighbours, before any of them knows who they are."""
    if comm.world_size == 1:
        return Offer(filling.needs[:0], 0)
    return Offer(filling.needs, window_nbytes(MOST_SLOTS, min(comm.world_size, MOST_RANKS)))


@contextlib.contextmanager
def together(
    comm: Communicator, offer: Offer, greetings: Sequence[bytes], timeout: float, doing: str
) -> Iterator[Together | None]:
    """Prepare to read together with the ranks of this node; all ranks of the job call it.

    `greetings` are all ranks' offers'. Yields None where this rank reads alone: it has no neighbours, or the node lacks
    the means to share memory, which is logged once. Raises on all ranks what any of them found, as `gather` does.
    """
    nodes = members(greetings)
    if len(nodes) == comm.world_size:
        yield None
        return
    node = next(node for node in nodes if any(member.rank == comm.rank for member in node))
    alone = len(node) == 1
    with contextlib.ExitStack() as stack:
        reason, error, slots = "", None, 0
        try:
            if not alone:
                neighbours = [stack.enter_context(contextlib.closing(one)) for one in _meet(node)]
                schedule = make_schedule([one.needs for one in neighbours])
                memory = neighbours[0].map() if schedule.requests else None  # the first rank's is the window
                if schedule.requests and node[0].rank == comm.rank:
                    slots = _allocate(offer, len(node), len(schedule.requests))
        except OSError as problem:
            reason = f"rank {comm.rank}: {problem}"
        except Exception as problem:
            error = problem
        replies = gather(comm, json.dumps([slots, reason]).encode(), error, timeout, doing)
        said = [json.loads(replies[member.rank]) for member in node]
        reasons = [why for _, why in said if why]
        if reasons or alone:
            _tell(reasons)
            yield None
            return
        rank = [member.rank for member in node].index(comm.rank)
        window = None
        if memory is not None:
            window = Window(memory, said[0][0], neighbours, rank, schedule.requests, timeout)
        yield Together(schedule, window, rank)


def read(filling: Filling, group: Together | None, timeout: float) -> Counts:
    """Fill this rank's part, together with those of its node.

    Every byte is verified by the rank that reads it. Raises `CheckpointDamagedError` naming file and place,
    `DeadlineError` naming ranks of the node that ended or hang, and `StoppedElsewhere` where another rank has an error.
    In each case the other ranks of the node stop as well, and some parts may have been filled.
    """
    needed = needed_nbytes(filling.needs)
    if group is None:
        return Counts(read_ranges(filling, filling.needs, timeout), needed, needed)
    schedule, window, rank = group.schedule, group.window, group.rank
    nbytes = 0
    try:
        if window is not None:
            nbytes += _read_shared(filling, schedule.requests, window, rank, timeout)
        nbytes += read_ranges(filling, schedule.private[rank], timeout)
    except BaseException:
        if window is not None:
            window.stop()
        raise
    return Counts(nbytes, needed, schedule.node_nbytes)


def _meet(node: Sequence[Member]) -> Iterator[Neighbour]:
    """Yield the ranks of this node, each opened; raises `OSError` where that can't be."""
    if len(node) > MOST_RANKS:
        raise OSError(f"more than {MOST_RANKS} ranks")
    yield from map(Neighbour, node)


def _allocate(offer: Offer, ranks: int, requests: int) -> int:
    """Allocate a window of as many slots as there is memory for; return their number."""
    slots = max(LEAST_SLOTS, min(MOST_SLOTS, requests))
    while True:
        try:
            offer.allocate(window_nbytes(slots, ranks))
            return slots
        except OSError:
            if slots == LEAST_SLOTS:
                raise
            slots = max(LEAST_SLOTS, slots // 2)


def _tell(reasons: Sequence[str]) -> None:
    if reasons and not _told.is_set():
        _told.set()
        _log.warning(
            "the ranks of this node can't share memory, so each rank reads for itself what several need: %s",
            "; ".join(reasons),
        )


def _read_shared(filling: Filling, requests: Sequence[Request], window: Window, rank: int, timeout: float) -> int:
    """Read what falls to this rank, and take what it needs of all; return the bytes read."""
    mine = [request for request in requests if request.reader == rank]
    wanted = (request for request in requests if rank in request.consumers)
    readers = _Readers(filling, window, mine, max(2, -(-IN_FLIGHT // window.ranks)))
    try:
        readers.start()
        for archive, some in itertools.groupby(wanted, lambda request: request.archive):
            _consume(filling, archive, list(some), window)
        readers.finish()
    except BaseException as problem:
        window.stop()
        hung = readers.give_up(window.left)
        if hung and isinstance(problem, DeadlineError | StoppedElsewhere):
            # Whoever has stopped the window: this rank is the one that they wait for.
            raise DeadlineError(
                f"reading a checkpoint: {hung} has not ended after {timeout:g} s; the storage does not answer"
            ) from problem
        if readers.error is not None and isinstance(problem, StoppedElsewhere):
            raise readers.error from None
        raise
    return sum(request.nbytes for request in mine)


def _consume(filling: Filling, number: int, requests: Sequence[Request], window: Window) -> None:
    """Take requests of one archive out of a window, to memory or, as many as fit there at a time, to devices."""
    source, devices = filling.sources[number], filling.devices
    if devices is None:
        window.consume(source.archive, requests, source.plan, _CONSUMERS)
        return
    for begin, end in devices.groups(number, [one.position for one in requests]):
        some = requests[begin:end]
        plan = devices.plan(number, some[0].position, some[-1].position + some[-1].nbytes)
        window.consume(source.archive, some, plan, _CONSUMERS)
        for one in some:
            devices.came(number, one.position, one.position + one.nbytes)


class _Readers:
    """The threads of this rank that read its requests into the window, in order, several at a time."""

    def __init__(self, filling: Filling, window: Window, requests: Sequence[Request], threads: int) -> None:
        self.error: Exception | None = None
        self._filling, self._window = filling, window
        self._requests = iter(requests)
        self._lock = threading.Lock()
        # Daemons: one that a dead file server holds must not hold up the end of the process.
        self._threads = [
            threading.Thread(target=self._run, name="ckptengine-read", daemon=True)
            for _ in range(min(threads, len(requests)))
        ]

    def start(self) -> None:
        """Start to read, on fewer threads where the system gives no more; raises `StorageError` where it gives none."""
        for number, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:
                if number == 0:
                    raise StorageError(
                        errno.EAGAIN, f"no thread could be started to read a checkpoint: {error}"
                    ) from error
                break

    def finish(self) -> None:
        """Return when all is read; raises what went wrong here, or elsewhere."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(LOOK)
                self._window.check()
        if self.error is not None:
            raise self.error

    def give_up(self, timeout: float) -> str:
        """Wait until no thread reads any more, `timeout` seconds and a moment; the window has been stopped.

        Return what a thread is still at, "" where none is. It does no harm: it fills a slot of the window, whose memory
        it keeps, and no state.
        """
        deadline = time.monotonic() + max(timeout, _MOMENT_SECONDS)
        for thread in self._threads:
            if thread.ident is not None:  # it could be started
                thread.join(max(0.0, deadline - time.monotonic()))
        return next((operation_of(thread) or "a read" for thread in self._threads if thread.is_alive()), "")

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    request = next(self._requests, None)
                if request is None:
                    return
                self._window.await_slot(request)
                archive = self._filling.sources[request.archive].archive
                # Through a private buffer: devices are slow at filling the small pages of shared memory.
                archive.read_into(request.position, self._window.slot(request), request.nbytes)
                self._window.publish(request)
        except Exception as problem:
            with self._lock:
                if self.error is None or isinstance(self.error, StoppedElsewhere):
                    self.error = problem
            self._window.stop()
