"""A training with torchtitan's containers, loader and manager interface on the CPU: `torchtitan_job.py OPTIONS`.

torchtitan's `Trainer` needs a GPU; this loop does what it does with its parts: pipeline stages, tensor parallelism and
FSDP2 by a mesh of `pp`, `dp` and `tp` ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.components.checkpointer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from ckptengine.integrations.torchtitan import CheckpointManager

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
RANK = int(os.environ["RANK"])
LAYERS, WIDTH, MICRO = 4, 8, 2


class Numbers(IterableDataset[Any]):
    """Samples without an end; its position is its state."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.at, self._ranks = rank, ranks

    def __iter__(self) -> Any:
        while True:
            at, self.at = self.at, self.at + self._ranks
            generator = torch.Generator().manual_seed(at)
            yield torch.rand(WIDTH, generator=generator), at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Block(nn.Module):
    """A layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(OPTIONS.get("dropout", 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.relu(self.up(x))))


class Model(nn.Module):
    """The layers of one pipeline stage, under their names in the whole model."""

    def __init__(self, layers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Block() for number in layers})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class State:
    """What torchtitan's Trainer saves of itself."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def loss_of(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(out, target)


def main() -> None:
    """Train, or go on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pp, dp, tp = OPTIONS["mesh"]
    mesh = init_device_mesh("cpu", (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
    stage, place = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    torch.manual_seed(1)
    whole = Model(range(LAYERS))
    share = LAYERS // pp
    model = Model(range(stage * share, (stage + 1) * share))
    model.load_state_dict({name: value for name, value in whole.state_dict().items() if name in model.state_dict()})
    for layer in model.layers.values():
        parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    torch.manual_seed(100 + RANK // tp)  # the ranks of a tensor-parallel group draw alike
    optimizers = OptimizersContainer.Config(
        param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.01})],
        implementation="for-loop",
    ).build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=4).build(optimizers=optimizers, training_steps=20)
    loader = ParallelAwareDataloader(Numbers(place, dp), place, dp, batch_size=2 * MICRO)
    state = State()
    kind = torchtitan.components.checkpointer.CheckpointManager if OPTIONS.get("own") else CheckpointManager
    manager = kind.Config(
        enable=True, interval=3, keep_latest_k=2, last_save_model_only=False, **OPTIONS.get("config", {})
    ).build(
        dataloader=loader, model_parts=[model], optimizers=optimizers, lr_schedulers=schedulers,
        states={"train_state": state}, sd_adapter=None, base_folder=OPTIONS["run"],
    )  # fmt: skip
    manager.load()
    start = state.step
    pipe = None
    if pp > 1:
        pipe = Schedule1F1B(
            PipelineStage(model, stage, pp, torch.device("cpu"), group=mesh["pp"].get_group()), MICRO, loss_fn=loss_of
        )
    batches = iter(loader)
    said = Path(f"{OPTIONS['log']}.{RANK}")
    while state.step < OPTIONS.get("steps", 9):
        state.step += 1
        if state.step == OPTIONS.get("kill") and not Path(OPTIONS["killed"]).exists():
            die(manager)
        x, numbers = next(batches)
        optimizers.zero_grad()
        losses: list[torch.Tensor] = []
        if pipe is None:
            losses = [loss_of(model(part), part.flip(-1)) for part in x.chunk(MICRO)]
            torch.stack(losses).mean().backward()
        elif stage == 0:
            pipe.step(x)
        else:
            pipe.step(target=x.flip(-1), losses=losses)
        optimizers.step()
        schedulers.step()
        with said.open("a") as file:
            file.write(json.dumps([state.step, numbers.tolist(), [one.item().hex() for one in losses]]) + "\n")
        manager.save(state.step, last_step=state.step == OPTIONS.get("steps", 9))
    manager.maybe_wait_for_saving()
    manager.close()
    end(model, optimizers, schedulers, start)
    dist.barrier()
    dist.destroy_process_group()


def die(manager: Any) -> None:
    """End like a machine that fails, once a checkpoint is committed."""
    deadline = time.monotonic() + 60
    while not list(Path(OPTIONS["run"]).glob(f"checkpoint/step-{OPTIONS['committed']}/manifest-*.json")):
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(0.02)
    dist.barrier()
    Path(OPTIONS["killed"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def end(model: nn.Module, optimizers: Any, schedulers: Any, start: int) -> None:
    """Write what was trained: digests of the whole tensors, by their names in the whole model."""
    digests = {}
    for name, value in {**model.state_dict(), **optimizers.state_dict()}.items():
        if isinstance(value, torch.Tensor):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            digests[name] = hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()
    said = {"digests": digests, "rates": schedulers.state_dict(), "start": start}
    Path(f"{OPTIONS['end']}.{RANK}").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
