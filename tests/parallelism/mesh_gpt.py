"""A small GPT over a mesh of pipeline stages × replicas × shards × stretches of the sequence × tensor parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

# An odd vocabulary, and layers that two stages can't share evenly.
VOCABULARY, WIDTH, HEADS, HIDDEN, CONTEXT, LAYERS, BATCH, MICRO_BATCHES = 33, 16, 4, 20, 8, 3, 8, 2
NAMES = ("embed", *(f"h{number}" for number in range(LAYERS)), "head")


@dataclass(frozen=True)
class Split:
    """How many ranks each dimension of the mesh has; `sequence` splits activations among the tensor-parallel ranks.

    `experts_as` says how a mixture of experts has them; empty for the model without experts.
    """

    pipeline: int = 1
    replicas: int = 1
    shards: int = 1
    context: int = 1
    tensor: int = 1
    sequence: bool = False
    experts: int = 1
    experts_as: str = ""

    @classmethod
    def of(cls, text: str) -> Split:
        """Return what a word like `pp2-fsdp2-tp2-sp` or `list-hsdp2-ep4` says; with `one` nothing is split."""
        sizes = dict(re.findall(r"([a-z]+)(\d)", text))
        kind = next((kind for kind in ("dtensor", "stack", "list") if text.startswith(kind)), "")
        sequence = text.endswith("-sp")
        return cls(**{_NAMES[key]: int(n) for key, n in sizes.items()}, sequence=sequence, experts_as=kind)

    @property
    def ranks(self) -> int:
        return self.pipeline * self.replicas * self.shards * self.context * self.tensor * self.experts


_NAMES = {
    "pp": "pipeline", "hsdp": "replicas", "fsdp": "shards", "cp": "context", "tp": "tensor", "ep": "experts"
}  # fmt: skip


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.first = 0

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.token(tokens) + self.position(self.first + torch.arange(tokens.shape[1]))
        return out


class Attention(nn.Module):
    """Causal attention; `context` is the group that shares the sequence, each rank with its stretch of the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.context: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        first = 0
        if self.context is not None:
            first = dist.get_rank(self.context) * q.shape[2]
            k, v = (all_gather_single_autograd(one.contiguous(), 2, self.context) for one in (k, v))
        seen = torch.arange(k.shape[2]) <= first + torch.arange(q.shape[2])[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(x))
        return out


class Part(nn.Module):
    """Some of the model's modules, under the names that they have in the whole model."""

    def __init__(self, names: tuple[str, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        kinds = {"embed": Embed, "head": Head}
        made = {name: kinds.get(name, Block)() for name in NAMES}  # all: each gets the same weights whatever the split
        for name in names:
            self.add_module(name, made[name])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def names_of(stage: int, stages: int) -> tuple[str, ...]:
    """Return the modules of a stage; the first ones have a layer more where they can't have the same number."""
    layers = torch.arange(LAYERS).tensor_split(stages)[stage].tolist()
    first, last = stage == 0, stage == stages - 1
    return (*("embed",) * first, *(f"h{number}" for number in layers), *("head",) * last)


def plan_of(part: Part, sequence: bool) -> dict[str, Any]:
    """Return the tensor-parallel plan; with `sequence`, activations between layers are split along the sequence."""
    between: Any = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {}
    for name in dict(part.named_children()):
        if name == "embed":
            plan["embed.token"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
            if sequence:
                plan["embed"] = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
            continue
        if name == "head":
            plan["head.out"] = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
        else:
            for one in ("attention.wq", "attention.wk", "attention.wv", "up"):
                plan[f"{name}.{one}"] = ColwiseParallel(input_layouts=between)
            for one in ("attention.wo", "down"):
                plan[f"{name}.{one}"] = RowwiseParallel(output_layouts=between)
        for one in ("norm",) if name == "head" else ("norm1", "norm2"):
            if sequence:
                plan[f"{name}.{one}"] = SequenceParallel(use_local_output=True)
    return plan


class Life:
    """This rank's part of the model on a mesh, with its optimizer and scheduler."""

    def __init__(self, split: Split, seed: int = 0) -> None:
        self.split = split
        sizes = (split.pipeline, split.replicas, split.shards, split.context, split.tensor)
        self.mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "replicas", "shards", "context", "tp"))
        self.stage = self.mesh.get_local_rank("pp")
        self.part = Part(names_of(self.stage, split.pipeline), seed)
        if split.tensor > 1:
            parallelize_module(self.part, self.mesh["tp"], plan_of(self.part, split.sequence))
        self.stretch = CONTEXT // split.context
        if split.context > 1:
            self._share_sequence()
        if split.replicas * split.shards * split.context > 1:
            self._shard()
        matrices = [p for p in self.part.parameters() if p.ndim > 1]
        vectors = [p for p in self.part.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        self.schedule = None
        if split.pipeline > 1:
            stage = PipelineStage(
                self.part, self.stage, split.pipeline, torch.device("cpu"), group=self.mesh.get_group("pp")
            )
            self.schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_of)

    def _share_sequence(self) -> None:
        for module in self.part.modules():
            if isinstance(module, Attention):
                module.context = self.mesh.get_group("context")
            elif isinstance(module, Embed):
                module.first = self.mesh.get_local_rank("context") * self.stretch

    def _shard(self) -> None:
        """Shard parameters over the ranks that have other samples or another stretch of them."""
        flat = self.mesh["shards", "context"]._flatten("shards_context")
        over = self.mesh["replicas", "shards_context"] if self.split.replicas > 1 else flat
        for module in self.part.children():
            fully_shard(module, mesh=over)
        fully_shard(self.part, mesh=over)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.part, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's samples, or its stretch of them, and what follows each token."""
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(step))
        ranks = self.split.replicas * self.split.shards
        mine = self.mesh.get_local_rank("replicas") * self.split.shards + self.mesh.get_local_rank("shards")
        tokens, first = tokens.chunk(ranks)[mine], self.mesh.get_local_rank("context") * self.stretch
        return tokens[:, first : first + self.stretch], tokens[:, first + 1 : first + 1 + self.stretch]

    def train(self, step: int) -> float:
        """Train on one batch and return its loss, the same on all ranks."""
        self.optimizer.zero_grad()
        tokens, targets = self.batch(step)
        losses: list[Tensor] = []
        if self.schedule is None:
            losses.append(loss_of(self.part(tokens), targets))
            losses[0].backward()
        else:
            ends = {"target": targets, "losses": losses} if self.stage == self.split.pipeline - 1 else {}
            self.schedule.step(*((tokens,) if self.stage == 0 else ()), **ends)
        self.optimizer.step()
        self.scheduler.step()
        # Those that have no loss, as the other stages, add nothing.
        total = torch.tensor([sum(float(loss.detach()) for loss in losses), float(len(losses))])
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def wholes(self) -> dict[str, Tensor]:
        """Return weights and moments of this stage in whole, by name, put together by torch."""
        found = {}
        for name, parameter in self.part.named_parameters():
            found[name] = whole(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name} {key}"] = whole(value)
        return found


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
