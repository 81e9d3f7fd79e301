"""A small GPT that trains on the CPU, with all cores."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.state import State

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 24576, 128, 512, 12, 8


class Training:
    """Model, AdamW and random data: at scale 1, 50.5 M parameters and 606 MB with the moments."""

    def __init__(self, scale: float = 1.0, batch: int = 2) -> None:
        torch.manual_seed(0)
        width = max(64, int(WIDTH * scale) // 64 * 64)
        self.model = _Gpt(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._tokens = torch.randint(VOCABULARY, (batch, CONTEXT + 1))
        self.step()

    def step(self) -> None:
        """Take one step: forward, backward, optimizer."""
        logits = self.model(self._tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def objects(self) -> dict[str, Any]:
        """Return the state as ckptengine takes it."""
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> State:
        """Return the same state as a flat dict, made once for those who need one; steps change the tensors in place."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state: State = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for parameter, moments in self.optimizer.state.items():
            state |= {f"optimizer.{names[parameter]}.{kind}": tensor for kind, tensor in moments.items()}
        return state


class _Gpt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return F.linear(self.norm(x), self.token.weight)
