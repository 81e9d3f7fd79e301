"""PyTorch's distributed checkpoint over this engine: `import ckptengine.dcp as dcp` in the place of torch's module.

`save`, `load` and `async_save` have its signatures; `Writer` and `Reader` plug into torch's own calls, wherever a
trainer lets one choose a storage writer or reader. `FileSystemWriter` and its like take torch's arguments and are these
two. All other names are those of `torch.distributed.checkpoint`.
"""

from typing import Any

import torch.distributed.checkpoint as _torchs

from ckptengine.dcp.api import async_save, load, save
from ckptengine.dcp.filesystem import FileSystemReader, FileSystemWriter, FsspecReader, FsspecWriter
from ckptengine.dcp.reader import Reader
from ckptengine.dcp.writer import Writer

__all__ = [
    "FileSystemReader",
    "FileSystemWriter",
    "FsspecReader",
    "FsspecWriter",
    "Reader",
    "Writer",
    "async_save",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    try:
        return getattr(_torchs, name)
    except AttributeError:
        raise AttributeError(f"neither ckptengine.dcp nor torch.distributed.checkpoint has {name!r}") from None
