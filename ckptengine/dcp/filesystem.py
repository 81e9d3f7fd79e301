"""The names and arguments of torch's file-system writers and readers, for scripts that make them themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat

from ckptengine.dcp.reader import Reader
from ckptengine.dcp.writer import Writer

__all__ = ["FileSystemReader", "FileSystemWriter", "FsspecReader", "FsspecWriter"]


class FileSystemWriter(Writer):
    """A `Writer` that takes what torch's `FileSystemWriter` takes.

    `path` and `overwrite` are those of `Writer`; the others tell torch's writer how to spread its work over files and
    threads, and say nothing here: each rank writes one file, with as many threads as serve it, and syncs it. Raises
    `ValueError` for `_extensions` and a `serialization_format`, which would change the format.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        _check_format(_extensions, serialization_format)
        super().__init__(path, overwrite=overwrite)


class FsspecWriter(Writer):
    """A `Writer` that takes what torch's `FsspecWriter` takes; further keywords are the file system's options."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        **storage_options: Any,
    ) -> None:
        _check_format(_extensions, serialization_format)
        super().__init__(path, overwrite=overwrite, storage_options=storage_options or None)


class FileSystemReader(Reader):
    """A `Reader` that takes what torch's `FileSystemReader` takes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)


class FsspecReader(Reader):
    """A `Reader` that takes what torch's `FsspecReader` takes; keywords are the file system's options."""

    def __init__(self, path: str | os.PathLike[str], **storage_options: Any) -> None:
        super().__init__(path, storage_options=storage_options or None)


def _check_format(extensions: Sequence[Any] | None, serialization_format: SerializationFormat) -> None:
    if extensions or serialization_format is not SerializationFormat.TORCH_SAVE:
        raise ValueError(
            "_extensions and serialization_format change the format of torch's files, and this engine writes its own: "
            "leave them out"
        )
