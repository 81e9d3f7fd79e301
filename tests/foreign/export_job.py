"""One of some ranks that save a sharded model and export it together, started as torchrun starts it.

`export_job.py FOLDER` exports to `FOLDER/hf` and `FOLDER/model.pt`, and writes to `FOLDER/rank-N.json` how many bytes
this rank wrote of the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from foreign_models import model
from torch.distributed.fsdp import fully_shard

import ckptengine as ce
from ckptengine.errors import CheckpointError


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    net = model(1)
    fully_shard(net)
    ce.save(folder / "c", {"net": net, "step": 3})
    written = [0]
    report = ce.export(
        folder / "c", folder / "hf", only=["net"], rename={"net": ""}, max_shard_size=3000,
        progress=lambda done, total: written.append(done),
    )  # fmt: skip
    ce.export(folder / "c", folder / "model.pt", to="torch")
    text = json.dumps({"written": written[-1], "files": report.files})
    (folder / f"rank-{dist.get_rank()}.json").write_text(text)
    with pytest.raises(CheckpointError, match="exists already"):
        ce.export(folder / "c", folder / "hf", only=["net"], max_shard_size=3000)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
