"""The names by which a checkpoint that MindSpore saved has a module's parameters."""

from __future__ import annotations

import torch

from ckptengine.frameworks.names import EMBEDDING, NORMALIZATION

__all__ = ["names_from_mindspore"]

_NORMALIZATIONS = (
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
)


def names_from_mindspore(module: torch.nn.Module, *, checkpoint: str = "net", state: str = "model") -> dict[str, str]:
    """Return what `rename` needs to load a MindSpore cell's weights into a module of the same structure.

    `checkpoint` is the cell's name in the checkpoint, `state` the module's in the state:

        ce.load(path, into={"model": module}, only=["model"], rename=names_from_mindspore(module), strict=False)

    The module's children must be called like the cell's. A normalization's weight, bias and running statistics are
    MindSpore's gamma, beta and moving statistics, an embedding's weight is its table; `Linear` and convolutions have
    MindSpore's names and layouts. The batch counts of BatchNorm are missing there, which `strict=False` reports: they
    matter with `momentum=None` only. MindSpore is not needed.
    """
    renamed = {checkpoint: state}
    for name, layer in module.named_modules():
        rules = {}
        if isinstance(layer, _NORMALIZATIONS):
            rules = NORMALIZATION
        elif isinstance(layer, torch.nn.Embedding):
            rules = EMBEDDING
        prefix = f"{name}." if name else ""
        own = {*layer._parameters, *layer._buffers}
        for theirs, ours in rules.items():
            if ours in own:
                renamed[f"{checkpoint}.{prefix}{theirs}"] = f"{state}.{prefix}{ours}"
    return renamed
