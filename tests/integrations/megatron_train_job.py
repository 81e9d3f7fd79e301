"""Trains a GPT of Megatron-Core's on the CPU: its schedules, its own fp32 optimizer, a save after each step.

Options, as JSON: `run`, a folder; `tensor`, `pipeline`, the sizes; `kill`, the step after which all ranks kill
themselves, 0: not at all. `run/losses` gets the loss of each step.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron_job import VOCAB, made, pretend_cuda

from ckptengine.integrations import megatron

STEPS, LENGTH, MICRO_BATCHES = 6, 8, 2


def forward_step(batches: Any, model: Any) -> tuple[Any, Any]:
    tokens = next(batches)
    positions = torch.arange(LENGTH).expand_as(tokens[:, :-1])
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    out = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())

    def loss_of(losses: Any) -> tuple[Any, Any]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return out, loss_of


def batches_of(step: int) -> Any:
    generator = torch.Generator().manual_seed(step)
    return iter([torch.randint(VOCAB, (2, LENGTH + 1), generator=generator) for _ in range(MICRO_BATCHES)])


def state_of(model: Any, optimizer: Any, iteration: int, *, loading: bool) -> dict[str, Any]:
    sharded = model.sharded_state_dict()
    own = optimizer.sharded_state_dict(sharded, is_loading=loading)
    return {"model": model.sharded_state_dict(), "optimizer": own, "iteration": iteration}


def main() -> None:
    options = json.loads(sys.argv[1])
    run = Path(options["run"])
    pretend_cuda()
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()  # nothing is drawn: no dropout
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    model, optimizer = made(options["tensor"], options["pipeline"], False, step=False)
    saved = sorted(int(one.name.removeprefix("at-")) for one in run.glob("at-*"))
    start = saved[-1] if saved else 0
    if start:
        loaded = megatron.load(state_of(model.module, optimizer, 0, loading=True), run / f"at-{start}")
        model.module.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        assert loaded["iteration"] == start
    for step in range(start + 1, STEPS + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        told = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=batches_of(step), model=[model],
            num_microbatches=MICRO_BATCHES, seq_length=LENGTH, micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        if told and parallel_state.get_tensor_model_parallel_rank() == 0:
            loss = float(sum(one["loss"] for one in told) / len(told))
            with (run / "losses").open("a") as file:
                file.write(json.dumps([step, options["tensor"], options["pipeline"], loss]) + "\n")
        megatron.save(state_of(model.module, optimizer, step, loading=False), run / f"at-{step}")
        dist.barrier()
        if step == options["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
