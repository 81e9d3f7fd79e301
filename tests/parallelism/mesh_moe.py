"""A mixture of experts over replicas × shards × experts: hybrid-sharded, and each rank with other samples.

Of the experts each rank of a group has some, for the tokens of all its ranks; what is not expert is sharded over that
group, too, as is usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from mesh_gpt import BATCH, CONTEXT, VOCABULARY, WIDTH, Attention, Split, loss_of, whole
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd, reduce_scatter_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

import ckptengine as ce

# Four ranks can't have the same number of experts.
EXPERTS, HIDDEN, LAYERS = 6, 10, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.empty(WIDTH, HIDDEN)), nn.Parameter(torch.empty(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.w_in) @ self.w_out


class Stack(nn.Module):
    """Experts in one tensor for each matrix."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(count, WIDTH, HIDDEN))
        self.w_out = nn.Parameter(torch.empty(count, HIDDEN, WIDTH))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the sum over this rank's experts of the outputs [tokens, width], by weights [tokens, experts]."""
        w_in, w_out = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w_in, self.w_out))
        inside = F.silu(torch.einsum("nw,ewh->neh", x, w_in))
        return torch.einsum("neh,ehw,ne->nw", inside, w_out, weights)


class List(nn.ModuleList):
    """Experts as modules, which each rank numbers from 0 on."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = sum(expert(x) * weights[:, number, None] for number, expert in enumerate(self))  # type: ignore[assignment]
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts: nn.Module = Stack(EXPERTS)
        self.group: Any = None
        self.mine = slice(0, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        tokens = self.norm2(x).flatten(0, 1)
        best, chosen = F.softmax(self.router(tokens), -1).topk(2, -1)
        weights = torch.zeros(len(tokens), EXPERTS).scatter(1, chosen, best)
        if self.group is not None:
            tokens, weights = (all_gather_single_autograd(one, 0, self.group) for one in (tokens, weights))
        mixed = self.experts(tokens, weights[:, self.mine])
        if self.group is not None:
            mixed = reduce_scatter_single_autograd(mixed, "sum", 0, self.group)
        return x + mixed.view_as(x)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


class MoELife:
    """The model on a mesh, with its optimizer.

    Experts are DTensors over the mesh and sharded further (`dtensor`), plain parts of a stack that are declared
    (`stack`), or modules of a list that are declared and sharded further (`list`).
    """

    def __init__(self, split: Split, seed: int = 0) -> None:
        self.split, self.kind = split, split.experts_as
        sizes = (split.replicas, split.shards, split.experts)
        self.mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards", "experts"))
        torch.manual_seed(seed)
        self.model = MoE()
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.3)
        # DTensors are cut as torch cuts, with fewer or none on the last ranks; by hand as evenly as can be.
        numbers = torch.arange(EXPERTS)
        parts = numbers.chunk(split.experts) if self.kind == "dtensor" else numbers.tensor_split(split.experts)
        place = self.mesh.get_local_rank("experts")
        mine = parts[place].tolist() if place < len(parts) else []
        self.mine = slice(mine[0], mine[-1] + 1) if mine else slice(0, 0)
        for layer in self.model.layers:
            self._spread(layer)
        if split.ranks > 1:
            self._shard()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        model: Any = self.model
        if self.kind == "stack":
            model = ce.Sharded(model, {"layers.*.experts.w_*": ce.Shard(0, self.mesh["experts"])})
        elif self.kind == "list":
            model = ce.Sharded(model, {"**.experts": ce.Renumbered(self.mesh["experts"])})
        self.state = {"model": model, "optimizer": self.optimizer}

    def _spread(self, layer: Any) -> None:
        """Leave a rank its own experts."""
        stack, layer.mine = layer.experts, self.mine
        if self.split.experts > 1:
            layer.group = self.mesh.get_group("experts")
        if self.kind == "list":
            layer.experts = List(Expert() for _ in range(EXPERTS)[self.mine])
            for expert, w_in, w_out in zip(layer.experts, stack.w_in[self.mine], stack.w_out[self.mine], strict=True):
                expert.w_in, expert.w_out = nn.Parameter(w_in.detach().clone()), nn.Parameter(w_out.detach().clone())
            return
        for name, tensor in list(stack.named_parameters()):
            tensor = tensor.detach()
            if self.kind == "dtensor":
                own = distribute_tensor(tensor, self.mesh["experts"], [Shard(0)])
            else:
                own = tensor[self.mine].clone()
            setattr(stack, name, nn.Parameter(own))

    def _shard(self) -> None:
        self.mesh["shards", "experts"]._flatten("batch")
        over = self.mesh["replicas", "batch"]
        by_hand = set()
        for layer in self.model.layers:
            if self.kind == "stack":
                by_hand |= set(layer.experts.parameters())
            else:
                for part in layer.experts if self.kind == "list" else [layer.experts]:
                    fully_shard(part, mesh=self.mesh["replicas", "shards"])
            fully_shard(layer, mesh=over, ignored_params=by_hand)
        fully_shard(self.model, mesh=over, ignored_params=by_hand)

    def train(self, step: int) -> float:
        """Train on one batch and return its loss, the same on all ranks."""
        self.optimizer.zero_grad()
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(step))
        tokens = tokens.chunk(self.split.ranks)[dist.get_rank()]
        loss = loss_of(self.model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        for name, parameter in self.model.named_parameters():
            if "experts" in name and self.split.ranks > 1:
                self._mean(parameter)
        self.optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / self.split.ranks

    def _mean(self, expert: nn.Parameter) -> None:
        """Make an expert's gradient, the sum over the samples of a group of experts, the mean over all samples."""
        gradient = expert.grad
        assert gradient is not None
        if self.kind == "stack":  # else FSDP has taken the mean over replicas and shards
            for dim in ("replicas", "shards"):
                dist.all_reduce(gradient, group=self.mesh.get_group(dim))
            gradient /= self.split.replicas * self.split.shards
        gradient /= self.split.experts

    def wholes(self) -> dict[str, Tensor]:
        """Return weights and moments in whole, by their names in the model with all experts."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found |= {key: one for key, one in self._whole(name, parameter)}
            for key, value in self.optimizer.state[parameter].items():
                found |= {f"{name} {key}": one for name, one in self._whole(name, value)}
        return found

    def _whole(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        tensor = whole(tensor)
        if self.kind == "stack" and "experts" in name and tensor.ndim:
            parts: list[Any] = [None] * self.split.experts
            dist.all_gather_object(parts, tensor, group=self.mesh.get_group("experts"))
            tensor = torch.cat(parts)
        elif self.kind == "list" and "experts" in name:
            head, _, rest = name.partition("experts.")
            number, _, rest = rest.partition(".")
            name = f"{head}experts.{int(number) + self.mine.start}.{rest}"
        yield name, tensor
