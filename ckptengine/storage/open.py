"""From what a user writes to the storage that it means."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from ckptengine.errors import StorageError
from ckptengine.storage.base import Storage
from ckptengine.storage.local import LocalStorage
from ckptengine.storage.remote import RemoteStorage

__all__ = ["is_url", "local_path", "open_storage"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# What `Path("s3://bucket/run")` makes of a URL, and `Path(...).absolute()` of that. Within a path only the protocols of
# stores tell a URL from a directory whose name ends with a colon.
_ONE_SLASH = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)|.*/(?P<store>s3a?|gs|gcs|abfss?|adl|az|obs|oss|r2|hdfs|sftp|memory|https?|file)):/"
    r"(?P<rest>.*)",
    re.DOTALL,
)


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL, not a path; raises `StorageError` for a URL that has lost a slash."""
    path = os.fspath(location)
    if _URL.match(path):
        return True
    lost = _ONE_SLASH.fullmatch(path)
    if lost is not None and "::" not in path:
        scheme = lost["scheme"] or lost["store"]
        url = f"{scheme}://{'/' if scheme.lower() == 'file' else ''}{lost['rest']}"
        raise StorageError(
            errno.EINVAL,
            f"{path!r} is a URL that has lost a slash, as in Path('{scheme}://…'): give it as a string, {url!r}. "
            f"A directory that is really called '{scheme}:' needs another name",
        )
    return False


def local_path(location: str | os.PathLike[str], what: str) -> str:
    """Return the path of what must be a local directory; raises `StorageError`, naming `what`, for a URL."""
    path = os.fspath(location)
    if is_url(path):
        raise StorageError(errno.EINVAL, f"{what}={path!r}: this is a directory, not a URL")
    return path


def open_storage(location: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage at a path, a `file://` URL, or any other URL that fsspec opens; nothing is touched yet.

    `options` are fsspec's `storage_options` for the URL's file system, such as `endpoint_url`; what is not given comes
    from fsspec's configuration and the store's own environment variables and files.

    Raises `StorageError` for an empty path and for URLs that hold credentials or name no place, `ValueError` for
    options of a path.
    """
    path = os.fspath(location)
    if not path or "\0" in path:
        raise StorageError(errno.EINVAL, f"{path!r} is not a path: give a directory or a URL")
    match = _URL.match(path) if is_url(path) else None
    if match is None or match[1].lower() == "file":
        if options:
            raise ValueError("storage_options are for URLs such as s3://bucket/run, not for directories")
        if match is None and "::" in path and "://" in path:
            raise StorageError(errno.EPROTONOSUPPORT, "chains of file systems (with ::) are not supported")
        return LocalStorage(path if match is None else _directory(path))
    protocol, rest = match[1].lower(), path[match.end() :].strip("/")
    host = rest.partition("/")[0]
    # Messages carry the scheme only: credentials may hide in the rest.
    if "?" in rest or "#" in rest or ":" in host.rpartition("@")[0]:
        raise StorageError(
            errno.EINVAL,
            f"{protocol}://…: a location holds no credentials and no query: give them as storage_options, or by the "
            "environment",
        )
    if not rest:
        raise StorageError(errno.EINVAL, f"{protocol}:// names no place: write {protocol}://bucket/path/to/run")
    return RemoteStorage(f"{protocol}://{_checked(rest)}", options)


def _checked(path: str) -> str:
    """Return a path with its parts checked; raises `StorageError` for `.`, `..` and empty ones."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise StorageError(errno.EINVAL, f"{path!r} has empty parts, . or ..: write a plain path")
    return path


def _directory(path: str) -> str:
    url = urlsplit(path)
    if url.netloc not in ("", "localhost") or not url.path:
        raise StorageError(errno.EINVAL, f"file://{url.hostname or ''}…: write file:///path/to/directory")
    return unquote(url.path)
