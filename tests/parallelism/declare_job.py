"""What goes wrong, and what goes right, when four ranks declare how their tensors are split: each case by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from groups import group, report

import ckptengine as ce
from ckptengine.errors import CheckpointError

FOLDER = Path(sys.argv[1])
CASES: list[Callable[[], Any]] = []


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Note a case; what it returns, or the error that it raises, is what the test looks at."""
    CASES.append(function)
    return function


def rows(count: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((count, 3), value)


def pair() -> list[int]:
    """Return the two ranks that split something; the other two are replicas of them."""
    first = dist.get_rank() // 2 * 2
    return [first, first + 1]


@case
def uneven_and_empty_parts() -> Any:
    rank = dist.get_rank()
    count = [2, 0, 3, 1][rank]
    mine = torch.arange(18.0).view(6, 3)[[0, 2, 2, 5][rank] :][:count].clone()
    ce.save(FOLDER / "uneven", {"w": ce.Sharded(mine, dim=0)})
    mine.fill_(-1)
    back = torch.zeros(1 if rank else 3, 3)
    ce.load(FOLDER / "uneven", into={"w": ce.Sharded(back, dim=0)})
    return [ce.load(FOLDER / "uneven")["w"].tolist(), back.tolist()]


@case
def replicas_that_are_equal() -> Any:
    ce.save(FOLDER / "pairs", {"w": ce.Sharded(rows(2, dist.get_rank() % 2), dim=0, group=pair())})
    return ce.load(FOLDER / "pairs")["w"].tolist()


@case
def replicas_that_differ() -> Any:
    ce.save(FOLDER / "never", {"v": ce.Sharded(rows(2, dist.get_rank()), dim=0, group=pair())})


@case
def nothing_declared() -> Any:
    ce.save(FOLDER / "never", {"w": rows(2, dist.get_rank())})


@case
def the_wrong_dimension() -> Any:
    ce.load(FOLDER / "pairs", into={"w": ce.Sharded(rows(2), dim=1, group=pair())})


@case
def parts_that_were_forgotten() -> Any:
    ce.save(FOLDER / "fused", {"w": ce.Sharded(rows(4), dim=0, parts=["gate", "up"])})
    half = {"w": ce.Sharded(rows(8), dim=0, group=pair(), parts={"gate": 3, "up": 3})}
    ce.load(FOLDER / "fused", into=half)
    ce.load(FOLDER / "fused", into={"w": ce.Sharded(rows(8), dim=0, group=pair())})


@case
def another_dimension_on_one_rank() -> Any:
    ce.Sharded(rows(2), dim=int(dist.get_rank() == 3), group=pair())


@case
def a_group_that_is_not_that_of_the_others() -> Any:
    ce.Sharded(rows(2), dim=0, group=[0, 1] if dist.get_rank() == 0 else [dist.get_rank()])


@case
def a_rank_that_lacks_the_tensor() -> Any:
    ce.Sharded({"a": rows(1)} if dist.get_rank() else {"b": rows(1)}, {"*": ce.Shard(0)})


@case
def lengths_that_do_not_fit_each_other() -> Any:
    ce.Sharded(torch.zeros(2, 3 + dist.get_rank()), dim=0)


@case
def a_pattern_that_fits_on_one_rank_only() -> Any:
    name = "late" if dist.get_rank() == 3 else "early"
    made = ce.Sharded({name: rows(1)}, {"early": ce.Shard(0, [0, 1, 2][:3] if name == "early" else [3]),
                                        "late": ce.Shard(0, [3] if name == "late" else [0, 1, 2])})  # fmt: skip
    return sorted(made.cuts)


@case
def a_pattern_that_fits_nowhere() -> Any:
    ce.Sharded({"early": rows(1)}, {"early": ce.Shard(0), "late": ce.Shard(0)})


@case
def another_number_of_rules_on_some_ranks() -> Any:
    late = {"late": ce.Shard(0)} if dist.get_rank() in (1, 3) else {}
    ce.Sharded({"early": rows(1)}, {"early": ce.Shard(0), **late})


@case
def no_rules_on_one_rank() -> Any:
    ce.Sharded({"early": rows(1)}, {} if dist.get_rank() == 2 else {"early": ce.Shard(0)})


@case
def a_group_without_the_rank_that_gives_it() -> Any:
    ce.Sharded(rows(1), dim=0, group=[0, 1] if dist.get_rank() == 3 else pair())


@case
def a_distributed_tensor() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    ce.Sharded({"w": distribute_tensor(rows(4), mesh, [Shard(0)])}, dim=0, group=mesh["tp"])


@case
def a_mesh_of_two_dimensions() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    made = ce.Sharded(rows(2), dim=0, group=mesh["tp"])
    ce.Sharded(rows(2), dim=0, group=mesh)
    return made.cuts[""].shape


@case
def a_stack_of_split_experts_and_distributed_tensors() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    whole = torch.arange(4.0 * 3 * 6).view(4, 3, 6)

    def parts() -> Any:
        mine = whole.chunk(2, 0)[mesh.get_coordinate()[0]].chunk(2, 2)[mesh.get_coordinate()[1]].clone()
        return ce.Sharded(mine, {"": [ce.Shard(0, mesh["ep"]), ce.Shard(-1, mesh["tp"])]})

    ce.save(FOLDER / "nested", {"w": parts()})
    found = []
    for placements in ([Shard(0), Shard(2)], [Shard(1), Replicate()], [Shard(0), Shard(0)]):
        target = distribute_tensor(torch.zeros_like(whole), mesh, placements)
        ce.load(FOLDER / "nested", into={"w": target})
        found.append(torch.equal(target.full_tensor(), whole))
        ce.save(FOLDER / "spread", {"w": target})
        back = parts()
        back.value.zero_()
        ce.load(FOLDER / "spread", into={"w": back})
        found.append(torch.equal(back.value, parts().value))
    return found


def adafactor(stacked: bool) -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.ones(2, 3, 5) if stacked else torch.ones(2, 5))
    optimizer = torch.optim.Adafactor([weight])
    (weight * torch.arange(weight.numel()).view(weight.shape) * (1 + dist.get_rank())).sum().backward()
    optimizer.step()
    return {"w": ce.Sharded({"w": weight}, {"w": ce.Shard(0)}), "optimizer": optimizer}


