"""From what a user writes to the storage that it means."""

from __future__ import annotations

import errno
import os
import re
from urllib.parse import unquote, urlsplit

from ckptengine.errors import StorageError
from ckptengine.storage.base import Storage
from ckptengine.storage.local import LocalStorage

__all__ = ["open_storage"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """Return the storage at a path or `file://` URL; nothing is touched yet.

    Raises `StorageError` for other URLs, which this version does not support, and for an empty path.
    """
    path = os.fspath(location)
    if not path or "\0" in path:
        raise StorageError(errno.EINVAL, f"{path!r} is not a path: give a directory or a file:// URL")
    if not _URL.match(path):
        return LocalStorage(path)
    url = urlsplit(path)
    # Messages carry the scheme and the host only: credentials may hide in the rest.
    if url.scheme.lower() != "file":
        raise StorageError(
            errno.EPROTONOSUPPORT,
            f"{url.scheme}:// locations are not supported by this version of ckptengine: "
            "give a local directory or a file:// URL",
        )
    if url.netloc not in ("", "localhost") or not url.path:
        raise StorageError(errno.EINVAL, f"file://{url.hostname or ''}…: write file:///path/to/directory")
    return LocalStorage(unquote(url.path))
