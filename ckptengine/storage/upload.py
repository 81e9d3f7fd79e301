"""An archive on its way into an object store: in parts, straight from the image."""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ckptengine.counters import note_file
from ckptengine.errors import StorageError
from ckptengine.storage.base import ArchiveWriter
from ckptengine.storage.budget import Budget
from ckptengine.storage.objects import Objects, Upload
from ckptengine.storage.parallel import in_parallel
from ckptengine.storage.retry import Patience, Request, persist

__all__ = ["RemoteArchiveWriter", "part_nbytes_for"]

_T = TypeVar("_T")
_MIB = 1 << 20


def part_nbytes_for(nbytes: int, budget: Budget, objects: Objects, write_nbytes: int | None = None) -> int:
    """Return the bytes of the parts of an archive whose fixed region has `nbytes`.

    `write_nbytes` of it come at once; only parts of these are in flight together. A tenth of the parts is left for the
    tail, whose size isn't known yet. Raises `StorageError` (EFBIG) where the store can't hold such an object.
    """
    part = budget.part_nbytes
    if part is None:
        part = 64 * _MIB if nbytes >= 512 * _MIB else 16 * _MIB
        if write_nbytes is not None and objects.parts_in_parallel:
            part = min(part, write_nbytes // budget.requests // _MIB * _MIB)
    least = -(-nbytes // max(1, objects.most_parts * 9 // 10))
    part = max(part, -(-least // _MIB) * _MIB, objects.least_part_nbytes)
    if part > objects.most_part_nbytes:
        raise StorageError(
            errno.EFBIG,
            f"an archive of {nbytes:,} bytes is more than this store accepts: use more ranks, so that each archive "
            "is smaller",
        )
    return part


class RemoteArchiveWriter(ArchiveWriter):
    """Parts of one size, several in flight, sent from where they lie.

    What a call of `write` leaves of a last part that isn't full is kept until the next one, or `finish`: at most one
    part, the only copy of the state that is ever made. An archive of less than one part is one plain object.
    """

    def __init__(self, objects: Objects, key: str, where: str, part: int, budget: Budget, patience: Patience) -> None:
        self._objects, self._key, self.where = objects, key, where
        self._budget, self._patience = budget, patience
        self._part = part
        self._carry = bytearray()
        self._position = self._sent = 0
        self._upload: Upload | None = None
        note_file()

    def write(self, address: int, nbytes: int, position: int) -> None:
        """Send the parts that lie in this memory as a whole, and keep the rest."""
        if position != self._position:
            raise ValueError(f"{self.where}: position {position} does not follow on {self._position}")
        view = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
        begin = 0
        if self._carry:
            begin = min(nbytes, self._part - len(self._carry))
            self._carry += view[:begin]
            if len(self._carry) == self._part:
                self._send([memoryview(self._carry)])
                self._carry = bytearray()
        whole = (nbytes - begin) // self._part
        self._send([view[begin + n * self._part : begin + (n + 1) * self._part] for n in range(whole)])
        self._carry += view[begin + whole * self._part :]
        self._position += nbytes

    def _persist(self, operation: str, call: Callable[[Request], _T], patience: Patience | None = None) -> _T:
        return persist(operation, self.where, call, patience or self._patience, self._objects)

    def _send(self, parts: list[memoryview]) -> None:
        if not parts:
            return
        upload = self._upload
        if upload is None:
            upload = self._upload = self._persist("begin the upload of", self._begin)
        first, self._sent = self._sent + 1, self._sent + len(parts)
        patience = self._patience

        def send(numbered: tuple[int, memoryview]) -> None:
            number, memory = numbered

            def once(request: Request) -> None:
                if request.doubtful and upload.in_order:
                    raise StorageError(errno.EIO, f"cannot write {self.where}: part {number} was lost in transit")
                upload.send(number, memory, request.left)

            self._persist(f"upload part {number} of", once, patience.for_bytes(memory.nbytes))

        in_parallel(send, enumerate(parts, first), 1 if upload.in_order else min(self._budget.requests, len(parts)))

    def _begin(self, request: Request) -> Upload:
        return self._objects.upload(self._key, self._part, request.left)

    def finish(self) -> None:
        """Send what is left, and make the object of its parts."""
        if self._upload is None:
            carry = memoryview(self._carry)
            patience = self._patience.for_bytes(carry.nbytes)
            self._persist("write", lambda one: self._objects.put(self._key, carry, one.left), patience)
            return
        if self._carry:
            self._send([memoryview(self._carry)])
        upload = self._upload

        def complete(request: Request) -> None:
            if request.doubtful and upload.in_order:
                # A file that failed to close counts as closed.
                if not self._is_there(request):
                    raise StorageError(errno.EIO, f"cannot write {self.where}: its last part was lost in transit")
                return
            try:
                upload.complete(request.left)
            except Exception:
                # The reply to an earlier try may have been lost.
                if not self._is_there(request):
                    raise

        self._persist("complete the upload of", complete)
        self._upload = None

    def _is_there(self, request: Request) -> bool:
        """Return whether the object is there with its size: nobody else writes under an attempt's name."""
        try:
            return self._objects.stat(self._key, request.left).nbytes == self._position
        except Exception:
            return False

    def close(self) -> None:
        """Abort an upload that was not finished, as far as the store can be reached: else it is swept later."""
        upload, self._upload = self._upload, None
        self._carry = bytearray()
        if upload is not None:
            few = replace(self._patience, seconds=min(10.0, self._patience.seconds))
            with contextlib.suppress(StorageError):
                self._persist("abort the upload of", lambda one: upload.abort(one.left), few)
