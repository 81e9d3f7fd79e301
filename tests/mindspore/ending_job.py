"""What a job under msrun does from begin to end: `msrun ... ending_job.py FOLDER RUN before|after`.

ckptengine.mindspore is imported before or after `init`; the ranks save once and end. With `before` rank 1 comes to the
first meeting when rank 0 has been told in vain that it is late.
"""

import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore.communication import get_rank, init

folder, run, order = sys.argv[1:]
if order == "before":
    import ckptengine.mindspore
init()
if order == "after":
    import ckptengine.mindspore
import ckptengine as ce  # noqa: E402
from ckptengine.comm.select import current  # noqa: E402

rank = get_rank()
late = Path(folder, "late")
if order == "before" and rank == 0:
    began = time.monotonic()
    try:
        current(2.0)
    except ce.errors.DeadlineError as error:
        late.with_suffix(".tmp").write_text(f"{time.monotonic() - began} {error}")
        late.with_suffix(".tmp").rename(late)
end = time.monotonic() + 100
while order == "before" and not late.exists() and time.monotonic() < end:
    time.sleep(0.05)
rows = ms.Tensor(np.full((2, 3), float(rank), np.float32)) * 1
with ce.Checkpointer(run, timeout=100) as ckpt:
    ckpt.save(1, {"rows": ce.ShardedArray(rows, (4, 3), (2 * rank, 0))})
