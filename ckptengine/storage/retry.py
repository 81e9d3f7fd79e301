"""What a failed request means, and asking again: with growing pauses, within a deadline, never after a refusal."""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from ckptengine.errors import StorageError

__all__ = ["Garbled", "Kind", "Patience", "Request", "code_of", "is_not_understood", "kind_of", "persist"]

_T = TypeVar("_T")

# Amazon S3, "Error responses": codes that tell of a moment, not of the request.
_MOMENTARY = frozenset(
    (
        "SlowDown",
        "InternalError",
        "ServiceUnavailable",
        "Busy",
        "RequestTimeout",
        "RequestTimeTooSkewed",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "TooManyRequests",
        "ConditionalRequestConflict",
        "OperationAborted",
        # The body was changed on its way.
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "IncompleteBody",
        "InvalidDigest",
    )
)
_MOMENTARY_STATUS = frozenset((408, 409, 423, 425, 429, 500, 502, 503, 504))
_MISSING = frozenset(("NoSuchKey", "NotFound", "404", "NoSuchUpload"))
_OF_STATUS = {
    400: errno.EINVAL,
    401: errno.EACCES,
    403: errno.EACCES,
    404: errno.ENOENT,
    405: errno.EOPNOTSUPP,
    412: errno.EEXIST,
    501: errno.EOPNOTSUPP,
}
# Classes of the HTTP libraries under fsspec's file systems, which are not imported here.
_LOST = re.compile(
    r".*(Timeout|Connect|Disconnect|ClientPayload|ClientOSError|ServerError|IncompleteRead|ResponseStreaming|"
    r"HTTPClientError|ServiceRequest|ServiceResponse|ResponseParser|ProtocolError|BadStatusLine).*"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,63}")
_ADVICE = {
    errno.EACCES: "check the credentials and what they permit",
    errno.ENOENT: "check the bucket and the path",
}


class Kind(enum.Enum):
    """What a request's failure means."""

    MOMENTARY = "momentary"
    """Ask again: the store is busy or the way there is disturbed; what was asked may have been done or not."""
    MISSING = "missing"
    TAKEN = "taken"
    """A condition was not met: the name is taken."""
    REFUSED = "refused"


class Garbled(Exception):
    """A reply that isn't what was asked for, though the store had it."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an operation is tried: `seconds` in all, pauses of at most `longest` seconds, drawn at random.

    "Full jitter": a pause is uniform between 0 and the bound, which doubles from `first` seconds on (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015). A single request may take `request` seconds. Both
    are longer for many bytes, by what these take at `slowest` bytes per second.
    """

    seconds: float = 120.0
    first: float = 0.2
    longest: float = 10.0
    request: float = 60.0
    slowest: float = 256 << 10

    def for_bytes(self, nbytes: int) -> Patience:
        """Return the patience for a request that moves so many bytes."""
        more = nbytes / self.slowest
        return replace(self, seconds=self.seconds + more, request=self.request + more)


@dataclass(slots=True)
class Request:
    """One operation on its way; `doubtful` says that an earlier try may have been carried out."""

    deadline: float
    seconds: float
    tries: int = 0
    doubtful: bool = False

    @property
    def left(self) -> float:
        """Seconds that the next try may take."""
        return max(0.1, min(self.seconds, self.deadline - time.monotonic()))


