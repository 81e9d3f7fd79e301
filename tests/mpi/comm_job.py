"""Four ranks that exchange values, come late, give up and contradict each other: `comm_job.py FOLDER`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "single"

from mpi4py import MPI  # noqa: E402

from ckptengine.comm import mpi  # noqa: E402
from ckptengine.comm.base import Communicator  # noqa: E402
from ckptengine.comm.hosted import HostedStore  # noqa: E402
from ckptengine.comm.select import current  # noqa: E402
from ckptengine.errors import CheckpointError  # noqa: E402

TIMEOUT = 2.0


def said(operation: Callable[[], Any]) -> list[str]:
    """Return the class and the message of what an operation raises."""
    try:
        return ["returned", str(operation())]
    except CheckpointError as error:
        return [type(error).__name__, str(error)]


def late(who: int, operation: Callable[[], Any]) -> list[str]:
    """Have all ranks but one enter an operation; that one enters it when the others have come out of it."""
    world, folder = MPI.COMM_WORLD, Path(sys.argv[1])
    number = len(list(folder.glob(f"out-*-{world.rank}")))
    world.Barrier()
    others = [folder / f"out-{number}-{rank}" for rank in range(world.size) if rank != who]
    deadline = time.monotonic() + 60
    while world.rank == who and not all(path.exists() for path in others):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    result = said(operation)
    (folder / f"out-{number}-{world.rank}").touch()
    world.Barrier()
    return result


def strangers(comm: Communicator, store: Any) -> dict[str, Any]:
    """Come to the store of rank 0 with a wrong secret, with none, and with rubbish; then all goes on."""
    rank = MPI.COMM_WORLD.rank
    places = json.loads(comm.broadcast(json.dumps(store.addresses).encode() if rank == 0 else None, 20))
    seen: dict[str, Any] = {"places": places}
    if rank == 1:
        seen["wrong"] = said(lambda: HostedStore([tuple(place) for place in places], bytes(32), 5.0))
        peer = socket.create_connection(places[0], 5)
        peer.sendall(bytes(1000))
        left = b"x"
        with contextlib.suppress(ConnectionResetError):
            while left:
                left = peer.recv(1000)
        seen["rubbish"] = "closed"
        # It does not hold up the others, who come while it says nothing.
        seen["silent"] = socket.create_connection(places[0], 5).fileno() >= 0
    comm.barrier(20)
    return seen


def forked(store: Any) -> str:
    """Return how a forked process comes off that uses the store; this one goes on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(said(lambda: store.get("nothing", 0.0))).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as pipe:
        return json.loads(pipe.read())


def held(store: Any) -> list[str]:
    """Return how the others come off at the store while rank 0 waits for them and holds the interpreter's lock.

    Rank 0 writes more than a pipe takes, in one call that keeps the lock: from the first byte that another rank reads
    until all have read their parts, it is in that call.
    """
    world, path = MPI.COMM_WORLD, Path(sys.argv[1], "held")
    if world.rank == 0:
        os.mkfifo(path)
    world.Barrier()
    pipe, part, result = os.open(path, os.O_RDWR), 1 << 20, []
    if world.rank == 0:
        nbytes = (world.size - 1) * part
        assert ctypes.PyDLL(None).write(pipe, bytes(nbytes), nbytes) == nbytes
    else:
        left = part - len(os.read(pipe, 1))
        result = said(lambda: store.set(f"held/{world.rank}", b"") or store.get(f"held/{world.rank}", 0.0))
        while left:
            left -= len(os.read(pipe, left))
    world.Barrier()
    return result


def main() -> None:
    world, report = MPI.COMM_WORLD, {}
    rank, size = world.rank, world.size

    # Rank 2 is late for the very first meeting; then all meet.
    report["late to connect"] = late(2, lambda: current(TIMEOUT))
    comm = mpi.from_mpi(timeout=20)
    assert comm is current()
    assert (comm.rank, comm.world_size) == (rank, size)
    store = comm.store()
    assert store is not None
    assert store.blocks

    # A receive that takes anything stays open on the job's own communicator: nothing of ours may fall into it.
    trap = world.Irecv([bytearray(1000), MPI.BYTE], MPI.ANY_SOURCE, MPI.ANY_TAG)
    report["gathered"] = [item.decode() for item in comm.all_gather(b"%d" % rank * rank, 20)]
    report["empty"] = [item.decode() for item in comm.all_gather(b"", 20)]
    report["broadcast"] = [
        comm.broadcast(b"from %d" % root if rank == root else None, 20, root).decode() for root in range(size)
    ]
    comm.barrier(20)

    value = bytes(range(256)) * 11_000
    uneven = [value[: len(value) >> number] + b"%d" % number for number in range(size)]
    report["pieces"] = comm.all_gather(uneven[rank], 20) == uneven
    report["large broadcast"] = comm.broadcast(value if rank == 3 else None, 20, 3) == value

    # Rank 2 comes after the others have stopped waiting; afterwards the group works.
    report["late"] = late(2, lambda: comm.all_gather(b"late", TIMEOUT))
    report["after late"] = [item.decode() for item in comm.all_gather(b"%d" % rank, 20)]

    # Rank 0 comes after the others have given up.
    report["leader late"] = late(0, lambda: comm.broadcast(None if rank else b"x", TIMEOUT))
    report["after leader"] = [item.decode() for item in comm.all_gather(b"%d" % rank, 20)]

    # Rank 2 leaves one out, then rank 0 does, and one is left out twice: all are in step at the next one, or after it.
    for name, who, times in (("left out", 2, 1), ("left out twice", 1, 2), ("left out by the leader", 0, 1)):
        for number in range(times):
            comm.about = f"{name} {number}"
            if rank != who:
                report[name] = said(lambda: comm.all_gather(b"x", TIMEOUT))
            world.Barrier()
        comm.about = f"{name} next"
        report[f"next to {name}"] = said(lambda: comm.all_gather(b"%d" % rank, 20))
        world.Barrier()
        report[f"after {name}"] = [item.decode() for item in comm.all_gather(b"%d" % rank, 20)]
        comm.about = ""

    report["contradiction"] = said(lambda: comm.barrier(20) if rank == 1 else comm.all_gather(b"", 20))
    report["after contradiction"] = [item.decode() for item in comm.all_gather(b"%d" % rank, 20)]

    report["split"] = [item.decode() for item in mpi.from_mpi(world.Split(rank % 2, rank)).all_gather(b"%d" % rank, 20)]
    assert mpi.from_mpi(MPI.COMM_SELF).world_size == 1

    # A background thread waits for what a third rank tells, while all meet; MPI is for one thread.
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.get, f"from/{(rank + 1) % size}", 60.0)
        comm.barrier(20)
        assert not waiting.done()
        comm.barrier(20)
        store.set(f"from/{rank}", b"%d" % rank)
        report["background"] = waiting.result() == b"%d" % ((rank + 1) % size)

    apart = world.Dup()
    with ThreadPoolExecutor(1) as pool:
        report["other thread"] = pool.submit(said, lambda: mpi.from_mpi(apart)).result()

    report["secret"] = strangers(comm, store)
    report["held"] = held(store)
    report["forked"] = forked(store)

    report["trap"] = trap.Test()
    trap.Cancel()
    trap.Wait()
    Path(sys.argv[1], f"rank-{rank}.json").write_text(json.dumps(report))


main()
