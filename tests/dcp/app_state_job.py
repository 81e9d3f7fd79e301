"""One of some ranks that train with a `Checkpointer` on states as scripts for torch's DCP have them.

`app_state_job.py ACTION RUN FOLDER`: `whole` saves in the middle with `AppState` and trains on; the others restore that
step in one of four ways, and train the rest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ckptengine as ce

sys.argv.insert(1, "ckptengine.dcp")  # what the script that is used here imports
from training_job import AppState, digest, made, train  # noqa: E402

TO_OBJECTS = {"app.model": "model", "app.optim": "optimizer"}


def main(action: str, run: str, folder: Path) -> None:
    """Train six steps, of which the first three may be restored."""
    dist.init_process_group("gloo")
    net, optimizer = made(seed=1 if action == "whole" else 2)
    with ce.Checkpointer(run) as ckpt:
        if action == "whole":
            train(net, optimizer, range(3))
            ckpt.save(3, {"app": AppState(net, optimizer)})
        elif action == "app":
            assert ckpt.restore({"app": AppState(net, optimizer)}) == 3
        elif action == "app that has trained":
            train(net, optimizer, range(2))
            assert ckpt.restore({"app": AppState(net, optimizer)}) == 3
        elif action == "dicts":
            model_state, optimizer_state = get_state_dict(net, optimizer)
            state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
            assert ckpt.restore(state, rename=TO_OBJECTS) == 3
            set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        else:
            assert ckpt.restore({"model": net, "optimizer": optimizer}, rename=TO_OBJECTS) == 3
    train(net, optimizer, range(3, 6))
    result = [digest(net), optimizer.param_groups[0]["lr"], int(next(iter(optimizer.state.values()))["step"])]
    if dist.get_rank() == 0:
        (folder / f"{action}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
