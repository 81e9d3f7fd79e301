"""Whether two states are equal, bit for bit and type for type; shares no code with the engine."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from any_state import Extra, Keeper
from torch import nn

import ckptengine as ce


class Different(AssertionError):
    """What was saved is not what came back."""


class Oracle:
    """Compares a state that was saved with one that came back."""

    def __init__(self) -> None:
        self.roots: list[list[tuple[str, Any, Any]]] = []  # the tensors in each object: path, saved, back
        self.tensors: list[tuple[str, Any, Any]] | None = None
        self.own = False  # within a PerRank

    def same(self, saved: Any, back: Any, where: str) -> None:
        """Raise `Different` naming the place."""
        if type(saved) is not type(back):
            raise Different(f"{where}: {type(saved)} {saved!r:.60}, {type(back)} {back!r:.60} came back")
        if isinstance(saved, torch.Tensor):
            self._torch(saved, back, where)
        elif isinstance(saved, np.ndarray):
            self._numpy(saved, back, where)
        elif isinstance(saved, Keeper):
            self._inside(saved.state, back.state, f"{where}()")
        elif isinstance(saved, ce.PerRank):
            outer, self.own = self.own, True
            self.same(saved.value, back.value, f"{where}<rank>")
            self.own = outer
        elif isinstance(saved, nn.Module):
            self._module(saved, back, where)
        elif isinstance(saved, torch.optim.Optimizer):
            self._optimizer(saved, back, where)
        elif isinstance(saved, Mapping):
            self._mapping(saved, back, where)
        elif isinstance(saved, list | tuple | deque):
            self._equal(len(saved), len(back), f"{where} (length)")
            self._equal(getattr(saved, "maxlen", None), getattr(back, "maxlen", None), f"{where} (maxlen)")
            for number, (one, other) in enumerate(zip(saved, back, strict=True)):
                self.same(one, other, f"{where}[{number}]")
        elif isinstance(saved, float):
            self._equal(struct.pack("d", saved), struct.pack("d", back), where)
        elif isinstance(saved, complex):
            self._equal(struct.pack("dd", saved.real, saved.imag), struct.pack("dd", back.real, back.imag), where)
        elif isinstance(saved, np.generic):
            self._equal((saved.dtype, saved.tobytes()), (back.dtype, back.tobytes()), where)
        elif isinstance(saved, set | frozenset):
            self._equal(sorted(map(repr, saved)), sorted(map(repr, back)), where)
        else:
            self._equal(saved, back, where)

    def _equal(self, saved: Any, back: Any, where: str) -> None:
        if saved != back:
            raise Different(f"{where}: {saved!r:.200}, {back!r:.200} came back")

    def _mapping(self, saved: Any, back: Any, where: str) -> None:
        if not isinstance(saved, Counter):
            keys = [[(type(key), repr(key)) for key in one] for one in (saved, back)]
            self._equal(*keys, f"{where} (keys)")
            values = list(zip(saved, saved.values(), back.values(), strict=True))
        else:
            self._equal(saved, back, where)
            values = []
        if isinstance(saved, defaultdict):
            self._equal(saved.default_factory, back.default_factory, f"{where} (factory)")
        if isinstance(saved, OrderedDict):
            self._equal(getattr(saved, "_metadata", None), getattr(back, "_metadata", None), f"{where} (metadata)")
        for key, one, other in values:
            self.same(one, other, f"{where}[{key!r}]")

    def _inside(self, saved: Any, back: Any, where: str) -> None:
        """What an object holds was made anew: names of one tensor must be one again."""
        outermost = self.tensors is None
        if outermost:
            self.tensors = []
        self.same(saved, back, where)
        if outermost:
            assert self.tensors is not None
            found, self.tensors = self.tensors, None
            if not self.own:
                self._ties(found)

    def _ties(self, found: list[tuple[str, Any, Any]]) -> None:
        for number, (where, one, other) in enumerate(found):
            for before, first, second in found[:number]:
                if one is first and span(one) is not None and other is not second:
                    raise Different(f"{where}: was the same as {before}")
                if span(one) is not None and span(one) == span(first) and span(other) != span(second):
                    raise Different(f"{where}: was the same memory as {before}")
                if not meet(span(one), span(first)) and meet(span(other), span(second)):
                    raise Different(f"{where}: has become the same memory as {before}")

    def _module(self, saved: nn.Module, back: nn.Module, where: str) -> None:
        if isinstance(saved, Extra):
            self._inside(saved.extra, back.extra, f"{where}<extra>")
        ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (saved, back))
        self._equal(list(ours), list(theirs), f"{where} (names)")
        for name in ours:
            if not name.endswith("cache"):  # a buffer that is not saved
                self._torch(ours[name], theirs[name], f"{where}.{name}", note=False)

    def _optimizer(self, saved: Any, back: Any, where: str) -> None:
        state = saved.state_dict(), back.state_dict()
        self._equal(list(state[0]["state"]), list(state[1]["state"]), f"{where}.state")
        for number in state[0]["state"]:
            self._inside(*(one["state"][number] for one in state), f"{where}.state[{number}]")
        self.same(*(one["param_groups"] for one in state), f"{where}.param_groups")

    def _torch(self, saved: Any, back: Any, where: str, note: bool = True) -> None:
        self._equal((saved.dtype, saved.shape), (back.dtype, back.shape), where)
        self._equal(saved.requires_grad, back.requires_grad, f"{where} (requires_grad)")
        self._equal(order(saved.shape, saved.stride()), order(back.shape, back.stride()), f"{where} (memory layout)")
        self._equal(bits(saved), bits(back), f"{where} (bytes)")
        if note and self.tensors is not None:
            self.tensors.append((where, saved, back))

    def _numpy(self, saved: Any, back: Any, where: str) -> None:
        self._equal((saved.dtype, saved.shape), (back.dtype, back.shape), where)
        self._equal(order(saved.shape, saved.strides), order(back.shape, back.strides), f"{where} (memory layout)")
        self._equal(saved.tobytes(), back.tobytes(), f"{where} (bytes)")
        if self.tensors is not None:
            self.tensors.append((where, saved, back))


def bits(tensor: Any) -> bytes:
    """Return the bytes of a tensor's elements in C order."""
    plain = tensor.detach().as_subclass(torch.Tensor)
    flat = torch.empty(plain.numel(), dtype=plain.dtype)
    flat.copy_(plain.reshape(-1))
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def order(shape: Any, strides: Any) -> list[int]:
    """Return the dimensions that are longer than one from the outermost in memory to the innermost."""
    if 0 in shape:
        return []
    dims = [dim for dim, length in enumerate(shape) if length > 1]
    return sorted(dims, key=lambda dim: -abs(strides[dim]))


