"""Copies from accelerators, beside what they compute; the same for every device that `torch.accelerator` knows."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ckptengine.schema.leaf import LinkError

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

_SHORTEST_SECONDS, _LONGEST_SECONDS = 2e-5, 1e-3
"""Between two looks at an event: short copies are not held up, long ones cost little."""

_INTERRUPTED_SECONDS = 10.0
"""For what is under way when Ctrl-C comes between two copies."""

_POOL = 32
"""How many streams torch gives out at most."""

_RELAXED = 2
"""`cudaStreamCaptureModeRelaxed` in CUDA's driver_types.h."""


class Link:
    """The way between the host and a device: see `ckptengine.schema.leaf.Link`. `Link.to` gives each device its own.

    Copies beside the device's work have a stream of their own. They are asynchronous where the host memory is pinned;
    else `cudaMemcpyAsync` itself takes as long as the copy, in the thread that calls it (CUDA Runtime API, "API
    synchronization behavior"), and is no less right. Events order the copies after what the caller gave the device:
    torch's streams wait for no other one, not for the default one either (`cudaStreamNonBlocking`, CUDAStream.cpp).
    """

    _known: ClassVar[dict[torch.device, Link]] = {}

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.Stream | None = None

    @classmethod
    def to(cls, device: torch.device) -> Link | None:
        """Return the link to a device, always the same; None where `torch.accelerator` is not about such devices."""
        link = cls._known.get(device)
        if link is None:
            accelerator = torch.accelerator.current_accelerator()
            if accelerator is not None and accelerator.type == device.type:
                link = cls._known.setdefault(device, cls(device))
        return link

    def _side(self) -> torch.Stream:
        """Return the stream for copies beside the device's work, as an object of the caller's own.

        A `torch.Stream` remembers in itself what its `with` block replaced: two threads, such as those of two
        Checkpointers, would restore each other's (up to torch 2.11 the second one fails: pytorch issue 176560). torch
        gives the same 32 streams out in turn (`kStreamsPerPool` in CUDAStream.cpp), so somebody may capture on it.
        """
        for _ in range(_POOL):
            own = self._stream
            if own is None:
                own = self._stream = torch.Stream(self._device)
            side = torch.Stream(stream_id=own.stream_id, device_index=own.device_index, device_type=own.device_type)
            with side:
                if not self._captures():
                    break
            self._stream = None
        return side

    def _captures(self) -> bool:
        """Whether a graph is captured on the stream that the caller works on."""
        module: Any = torch.get_device_module(self._device.type)
        capturing = getattr(module, "is_current_stream_capturing", None)
        return capturing is not None and bool(capturing())

    def _here(self) -> torch.Stream:
        """Return the stream that the caller works on: each thread has its own (CUDAStream.cpp, `current_streams`).

        Raises `LinkError` where a graph is captured on it: a copy would become part of the graph, and waiting for one
        would spoil it (CUDA's programming guide, "Prohibited and unhandled operations" of stream capture).
        """
        if self._captures():
            raise LinkError(
                f"{self._device}, on which a graph is being captured; do this before the capture or after it"
            )
        return torch.accelerator.current_stream(self._device)

    def mark(self) -> torch.Event:
        """Return an event of the stream that the caller works on."""
        with _telling(self._device):
            return self._here().record_event()

    def host(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return an array's memory as a tensor, never a copy."""
        return bits_of(array)

    def kept(self, owner: torch.Tensor) -> torch.Tensor | None:
        """Return a clone, made in the stream that the caller works on; None where there is no memory for it."""
        try:
            with _telling(self._device), _beside_captures(), torch.no_grad():
                self._here()
                return owner.clone()
        except LinkError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            _log.warning(
                "%s has no memory to copy buffers there, so the call waits for them: %s", self._device, error.__cause__
            )
            return None

    def turned(self, owner: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        """Return a view with its dimensions in another order."""
        return owner.permute(order)

    def to_host(self, pairs: Sequence[tuple[Any, Any]], after: Any | None) -> Callable[[float], None]:
        """Begin to copy tensors to host memory.

        A tensor that is not contiguous is first made so on the device, in memory of as many bytes (`copy_kernel_cuda`
        in Copy.cu), which belongs to the stream of the copy.
        """

        def copy(tensor: torch.Tensor, target: torch.Tensor) -> None:
            target.copy_(tensor.view(target.dtype), non_blocking=True)

        return self._begin(copy, pairs, after)

    def to_device(self, pairs: Sequence[tuple[Any, Any]], after: Any) -> Callable[[float], None]:
        """Begin to copy host memory to tensors."""

        def copy(tensor: torch.Tensor, source: torch.Tensor) -> None:
            tensor.view(source.dtype).copy_(source, non_blocking=True)

        return self._begin(copy, pairs, after)

    def _begin(
        self, copy: Callable[[torch.Tensor, torch.Tensor], None], pairs: Sequence[tuple[Any, Any]], after: Any | None
    ) -> Callable[[float], None]:
        """Give a stream some copies; return what waits for them, and raises what went wrong at the first that failed.

        The device is current meanwhile: a thread begins with the first device, and CUDA makes a context on that, of
        some hundred MB, where a stream's `with` block or an event sets it again (`MaybeSetDevice` in CUDAFunctions.cpp
        tells).
        """
        copies = _Copies(self._device, pairs)
        try:
            with _current(self._device), _beside_captures(), torch.no_grad():
                stream = self._here() if after is None else self._side()
                with stream:
                    if after is not None:
                        stream.wait_event(after)
                    try:
                        for tensor, host in pairs:
                            copy(tensor, host)
                            copies.begun += 1
                            if after is not None:
                                # The allocator must not give the memory to somebody else before the copy is done,
                                # who may be here earlier where the wait is given up (Tensor.record_stream).
                                tensor.record_stream(stream)
                    finally:
                        copies.event = stream.record_event()
        except LinkError:
            raise
        except Exception as error:
            copies.failure = error
        except BaseException:  # Ctrl-C: nobody gets what waits for the copies
            try:
                copies(_INTERRUPTED_SECONDS)
            except LinkError as error:
                if error.under_way:
                    _left.append(copies)
                    raise
            raise
        return copies


_left: list[object] = []
"""Copies that were interrupted and did not end, for as long as the process lives."""


class _Copies:
    """Copies that a stream was given. Called with seconds, it waits for them; what they need is kept until then.

    The device is asked again and again: a wait in CUDA has no limit of time, and keeps a core busy (an event that lets
    one sleep is CUDA's alone: torch.Event heeds `blocking` on no device yet).
    """

    def __init__(self, device: torch.device, pairs: Sequence[tuple[Any, Any]]) -> None:
        self._device, self._pairs = device, pairs
        self.begun = 0
        self.event: torch.Event | None = None
        self.failure: Exception | None = None

    def __call__(self, timeout: float) -> None:
        with _telling(self._device), _current(self._device), _beside_captures():
            try:
                ended = self.event is None or _came(self.event, timeout)
            except Exception as error:  # the device's: what was under way has ended with it
                ended, self.failure = True, self.failure or error
            self.event = None  # whose end sets the device, too
        number = self.begun if self.begun < len(self._pairs) else None
        if ended:
            self._pairs = ()
        if self.failure is not None:
            raise LinkError(f"{self._device}: {_told(self.failure)}", number, not ended) from self.failure
        if not ended:
            raise LinkError(
                f"{self._device}: it has not ended after {timeout:.3g} s; the device does not answer: end this process",
                under_way=True,
            )


def _came(event: torch.Event, timeout: float) -> bool:
    """Return whether the device comes to an event within some seconds."""
    end, pause = time.monotonic() + timeout, _SHORTEST_SECONDS
    while not event.query():
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_SECONDS)
    return True


@contextlib.contextmanager
def _telling(device: torch.device) -> Iterator[None]:
    """Raise a device's errors as `LinkError`."""
    try:
        yield
    except LinkError:
        raise
    except Exception as error:
        raise LinkError(f"{device}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """Return what a device's error says, and what to do."""
    advice = "the device may be unusable: end this process and start the job anew"
    if isinstance(error, torch.OutOfMemoryError):
        advice = "free memory there (torch.accelerator.empty_cache(), a smaller batch) and try again"
    return f"{type(error).__name__}: {error}; {advice}"


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device current for this thread; what was current before is so afterwards, without a context of its own."""
    return torch.accelerator.device_index(device.index)


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
    device = same_device()
    with _beside_captures():
        failure = int(runtime.cudaHostRegister(address, nbytes, 0))
        if failure != 0:
            _forget_last_error()
    if failure != 0:
        _log.warning(
            "cudaHostRegister could not pin %s bytes of host memory (CUDA error %d): copies between it and the device "
            "are right, and slower",
            f"{nbytes:,}",
            failure,
        )
        return None

    def unpin() -> None:
        with device(), _beside_captures():  # the thread may be any
            if int(runtime.cudaHostUnregister(address)) != 0:
                _forget_last_error()

    return unpin


def same_device() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return what makes this thread's device current in another one, where CUDA would begin to use the first device."""
    device = torch.accelerator.current_accelerator()
    if device is None or not torch.accelerator.is_available() or not _in_use(device):
        return contextlib.nullcontext
    return functools.partial(_there, torch.accelerator.current_device_index())


@contextlib.contextmanager
def _there(index: int) -> Iterator[None]:
    """Make a device current, unless it has failed: what it is asked for next tells that, and of what."""
    current = contextlib.ExitStack()
    with contextlib.suppress(RuntimeError):
        current.enter_context(torch.accelerator.device_index(index))
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            current.close()


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
