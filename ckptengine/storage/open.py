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

__all__ = ["is_url", "local_path", "open_storage"]

# The last part of a chain (`dir::s3://bucket/run`) says where the files are.
_URL = re.compile(
    r"(?P<chain>(?:[A-Za-z][A-Za-z0-9+.-]*(?:://[^:]*)?::)*)(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://",
)
_CACHES = frozenset(("simplecache", "filecache", "blockcache", "cached"))
_ARCHIVES = frozenset(("zip", "tar", "libarchive", "reference", "data", "generic"))
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
            f"{path!r} is a URL that lost a slash, as in Path('{scheme}://…'): give it as a string, {url!r}. "
            f"A directory that is really called '{scheme}:' needs another name",
        )
    return False


def local_path(location: str | os.PathLike[str], what: str) -> str:
    """Return the path of what must be a local path, `~` expanded; raises `StorageError`, naming `what`, for URLs."""
    path = os.fspath(location)
    if is_url(path):
        raise StorageError(errno.EINVAL, f"{what}={path!r}: this is a directory, not a URL")
    return os.path.expanduser(path)


def open_storage(
    location: str | os.PathLike[str], options: Mapping[str, Any] | None = None, timeout: float | None = None
) -> Storage:
    """Return the storage at a path, a `file://` URL, or any other URL that fsspec opens; nothing is touched yet.

    `options` are fsspec's `storage_options` for the URL's file system, such as `endpoint_url`; what is not given comes
    from fsspec's configuration and the store's own environment variables and files. `timeout`, in seconds, bounds each
    operation of a store.

    Raises `StorageError` for an empty path and for URLs that hold credentials or name no place, `ValueError` for
    options of a path.
    """
    path = os.fspath(location)
    if not path or "\0" in path:
        raise StorageError(errno.EINVAL, f"{path!r} is not a path: give a directory or a URL")
    match = _URL.match(path) if is_url(path) else None
    if match is None or (match["scheme"].lower() in ("file", "local") and not match["chain"]):
        if options:
            raise ValueError("storage_options are for URLs such as s3://bucket/run, not for directories")
        return LocalStorage(os.path.expanduser(path) if match is None else _directory(path))
    chain, protocol, rest = match["chain"] or "", match["scheme"].lower(), path[match.end() :].rstrip("/")
    _check_chain(chain)
    _check_rest(protocol, rest)
    from ckptengine.storage.remote import RemoteStorage  # with asyncio and ssl, which a directory does not need

    return RemoteStorage(f"{chain}{protocol}://{rest}", options, timeout=timeout)


def _check_chain(chain: str) -> None:
    """Raise for a part of a chain that checkpoints can't be written through, or not be read through as they are."""
    for part in chain.split("::")[:-1]:
        protocol, _, path = part.partition("://")
        if path:
            raise StorageError(
                errno.EPROTONOSUPPORT, f"{protocol}://…:: in a chain: only the last part may have a path"
            )
        if protocol in _CACHES:
            raise StorageError(
                errno.EPROTONOSUPPORT,
                f"{protocol}:: keeps copies of files, and would show manifests and leases that have changed: leave it "
                "out; local= and `ckptengine prefetch` keep checkpoints on the local disk",
            )
        if protocol in _ARCHIVES:
            raise StorageError(
                errno.EPROTONOSUPPORT, f"{protocol}:: is an archive, and a run can't be written into one: leave it out"
            )


def _check_rest(protocol: str, rest: str) -> None:
    # Messages repeat only what comes before a sign that credentials may follow.
    host, _, _ = rest.partition("/")
    if ":" in host.rpartition("@")[0]:
        raise StorageError(
            errno.EINVAL,
            f"{protocol}://…: a location holds no credentials: give them as storage_options, or by the environment",
        )
    sign = re.search(r"[?#]", rest)
    if sign is not None:
        raise StorageError(
            errno.EINVAL,
            f"{protocol}://{rest[: sign.start()]} goes on with {sign[0]!r}: a location holds no query, no "
            "credentials and no name with ? or # in it; choose another name, and give settings as storage_options",
        )
    if not rest.strip("/"):
        raise StorageError(errno.EINVAL, f"{protocol}:// has no location: write {protocol}://bucket/path/to/run")
    # A path that begins with a slash has no host, as in hdfs:///user/run.
    if any(part in ("", ".", "..") for part in rest.removeprefix("/").split("/")):
        raise StorageError(errno.EINVAL, f"{rest!r} has empty parts, . or ..: write a plain path")


def _directory(path: str) -> str:
    url = urlsplit(path)
    if url.netloc not in ("", "localhost") or not url.path:
        scheme = url.scheme
        raise StorageError(errno.EINVAL, f"{scheme}://{url.hostname or ''}…: write {scheme}:///path/to/directory")
    return unquote(url.path)
