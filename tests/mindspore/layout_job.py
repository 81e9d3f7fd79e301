"""One rank of several: saves or loads arrays in MindSpore's layouts, which are made up: there is no such machine here.

python layout_job.py FOLDER save|load RANK RANKS
"""

import sys
from pathlib import Path

import numpy as np

import ckptengine as ce
from ckptengine.comm.exchange import connect
from ckptengine.layout.device_matrix import device_matrix_box

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from file_store import FileStore

# Name: whole shape; then for 2x4 and for 4x1 devices the tensor map, and whether the optimizer shards it: it does so
# over the ranks that hold copies, which here are those of one column of the device matrix.
LAYOUTS = {
    "columns": ((8, 12), (-1, 0), True, (-1, 0), True),
    "rows": ((16, 6), (0, -1), False, (1, -1), False),
    "both": ((8, 8), (1, 0), False, (-1, 1), False),
    "folded": ((16, 3), ((1, 0), -1), False, (1, -1), False),
    "whole": ((5,), (-1,), False, (-1,), False),
    "moments": ((16, 2), (-1, -1), True, (-1, -1), True),
}
MATRICES = {8: (2, 4), 4: (4, 1)}


def whole(name, shape):
    return np.random.RandomState(len(name)).rand(*shape).astype(np.float32)


def state_of(rank, ranks, values):
    state = {}
    for name, (shape, *layouts) in LAYOUTS.items():
        tensor_map, sharded = layouts[:2] if ranks == 8 else layouts[2:]
        matrix = MATRICES[ranks]
        shards, shard = (matrix[0], rank // matrix[1]) if sharded else (1, 0)
        box = device_matrix_box(shape, matrix, tensor_map, rank, shards, shard)
        part = whole(name, shape)[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
        local = np.ascontiguousarray(part) if values else np.zeros(box.shape, np.float32)
        state[name] = ce.ShardedArray(local, shape, box.offset)
    return state


def main():
    folder, what, rank, ranks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    comm = connect(FileStore(folder / f"messages-{what}"), rank, ranks, 60)
    if what == "save":
        ce.save(folder / "checkpoint", state_of(rank, ranks, True), comm=comm, timeout=60)
        return
    state = state_of(rank, ranks, False)
    ce.load(folder / "checkpoint", into=state, comm=comm, timeout=60)
    for name, expected in state_of(rank, ranks, True).items():
        assert state[name].local.tobytes() == expected.local.tobytes(), (name, rank)


if __name__ == "__main__":
    main()
