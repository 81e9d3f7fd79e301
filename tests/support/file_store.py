"""A key-value store in a directory, for test processes that have no framework to exchange messages through."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from urllib.parse import quote

from ckptengine.comm.base import KeyValueStore
from ckptengine.comm.keyvalue import poll
from ckptengine.errors import StorageError

__all__ = ["FileStore"]


class FileStore(KeyValueStore):
    """A store in a directory that all ranks see, one file per key.

    Nothing is synced: these are messages, not records. On NFS another machine's file may show only after the
    attribute cache's time (`acdirmax`, 60 s unless mounted otherwise): give timeouts beyond that.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)

    def set(self, key: str, value: bytes) -> None:
        """Store a value: written under a temporary name, then renamed."""
        path = self._path(key)
        temporary = f"{self._directory}/.tmp-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:
                file.write(value)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise StorageError(error.errno, f"cannot write the message {path}: {error.strerror}") from error

    def get(self, key: str, timeout: float) -> bytes | None:
        """Return the value as soon as it is there, None after `timeout` seconds without it."""
        path = self._path(key)

        def look() -> bytes | None:
            try:
                return Path(path).read_bytes()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise StorageError(error.errno, f"cannot read the message {path}: {error.strerror}") from error

        return poll(look, timeout)

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        path = self._path(key)
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(error.errno, f"cannot delete the message {path}: {error.strerror}") from error

    def claim(self, key: str, value: bytes) -> bytes:
        """Store a value unless the key has one; return the one that it has."""
        temporary = f"{self._directory}/.tmp-{secrets.token_hex(8)}"
        Path(temporary).write_bytes(value)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, self._path(key))
        os.unlink(temporary)
        return Path(self._path(key)).read_bytes()

    def _path(self, key: str) -> str:
        return f"{self._directory}/{quote(key, safe='')}"
