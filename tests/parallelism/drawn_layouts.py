"""A network of any sizes, and every way in which ranks can split it: by torch's wrappers, in stages, and by hand."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ckptengine as ce


@dataclass(frozen=True)
class Sizes:
    """The sizes of a network; `queries` is how many heads of queries a head of keys has, `cuts` seeds cuts by hand."""

    vocabulary: int = 11
    width: int = 5
    hidden: int = 7
    heads: int = 3
    queries: int = 2
    experts: int = 5
    layers: int = 3
    listed: bool = False
    tied: bool = False
    cuts: int = 0


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, (sizes.queries + 2) * sizes.heads * 2)  # heads of two elements
        self.gate_up = nn.Linear(sizes.width, 2 * sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)
        self.register_buffer("mean", torch.zeros(sizes.hidden))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        if sizes.listed:
            self.experts = nn.ModuleList(nn.Linear(sizes.width, sizes.hidden) for _ in range(sizes.experts))
        else:
            self.stack = nn.Parameter(torch.zeros(sizes.experts, sizes.width, sizes.hidden))


class Net(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleDict({str(number): Layer(sizes) for number in range(sizes.layers)})
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(sizes.width, sizes.vocabulary)
        if sizes.tied:
            _tie(self)


def _tie(net: nn.Module) -> None:
    net.head.weight = net.embed.weight


def network(sizes: Sizes, seed: int) -> Net:
    """Return the whole network with random parameters and buffers."""
    torch.manual_seed(seed)
    net = Net(sizes)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(seed))
    return net


@dataclass(frozen=True)
class Built:
    """A split network: what goes into the state, whose tensors this rank has, and the optimizer."""

    model: Any
    modules: Sequence[nn.Module]
    optimizer: Any

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for module in self.modules:
            yield from module.named_parameters()


def _built(
    model: Any, modules: Sequence[nn.Module], one_group: bool, kind: Any = torch.optim.AdamW, **more: Any
) -> Built:
    """Return it with an optimizer of two groups, of the biases and of the others, or of one."""
    named = [item for module in modules for item in module.named_parameters()]
    vectors = [p for name, p in named if name.endswith("bias")]
    others = [p for name, p in named if not name.endswith("bias")]
    groups = [{"params": [*others, *vectors]}] if one_group else [{"params": vectors, "lr": 0.003}, {"params": others}]
    if kind is not torch.optim.AdamW:
        groups = [group for group in groups if group["params"]]
    return Built(model, modules, kind(groups, lr=0.01, amsgrad=True, foreach=False, **more))


# By torch's wrappers.


def whole(net: Net, sizes: Sizes, one_group: bool) -> Built:
    return _built(net, [net], one_group)


def ddp(net: Net, sizes: Sizes, one_group: bool) -> Built:
    model = DistributedDataParallel(net)
    return _built(model, [net], one_group)


def zero(net: Net, sizes: Sizes, one_group: bool) -> Built:
    model = DistributedDataParallel(net)
    return _built(model, [net], one_group, ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)


def _fsdp1(original: bool) -> Callable[[Net, Sizes, bool], Built]:
    def build(net: Net, sizes: Sizes, one_group: bool) -> Built:
        def wrap(part: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(part, device_id=torch.device("cpu"), use_orig_params=original)

        for name, layer in net.layers.items():
            net.layers[name] = wrap(layer)
        model = wrap(net)
        return _built(model, [model], one_group)

    return build


def fsdp2(net: Net, sizes: Sizes, one_group: bool) -> Built:
    _fully_shard(net, _mesh("dp"))
    return _built(net, [net], one_group)


def hsdp(net: Net, sizes: Sizes, one_group: bool) -> Built:
    _fully_shard(net, _mesh("replicas", "dp", sizes=(2, -1)))
    return _built(net, [net], one_group)


def _tensor_parallel(dim: int) -> Callable[[Net, Sizes, bool], Built]:
    def build(net: Net, sizes: Sizes, one_group: bool) -> Built:
        _spread(net, _mesh("tp"), dim)
        return _built(net, [net], one_group)

    return build


def fsdp2_tensor(net: Net, sizes: Sizes, one_group: bool) -> Built:
    mesh = _mesh("dp", "tp", sizes=(-1, 2))
    _spread(net, mesh["tp"], 0)
    _fully_shard(net, mesh["dp"])
    return _built(net, [net], one_group)


def _mesh(*names: str, sizes: tuple[int, ...] = (-1,)) -> DeviceMesh:
    known = 1
    for size in sizes:
        known *= max(size, 1)
    shape = tuple(size if size > 0 else dist.get_world_size() // known for size in sizes)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _fully_shard(net: Net, mesh: DeviceMesh) -> None:
    for layer in net.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _spread(net: Net, mesh: DeviceMesh, dim: int) -> None:
    tied = net.head.weight is net.embed.weight
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(dim) if dim < parameter.ndim else Replicate()
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    if tied:
        _tie(net)


# In stages: each rank has some of the layers, under their names in the whole network.


def _stage(net: Net, number: int, count: int) -> Net:
    """Leave of a network what a stage has; there may be stages without a layer."""
    mine = {str(n) for n in torch.arange(len(net.layers)).tensor_split(count)[number].tolist()}
    for name in list(net.layers):
        if name not in mine:
            del net.layers[name]
    if number > 0:
        del net.embed
    if number < count - 1:
        del net.head, net.scale
    return net


def _pipeline(stages: int, sharded: bool = False, by_hand: bool = False) -> Callable[[Net, Sizes, bool], Built]:
    def build(net: Net, sizes: Sizes, one_group: bool) -> Built:
        mesh = _mesh("pp", "inside", sizes=(stages, -1))
        stage = _stage(net, mesh.get_local_rank("pp"), stages)
        if sharded:
            _fully_shard(stage, mesh["inside"])
        model: Any = _cut(stage, sizes, mesh["inside"], mesh["inside"]) if by_hand else stage
        return _built(model, [stage], one_group)

    return build


def interleaved(net: Net, sizes: Sizes, one_group: bool) -> Built:
    """Two chunks on each rank."""
    ranks = dist.get_world_size()
    chunks = []
    for number in range(dist.get_rank(), 2 * ranks, ranks):
        chunk = Net(sizes)
        chunk.load_state_dict(net.state_dict())
        chunks.append(_stage(chunk, number, 2 * ranks))
    return _built(ce.Merged(chunks), chunks, one_group)


# By hand: plain tensors, cut anywhere.


def _lengths(total: int, ranks: int, seed: str) -> list[int]:
    """Return any lengths that add up to a total, zeros among them."""
    draw = random.Random(seed)
    places = sorted(draw.randint(0, total) for _ in range(ranks - 1))
    return [end - start for start, end in zip([0, *places], [*places, total], strict=True)]


def _part(tensor: Tensor, dim: int, parts: Sequence[int], total: int, mesh: DeviceMesh, seed: str) -> Tensor:
    """Return this rank's part: of `total` units some, of each of the fused parts as many elements per unit as said."""
    rank, lengths = mesh.get_local_rank(), _lengths(total, mesh.size(), seed)
    start, found = sum(lengths[:rank]), []
    for piece, unit in zip(tensor.split([part * total for part in parts], dim), parts, strict=True):
        found.append(piece.narrow(dim, start * unit, lengths[rank] * unit))
    return torch.cat(found, dim).contiguous()


