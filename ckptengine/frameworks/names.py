"""What PyTorch and MindSpore call the same weights."""

from __future__ import annotations

__all__ = ["EMBEDDING", "NORMALIZATION", "UNUSED"]

NORMALIZATION = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""Of BatchNorm, LayerNorm, GroupNorm and InstanceNorm: MindSpore's names in front."""

EMBEDDING = {"embedding_table": "weight"}
"""Of embeddings."""

UNUSED = "num_batches_tracked"
"""torch's BatchNorm counts batches; MindSpore's `nn` has no such number."""
