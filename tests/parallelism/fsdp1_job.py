"""Restores into FSDP1 models that have evaluated before, and more moments of theirs: `fsdp1_job.py FOLDER`, 4 ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard

import ckptengine as ce
from ckptengine.errors import ReplicaMismatchError, StateError

BFLOAT16 = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
KINDS: dict[str, dict[str, Any]] = {
    "flat": {},
    "original": {"use_orig_params": True},
    "mixed": {"mixed_precision": BFLOAT16},
    "grad-op": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP, "use_orig_params": True},
    "whole": {
        "sharding_strategy": ShardingStrategy.NO_SHARD,
        "use_orig_params": True,
        "mixed_precision": BFLOAT16,
    },
    "hybrid": {"sharding_strategy": ShardingStrategy.HYBRID_SHARD},
}
INPUT = torch.ones(4, 7) * torch.arange(4.0)[:, None]


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.up, self.norm, down = nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Linear(13, 5)
        self.down = FullyShardedDataParallel(down, device_id=torch.device("cpu"), **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


def build(seed: int, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    options = KINDS[kind]
    if kind == "hybrid":
        options = options | {"device_mesh": init_device_mesh("cpu", (2, 2))}
    model = FullyShardedDataParallel(Net(**options), device_id=torch.device("cpu"), **options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = model(INPUT).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def losses_after(folder: Path, kind: str) -> dict[str, list[float]]:
    """Return the losses of steps after a save, and after its restore into a model that has evaluated."""
    model, optimizer = build(0, kind)
    step(model, optimizer)
    ce.save(folder / kind, {"model": model, "optimizer": optimizer}, timeout=60)
    expected = [step(model, optimizer) for _ in range(2)]
    other, its = build(1, kind)
    other.eval()
    with torch.no_grad():
        other(INPUT)
    other.train()
    ce.load(folder / kind, into={"model": other, "optimizer": its}, timeout=60)
    return {"expected": expected, "found": [step(other, its) for _ in range(2)]}


def said(folder: Path, state: dict[str, Any]) -> str:
    try:
        ce.save(folder, state, timeout=60)
    except (StateError, ReplicaMismatchError) as error:
        return str(error)
    return "saved"


def inside_gathered(folder: Path, how: str) -> str:
    """Return what a save says of a module inside of the wrapper whose weights are in memory, or that was saved before
    it was wrapped."""
    net, options = nn.Sequential(nn.Linear(7, 13), nn.ReLU()), {}
    if how == "saved before":
        said(folder / "before", {"model": net[0]})
    if how == "not sharded":
        options = {"sharding_strategy": ShardingStrategy.NO_SHARD}
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)
    if how == "evaluated":
        with torch.no_grad():
            model(INPUT)
    return said(folder / f"inside {how}", {"model": net[0]})


def saves_replaced(folder: Path, kind: str) -> bool:
    """Return whether a save has what was put in the place of parameters, which the next forward pass computes with."""
    model, optimizer = build(0, kind)
    step(model, optimizer)
    for parameter in model.parameters():
        parameter.data = parameter.data * 2
    ce.save(folder / f"replaced-{kind}", {"model": model}, timeout=60)
    stored = ce.load(folder / f"replaced-{kind}")["model"]
    step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with FullyShardedDataParallel.summon_full_params(model):
        named = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in model.named_parameters()}
        return all(torch.equal(torch.as_tensor(stored[name]), value) for name, value in named.items())


def experts_apart(folder: Path, kind: str) -> str:
    """Return what a save says where ranks 0 and 2 have one expert, and ranks 1 and 3 another one, under one name."""
    torch.manual_seed(dist.get_rank() % 2)
    ranks = [[number, number + 2] for number in range(2)]
    groups = [dist.new_group(one) for one in ranks]
    model: Any = nn.Linear(6, 4)
    if kind == "fsdp1":
        group = groups[dist.get_rank() % 2]
        model = FullyShardedDataParallel(model, process_group=group, device_id=torch.device("cpu"))
    elif kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))["data"])
    else:  # a mesh of each rank alone
        fully_shard(model, mesh=init_device_mesh("cpu", (4, 1), mesh_dim_names=("expert", "data"))["data"])
    return said(folder / f"experts-{kind}", {"expert": model})


def hybrid_apart(folder: Path) -> str:
    """Return what a save says where the replicas of HYBRID_SHARD were made of other random numbers."""
    model, _ = build(dist.get_rank() // 2, "hybrid")
    return said(folder / "hybrid-apart", {"model": model})


def names_from_whole(folder: Path) -> list[str]:
    """Return what differs where a plain optimizer was given names, and one over flat parameters takes its state."""
    torch.manual_seed(0)
    whole = nn.Linear(6, 4)
    named = torch.optim.AdamW(whole.named_parameters())
    whole(torch.ones(6)).sum().backward()
    named.step()
    ce.save(folder / "named", {"model": whole, "optimizer": named}, timeout=60)
    model = FullyShardedDataParallel(nn.Linear(6, 4), device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    ce.load(folder / "named", into={"model": model, "optimizer": optimizer}, timeout=60)
    ce.save(folder / "flat", {"model": model, "optimizer": optimizer}, timeout=60)
    one, other = (ce.load(folder / name)["optimizer"]["state"] for name in ("named", "flat"))
    return [key for name in one for key in one[name] if one[name][key].tobytes() != other[name][key].tobytes()]


class Container(torch.optim.Optimizer):
    """Several optimizers as one, with a `state_dict` of its own, as torchtitan's container has."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([p for one in optimizers for group in one.param_groups for p in group["params"]], {})

    def state_dict(self) -> dict[str, Any]:
        return {str(number): one.state_dict() for number, one in enumerate(self.optimizers)}


