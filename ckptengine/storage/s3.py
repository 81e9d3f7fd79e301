"""S3 and stores that speak its protocol, through s3fs' client: its own multipart and conditional calls."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import hashlib
import importlib.util
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ckptengine.storage.objects import Listing, Objects, Stat, Unfinished, Upload
from ckptengine.storage.ranges import LARGE, S3Ranges
from ckptengine.storage.retry import Garbled, code_of, is_unknown

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["S3Objects", "s3_options"]

_CHUNK = 256 << 10  # bytes of the image that are copied at a time on their way into the socket
_CONNECTIONS = 32
_LOOK_AGAIN = 30.0  # seconds until credentials that were refused and had not changed are looked at again

_log = logging.getLogger("ckptengine")


def s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a user's options for s3fs with ours where they say nothing.

    Trying again is ours: below us it would hide that a lost request may have been carried out. Bodies are guarded by
    the CRC32 that botocore sends along, and by TLS; a SHA-256 of every byte would take longer than the network.
    """
    config = dict(options.get("config_kwargs") or {})
    config.setdefault("retries", {"total_max_attempts": 1})
    config.setdefault("max_pool_connections", _CONNECTIONS)
    config.setdefault("connect_timeout", 10)
    config.setdefault("read_timeout", 30)
    config["s3"] = {"payload_signing_enabled": False, **(config.get("s3") or {})}
    return {"use_listings_cache": False, **options, "config_kwargs": config}


