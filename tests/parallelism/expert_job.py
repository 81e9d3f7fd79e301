"""Trains a mixture of 8 experts over 4 ranks, goes on over 2 and over 8, and compares with 4 throughout.

`expert_job.py FOLDER KIND`: `stacked` and `list` declare what each rank has, `dtensor` has DTensors over a mesh of
experts. Over 8 ranks there are two replicas of four parts, or eight parts (`wide`).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from by_hand import EXPERTS, MoE, moe_rules, train_step, whole_experts
from groups import group, report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import ckptengine as ce

STEPS = 3
JOBS = {"four": (1, 4), "two": (1, 2), "wide": (1, 8), "replicas": (2, 4)}


class Life:
    """A model on a mesh of replicas and experts, with its optimizer."""

    def __init__(self, kind: str, shape: tuple[int, int], filled: bool) -> None:
        self.mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "experts"))
        self.experts = self.mesh.get_group("experts")
        self.kind = kind
        torch.manual_seed(dist.get_rank())
        self.model = MoE(self.experts, stacked=kind != "list")
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter)
        if filled:
            with torch.no_grad():
                for name, tensor in self.parts(whole_experts(kind != "list")).items():
                    self.model.get_parameter(name).copy_(tensor)
        if kind == "dtensor":
            for layer in self.model.layers:
                for name in ("w_in", "w_out"):
                    local = getattr(layer, name).detach()
                    spread = DTensor.from_local(local, self.mesh["experts"], [Shard(0)])
                    setattr(layer, name, torch.nn.Parameter(spread))
        # Whether a rank's experts get tokens or not, all have gradients: one step for all parts of a stack.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)

    @property
    def state(self) -> dict[str, Any]:
        model: Any = self.model
        if self.kind != "dtensor":
            model = ce.Sharded(self.model, moe_rules(self.experts, self.kind == "stacked"))
        return {"model": model, "optimizer": self.optimizer}

    def parts(self, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return this rank's part of each tensor, by the names that it has here; said once more, by hand."""
        here = EXPERTS // dist.get_world_size(self.experts)
        first = dist.get_rank(self.experts) * here
        found = {}
        for name, tensor in whole.items():
            number = re.search(r"experts\.(\d+)\.", name)
            if number is None:
                found[name] = tensor[first : first + here] if "w_" in name else tensor
            elif first <= int(number[1]) < first + here:
                found[name.replace(number[0], f"experts.{int(number[1]) - first}.")] = tensor
        return found

    def train(self, steps: range) -> list[float]:
        replicas = self.mesh.get_group("replicas")
        return [train_step(self.model, self.optimizer, step, replicas) for step in steps]

    def wrong(self, path: Path) -> list[str]:
        """Return what is not, to the bit, this rank's part of what numpy reads."""
        saved, wrong = ce.load(path, as_torch=True), []
        states = {name.removeprefix("model."): one for name, one in saved["optimizer"]["state"].items()}
        wholes = {key: {name: one[key] for name, one in states.items()} for key in ("step", "exp_avg", "exp_avg_sq")}
        for name, part in self.parts(saved["model"]).items():
            if not torch.equal(part, local(self.model.get_parameter(name))):
                wrong.append(name)
        for key in ("exp_avg", "exp_avg_sq"):
            for name, part in self.parts(wholes[key]).items():
                if not torch.equal(part, local(self.optimizer.state[self.model.get_parameter(name)][key])):
                    wrong.append(f"{key} {name}")
        return wrong


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main(folder: Path, kind: str) -> None:
    found: dict[str, Any] = {}
    with group("four", 4) as inside:
        if inside:
            life = Life(kind, JOBS["four"], filled=True)
            found["four"] = life.train(range(STEPS))
            ce.save(folder / "four", life.state)
            found["reference"] = life.train(range(STEPS, 2 * STEPS))
    for name, source in (("two", "four"), ("wide", "two"), ("replicas", "wide"), ("two", "replicas")):
        with group(f"{name} from {source}", JOBS[name][0] * JOBS[name][1]) as inside:
            if inside:
                life = Life(kind, JOBS[name], filled=False)
                state = life.state
                ce.load(folder / source, into=state)
                found[f"{name} from {source} wrong"] = life.wrong(folder / source)
                ce.save(folder / name, state)
                found[f"{name} from {source}"] = life.train(range(STEPS, 2 * STEPS))
    report(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
