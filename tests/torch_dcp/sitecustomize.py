"""Puts this engine's writer and reader in the place of torch's own, in every process that torch's tests start."""

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _fsspec_filesystem, filesystem, format_utils

import ckptengine.dcp as ours

for module in (dcp, filesystem, format_utils, _fsspec_filesystem):
    for name in ("FileSystemWriter", "FileSystemReader", "FsspecWriter", "FsspecReader"):
        if hasattr(module, name):
            setattr(module, name, getattr(ours, name))