class S3Objects(Objects):
    """Objects below a prefix of one bucket. `make` gives an `s3fs.S3FileSystem`, `root` is `bucket/prefix`."""

    needs_probe = True
    parts_in_parallel = True
    # Amazon S3, "Multipart upload limits".
    least_part_nbytes = 5 << 20
    most_part_nbytes = 5 << 30
    most_parts = 10_000
    most_deleted = 1000  # Amazon S3, "DeleteObjects"

    def __init__(self, make: Callable[[], Any], root: str) -> None:
        super().__init__()
        self._make = make
        self._fs = self._open()
        self._deletes_many = True
        self._looked = -float("inf")  # when the credentials were last found to be the same
        self._bucket, prefix, _ = self._fs.split_path(root)
        self._ranges = S3Ranges(self._bucket) if importlib.util.find_spec("obstore") is not None else None
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def _open(self) -> Any:
        fs = self._make()
        # One try each: `persist` is above.
        fs.retries = 1
        return fs

    @property
    def endpoint(self) -> str:
        """Return scheme, host and port of the store, as far as they are known without asking anybody."""
        client = self._fs._s3
        url = urlsplit(str(self._fs.endpoint_url or (client.meta.endpoint_url if client is not None else "")))
        host = f"{url.hostname}:{url.port}" if url.port else url.hostname
        return f"{url.scheme}://{host}" if url.hostname else ""

    def renew(self, seen: int) -> bool:
        """Make a client with the credentials that environment, files and roles give now, if those differ."""
        with self._renewing:
            if self.version != seen:
                return True
            # What was given as options stays what it is.
            if self._fs.key or time.monotonic() - self._looked < _LOOK_AGAIN:
                return False
            fresh = self._open()
            if self._run(_credentials(fresh), _LOOK_AGAIN) == self._run(_credentials(self._fs), _LOOK_AGAIN):
                self._looked = time.monotonic()
                return False
            self._fs = fresh
            self.version += 1
            return True

    def put(self, key: str, data: Buffer, seconds: float) -> None:
        """Write an object."""
        memory = memoryview(data).cast("B")
        with _Body(memory) as body:
            self._call("put_object", seconds, Key=self._prefix + key, Body=body, **self.checksum(memory))

    def checksum(self, memory: memoryview) -> dict[str, str]:
        """Return a body's CRC32 as a request's argument, none where the client is told to send checksums only if asked.

        Computed here: the client would read the body once more for it, at a tenth of the speed, and send it behind the
        body, which then has to go in chunks that the store takes apart.
        """
        import ckptengine._native as _native

        if self._fs.s3.meta.config.request_checksum_calculation == "when_required":
            return {}
        return {"ChecksumCRC32": base64.b64encode(_native.crc32(memory).to_bytes(4, "big")).decode()}

    def create(self, key: str, data: bytes, seconds: float) -> None:
        """Write an object with `If-None-Match: *`."""
        self._call("put_object", seconds, Key=self._prefix + key, Body=data, IfNoneMatch="*")

    def get(self, key: str, position: int, nbytes: int, seconds: float) -> bytes | memoryview:
        """Return bytes of an object: one ranged GET."""
        ranges = self._ranges
        if ranges is None or nbytes < LARGE:
            return self._get(key, position, nbytes, seconds)

        def here(left: float) -> memoryview | None:
            data: memoryview | None = self._run(ranges.get(self._fs, self._prefix, key, position, nbytes), left)
            return data

        return ranges.read(key, position, seconds, here, lambda left: self._get(key, position, nbytes, left))

    def _get(self, key: str, position: int, nbytes: int, seconds: float) -> bytes:
        async def read() -> bytes:
            wanted = f"bytes={position}-{position + nbytes - 1}"
            reply = await self._ask("get_object", Key=self._prefix + key, Range=wanted)
            async with reply["Body"] as body:
                data: bytes = await body.read()
            total = _total(reply)
            expected = max(0, min(nbytes, total - position))
            if len(data) != expected:
                raise Garbled(f"{len(data)} bytes came of {expected} that were asked for")
            return data

        try:
            data: bytes = self._run(read(), seconds)
            return data
        except Exception as error:
            if _code(error) in ("InvalidRange", "416"):
                return b""
            raise

    def stat(self, key: str, seconds: float) -> Stat:
        """Return size and time: one HEAD."""
        reply = self._call("head_object", seconds, Key=self._prefix + key)
        return Stat(int(reply["ContentLength"]), reply["LastModified"].timestamp())

    def list(self, prefix: str, seconds: float) -> Listing:
        """Return what lies right below a prefix."""
        full = self._prefix + prefix
        objects: list[str] = []
        prefixes: list[str] = []
        for page in self._pages(full, seconds, Delimiter="/"):
            objects += (item["Key"][len(full) :] for item in page.get("Contents", ()))
            prefixes += (item["Prefix"][len(full) :].rstrip("/") for item in page.get("CommonPrefixes", ()))
        # Some tools make empty objects in place of directories.
        return Listing(tuple(filter(None, objects)), tuple(filter(None, prefixes)))

    def below(self, prefix: str, seconds: float) -> dict[str, Stat]:
        """Return all objects below a prefix."""
        return {
            item["Key"][len(self._prefix) :]: Stat(int(item["Size"]), item["LastModified"].timestamp())
            for page in self._pages(self._prefix + prefix, seconds)
            for item in page.get("Contents", ())
        }

    def delete(self, keys: Sequence[str], seconds: float) -> None:
        """Delete objects by one request, or one by one where the store does not take that."""
        if len(keys) > 1 and self._deletes_many:
            try:
                self._run(self._delete_many(keys), seconds)
                return
            except Exception as error:
                if not is_unknown(error):
                    raise
                _log.info(
                    "the store does not support DeleteObjects (%s): objects are deleted one by one", code_of(error)
                )
                self._deletes_many = False
        self._run(self._delete_each(keys), seconds)

    async def _delete_many(self, keys: Sequence[str]) -> None:
        client = await self._fs.get_s3(self._bucket)
        # Amazon S3, "DeleteObjects": Content-MD5 is required. Amazon takes newer checksums too, other stores don't.
        client.meta.events.register("before-call.s3.DeleteObjects", _add_md5, unique_id="ckptengine-content-md5")
        some = [{"Key": self._prefix + key} for key in keys]
        reply = await self._ask("delete_objects", Delete={"Objects": some, "Quiet": True})
        for failure in reply.get("Errors", ()):
            if failure.get("Code") != "NoSuchKey":
                raise _Failure(str(failure.get("Code", "")))

    async def _delete_each(self, keys: Sequence[str]) -> None:
        slots = asyncio.Semaphore(_CONNECTIONS)

        async def one(key: str) -> None:
            async with slots:
                with contextlib.suppress(FileNotFoundError):  # some stores tell
                    await self._ask("delete_object", Key=self._prefix + key)

        for error in await asyncio.gather(*map(one, keys), return_exceptions=True):
            if error is not None:
                raise error

    def remove_empty(self, prefix: str, seconds: float) -> None:
        """Remove what stores that lie on a file system leave in place of a directory: keys that end with a slash."""
        # Without its slash, since one that is asked for with it is not told itself.
        found = self.below(prefix.removesuffix("/"), seconds)
        for key in sorted((key for key in found if key.startswith(prefix) and key.endswith("/")), reverse=True):
            self._call("delete_object", seconds, Key=self._prefix + key)

    def upload(self, key: str, part_nbytes: int, seconds: float) -> Upload:
        """Begin a multipart upload."""
        reply = self._call("create_multipart_upload", seconds, Key=self._prefix + key)
        return _MultipartUpload(self, self._prefix + key, reply["UploadId"])

    def unfinished(self, prefix: str, seconds: float) -> tuple[Unfinished, ...]:
        """Return the multipart uploads that were begun."""
        found = []
        more: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", seconds, Prefix=self._prefix + prefix, **more)
            for item in page.get("Uploads", ()):
                key, began = item["Key"], item["Initiated"].timestamp()
                found.append(Unfinished(key[len(self._prefix) :], item["UploadId"], began))
            if not page.get("IsTruncated"):
                return tuple(found)
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort(self, unfinished: Unfinished, seconds: float) -> None:
        """Abort a multipart upload."""
        key = self._prefix + unfinished.key
        self._call("abort_multipart_upload", seconds, Key=key, UploadId=unfinished.upload)

    def now(self, seconds: float) -> float | None:
        """Return the time in the `Date` of the store's reply."""
        reply = self._call("list_objects_v2", seconds, Prefix=self._prefix, MaxKeys=1)
        date = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        return None if date is None else email.utils.parsedate_to_datetime(date).timestamp()

    def _pages(self, prefix: str, seconds: float, **more: str) -> Any:
        while True:
            page = self._call("list_objects_v2", seconds, Prefix=prefix, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    async def _ask(self, method: str, **arguments: Any) -> Any:
        return await self._fs._call_s3(method, Bucket=self._bucket, **arguments)

    def _call(self, method: str, seconds: float, **arguments: Any) -> Any:
        return self._run(self._ask(method, **arguments), seconds)

    def _run(self, call: Coroutine[Any, Any, Any], seconds: float) -> Any:
        """Run a call in fsspec's event loop, and end it there where it takes too long."""
        future = asyncio.run_coroutine_threadsafe(call, self._fs.loop)
        try:
            return future.result(seconds)
        except BaseException:
            future.cancel()
            raise


class _MultipartUpload(Upload):
    def __init__(self, objects: S3Objects, key: str, upload: str) -> None:
        self._objects, self._key, self._upload = objects, key, upload
        self._tags: dict[int, dict[str, Any]] = {}

    def send(self, number: int, memory: memoryview, seconds: float) -> None:
        with _Body(memory) as body:
            reply = self._objects._call(
                "upload_part",
                seconds,
                Key=self._key,
                UploadId=self._upload,
                PartNumber=number,
                Body=body,
                **self._objects.checksum(memory),
            )
        # What the store says of the part's checksum belongs to the list of parts.
        sums = {name: value for name, value in reply.items() if name.startswith("Checksum") and name != "ChecksumType"}
        self._tags[number] = {"PartNumber": number, "ETag": reply["ETag"], **sums}

    def complete(self, seconds: float) -> None:
        parts = [self._tags[number] for number in sorted(self._tags)]
        reply = self._objects._call(
            "complete_multipart_upload",
            seconds,
            Key=self._key,
            UploadId=self._upload,
            MultipartUpload={"Parts": parts},
        )
        if "ETag" not in reply:
            raise Garbled("a reply without an entity tag")

    def abort(self, seconds: float) -> None:
        self._objects._call("abort_multipart_upload", seconds, Key=self._key, UploadId=self._upload)


class _Body:
    """Memory as the body of a request: a file to botocore, chunks to aiohttp. Closed, it does not touch the memory.

    A request that was given up may still be on its way out of the event loop when the memory is used again.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory: memoryview | None = memory
        self._nbytes, self._position = memory.nbytes, 0
        self._lock = threading.Lock()

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._memory = None

    def __len__(self) -> int:
        return self._nbytes

    def read(self, nbytes: int | None = -1) -> bytes:
        """Return the next bytes."""
        with self._lock:
            if self._memory is None:
                raise ValueError("the request was given up")
            end = self._nbytes if nbytes is None or nbytes < 0 else min(self._nbytes, self._position + nbytes)
            part = bytes(self._memory[self._position : end])
            self._position = end
            return part

    def seek(self, position: int, whence: int = 0) -> int:
        """Go to a position."""
        self._position = position + (0, self._position, self._nbytes)[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := self.read(_CHUNK):
            yield chunk


async def _credentials(fs: Any) -> object:
    """Return what a file system's client signs with."""
    client = await fs.set_session()
    credentials = client._request_signer._credentials
    return None if credentials is None else await credentials.get_frozen_credentials()


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """Add the Content-MD5 of a request's body, as botocore did before it had other checksums."""
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


class _Failure(Exception):
    """One key of a bulk request has failed."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


def _code(error: BaseException) -> str:
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _total(reply: dict[str, Any]) -> int:
    """Return the length of the whole object that a ranged reply tells."""
    told = str(reply.get("ContentRange", "")).rpartition("/")[2]
    if told.isdigit():
        return int(told)
    if reply.get("ResponseMetadata", {}).get("HTTPStatusCode") == 206:
        raise Garbled("a part of an object without its place")
    return int(reply["ContentLength"])
