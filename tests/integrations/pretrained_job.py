"""One rank of a job that trains a Llama under FSDP2, exports it for `from_pretrained`, and loads that again.

`pretrained_job.py FOLDER TIED`; every rank writes `FOLDER/rank-N.json`, rank 0 also the logits that it saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.load.loader import LoadOptions, load_newest
from ckptengine.storage.open import open_storage


def configured(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip


def sharded(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def prompts() -> torch.Tensor:
    return torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(5))


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(prompts()).logits


def main() -> None:
    folder, tied = Path(sys.argv[1]), sys.argv[2] == "tied"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = configured(tied)

    model = sharded(config, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        ids = torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(100 * step + rank))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ce.save(folder / "point", {"model": model, "optimizer": optimizer})
    seen = logits(model)

    hub = folder / "hub"
    ce.export(folder / "point", hub, only=["model"], rename={"model": ""}, max_shard_size="60KB")
    if rank == 0:
        config.save_pretrained(hub)
        torch.save(seen, folder / "logits.pt")
    dist.barrier()

    again = sharded(config, 2)
    options = LoadOptions.of(None, {"": "model"}, True, False)
    loaded = load_newest(open_storage(hub), {"model": again}, current(60), 60, options)
    assert loaded.report.complete, loaded.report
    report = {
        "read": loaded.counts.read,
        "node": loaded.counts.node_needed,
        "equal": torch.equal(logits(again), seen),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
