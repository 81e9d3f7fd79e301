"""Trains a GPT that is split by hand over 2 ranks, goes on over 4 and over 1, and shared by FSDP1 and by
ZeroRedundancyOptimizer, and compares with 1 throughout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from by_hand import BLOCK_RULES, GPT, gpt_rules, part_of, train_step
from groups import group, process_rank, report
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

import ckptengine as ce

STEPS = 3


def whole_model() -> dict[str, torch.Tensor]:
    """Return the values of the model that is not split, by name."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in GPT(None).state_dict().items()}
    size = dist.get_world_size()
    values = {}
    for name, shape in names.items():
        full = list(shape)
        dim = dim_of(name)
        if dim is not None:
            full[dim] *= size
        values[name] = torch.rand(full, generator=generator) * 0.4 - 0.2
    values["head.weight"] = values["embedding.weight"]
    return values


def rule_of(name: str) -> tuple[int, Any] | None:
    """Return dimension and parts of the tensor of a name, None where it is not split; said here once more, by hand."""
    last = name.split(".", 2)[-1]
    if name in ("embedding.weight", "head.weight"):
        return 0, None
    found = [rule for key, rule in BLOCK_RULES.items() if last == key or last.startswith(f"{key}.")]
    return found[0] if name.startswith("blocks.") and found else None


def dim_of(name: str) -> int | None:
    rule = rule_of(name)
    return None if rule is None else rule[0]


def fill(model: GPT) -> None:
    """Give a rank its parts of the whole model."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            whole, rule = whole_model()[name], rule_of(name)
            tensor.copy_(whole if rule is None else part_of(whole, *rule, dist.get_rank(), dist.get_world_size()))


def made(filled: bool) -> tuple[GPT, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(dist.get_rank())
    model = GPT(dist.group.WORLD)
    if filled:
        fill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return model, optimizer, {"model": ce.Sharded(model, gpt_rules(dist.group.WORLD)), "optimizer": optimizer}


def shared(how: str) -> tuple[Any, torch.optim.Optimizer]:
    """Return a model that is not split, of which all ranks have the whole, or of its optimizer, between them."""
    torch.manual_seed(9)
    alone, _ = dist.new_subgroups(1)
    model = GPT(alone)
    if how == "fsdp1":
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        return wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.1)
    parameters = model.parameters()
    return model, ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def compare(model: GPT, optimizer: torch.optim.Optimizer, path: Path) -> list[str]:
    """Return the names of what is not bit-equal with what numpy reads of the checkpoint, cut by hand."""
    saved = ce.load(path, as_torch=True)
    wrong = []
    names = dict(model.named_parameters())
    held = {("model", name): tensor for name, tensor in model.state_dict().items()}
    held |= {(key, name): optimizer.state[p][key] for name, p in names.items() for key in ("exp_avg", "exp_avg_sq")}
    for (kind, name), tensor in held.items():
        whole = saved["model"][name] if kind == "model" else saved["optimizer"]["state"][f"model.{name}"][kind]
        rule = rule_of(name)
        part = whole if rule is None else part_of(whole, *rule, dist.get_rank(), dist.get_world_size())
        if not torch.equal(part, tensor):
            wrong.append(f"{kind} {name}")
    return wrong


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    with group("one", 1) as inside:
        if inside:
            model, optimizer, _ = made(filled=True)
            found["reference"] = [train_step(model, optimizer, step) for step in range(2 * STEPS)]
            ce.save(folder / "reference", {"model": model, "optimizer": optimizer})
    with group("two", 2) as inside:
        if inside:
            model, optimizer, state = made(filled=True)
            found["two"] = [train_step(model, optimizer, step) for step in range(STEPS)]
            ce.save(folder / "two", state)
            ce.save(folder / "again", state)
    for name, size in (("four", 4), ("back to one", 1)):
        with group(name, size) as inside:
            if inside:
                model, optimizer, state = made(filled=False)
                ce.load(folder / "two", into=state)
                found[f"{name} wrong"] = compare(model, optimizer, folder / "two")
                found[name] = [train_step(model, optimizer, step) for step in range(STEPS, 2 * STEPS)]
    for how, size in (("fsdp1", 2), ("zero", 3)):
        with group(how, size) as inside:
            if inside:
                model, optimizer = shared(how)
                ce.load(folder / "two", into={"model": model, "optimizer": optimizer})
                found[how] = [train_step(model, optimizer, step) for step in range(STEPS, 2 * STEPS)]
                ce.save(folder / how, {"model": model, "optimizer": optimizer})
    for how in ("fsdp1", "zero"):
        with group(f"by hand after {how}", 2) as inside:
            if inside:
                model, optimizer, state = made(filled=False)
                ce.load(folder / how, into=state)
                found[f"by hand after {how} wrong"] = compare(model, optimizer, folder / how)
    report(folder, found | {"rank": process_rank()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
