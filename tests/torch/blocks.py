"""A tensor subclass as quantized optimizers have it: 8-bit codes, a scale for each block of 4 elements, a table."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

BLOCK = 4


class Blocks(torch.Tensor):
    codes: torch.Tensor
    scale: torch.Tensor
    table: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, signed: bool, shape: Any) -> Blocks:
        return torch.Tensor._make_wrapper_subclass(cls, shape, device=codes.device, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, signed: bool, shape: Any) -> None:
        self.codes, self.scale, self.table, self.signed, self.own_shape = codes, scale, table, signed, shape

    @classmethod
    def of(cls, values: torch.Tensor) -> Blocks:
        """Return values that are codes times powers of two, without loss."""
        flat = values.flatten()
        scale = flat.view(-1, BLOCK).abs().amax(1).clamp(min=1)
        return cls(flat.to(torch.int8), scale, torch.arange(6.0), True, tuple(values.shape))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "table"], [self.signed, self.own_shape]

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, outer_size: Any = None, outer_stride: Any = None) -> Blocks:
        return cls(*(inner[name] for name in ("codes", "scale", "table")), *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        (x, *rest) = args
        if func in (aten.detach.default, aten.alias.default):
            return cls(x.codes, x.scale, x.table, x.signed, x.own_shape)
        if func is aten.view.default:
            return cls(x.codes, x.scale, x.table, x.signed, tuple(rest[0]))
        if func is aten.slice.Tensor:
            dim, start, end = (*rest, 0, 0)[:3]
            row = math.prod(x.shape[1:])
            if dim or start * row % BLOCK or end * row % BLOCK:
                raise ValueError("not at a block's end")
            blocks = slice(start * row // BLOCK, end * row // BLOCK)
            shape = (end - start, *x.shape[1:])
            return cls(x.codes[start * row : end * row], x.scale[blocks], x.table.clone(), x.signed, shape)
        raise NotImplementedError(f"{func}")


class BlockSGD(torch.optim.Optimizer):
    """Counts its steps in blocks, laid out like the parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                state = self.state[parameter]
                if not state:
                    state["moment"] = [spread(Blocks.of(local.round()), parameter)]
                (moment,) = state["moment"]
                own = moment.to_local() if isinstance(moment, DTensor) else moment
                own.codes += 1
                own.scale += 0.5
                local -= (own.codes.view(-1, BLOCK) * own.scale[:, None]).view(local.shape)


def spread(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