def several(kind: str, seed: int, steps: int, *, named: bool) -> dict[str, Any]:
    """Return a state whose optimizers are in a dict or in a list, each over some of the parameters."""
    model, _ = build(seed, kind)
    inner = {id(parameter) for parameter in model.down.parameters()}
    parts = [[p for p in model.parameters() if (id(p) in inner) == wanted] for wanted in (True, False)]
    optimizers = [torch.optim.AdamW(parts[0], lr=0.01), torch.optim.SGD(parts[1], lr=0.01, momentum=0.9)]
    for _ in range(steps):
        model(INPUT).float().square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    held: Any = dict(zip(("inner", "outer"), optimizers, strict=True)) if named else optimizers
    return {"model": model, "optimizers": held}


def states_of(state: dict[str, Any]) -> list[torch.Tensor]:
    held = state["optimizers"]
    optimizers = list(held.values()) if isinstance(held, dict) else held
    return [
        value.detach().clone()
        for one in optimizers
        for group in one.param_groups
        for parameter in group["params"]
        for _, value in sorted(one.state.get(parameter, {}).items())
    ]


def goes_through(folder: Path, kind: str, *, named: bool) -> list[bool]:
    """Return whether weights and moments of several optimizers come back, and that there were any."""
    saved, place = several(kind, 0, 2, named=named), folder / f"several-{kind}-{named}"
    ce.save(place, saved, timeout=60)
    found = several(kind, 1, 0, named=named)
    ce.load(place, into=found, timeout=60)
    here, there = states_of(found), states_of(saved)
    weights = zip(found["model"].parameters(), saved["model"].parameters(), strict=True)
    return [
        len(here) == len(there) > 2 and all(map(torch.equal, here, there)),
        all(torch.equal(a, b) for a, b in weights),
    ]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {kind: losses_after(folder, kind) for kind in KINDS}
    model, optimizer = build(0, "original")
    step(model, optimizer)
    found["without the module"] = said(folder / "alone", {"optimizer": optimizer})
    with FullyShardedDataParallel.summon_full_params(model):
        found["summoned"] = said(folder / "summoned", {"model": model})
    pairs = [(kind, named) for kind in ("flat", "original", "hybrid") for named in (True, False)]
    found["several"] = [goes_through(folder, kind, named=named) for kind, named in pairs]
    found["container"] = said(folder / "container", {"model": model, "optimizer": Container([optimizer])})
    for kind in ("flat", "original"):
        whole, _ = build(0, kind)
        inner = whole.module
        norm = nn.Sequential(inner.norm)  # with buffers of its own, which are saved
        found[f"inside {kind}"] = [said(folder / f"inside-{kind}", {"model": one}) for one in (inner, norm, inner.down)]
    found["gathered"] = {how: inside_gathered(folder, how) for how in ("evaluated", "not sharded", "saved before")}
    found["replaced"] = {kind: saves_replaced(folder, kind) for kind in ("original", "whole")}
    found["experts"] = {kind: experts_apart(folder, kind) for kind in ("fsdp1", "fsdp2", "alone")}
    found["hybrid apart"] = hybrid_apart(folder)
    found["names"] = names_from_whole(folder)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
