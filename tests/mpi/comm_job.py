"""Four ranks that exchange values, come late, give up and contradict each other: `comm_job.py FOLDER`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "single"

from mpi4py import MPI  # noqa: E402

from ckptengine.comm import mpi  # noqa: E402
from ckptengine.comm.select import current  # noqa: E402
from ckptengine.errors import CheckpointError  # noqa: E402


def said(operation: Callable[[], Any]) -> list[str]:
    """Return the class and the message of what an operation raises."""
    try:
        return ["returned", str(operation())]
    except CheckpointError as error:
        return [type(error).__name__, str(error)]


def main() -> None:
    world, report = MPI.COMM_WORLD, {}
    rank, size = world.rank, world.size

    # Rank 2 is late for the very first meeting; then all meet.
    if rank == 2:
        time.sleep(2.0)
    report["late to connect"] = said(lambda: mpi.from_mpi(timeout=0.5))
    world.Barrier()
    comm = mpi.from_mpi(timeout=20)
    assert comm is current()
    assert (comm.rank, comm.world_size, comm.store()) == (rank, size, None)

    # A receive that takes anything stays open on the job's own communicator: nothing of ours may fall into it.
    trap = world.Irecv([bytearray(1000), MPI.BYTE], MPI.ANY_SOURCE, MPI.ANY_TAG)
    report["gathered"] = [item.decode() for item in comm.all_gather(b"%d" % rank * rank, 20)]
    report["empty"] = [item.decode() for item in comm.all_gather(b"", 20)]
    report["broadcast"] = [
        comm.broadcast(b"from %d" % root if rank == root else None, 20, root).decode() for root in range(size)
    ]
    comm.barrier(20)

    mpi._PIECE_NBYTES = 1 << 20
    value = bytes(range(256)) * 11_000
    uneven = [value[: len(value) >> number] + b"%d" % number for number in range(size)]
    report["pieces"] = comm.all_gather(uneven[rank], 20) == uneven
    report["large broadcast"] = comm.broadcast(value if rank == 3 else None, 20, 3) == value

    # Rank 2 comes after the others have stopped waiting; afterwards the group works.
    if rank == 2:
        time.sleep(2.0)
    report["late"] = said(lambda: comm.all_gather(b"late", 0.5))
    report["after late"] = [item.decode() for item in comm.all_gather(b"%d" % rank, 20)]

    # Rank 0 comes after the others have given up, and some are already in the next operation.
    if rank == 0:
        time.sleep(2.5)
    report["leader late"] = said(lambda: comm.broadcast(None if rank else b"x", 0.5))
    report["after leader"] = [item.decode() for item in comm.all_gather(b"%d" % rank, 20)]

    report["contradiction"] = said(lambda: comm.barrier(20) if rank == 1 else comm.all_gather(b"", 20))
    report["after contradiction"] = [item.decode() for item in comm.all_gather(b"%d" % rank, 20)]

    report["split"] = [item.decode() for item in mpi.from_mpi(world.Split(rank % 2, rank)).all_gather(b"%d" % rank, 20)]
    assert mpi.from_mpi(MPI.COMM_SELF).world_size == 1

    began = time.monotonic()
    for _ in range(100):
        comm.all_gather(b"x" * 64, 20)
    report["seconds each"] = (time.monotonic() - began) / 100

    report["trap"] = trap.Test()
    trap.Cancel()
    trap.Wait()
    Path(sys.argv[1], f"rank-{rank}.json").write_text(json.dumps(report))


main()
