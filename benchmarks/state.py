"""The states that are measured."""

import torch

LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 768, 50257, 1024

State = dict[str, torch.Tensor]
"""Tensors under their names; most are contiguous fp32."""


def gpt2_small(scale: float = 1.0) -> State:
    """Return 444 tensors of 1.49 GB (at scale 1, which is that of the width): fp32 weights and Adam moments.

    The shapes and names are those of GPT-2 small. All memory has been written to.
    """
    width = max(64, int(WIDTH * scale) // 64 * 64)
    shapes = {"wte.weight": (VOCABULARY, width), "wpe.weight": (CONTEXT, width)}
    for layer in range(LAYERS):
        for name, shape in (
            ("ln_1.weight", (width,)),
            ("ln_1.bias", (width,)),
            ("attn.c_attn.weight", (width, 3 * width)),
            ("attn.c_attn.bias", (3 * width,)),
            ("attn.c_proj.weight", (width, width)),
            ("attn.c_proj.bias", (width,)),
            ("ln_2.weight", (width,)),
            ("ln_2.bias", (width,)),
            ("mlp.c_fc.weight", (width, 4 * width)),
            ("mlp.c_fc.bias", (4 * width,)),
            ("mlp.c_proj.weight", (4 * width, width)),
            ("mlp.c_proj.bias", (width,)),
        ):
            shapes[f"h.{layer}.{name}"] = shape
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }


def many_leaves(count: int, leaf_nbytes: int = 4096) -> State:
    """Return many small fp32 tensors, each with memory of its own."""
    generator = torch.Generator().manual_seed(0)
    return {f"group{i // 1000}.leaf{i}": torch.randn(leaf_nbytes // 4, generator=generator) for i in range(count)}


def nbytes(state: State) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())
