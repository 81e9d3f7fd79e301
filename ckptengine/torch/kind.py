"""What a tensor of torch is beside its contents: parameter, subclass, taking a gradient."""

from __future__ import annotations

import torch

from ckptengine.errors import LoadMismatchError
from ckptengine.frameworks.adapter import TensorKind
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import find_class, full_name
from ckptengine.torch.dtensor import is_dtensor
from ckptengine.torch.flat import FlatPart

__all__ = ["as_kind", "tensor_kind"]


def tensor_kind(tensor: torch.Tensor) -> TensorKind:
    """Return None for a plain tensor, `requires_grad` of a parameter, for others an object.

    What another tensor was computed from is no part of a state: the result of a graph is a plain tensor.
    """
    grad = tensor.requires_grad and tensor.is_leaf
    if type(tensor) in (torch.Tensor, torch.nn.Parameter, FlatPart) or is_dtensor(tensor):
        if isinstance(tensor, torch.nn.Parameter):
            return grad
        return {"grad": True} if grad else None
    told = {"class": full_name(type(tensor)), "grad": grad}
    attributes = sorted(getattr(tensor, "__dict__", ()))
    return {**told, "attributes": attributes} if attributes else told


def as_kind(tensor: torch.Tensor, kind: TensorKind, path: Path) -> torch.Tensor:
    """Return a tensor's memory as what `tensor_kind` told of; raises `LoadMismatchError` where that can't be made."""
    base = tensor.detach()
    if not is_dtensor(base):
        base = base.as_subclass(torch.Tensor)
    if kind is None:
        return base
    if not isinstance(kind, dict):
        return torch.nn.Parameter(base, kind)
    grad, name = bool(kind.get("grad")), kind.get("class")
    if name is None:
        return base.requires_grad_(grad)
    cls = find_class(str(name))
    if cls is None or not issubclass(cls, torch.Tensor):
        raise LoadMismatchError(f"{dotted(path)}: is a {name} in the checkpoint; import that class before the load")
    if kind.get("attributes"):
        raise LoadMismatchError(
            f"{dotted(path)}: is a {name} in the checkpoint, whose attributes {', '.join(kind['attributes'])} were not "
            "saved; put one into the state before the load, which is then filled"
        )
    return torch.Tensor._make_subclass(cls, base, grad)
