"""What ranks under msrun do: save and lose a rank, or load on another number of ranks.

msrun ... msrun_job.py FOLDER RUN save|load
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.communication import get_group_size, get_rank, init

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.errors import CheckpointError, DeadlineError
from ckptengine.snapshot.threads import copy_threads
from ckptengine.storage.local import LocalStorage
from tests.mindspore import training
from tests.mindspore.training import as_array

ROWS = 10


def table(step):
    return np.random.RandomState(step).rand(ROWS, 6).astype(np.float32)


def state_of(cell, step):
    """Return a training's state, and this rank's rows of a table that all have a part of."""
    rank, ranks = get_rank(), get_group_size()
    begin, end = (ROWS * number // ranks for number in (rank, rank + 1))
    rows = ce.ShardedArray(Tensor(table(step)[begin:end]), (ROWS, 6), (begin, 0))
    return {
        "net": cell.network,
        "optimizer": cell.optimizer,
        "table": rows,
        "mine": ce.PerRank({"rank": rank}, resize=lambda values, rank, ranks: {"rank": rank}),
    }


def coordinate():
    """Return what a rank that does not come is called, and check that a background wait holds up nobody."""
    comm = current()
    assert comm is current()
    assert comm.all_gather(b"%d" % comm.rank * 1_500_000, 60) == [b"%d" % r * 1_500_000 for r in range(comm.world_size)]
    store, seen = comm.store(), []
    waiter = threading.Thread(target=lambda: seen.append(store.get("never", 1.5)))
    waiter.start()
    comm.barrier(60)
    store.set(f"from/{comm.rank}", b"")
    assert store.get(f"from/{(comm.rank + 1) % comm.world_size}", 60) == b""
    assert waiter.is_alive()
    waiter.join()
    assert seen == [None]
    comm.barrier(60)
    store.delete(f"from/{comm.rank}")
    assert store.get(f"from/{comm.rank}", 0) is None


def save(run):
    """Save step 1; then lose rank 1 while it writes its file of step 2, and say what the others are told."""
    coordinate()
    _, cell = training.train_cell()
    cell(*training.batch(0))
    current().barrier(60)  # compiling takes each rank its time
    with ce.Checkpointer(run, timeout=5) as checkpointer:
        checkpointer.save(1, state_of(cell, 1)).durable.result()
        expected = {name: value.hex() for name, value in training.contents(cell).items()}
        if get_rank() == 1:
            create = LocalStorage.create_archive

            def dies(*arguments, **options):
                create(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            LocalStorage.create_archive = dies
        cell(*training.batch(1))
        began = time.monotonic()
        handle = checkpointer.save(2, state_of(cell, 2))
        report = {"contents": expected}
        try:
            handle.durable.result()
        except CheckpointError as error:
            report |= {"error": str(error), "seconds": time.monotonic() - began}
        write(report)
        os._exit(0)  # without a farewell to a rank that is gone


def load(run):
    """Load into another training, in another split; what can't be agreed on is told."""
    _, cell = training.train_cell(seed=7)
    cell(*training.batch(5))  # compiled and stepped before
    state = state_of(cell, 0)
    with ce.Checkpointer(run, timeout=60) as checkpointer:
        step = checkpointer.restore(state)
    rows, box = as_array(state["table"].local), state["table"].box
    part = table(1)[box.offset[0] : box.offset[0] + box.shape[0]]
    report = {"step": step, "rows": rows.tobytes() == part.tobytes(), "mine": state["mine"].value}
    report["threads"] = copy_threads()
    report["contents"] = {name: value.hex() for name, value in training.contents(cell).items()}
    current().barrier(60)
    try:
        if get_rank() != 2:
            current().barrier(2.0)
    except DeadlineError as error:
        report["missing"] = str(error)
    write(report)
    ms.mint.distributed.barrier()


def write(report):
    temporary = Path(sys.argv[1], f"tmp-{get_rank()}")
    temporary.write_text(json.dumps(report))
    temporary.rename(Path(sys.argv[1], f"rank-{get_rank()}.json"))


if __name__ == "__main__":
    init()
    {"save": save, "load": load}[sys.argv[3]](sys.argv[2])