def _cut(net: Net, sizes: Sizes, tp: DeviceMesh, ep: DeviceMesh) -> Any:
    """Cut a network over the ranks of `tp` and its experts over those of `ep`, and say so."""
    rules: dict[str, tuple[int, Any, tuple[int, ...], int, DeviceMesh]] = {
        "embed.weight": (0, None, (1,), sizes.vocabulary, tp),
        "head.*": (0, None, (1,), sizes.vocabulary, tp),
        "layers.*.qkv": (0, {"q": sizes.queries, "k": 1, "v": 1}, (2 * sizes.queries, 2, 2), sizes.heads, tp),
        "layers.*.gate_up.weight": (0, ["gate", "up"], (1, 1), sizes.hidden, tp),
        "layers.*.down.weight": (1, None, (1,), sizes.hidden, tp),
        "layers.*.mean": (0, None, (1,), sizes.hidden, tp),
    }
    if not sizes.listed:
        rules["layers.*.stack"] = (0, None, (1,), sizes.experts, ep)
    said: dict[str, Any] = {text: ce.Shard(dim, mesh, parts=p) for text, (dim, p, _, _, mesh) in rules.items()}
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        for text, (dim, _, units, total, mesh) in rules.items():
            if re.match(text.replace(".", r"\.").replace("*", "[^.]*") + r"(\.|$)", name):
                # What belongs to one module is cut in the same places.
                seed = f"{sizes.cuts} {name.removesuffix('.weight').removesuffix('.bias')}"
                own = _part(tensor.detach(), dim, units, total, mesh, seed)
                holder, _, key = name.rpartition(".")
                setattr(net.get_submodule(holder), key, nn.Parameter(own) if isinstance(tensor, nn.Parameter) else own)
    if sizes.tied and hasattr(net, "head") and hasattr(net, "embed"):
        _tie(net)
    if sizes.listed:
        for name, layer in net.layers.items():
            lengths = _lengths(sizes.experts, ep.size(), f"{sizes.cuts} {name} experts")
            start = sum(lengths[: ep.get_local_rank()])
            layer.experts = nn.ModuleList(list(layer.experts)[start : start + lengths[ep.get_local_rank()]])
        said["**.experts"] = ce.Renumbered(ep)
    return ce.Sharded(net, said)


