"""The names by which a checkpoint that PyTorch saved has a cell's parameters."""

from __future__ import annotations

from mindspore import nn

from ckptengine.frameworks.names import EMBEDDING, NORMALIZATION, UNUSED

__all__ = ["names_from_torch"]

_ELSEWHERE = "unused"


def names_from_torch(cell: nn.Cell, *, checkpoint: str = "model", state: str = "net") -> dict[str, str]:
    """Return the `rename` mapping that loads a torch module's weights into a cell of the same structure.

    `checkpoint` is the module's name in the checkpoint, `state` the cell's in the state:

        ce.load(path, into={"net": cell}, only=["net"], rename=names_from_torch(cell))

    Names are those of the module as a child of the checkpoint, so the cell's children must be called like the
    module's. Normalization layers' gamma, beta and moving statistics are torch's weight, bias and running statistics,
    an `nn.Embedding`'s table is torch's weight; `Dense`, convolutions and everything of `mint.nn` have torch's names
    and layouts. The batch counts of torch's BatchNorm, which MindSpore lacks, are renamed so that `only` leaves them
    out.
    """
    renamed = {checkpoint: state}
    for _, layer in cell.cells_and_names():
        rules = _rules(layer)
        for own, parameter in layer._params.items():
            if parameter is None or own not in rules:
                continue
            prefix = parameter.name.removesuffix(own)
            renamed[f"{checkpoint}.{prefix}{rules[own]}"] = f"{state}.{parameter.name}"
            if own == "moving_mean":
                renamed[f"{checkpoint}.{prefix}{UNUSED}"] = f"{_ELSEWHERE}.{prefix}{UNUSED}"
    return renamed


def _rules(layer: nn.Cell) -> dict[str, str]:
    own = set(layer._params)
    return NORMALIZATION if "gamma" in own else EMBEDDING if "embedding_table" in own else {}
