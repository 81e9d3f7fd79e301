"""Heat on a rectangular plate, of which each MPI rank computes one block:

    mpiexec -n 4 --bind-to none python -m mpi4py examples/heat_mpi.py

Stop it at any time and start it again, on as many ranks as you like. It goes on from the newest checkpoint, and the
plate is the same to the last bit as one that was never stopped.
"""

import sys

import numpy as np
from mpi4py import MPI  # so that ckptengine coordinates the ranks through MPI

import ckptengine as ce

SHAPE = (300, 400)
CONDUCTION = 0.2


def main(run: str = "runs/heat", steps: int = 4000) -> None:
    world = MPI.COMM_WORLD
    grid = world.Create_cart(MPI.Compute_dims(world.size, 2))
    top, bottom = block(SHAPE[0], grid.dims[0], grid.coords[0])
    left, right = block(SHAPE[1], grid.dims[1], grid.coords[1])

    # This rank's block, in a frame that holds the neighbours' nearest cells. The plate's own edge stays at 0 degrees.
    framed = np.zeros((bottom - top + 2, right - left + 2))
    plate = framed[1:-1, 1:-1]
    row, column = np.ogrid[top:bottom, left:right]
    plate[:] = np.where((row - 100) ** 2 + (column - 150) ** 2 < 60**2, 100.0, 20.0)

    state = {"plate": ce.ShardedArray(plate, SHAPE, (top, left))}
    with ce.Checkpointer(run, every=100, keep_last=3) as ckpt:
        start = ckpt.restore(state)
        if world.rank == 0:
            print("fresh start" if start is None else f"resumed at step {start}", f"on {world.size} ranks", flush=True)
        for step in range((start or 0) + 1, steps + 1):
            exchange(grid, framed)
            # Each cell's sum has the same order on any decomposition.
            vertical, horizontal = framed[:-2, 1:-1] + framed[2:, 1:-1], framed[1:-1, :-2] + framed[1:-1, 2:]
            plate += CONDUCTION * (vertical + horizontal - 4 * plate)
            ckpt.step(step, state)  # saves when due, in the background
    hottest = world.allreduce(plate.max(), MPI.MAX)
    if world.rank == 0:
        print(f"step {steps}: the hottest cell has {hottest} degrees")


def block(length: int, parts: int, part: int) -> tuple[int, int]:
    """Return where a part of a dimension begins and ends."""
    return length * part // parts, length * (part + 1) // parts


def exchange(grid: MPI.Cartcomm, framed: np.ndarray) -> None:
    """Fill the frame with the neighbours' nearest cells."""
    for axis in (0, 1):
        before, after = grid.Shift(axis, 1)
        lines = framed.swapaxes(0, axis)
        for target, edge, source, frame in ((before, 1, after, -1), (after, -2, before, 0)):
            received = lines[frame].copy()  # stays as it is at the plate's edge, where there is no neighbour
            grid.Sendrecv(lines[edge].copy(), target, recvbuf=received, source=source)
            lines[frame] = received


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
