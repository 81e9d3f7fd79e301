"""Copies from accelerators, beside what they compute; the same for every device that `torch.accelerator` knows."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["before_graph_replay", "begin_copy", "pin_host_memory"]

_log = logging.getLogger("ckptengine")

_sides: dict[torch.device, torch.Stream] = {}

_RELAXED = 2
"""`cudaStreamCaptureModeRelaxed` in CUDA's driver_types.h."""


def begin_copy(piece: torch.Tensor, bits: torch.dtype, target: torch.Tensor, beside: bool) -> Callable[[], None]:
    """Begin to copy a tensor to contiguous host memory of the type `bits`; return what waits until it is there.

    The copy follows what the device's current stream has been given so far. With `beside` it has a stream of its own,
    so that the device goes on meanwhile: nothing may change the tensor before the copy is there. It is asynchronous
    where the host memory is pinned, and else takes longer, but is no less right. What waits may be called in another
    thread.
    """
    current = torch.accelerator.current_stream(piece.device)
    stream = current
    if beside:
        if piece.device not in _sides:
            _sides[piece.device] = torch.Stream(piece.device)
        stream = _sides[piece.device]
        stream.wait_stream(current)
    with torch.no_grad(), stream:
        target.copy_(piece.resolve_conj().resolve_neg().view(bits), non_blocking=True)
    if beside:
        # The allocator must not give the memory to somebody else before the copy is done.
        piece.record_stream(stream)
    event = stream.record_event()

    def wait() -> None:
        with _beside_captures():
            event.synchronize()

    return wait


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
