"""Where states are copied to before they are saved in the background: memory that is kept from save to save."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, TimeoutError
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from ckptengine.errors import DeadlineError
from ckptengine.lifecycle import Living

__all__ = ["Stager", "stager"]

_ALIGNMENT = 64  # a cache line, and what any element type needs


class Stager(AsyncStager):
    """Copies a state into memory of its own, which the next state is copied into again: new memory is what is slow.

    The copy of one save must stay as it is until that is written, so the next save waits for it (`turn`). Containers
    are copied too; what is neither a plain tensor nor a `DTensor` of one is left to torch's own stager.
    """

    _synchronize_after_execute = False  # `stage` returns when all is copied

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()
        self._last: Future[Any] | None = None
        _living.add(self)

    @contextlib.contextmanager
    def turn(self, timeout: float) -> Iterator[None]:
        """Have the memory to oneself from the end of the save before until `used_by` has told whose it is now.

        Raises `DeadlineError` after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        lock = self._lock
        if not lock.acquire(timeout=timeout):
            raise _late(timeout)
        try:
            if self._last is not None:
                try:
                    self._last.exception(max(0.0, end - time.monotonic()))
                except TimeoutError:
                    raise _late(timeout) from None
            yield
        finally:
            lock.release()

    def used_by(self, save: Future[Any]) -> None:
        """Note, in one's turn, whose state lies in the memory."""
        self._last = save

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return a copy of the state; its tensors lie in host memory, those of a `DTensor` with their placements."""
        tensors = list(_tensors(state_dict))
        nbytes = sum(map(_room, tensors))
        if nbytes > self._memory.numel():
            # Views of what it replaces keep that alive.
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies, position = {}, 0
        with torch.no_grad():
            for tensor in tensors:
                end = position + tensor.numel() * tensor.element_size()
                target = self._memory[position:end].view(tensor.dtype).view(tensor.shape)
                copies[id(tensor)] = target.copy_(tensor)
                position += _room(tensor)
        # Made anew: it knows memory by its storage, and refuses one that was resized.
        others = DefaultStager(StagingOptions(False, False, False, False))
        try:
            result: dict[str, Any] = self._copied(state_dict, copies, others)
        finally:
            others.close()
        return result

    def _copied(self, value: Any, copies: Mapping[int, torch.Tensor], others: DefaultStager) -> Any:
        if type(value) in (dict, OrderedDict):
            new = copy.copy(value)  # with an OrderedDict's `_metadata`
            new.update((key, self._copied(item, copies, others)) for key, item in value.items())
            return new
        if type(value) in (list, tuple):
            return type(value)(self._copied(item, copies, others) for item in value)
        if isinstance(value, DTensor) and id(value._local_tensor) in copies:
            local = copies[id(value._local_tensor)]
            # Not `from_local`, which would copy it to the mesh's device again.
            return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        if id(value) in copies:
            return copies[id(value)]
        other: Any = others.stage({"": value})
        return other[""]

    def synchronize_staging(self) -> None:
        """Do nothing: `stage` returns when all is copied."""
        return

    def close(self) -> None:
        """Do nothing: the memory is kept for the next save."""

    def abandon(self) -> None:
        """Forget the save, in a forked process: it is the parent's."""
        self._lock, self._last = threading.Lock(), None


def _late(timeout: float) -> DeadlineError:
    return DeadlineError(
        f"the asynchronous save before this one was not written within {timeout:g} s: save less often, or wait for the "
        "future that async_save returned"
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose elements are all that it is."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_meta


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield what is copied into the memory, each once."""
    if type(value) in (dict, OrderedDict):
        for item in value.values():
            yield from _tensors(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, DTensor):
        if _is_plain(value._local_tensor):
            yield value._local_tensor
    elif _is_plain(value):
        yield value


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


_living: Living[Stager] = Living(forked=Stager.abandon)
stager = Stager()
