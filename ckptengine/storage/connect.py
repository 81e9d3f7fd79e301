"""From a URL and its options to the objects that lie there: which file system of fsspec, and what is wrong with it."""

from __future__ import annotations

import difflib
import errno
import inspect
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from ckptengine.errors import StorageError
from ckptengine.storage.objects import Objects
from ckptengine.storage.retry import code_of, is_momentary

__all__ = ["connect"]

_S3 = frozenset(("s3", "s3a"))
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "hdfs": "pyarrow",
}
# How like a known option's name an unknown one has to be to be taken for a mistyped one (difflib's ratio).
_LIKE = 0.8


def connect(location: str, options: dict[str, Any]) -> Objects:
    """Return the objects at a URL or a chain of URLs, as `fsspec.core.url_to_fs` understands them.

    Raises `StorageError` that names the package that is missing, or the option, endpoint or part of the URL that is
    wrong; and what the file system raises where it connects at once and can't.
    """
    # Never fsspec's instance of earlier: it may have been made when the environment held no credentials, or others.
    try:
        import fsspec
    except ImportError:
        raise StorageError(
            errno.EPROTONOSUPPORT, f"{location}: object stores need fsspec: pip install fsspec"
        ) from None
    protocol = location.partition("://")[0].partition("::")[0]
    try:
        if protocol in _S3:
            return _s3(location, protocol, options)
        _check_options(location, fsspec.get_filesystem_class(protocol), options)
        from fsspec.core import url_to_fs

        from ckptengine.storage.generic import FsspecObjects

        def make() -> tuple[Any, str]:
            fs, root = url_to_fs(location, skip_instance_cache=True, **options)
            # This one has the path of the URL after it as its own root.
            return fs, "" if protocol == "dir" else root

        return FsspecObjects(_explained(make, location), protocol, location)
    except ImportError as error:
        name = _PACKAGES.get(protocol)
        what = f"pip install {name}" if name else f"install fsspec's implementation for {protocol}://"
        if name is None and "::" in location:
            what = f"a part of the chain is missing: {error.name or 'see the protocols'}"
        raise StorageError(errno.EPROTONOSUPPORT, f"{location}: {what}") from None
    except ValueError as error:
        if isinstance(error, StorageError) or "Protocol not known" not in str(error):
            raise
        raise StorageError(
            errno.EPROTONOSUPPORT, f"{location}: fsspec does not know the protocol {protocol!r}: check the URL"
        ) from None


def _s3(location: str, protocol: str, options: dict[str, Any]) -> Objects:
    import fsspec
    import s3fs
    from fsspec.config import conf

    from ckptengine.storage.s3 import S3Objects, s3_options

    # Others can be registered for s3:// (obstore's, for one), but what is used of it are s3fs' own calls.
    found = fsspec.get_filesystem_class(protocol)
    kind = found if issubclass(found, s3fs.S3FileSystem) else s3fs.S3FileSystem
    merged = {**conf.get(protocol, {}), **options}
    _check_options(location, kind, merged)
    _check_endpoint(location, merged)
    make = _explained(lambda: kind(skip_instance_cache=True, **s3_options(merged)), location)
    return S3Objects(make, kind._strip_protocol(location))


def _explained(make: Callable[[], Any], location: str) -> Callable[[], Any]:
    """Return `make` with errors that name what is wrong; those of a moment, and of credentials, come as they are."""

    def explained() -> Any:
        try:
            return make()
        except (StorageError, ImportError):
            raise
        except Exception as error:
            if is_momentary(error) or isinstance(error, OSError):
                raise
            raise StorageError(
                errno.EINVAL, f"{location} can't be opened: {code_of(error)}; check the location and storage_options"
            ) from None

    return explained


def _check_options(location: str, kind: type, options: dict[str, Any]) -> None:
    """Raise for an option that no parameter has the name of, and one nearly has."""
    inits = [vars(one)["__init__"] for one in kind.__mro__ if inspect.isfunction(vars(one).get("__init__"))]
    known = {name for init in inits for name in inspect.signature(init).parameters}
    known -= {"self", "args", "kwargs", "storage_options"}
    for name in options:
        near = difflib.get_close_matches(name, known, 1, _LIKE) if name not in known else []
        if near:
            raise StorageError(
                errno.EINVAL,
                f"{location}: storage_options has {name!r}, which {kind.__name__} does not know: do you mean "
                f"{near[0]!r}?",
            )


def _check_endpoint(location: str, options: dict[str, Any]) -> None:
    """Raise for an endpoint that is no URL: the client would speak of something else."""
    given = options.get("endpoint_url") or (options.get("client_kwargs") or {}).get("endpoint_url")
    where = "endpoint_url"
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if not given and os.environ.get(name):
            given, where = os.environ[name], name
    if not given:
        return
    url = urlsplit(str(given))
    if url.scheme not in ("http", "https") or not url.hostname:
        shown = str(given).rpartition("@")[2]
        raise StorageError(
            errno.EINVAL, f"{location}: {where}={shown!r} is not a URL: write it as https://host or http://host:port"
        )
