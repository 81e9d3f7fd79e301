"""What a failed request means, and asking again: with growing pauses, within a deadline, never after a refusal."""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from ckptengine.errors import StorageError

if TYPE_CHECKING:
    from ckptengine.storage.objects import Objects

__all__ = [
    "Garbled",
    "Kind",
    "Patience",
    "Request",
    "code_of",
    "is_momentary",
    "is_unknown",
    "kind_of",
    "persist",
]

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
    r"HTTPClientError|SSHException|ServiceRequest|ServiceResponse|ResponseParser|ProtocolError|BadStatusLine).*"
)
# Of those, the ones that are a refusal all the same.
_DENIED = re.compile(r".*(Authentication|PermissionDenied|HostKey|Credentials).*")
_KEYWORD = re.compile(r"keyword argument:? '(\w+)'")
# The credentials are not valid any more, or not the ones that are now; some stores say 400 or no more than 403.
_EXPIRED = frozenset(
    (
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidToken",
        "TokenRefreshRequired",
        "RequestExpired",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "SignatureDoesNotMatch",
    )
)
# A wait is told from so many seconds on, and the same one not again for so many.
_TOLD_FROM, _TOLD_FOR = 4.0, 60.0
# After an operation was given up, those that follow at once, cleaning up, wait no more than this.
_OUTAGE, _AFTER_OUTAGE = 5.0, 1.0

_log = logging.getLogger("ckptengine")
_waits: dict[tuple[str, str], float] = {}
_waits_lock = threading.Lock()
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
    are longer for many bytes, by what these take at `slowest` bytes per second, and never longer than `limit`.
    """

    seconds: float = 120.0
    first: float = 0.2
    longest: float = 10.0
    request: float = 60.0
    slowest: float = 256 << 10
    limit: float = float("inf")

    def for_bytes(self, nbytes: int) -> Patience:
        """Return the patience for a request that moves so many bytes."""
        more = nbytes / self.slowest
        return replace(self, seconds=min(self.seconds + more, self.limit), request=min(self.request + more, self.limit))

    def within(self, timeout: float | None) -> Patience:
        """Return the patience of what a caller does who waits `timeout` seconds at most; None: as long as it takes.

        A little less, so that the error comes in time on other ranks, which wait for this one as long.
        """
        if timeout is None:
            return self
        limit = 0.8 * timeout
        return replace(self, seconds=min(self.seconds, limit), request=min(self.request, limit), limit=limit)


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


def persist(
    operation: str, where: str, call: Callable[[Request], _T], patience: Patience, objects: Objects | None = None
) -> _T:
    """Return what `call` returns, trying again after momentary failures until the patience is at its end.

    Where the store refuses the credentials, `objects` are connected anew once, with those that are there now. A wait of
    more than a few seconds is told, once.

    Raises `StorageError` naming operation and place: ENOENT for what is missing, EEXIST where a condition was not met,
    EACCES, EINVAL or EOPNOTSUPP for a refusal, ETIMEDOUT or EIO after the last try. Its message has the store's error
    code, never the store's words or the request's: those may hold credentials.
    """
    began = time.monotonic()
    if objects is not None and began - objects.outage < _OUTAGE:
        patience = replace(patience, seconds=min(patience.seconds, _AFTER_OUTAGE))
    told: tuple[str, int] | None = None
    request = Request(began + patience.seconds, patience.request)
    bound = patience.first
    renewed = False
    while True:
        request.tries += 1
        version = 0 if objects is None else objects.version
        try:
            result = call(request)
            if objects is not None:
                objects.outage = -float("inf")
            return result
        except StorageError:
            raise
        except Exception as error:
            kind, code, lost = kind_of(error), code_of(error), _is_lost(error)
            number = _errno_of(error, kind)
        if kind is not Kind.MOMENTARY:
            if number == errno.EACCES and objects is not None and not renewed and objects.renew(version):
                renewed = True
                _tell_renewal(operation, where, code, objects)
                continue
            raise _error(operation, where, code, number)
        request.doubtful = True
        if lost and objects is not None:
            code = f"{code} at {objects.endpoint}" if objects.endpoint else code
            objects.reconnect(version)
        # The last try may have had no time left: what the store said before tells more.
        if told is None or number != errno.ETIMEDOUT:
            told = code, number
        pause = random.uniform(0.0, bound)
        bound = min(2 * bound, patience.longest)
        now = time.monotonic()
        if now + pause >= request.deadline:
            if objects is not None:
                objects.outage = now
            taken = f" ({request.tries} tries in {now - began:.3g} s)"
            raise _error(operation, where, told[0] + taken, told[1])
        if now + pause - began >= _TOLD_FROM:
            _tell_wait(operation, where, told[0], patience.seconds)
        time.sleep(pause)


def _tell_renewal(operation: str, where: str, code: str, objects: Objects) -> None:
    """Warn that a store was connected anew, not for each of the requests that were refused at the same time."""
    with _waits_lock:
        known, objects.told = objects.told >= objects.version, objects.version
    if not known:
        _log.warning(
            "cannot %s %s: %s; the credentials were read again, and it is tried once more", operation, where, code
        )


def _tell_wait(operation: str, where: str, code: str, seconds: float) -> None:
    """Warn that a store does not answer, not for each of the operations that wait for the same."""
    key, now = (where.partition("/step-")[0], code), time.monotonic()
    with _waits_lock:
        if now - _waits.get(key, -float("inf")) < _TOLD_FOR:
            return
        _waits[key] = now
    _log.warning("cannot %s %s yet: %s; it is tried again for up to %.3g s in all", operation, where, code, seconds)


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


def is_momentary(error: BaseException) -> bool:
    """Return whether the same may go well another time."""
    return kind_of(error) is Kind.MOMENTARY


def is_unknown(error: BaseException) -> bool:
    """Return whether a store has refused a request because of its form: another one may do."""
    return kind_of(error) is Kind.REFUSED and _errno_of(error, Kind.REFUSED) in (errno.EINVAL, errno.EOPNOTSUPP)


def _is_lost(error: BaseException) -> bool:
    """Return whether no reply came, or not the whole of it."""
    lost = Garbled, TimeoutError, asyncio.TimeoutError, ConnectionError, EOFError
    if any(_DENIED.fullmatch(kind.__name__) for kind in type(error).__mro__):
        return False
    if isinstance(error, OSError) and str(error) == "Socket is closed":  # paramiko
        return True
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
        # Names of parameters only, never their values.
        option = _KEYWORD.search(str(error)) if isinstance(error, TypeError) else None
        if option is not None:
            words.append(f"about the option {option[1]!r}")
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
    if code in _EXPIRED:
        return errno.EACCES
    if code in ("NotImplemented", "MethodNotAllowed"):
        return errno.EOPNOTSUPP
    if status in _OF_STATUS:
        return _OF_STATUS[status]
    if isinstance(error, PermissionError) or any(_DENIED.fullmatch(kind.__name__) for kind in type(error).__mro__):
        return errno.EACCES
    if isinstance(error, TimeoutError | asyncio.TimeoutError) or "Timeout" in type(error).__name__:
        return errno.ETIMEDOUT
    return errno.EIO


def _error(operation: str, where: str, what: str, number: int) -> StorageError:
    advice = _ADVICE.get(number)
    text = f"cannot {operation} {where}: {what}"
    return StorageError(number, f"{text}; {advice}" if advice else text)
