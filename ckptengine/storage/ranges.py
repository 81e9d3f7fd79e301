"""Ranges of objects through obstore, where it is installed: it reads more bytes for each core than aiohttp."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from ckptengine.storage.retry import Garbled

__all__ = ["LARGE", "NEVER", "NotAlikeError", "RangeReads", "S3Ranges", "made_store", "refuse_unlike"]

LARGE = (64 << 10) + 1
"""From so many bytes on a read goes through obstore, where it is installed."""
_FAILURES = 8  # in a row, each of a read that s3fs' client then did: then it rests
_REST_SECONDS = 60.0
_REMEMBERED = 1024  # failures of what was never read
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_MOMENTARY = frozenset((408, 429, 500, 502, 503, 504))
NEVER = "86400s"  # each read is bounded by its caller

_log = logging.getLogger("ckptengine")
# obstore's threads are this process's, and not there in one that is forked from it.
_owner: list[int] = []


class RangeReads(ABC):
    """Reads of one bucket: the same that fsspec's client for it would make, with the same credentials.

    A read that fails is made by that client the next time, and where the answer is final at once: so errors, renewed
    credentials and messages are the same with and without obstore. Where the client was told something that can't be
    told to obstore, all reads are the client's; the log says so.
    """

    client: str
    """The name of fsspec's client, for messages."""

    def __init__(self, bucket: str, scheme: str) -> None:
        self._bucket, self._url = bucket, f"{scheme}://{bucket}"
        self._lock = threading.Lock()
        self._made: tuple[Any, Any, Any] | None = None  # the client, its credentials, and the store for these
        self._failed: set[tuple[str, int]] = set()
        self._rescued, self._rests_until = 0, -float("inf")

    def takes(self, key: str, position: int) -> bool:
        """Return whether to read this here: not what has just failed here."""
        with self._lock:
            return (key, position) not in self._failed and time.monotonic() >= self._rests_until

    def rescued(self, key: str, position: int) -> None:
        """Note that the client has made a read, which may be one that failed here."""
        with self._lock:
            if (key, position) not in self._failed:
                return
            self._failed.discard((key, position))
            self._rescued += 1
            if self._rescued < _FAILURES:
                return
            self._rescued, self._rests_until = 0, time.monotonic() + _REST_SECONDS
        _log.warning(
            "%s: obstore failed to read what %s then read, %d times in a row: %s reads everything for %.3g s",
            self._url,
            self.client,
            _FAILURES,
            self.client,
            _REST_SECONDS,
        )

    def read(
        self,
        key: str,
        position: int,
        seconds: float,
        here: Callable[[float], memoryview | None],
        by_client: Callable[[float], bytes],
    ) -> bytes | memoryview:
        """Return what `here`, a call of `get`, reads, or where it should not or can't, what the client does.

        Both get the seconds that are left.
        """
        deadline = time.monotonic() + seconds
        if self.takes(key, position):
            data = here(seconds)
            if data is not None:
                return data
        found = by_client(max(0.1, deadline - time.monotonic()))
        self.rescued(key, position)
        return found

    async def get(self, fs: Any, prefix: str, key: str, position: int, nbytes: int) -> memoryview | None:
        """Return bytes of an object, fewer only where it ends before; None where the client is to be asked at once.

        The object is `prefix + key`. `fs` is the client's file system, in whose event loop this runs. Raises for what
        another try may do.
        """
        try:
            store = await self._store(fs)
            if store is None:
                return None
            import obstore

            reply = await obstore.get_async(store, prefix + key, options={"range": (position, position + nbytes)})
            data: Any = await reply.bytes_async()
            total = int(reply.meta["size"])
            expected = max(0, min(nbytes, total - position))
            if len(data) != expected or tuple(reply.range) != (position, position + expected):
                raise Garbled(f"{len(data)} bytes came of {expected} that were asked for")
        except BaseException as error:
            with self._lock:
                if len(self._failed) > _REMEMBERED:
                    self._failed.clear()
                self._failed.add((key, position))
            if isinstance(error, Exception) and _is_final(error):
                return None
            if isinstance(error, Garbled) or not isinstance(error, Exception):
                raise
            # Not its text, which has the store's words.
            raise _momentary(str(error)) from None
        with self._lock:
            self._rescued = 0
        return memoryview(data)

    async def _store(self, fs: Any) -> Any:
        """Return obstore's store for what the client is and signs with now, None where there is none."""
        client, credentials = await self._held(fs)
        made = self._made
        if made is None or made[0] is not client or made[1] != credentials:
            try:
                if not _owner:
                    _owner.append(os.getpid())
                if _owner[0] != os.getpid():
                    raise NotAlikeError("a forked process")
                store = await self._like(fs, client, credentials)
                _log.info("%s: large reads go through obstore", self._url)
            except NotAlikeError as problem:
                store = None
                _log.info("%s: reads go only through %s: obstore does not support %s", self._url, self.client, problem)
            made = self._made = client, credentials, store
        return made[2]

    @abstractmethod
    async def _held(self, fs: Any) -> tuple[Any, Any]:
        """Return the client and its credentials as they are now; a store is made for each pair of them."""

    @abstractmethod
    async def _like(self, fs: Any, client: Any, credentials: Any) -> Any:
        """Return a store that asks where the client asks, as it does; raises `NotAlikeError` saying what keeps it."""


