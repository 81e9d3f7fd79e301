"""Copies from accelerators, beside what they compute; the same for every device that `torch.accelerator` knows."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

__all__ = ["BITS", "Link", "before_graph_replay", "bits_of", "pin_host_memory", "same_device"]

_log = logging.getLogger("ckptengine")

# Types of equal size that numpy and torch share, to move bits between them.
BITS = {
    1: (np.uint8, torch.uint8),
    2: (np.int16, torch.int16),
    4: (np.int32, torch.int32),
    8: (np.int64, torch.int64),
    16: (np.complex128, torch.complex128),
}

_RELAXED = 2
"""`cudaStreamCaptureModeRelaxed` in CUDA's driver_types.h."""


class Link:
    """The way between the host and a device: see `ckptengine.schema.leaf.Link`. `Link.to` gives each device its own.

    Copies beside the device's work have a stream of their own. They are asynchronous where the host memory is pinned,
    and else take longer, but are no less right.
    """

    _known: ClassVar[dict[torch.device, Link]] = {}

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.Stream | None = None

    @classmethod
    def to(cls, device: torch.device) -> Link:
        """Return the link to a device, always the same."""
        link = cls._known.get(device)
        return link if link is not None else cls._known.setdefault(device, cls(device))

    @property
    def _side(self) -> torch.Stream:
        if self._stream is None:
            self._stream = torch.Stream(self._device)
        return self._stream

    def mark(self) -> torch.Event:
        """Return an event of the stream that the caller works on."""
        return torch.accelerator.current_stream(self._device).record_event()

    def host(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return an array's memory as a tensor, never a copy."""
        return bits_of(array)

    def kept(self, owner: torch.Tensor) -> torch.Tensor | None:
        """Return a clone, made in the stream that the caller works on; None where there is no memory for it."""
        try:
            with torch.no_grad():
                return owner.clone()
        except torch.OutOfMemoryError as error:
            _log.warning("%s has no memory to copy buffers there, so the call waits for them: %s", self._device, error)
            return None

    def turned(self, owner: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        """Return a view with its dimensions in another order."""
        return owner.permute(order)

    def to_host(self, pairs: Sequence[tuple[Any, Any]], after: Any | None) -> Callable[[], None]:
        """Begin to copy tensors to host memory."""
        stream = torch.accelerator.current_stream(self._device) if after is None else self._side

        def copy() -> None:
            for tensor, target in pairs:
                target.copy_(tensor.view(target.dtype), non_blocking=True)
                if after is not None:
                    # The allocator must not give the memory to somebody else before the copy is done.
                    tensor.record_stream(stream)

        return self._begin(stream, copy, after, pairs)

    def to_device(self, pairs: Sequence[tuple[Any, Any]], after: Any) -> Callable[[], None]:
        """Begin to copy host memory to tensors."""
        stream = self._side

        def copy() -> None:
            for tensor, source in pairs:
                tensor.view(source.dtype).copy_(source, non_blocking=True)
                tensor.record_stream(stream)

        return self._begin(stream, copy, after, pairs)

    def _begin(
        self, stream: torch.Stream, copy: Callable[[], None], after: Any | None, kept: object
    ) -> Callable[[], None]:
        """Give a stream some copies; return what waits for them. Where one can't be given, none is left under way."""
        # So that who waits sleeps, and keeps no core busy, as soon as torch heeds it: torch.Event's text says not yet.
        event = torch.Event(self._device, blocking=True)
        with _beside_captures(), torch.no_grad(), stream:
            if after is not None:
                stream.wait_event(after)
            try:
                copy()
            except BaseException:
                stream.record_event(event)
                event.synchronize()
                raise
            stream.record_event(event)
        return functools.partial(_wait_for, event, kept)


def _wait_for(event: torch.Event, kept: object) -> None:
    """Return when the device has come to an event; until then `kept` stays where it is."""
    with _beside_captures():
        event.synchronize()


def bits_of(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a tensor on a numpy array's memory, of the type of that size; never a copy."""
    return torch.from_numpy(array.view(BITS[array.itemsize][0]))


def pin_host_memory(address: int, nbytes: int) -> Callable[[], None] | None:
    """Pin host memory for direct transfers, where the accelerator has a call for memory that is there already.

    Returns what undoes it; None where there is no such call (CUDA has one), or it fails, which is logged.
    """
    if not torch.cuda.is_available():
        return None
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failure = int(runtime.cudaHostRegister(address, nbytes, 0))
    if failure != 0:
        _forget_last_error()
        _log.warning(
            "cudaHostRegister could not pin %s bytes of host memory (CUDA error %d): copies from the device are "
            "slower, and the call waits for them under overlap too",
            f"{nbytes:,}",
            failure,
        )
        return None

    def unpin() -> None:
        if int(runtime.cudaHostUnregister(address)) != 0:
            _forget_last_error()

    return unpin


def same_device() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return what makes this thread's device current in another one, where CUDA would begin to use the first device."""
    device = torch.accelerator.current_accelerator()
    if device is None or not torch.accelerator.is_available() or not _in_use(device):
        return contextlib.nullcontext
    return functools.partial(torch.accelerator.device_index, torch.accelerator.current_device_index())


def _in_use(device: torch.device) -> bool:
    known = getattr(torch.get_device_module(device.type), "is_initialized", None)
    return known is None or bool(known())


def before_graph_replay(call: Callable[[], None]) -> Callable[[], None]:
    """Have something called before any of the device's graphs is replayed; return what undoes it.

    A replay runs no Python, so neither an optimizer's hooks nor autograd's version counters see what it changes.
    """
    if not _calls:
        for graph in _graphs():
            _restore.append(_wrap_replay(graph))
    key = object()
    _calls[key] = call

    def remove() -> None:
        if _calls.pop(key, None) is not None and not _calls:
            while _restore:
                _restore.pop()()

    return remove


_calls: dict[object, Callable[[], None]] = {}
_restore: list[Callable[[], None]] = []


def _graphs() -> list[Any]:
    """Return the classes that replay what a device has recorded: CUDA's, the present accelerator's own, torch's own."""
    found: list[Any] = [torch.cuda.CUDAGraph]
    device = torch.accelerator.current_accelerator()
    if device is not None and device.type != "cuda":
        found.append(getattr(torch.get_device_module(device.type), f"{device.type.upper()}Graph", None))
    found.append(getattr(torch.accelerator, "Graph", None))
    return [graph for graph in found if graph is not None]


def _wrap_replay(graph: Any) -> Callable[[], None]:
    original = graph.replay

    @functools.wraps(original)
    def replay(self: Any, *arguments: Any, **keywords: Any) -> Any:
        for call in list(_calls.values()):
            call()
        return original(self, *arguments, **keywords)

    graph.replay = replay
    return functools.partial(setattr, graph, "replay", original)


@functools.cache
def _runtime() -> Any | None:
    """Return CUDA's runtime library, which torch has loaded, for two calls that torch does not have; or None."""
    if torch.version.cuda is None:
        return None
    with contextlib.suppress(OSError):
        return ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
    return None


def _forget_last_error() -> None:
    """Clear CUDA's last error of this thread: torch would raise it at the next kernel that is launched."""
    runtime = _runtime()
    if runtime is not None:
        runtime.cudaGetLastError()
        return
    with contextlib.suppress(RuntimeError):  # the launch finds the error, and clears it
        torch.zeros(1, device=torch.accelerator.current_accelerator())


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """Let this thread wait for the device while another one captures a CUDA graph.

    Under torch's default mode of a capture, such a call of any thread fails, and spoils the capture. Waiting for a
    stream that takes no part in it is safe: see `cudaThreadExchangeStreamCaptureMode` in CUDA's reference.
    """
    runtime = _runtime()
    if runtime is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
