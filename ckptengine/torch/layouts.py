"""New tensors that are spread over the ranks like the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ckptengine.errors import LoadMismatchError
from ckptengine.frameworks.adapter import Layouts
from ckptengine.schema.path import Path, dotted
from ckptengine.torch.dtensor import is_dtensor
from ckptengine.torch.optimizer import new_state_tensor

__all__ = ["TorchLayouts"]


class TorchLayouts(Layouts):
    """The parameters and tensors of a state, by shape and by name."""

    def __init__(self, tensors: Sequence[tuple[Path, Any]]) -> None:
        self._any = False
        self._distributed = False
        self._by_shape: dict[tuple[int, ...], list[tuple[Path, torch.Tensor]]] = {}
        self._by_name: dict[str, list[torch.Tensor]] = {}
        for path, tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            self._any = True
            self._distributed = self._distributed or is_dtensor(tensor)
            self._by_shape.setdefault(tuple(tensor.shape), []).append((path, tensor))
            self._by_name.setdefault(str(path[-1]), []).append(tensor)

    def new(self, path: Path, dtype: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Return zeros like the parameter whose name is a key of the path, or like those of the same shape.

        Where the job spreads none of its tensors, every rank has the whole. Raises `LoadMismatchError` where tensors of
        the same shape are spread in different ways.
        """
        if not self._any:
            return None
        if not self._distributed or shape == ():
            return new_state_tensor({}, torch.empty(0), "", dtype, shape)
        like = self.pattern(path, shape)
        return None if like is None else new_state_tensor({}, like, str(path[-1]), dtype, shape)

    def pattern(self, path: Path, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Return the parameter whose name is a key of the path, or one of the shape; raises as `new`."""
        if not self._distributed:
            return None
        for key in reversed(path):
            named = self._by_name.get(key, []) if isinstance(key, str) else []
            if len(named) == 1 and (is_dtensor(named[0]) or tuple(named[0].shape) == shape):
                return named[0]
        alike = self._by_shape.get(shape, [])
        if not alike:
            return None
        first = alike[0][1]
        other = next((where for where, tensor in alike if _layout(tensor) != _layout(first)), None)
        if other is not None:
            raise LoadMismatchError(
                f"{dotted(path)}: {dotted(alike[0][0])} and {dotted(other)} have its shape {shape} and are spread in "
                "different ways, so it can't be known how to spread it; pass the optimizer itself, not its state_dict()"
            )
        return first


def _layout(tensor: Any) -> tuple[Any, ...]:
    if not is_dtensor(tensor):
        return (tensor.device,)
    return (tensor.device_mesh, tensor.placements, tensor.device)
