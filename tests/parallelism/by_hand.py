"""Models that split their layers by hand, as Megatron's do: plain tensors, and collectives where they must be."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import ckptengine as ce

WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, VOCAB, EXPERTS = 32, 8, 4, 4, 48, 20, 8
QKV = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}


class _ToParts(torch.autograd.Function):
    """The same input on all ranks; gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _FromParts(torch.autograd.Function):
    """The ranks' results add up; each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


def to_parts(x: torch.Tensor, group: Any) -> torch.Tensor:
    return _ToParts.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def from_parts(x: torch.Tensor, group: Any) -> torch.Tensor:
    return _FromParts.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


class Block(nn.Module):
    """A tensor-parallel block: fused query, key and value, fused gate and up, and the layers that bring them back."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group, size = group, dist.get_world_size(group)
        self.size = size
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD // size)
        self.out = nn.Linear(HEADS * HEAD // size, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN // size, bias=False)
        self.down = nn.Linear(HIDDEN // size, WIDTH, bias=False)
        self.register_buffer("scale", torch.full((HIDDEN // size,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, kv = HEADS // self.size, KV_HEADS // self.size
        qkv = self.qkv(to_parts(self.norm(x), self.group)).unflatten(-1, (heads + 2 * kv, HEAD)).transpose(1, 2)
        q, k, v = qkv.split([heads, kv, kv], 1)
        k, v = (one.repeat_interleave(heads // kv, 1) for one in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + from_parts(self.out(mixed), self.group)
        gate, up = self.gate_up(to_parts(x, self.group)).chunk(2, -1)
        return x + from_parts(self.down(F.silu(gate) * up * self.scale), self.group)


BLOCK_RULES = {
    "qkv": (0, QKV), "out.weight": (1, None), "gate_up.weight": (0, ("gate", "up")), "down.weight": (1, None),
    "scale": (0, None),
}  # fmt: skip


class GPT(nn.Module):
    """Two blocks between an embedding that is split over the vocabulary and its transpose, which is tied to it."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group, self.size = group, dist.get_world_size(group)
        self.embedding = nn.Embedding(VOCAB // self.size, WIDTH)
        self.blocks = nn.ModuleList(Block(group) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB // self.size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first, here = dist.get_rank(self.group) * VOCAB // self.size, VOCAB // self.size
        mine = (tokens >= first) & (tokens < first + here)
        x = self.embedding((tokens - first).clamp(0, here - 1)) * mine.unsqueeze(-1)
        x = from_parts(x, self.group)
        for block in self.blocks:
            x = block(x)
        logits = self.head(to_parts(x, self.group))
        whole = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(whole, logits.detach(), group=self.group)
        whole[dist.get_rank(self.group)] = logits
        return torch.cat(whole, -1)


def gpt_rules(group: Any) -> dict[str, Any]:
    """Return what is said of the tensors of a `GPT`."""
    rules = {f"blocks.*.{name}": ce.Shard(dim, group, parts=parts) for name, (dim, parts) in BLOCK_RULES.items()}
    return {**rules, "embedding": ce.Shard(0, group), "head": ce.Shard(0, group)}


def part_of(whole: torch.Tensor, dim: int, parts: Any, rank: int, size: int) -> torch.Tensor:
    """Return a rank's part of a whole tensor, cut as a trainer does: each fused part by itself."""
    units = [1] if parts is None else list(parts.values()) if isinstance(parts, dict) else [1] * len(parts)
    lengths = [whole.shape[dim] * unit // sum(units) for unit in units]
    return torch.cat([one.chunk(size, dim)[rank] for one in whole.split(lengths, dim)], dim)


class Experts(nn.Module):
    """Feed-forward experts of which each rank has its own, and a router that sends each token to the best two.

    Tokens are the same on all ranks of the group: each rank works off those for its experts, and the results add up.
    """

    def __init__(self, group: Any, stacked: bool) -> None:
        super().__init__()
        self.group, self.stacked = group, stacked
        self.here = EXPERTS // dist.get_world_size(group)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        if stacked:
            self.w_in = nn.Parameter(torch.empty(self.here, WIDTH, HIDDEN))
            self.w_out = nn.Parameter(torch.empty(self.here, HIDDEN, WIDTH))
        else:
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.SiLU(), nn.Linear(HIDDEN, WIDTH, bias=False))
                for _ in range(self.here)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, x = x.shape, x.flatten(0, -2)
        weights, chosen = F.softmax(self.router(x), -1).topk(2, -1)
        weights, inner = to_parts(weights, self.group), to_parts(x, self.group)
        result = torch.zeros_like(x)
        first = dist.get_rank(self.group) * self.here
        if self.stacked:
            w_in, w_out = (one.to_local() if isinstance(one, DTensor) else one for one in (self.w_in, self.w_out))
        for number in range(self.here):
            token, place = (chosen == first + number).nonzero(as_tuple=True)
            one = inner[token]
            one = F.silu(one @ w_in[number]) @ w_out[number] if self.stacked else self.experts[number](one)
            result = result.index_add(0, token, one * weights[token, place].unsqueeze(-1))
        return from_parts(result, self.group).view(shape)


class MoE(nn.Module):
    """A small language model with experts."""

    def __init__(self, group: Any, stacked: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Experts(group, stacked) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(x)  # type: ignore[no-any-return]


def moe_rules(group: Any, stacked: bool) -> dict[str, Any]:
    """Return what is said of the tensors of a `MoE`."""
    if stacked:
        return {"layers.*.w_*": ce.Shard(0, group)}
    return {"**.experts": ce.Renumbered(group)}


def whole_experts(stacked: bool) -> dict[str, torch.Tensor]:
    """Return the values of a `MoE` with all experts, by name, the same on all ranks whatever their number."""
    generator = torch.Generator().manual_seed(11)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.weight": (VOCAB, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.bias": (VOCAB,),
        "head.weight": (VOCAB, WIDTH),
    }  # fmt: skip
    for layer in range(2):
        shapes[f"layers.{layer}.router.weight"] = (EXPERTS, WIDTH)
        shapes[f"layers.{layer}.w_in"] = (EXPERTS, WIDTH, HIDDEN)
        shapes[f"layers.{layer}.w_out"] = (EXPERTS, HIDDEN, WIDTH)
    values = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    if not stacked:
        for layer in range(2):
            for place, name in (("0", f"layers.{layer}.w_in"), ("2", f"layers.{layer}.w_out")):
                for number, one in enumerate(values.pop(name)):
                    values[f"layers.{layer}.experts.{number}.{place}.weight"] = one.T.contiguous()
    return values


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of a step and what follows them."""
    tokens = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, replicas: Any = None) -> float:
    """Train on one batch, whose rows the ranks of a group of replicas share, and return the loss."""
    tokens, targets = batch(step)
    size = 1 if replicas is None else dist.get_world_size(replicas)
    if size > 1:
        tokens, targets = (one.chunk(size)[dist.get_rank(replicas)] for one in (tokens, targets))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    loss = loss.detach()
    if size > 1:
        for one in (loss, *(p.grad for p in model.parameters() if p.grad is not None)):
            local = one.to_local() if isinstance(one, DTensor) else one
            dist.all_reduce(local, group=replicas)
            local /= size
    optimizer.step()
    return float(loss)