class S3Ranges(RangeReads):
    """Reads as s3fs makes them."""

    client = "s3fs"

    def __init__(self, bucket: str) -> None:
        super().__init__(bucket, "s3")

    async def _held(self, fs: Any) -> tuple[Any, Any]:
        await fs.set_session()
        client = await fs.get_s3(self._bucket)
        held = client._request_signer._credentials
        return client, None if held is None else await held.get_frozen_credentials()

    async def _like(self, fs: Any, client: Any, credentials: Any) -> Any:
        return await _store_like(fs, client, credentials, self._bucket)


class NotAlikeError(Exception):
    """Something that the client was told has no counterpart."""


def refuse_unlike(unlike: dict[str, Any]) -> None:
    """Raise `NotAlikeError` for the first thing that is there; the values say whether, or hold it."""
    for what, found in unlike.items():
        if found:
            raise NotAlikeError(what)


def made_store(store: Any, bucket: str, options: dict[str, Any]) -> Any:
    """Return obstore's store of a class; raises `NotAlikeError` for options that its version does not take."""
    try:
        return store(bucket, **options)
    except Exception as error:
        raise NotAlikeError(f"its options ({type(error).__name__})") from None


async def _store_like(fs: Any, client: Any, credentials: Any, bucket: str) -> Any:
    """Return a store that asks where s3fs' client asks, as it does; raises `NotAlikeError` saying what keeps it."""
    from botocore import UNSIGNED
    from obstore.store import S3Store
    from s3fs import S3FileSystem

    config = client.meta.config
    unsigned = config.signature_version is UNSIGNED
    session = client._endpoint.http_session
    # Where a request goes, by botocore's own rules.
    url = urlsplit(await client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"}))
    in_path = url.path == f"/{bucket}/k"
    unlike = {
        "a file system of another class": type(fs) is not S3FileSystem,
        "s3_additional_kwargs": fs.s3_additional_kwargs,
        "requester_pays": fs.req_kw,
        "a session": fs.storage_options.get("session") is not None,
        "a signature other than version 4": not unsigned and config.signature_version != "s3v4",
        "no credentials": not unsigned and credentials is None,
        "an unknown region": not client.meta.region_name or client.meta.region_name == "aws-global",
        "a directory bucket": bucket.endswith("--x-s3"),
        "an address of this form": not in_path and not (url.path == "/k" and url.netloc.startswith(f"{bucket}.")),
        "certificates": url.scheme != "http" and (session._verify is not True or session._cert_file is not None),
        "a proxy": _has_proxy(config, url.geturl()),
    }
    refuse_unlike(unlike)
    endpoint = f"{url.scheme}://{url.netloc}"
    options: dict[str, Any] = {
        # Both names, and the rest too: what is not said would be taken from the environment.
        "endpoint": endpoint,
        "aws_endpoint_url_s3": endpoint,
        "region": client.meta.region_name,
        "virtual_hosted_style_request": not in_path,
        "s3_express": False,
        "request_payer": False,
        "skip_signature": unsigned,
        "client_options": {
            "allow_http": url.scheme == "http",
            "timeout": NEVER,
            "connect_timeout": f"{config.connect_timeout}s",
            "read_timeout": f"{config.read_timeout}s",
        },
        "retry_config": {"max_retries": 0},  # trying again is `persist`'s
    }
    if not unsigned:
        signed = {
            "access_key_id": credentials.access_key,
            "secret_access_key": credentials.secret_key,
            "token": credentials.token,
            "expires_at": None,
        }
        options["credential_provider"] = lambda: signed
    return made_store(S3Store, bucket, options)


def _has_proxy(config: Any, url: str) -> bool:
    from botocore.utils import get_environ_proxies

    return bool(config.proxies or get_environ_proxies(url))


def _is_final(error: Exception) -> bool:
    """Return whether the store has given an answer that another try would not change."""
    status = _status_of(str(error))
    return isinstance(error, FileNotFoundError) or (status is not None and status not in _MOMENTARY)


def _status_of(text: str) -> int | None:
    found = _STATUS.search(text)
    return int(found[1]) if found else None


def _momentary(text: str) -> Exception:
    """Return a failure as `persist` knows it: the store's status and code, or that no reply came."""
    status, code = _status_of(text), _CODE.search(text)
    if status is None:
        return Garbled("no whole reply")
    return _StatusError(status, code[1] if code else "")


class _StatusError(Exception):
    """An answer with a status that tells of a moment."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
