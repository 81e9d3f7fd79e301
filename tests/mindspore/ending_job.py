"""What a job under msrun does from begin to end: `msrun ... ending_job.py FOLDER RUN before|after`.

ckptengine.mindspore is imported before or after `init`; the ranks save once and end.
"""

import sys

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

rank = get_rank()
rows = ms.Tensor(np.full((2, 3), float(rank), np.float32)) * 1
with ce.Checkpointer(run, timeout=100) as ckpt:
    ckpt.save(1, {"rows": ce.ShardedArray(rows, (4, 3), (2 * rank, 0))})
