"""Copies from accelerators, beside what they compute; the same for every device that `torch.accelerator` knows."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["begin_copy", "pin_host_memory"]

_sides: dict[torch.device, torch.Stream] = {}


def begin_copy(piece: torch.Tensor, bits: torch.dtype, target: torch.Tensor, beside: bool) -> Callable[[], None]:
    """Begin to copy a tensor to host memory of the type `bits`; return what waits until it is there.

    The copy follows what the device's current stream has been given so far. With `beside` it has a stream of its own,
    so that the device goes on meanwhile: nothing may change the tensor before the copy is there. It is asynchronous
    where the host memory is pinned, and else takes longer, but is no less right.
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
    return event.synchronize


def pin_host_memory(address: int, nbytes: int) -> Callable[[], None] | None:
    """Pin host memory for direct transfers, where the accelerator has a call for memory that is there already.

    Returns what undoes it; None where there is no such call (CUDA has one), or it fails.
    """
    if not torch.cuda.is_available():
        return None
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(address, nbytes, 0)) != 0:
        return None

    def unpin() -> None:
        runtime.cudaHostUnregister(address)

    return unpin