def persist(operation: str, where: str, call: Callable[[Request], _T], patience: Patience) -> _T:
    """Return what `call` returns, trying again after momentary failures until the patience is at its end.

    Raises `StorageError` naming operation and place: ENOENT for what is missing, EEXIST where a condition was not met,
    EACCES, EINVAL or EOPNOTSUPP for a refusal, ETIMEDOUT or EIO after the last try. Its message has the store's error
    code, never the store's words or the request's: those may hold credentials.
    """
    began = time.monotonic()
    told: tuple[str, int] | None = None
    request = Request(began + patience.seconds, patience.request)
    bound = patience.first
    while True:
        request.tries += 1
        try:
            return call(request)
        except StorageError:
            raise
        except Exception as error:
            kind, code = kind_of(error), code_of(error)
            number = _errno_of(error, kind)
        if kind is not Kind.MOMENTARY:
            raise _error(operation, where, code, number)
        request.doubtful = True
        # The last try may have had no time left: what the store said before tells more.
        if told is None or number != errno.ETIMEDOUT:
            told = code, number
        pause = random.uniform(0.0, bound)
        bound = min(2 * bound, patience.longest)
        if time.monotonic() + pause >= request.deadline:
            taken = f" ({request.tries} tries in {time.monotonic() - began:.3g} s)"
            raise _error(operation, where, told[0] + taken, told[1])
        time.sleep(pause)


def kind_of(error: BaseException) -> Kind:
    """Return what an error of a file system of fsspec means."""
    status, code = _answer(error)
    if code in _MOMENTARY or status in _MOMENTARY_STATUS:
        return Kind.MOMENTARY
    if status == 412 or code == "PreconditionFailed" or isinstance(error, FileExistsError):
        return Kind.TAKEN
    if code in _MISSING or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket"):
        return Kind.MISSING
    if _is_lost(error):
        return Kind.MOMENTARY
    return Kind.MISSING if status == 404 and code is None else Kind.REFUSED


def is_not_understood(error: BaseException) -> bool:
    """Return whether a store has refused a request because of its form: another one may do."""
    return kind_of(error) is Kind.REFUSED and _errno_of(error, Kind.REFUSED) in (errno.EINVAL, errno.EOPNOTSUPP)


def _is_lost(error: BaseException) -> bool:
    """Return whether no reply came, or not the whole of it."""
    lost = Garbled, TimeoutError, asyncio.TimeoutError, ConnectionError, EOFError
    return isinstance(error, lost) or any(_LOST.fullmatch(kind.__name__) for kind in type(error).__mro__)


def code_of(error: BaseException) -> str:
    """Return a short word for an error: the store's code, or the class."""
    status, code = _answer(error)
    if isinstance(error, Garbled):
        return str(error)
    words = [str(status)] if status is not None else []
    if code is not None and code != str(status):
        words.append(code)
    if not words:
        words.append(type(error).__name__)
        if isinstance(error, OSError) and error.errno:
            words.append(os.strerror(error.errno))
    return " ".join(words)


def _answer(error: BaseException | None) -> tuple[int | None, str | None]:
    """Return status and code of the store's reply that an error tells of."""
    for _ in range(4):
        if error is None:
            break
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            return status if isinstance(status, int) else None, code if _WORD.fullmatch(code) else None
        if _is_lost(error):
            break  # aiohttp gives a status to replies that broke off
        for name in ("status_code", "status", "code"):
            status = getattr(error, name, None)
            if isinstance(status, str) and status.isdigit():
                status = int(status)
            if isinstance(status, int) and 400 <= status < 600:
                return status, None
        error = error.__cause__
    return None, None


def _errno_of(error: BaseException, kind: Kind) -> int:
    if kind is Kind.MISSING:
        return errno.ENOENT
    if kind is Kind.TAKEN:
        return errno.EEXIST
    status, code = _answer(error)
    if code == "NoSuchBucket":
        return errno.ENOENT
    if code in ("NotImplemented", "MethodNotAllowed"):
        return errno.EOPNOTSUPP
    if status in _OF_STATUS:
        return _OF_STATUS[status]
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return errno.EACCES
    if isinstance(error, TimeoutError | asyncio.TimeoutError) or "Timeout" in type(error).__name__:
        return errno.ETIMEDOUT
    return errno.EIO


def _error(operation: str, where: str, what: str, number: int) -> StorageError:
    advice = _ADVICE.get(number)
    text = f"cannot {operation} {where}: {what}"
    return StorageError(number, f"{text}; {advice}" if advice else text)