def by_hand(net: Net, sizes: Sizes, one_group: bool) -> Built:
    mesh = _mesh("tp")
    return _built(_cut(net, sizes, mesh, mesh), [net], one_group)


def by_hand_2x2(net: Net, sizes: Sizes, one_group: bool) -> Built:
    """Experts over other ranks than the rest."""
    mesh = _mesh("tp", "ep", sizes=(2, 2))
    return _built(_cut(net, sizes, mesh["tp"], mesh["ep"]), [net], one_group)


Build = Callable[[Net, Sizes, bool], Built]
LAYOUTS: dict[str, tuple[tuple[int, ...], Build]] = {
    "whole": ((1,), whole),
    "ddp": ((2,), ddp),
    "zero": ((2, 3), zero),
    "fsdp1": ((2, 3), _fsdp1(False)),
    "fsdp1-orig": ((2, 4), _fsdp1(True)),
    "fsdp2": ((2, 3), fsdp2),
    "hsdp": ((4,), hsdp),
    "tensor-rows": ((2, 4), _tensor_parallel(0)),
    "tensor-columns": ((3,), _tensor_parallel(1)),
    "fsdp2-tensor": ((4,), fsdp2_tensor),
    "pipeline-2": ((2,), _pipeline(2)),
    "pipeline-4": ((4,), _pipeline(4)),
    "pipeline-fsdp2": ((4,), _pipeline(2, sharded=True)),
    "pipeline-by-hand": ((4,), _pipeline(2, by_hand=True)),
    "interleaved": ((2, 3), interleaved),
    "by-hand": ((2, 3, 4), by_hand),
    "by-hand-2x2": ((4,), by_hand_2x2),
}
"""By name: at which numbers of ranks, and how a network is split."""
CASES = [f"{size}-{name}" for name, (sizes, _) in LAYOUTS.items() for size in sizes]


def take_steps(built: Built) -> None:
    """Take two steps with gradients that are a function of each element alone; where there is padding, it is 0."""
    for _ in range(2):
        for module in built.modules:
            flat = isinstance(module, FullyShardedDataParallel)
            for parameter in module.parameters():
                if flat and not parameter.numel():
                    continue  # FSDP1 leaves the gradient of what a rank has nothing of at None
                with torch.no_grad():
                    value = parameter.detach()
                    parameter.grad = value * 0.5 + 0.25 * value.sign().abs()
        built.optimizer.step()


def local_tensors(built: Built) -> Iterator[tuple[str, Tensor]]:
    """Yield what this rank holds, in the forms and under the names that torch itself keeps it."""
    named = dict(built.named())
    yield from ((f"param {name}", _local(p)) for name, p in named.items())
    for module in built.modules:
        yield from ((f"buffer {name}", buffer) for name, buffer in module.named_buffers())
    state = getattr(built.optimizer, "optim", built.optimizer).state
    for name, parameter in named.items():
        for key, value in state.get(parameter, {}).items():
            yield f"{key} {name}", _local(value)


def _local(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