def span(tensor: Any) -> tuple[Any, ...] | None:
    """Return the first and the last byte of a tensor's memory and how it lies there; None where it has none."""
    if math.prod(tensor.shape) == 0:
        return None
    if isinstance(tensor, torch.Tensor):
        size, address = tensor.element_size(), tensor.data_ptr()
        steps = [step * size for step in tensor.stride()]
    else:
        size, address, steps = tensor.itemsize, tensor.__array_interface__["data"][0], list(tensor.strides)
    ends = [(length - 1) * step for length, step in zip(tensor.shape, steps, strict=True)]
    low, high = address + sum(end for end in ends if end < 0), address + size + sum(end for end in ends if end > 0)
    return low, high, tuple(tensor.shape), tuple(steps), str(tensor.dtype)


def meet(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> bool:
    """Whether two spans have bytes in common, or may have."""
    return one is not None and other is not None and one[0] < other[1] and other[0] < one[1]


class PlainOracle(Oracle):
    """Compares a state that was saved with the arrays and values that `ckptengine.load(path)` gives."""

    def same(self, saved: Any, back: Any, where: str) -> None:
        """Raise `Different` naming the place; objects have become their states, tensors arrays."""
        if isinstance(saved, Keeper):
            self.same(saved.state, back, f"{where}()")
        elif isinstance(saved, nn.Module):
            self.same(dict(saved.state_dict(keep_vars=True)), back, where)
        elif isinstance(saved, torch.Tensor | np.ndarray):
            self._equal(np.ndarray, type(back), where)
            name = str(saved.dtype).removeprefix("torch.")
            size = torch.empty((), dtype=saved.dtype).element_size() if isinstance(saved, torch.Tensor) else 0
            raw = (back.dtype.kind == "V" and back.dtype.names is None) or name == "complex32"
            self._equal(size if raw and size else name, back.dtype.itemsize if raw and size else back.dtype.name, where)
            self._equal(tuple(saved.shape), back.shape, where)
            self._equal(bits(saved) if size else saved.tobytes(), back.tobytes(), f"{where} (bytes)")
        else:
            super().same(saved, back, where)
