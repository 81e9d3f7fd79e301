"""A job that saves until its store ends: `ending_job.py URL OPTIONS PROTOCOL TIMEOUT`."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from stores import use_paramiko

import ckptengine as ce

url, options, protocol, timeout = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], float(sys.argv[4])
if protocol == "sftp":
    use_paramiko()
with ce.Checkpointer(url, every=1, storage_options=options, timeout=timeout, on_error="raise") as ckpt:
    for step in range(1, 10_000):
        ckpt.step(step, {"w": np.random.default_rng(step).standard_normal(100_000)})
        print("step", step, flush=True)
        time.sleep(0.05)
