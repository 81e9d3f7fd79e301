"""A process that is killed while it writes an archive: `dead_writer.py URL OPTIONS DIRECTORY`."""

from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np

from ckptengine.storage.budget import Budget
from ckptengine.storage.remote import RemoteStorage

data = np.random.default_rng(0).integers(0, 256, 11 << 20, np.uint8)
storage = RemoteStorage(sys.argv[1], json.loads(sys.argv[2]), Budget(part_nbytes=5 << 20))
archive = storage.create_archive(f"{sys.argv[3]}/rank-00000.zarr.zip", data.nbytes)
archive.write(data.ctypes.data, data.nbytes, 0)
os.kill(os.getpid(), signal.SIGKILL)
