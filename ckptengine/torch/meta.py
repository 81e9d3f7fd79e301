"""Tensors on the meta device: given memory in place, so that optimizers and tied modules keep them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ckptengine.torch.tensor import dtype_name

__all__ = ["give_memory", "unsaved_without_memory"]


def give_memory(tensor: torch.Tensor, dtype: str, cast: bool) -> Callable[[], bool] | None:
    """Give a plain tensor or parameter memory on torch's default device, the CPU where that is the meta device itself.

    It stays the same object (`torch.utils.swap_tensors`). Distributed tensors, subclasses, and what something else
    holds so that it can't be swapped, stay as they are; so does what has another dtype than `dtype`, unless `cast`.
    Returns what puts it back on the meta device, None where it has stayed there.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not (cast or dtype_name(tensor.dtype) == dtype):
        return None
    device = torch.get_default_device()
    with torch.no_grad():
        new = torch.empty_like(tensor, device="cpu" if device.type == "meta" else device)
    other = torch.nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else new
    del new
    if not _swapped(tensor, other):
        return None

    def undo() -> bool:
        if tensor.is_meta or _swapped(tensor, other):
            return True
        with torch.no_grad():  # something holds it: at least nobody computes with it unawares
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
        return False

    return undo


def _swapped(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        torch.utils.swap_tensors(tensor, other)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True


def unsaved_without_memory(module: torch.nn.Module) -> list[str]:
    """Return the names of buffers on the meta device that are not persistent."""
    return [
        f"{name}.{key}" if name else key
        for name, part in module.named_modules()
        for key, buffer in part._buffers.items()
        if buffer is not None and buffer.is_meta and key in part._non_persistent_buffers_set
    ]