@case
def means_over_a_split_dimension() -> Any:
    ce.save(FOLDER / "never", adafactor(stacked=False))


@case
def means_inside_a_stack() -> Any:
    state = adafactor(stacked=True)
    ce.save(FOLDER / "stack", state)
    (before,) = [dict(one) for one in state["optimizer"].state.values()]
    other = adafactor(stacked=True)
    ce.load(FOLDER / "stack", into=other)
    (after,) = other["optimizer"].state.values()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return {key: list(one.shape) for key, one in ce.load(FOLDER / "stack")["optimizer"]["state"]["w.w"].items()}


@case
def each_rank_s_own_by_name() -> Any:
    layer = torch.nn.Linear(2, 2)
    layer.register_buffer("count", torch.tensor([float(dist.get_rank())]))
    torch.nn.init.constant_(layer.weight, 1)
    torch.nn.init.constant_(layer.bias, float(dist.get_rank()))
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    (layer.weight.sum() + layer.bias.sum() * dist.get_rank()).backward()
    optimizer.step()
    rules = {"count": ce.PerRank, "bias": ce.PerRank}
    ce.save(FOLDER / "own", {"layer": ce.Sharded(layer, rules), "optimizer": optimizer})
    fresh = torch.nn.Linear(2, 2)
    fresh.register_buffer("count", torch.tensor([-1.0]))
    again = torch.optim.SGD(fresh.parameters(), momentum=0.9)
    ce.load(FOLDER / "own", into={"layer": ce.Sharded(fresh, rules), "optimizer": again})
    same = torch.equal(fresh.bias, layer.bias) and torch.equal(fresh.count, layer.count)
    moments = [again.state[p]["momentum_buffer"] for p in fresh.parameters()]
    wanted = [optimizer.state[p]["momentum_buffer"] for p in layer.parameters()]
    return [same, all(map(torch.equal, moments, wanted))]


def main() -> None:
    found: dict[str, Any] = {}
    with group("all", 4):
        for one in CASES:
            try:
                found[one.__name__] = one()
            except (CheckpointError, TypeError) as error:
                found[one.__name__] = f"{type(error).__name__}: {error}"
    report(FOLDER, found)


main()
