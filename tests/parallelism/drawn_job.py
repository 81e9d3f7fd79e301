"""Saves and loads networks of any sizes as it is asked: `drawn_job.py FOLDER`.

Each rank waits for `FOLDER/N.json`, for N from 0 on: sizes, one case that saves, and those that load. It answers with
what was wrong in `FOLDER/N-RANK.json`, and ends where it is asked nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import numpy as np
import torch
import torch.distributed as dist
from drawn_layouts import LAYOUTS, Built, Sizes, local_tensors, network, take_steps
from groups import group, process_rank

import ckptengine as ce
from ckptengine.comm.select import current
from ckptengine.load.loader import LoadOptions, load_newest
from ckptengine.storage.open import open_storage


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def build(case: str, sizes: Sizes, one_group: bool, seed: int) -> Built:
    return LAYOUTS[case.partition("-")[2]][1](network(sizes, seed), sizes, one_group)


def stored(path: Path) -> dict[str, np.ndarray]:
    """Return what a checkpoint holds, read without torch."""
    found = {}

    def look(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                look(item, f"{name}/{key}" if name else str(key))
        elif isinstance(value, np.ndarray):
            found[name] = value

    look(ce.load(path), "")
    return found


def check_stored(path: Path, sizes: Sizes, one_group: bool, apart: bool = False) -> list[str]:
    """Return what is not in a checkpoint as the network in one piece has it.

    `apart` says that the first and the last stage have each their own of a tied weight.
    """
    built = LAYOUTS["whole"][1](network(sizes, 1), sizes, one_group)
    take_steps(built)
    (net,) = built.modules
    want = {f"model/{name}": value for name, value in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        want |= {f"optimizer/state/model.{name}/{key}": v for key, v in built.optimizer.state[parameter].items()}
    if sizes.tied and apart:
        of_head = {
            f"optimizer/state/model.head.weight/{key}": v for key, v in built.optimizer.state[net.embed.weight].items()
        }
        want |= of_head
    have = stored(path)
    wrong = [f"{name}: missing" for name in want if name not in have]
    wrong += [f"{name}: too much" for name in have if name not in want]
    return wrong + [
        f"{name}: other contents"
        for name in want.keys() & have.keys()
        if (have[name].shape, have[name].tobytes()) != bits(want[name].detach())[1:]
    ]


def check_loaded(path: Path, case: str, sizes: Sizes, one_group: bool, options: LoadOptions | None = None) -> list[str]:
    """Load into a network of other values, and return what is not as in one that was trained so."""
    trained = build(case, sizes, one_group, 1)
    take_steps(trained)
    want = {name: bits(tensor) for name, tensor in local_tensors(trained)}
    built = build(case, sizes, one_group, 2)
    loaded = load_newest(open_storage(path), built.state, current(), 30, options or LoadOptions())
    have = {name: bits(tensor) for name, tensor in local_tensors(built)}
    wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    read = torch.tensor(loaded.counts.read)
    dist.all_reduce(read)
    wrong += [] if int(read) <= 1.05 * loaded.counts.node_needed else [f"{int(read)} bytes read"]
    return wrong + ([] if loaded.report.complete else [str(loaded.report)])


def answer(folder: Path, number: int, asked: dict[str, Any]) -> dict[str, str]:
    sizes, one_group, saves = Sizes(**asked["sizes"]), asked["one_group"], asked["saves"]
    path, problems = folder / f"checkpoint-{number}", {}
    with group(f"{number} saves", int(saves[0])) as mine:
        if mine:
            try:
                built = build(saves, sizes, one_group, 1)
                take_steps(built)
                ce.save(path, built.state, timeout=30)
                apart = "pipeline" in saves or "interleaved" in saves
                wrong = check_stored(path, sizes, one_group, apart) if dist.get_rank() == 0 else []
            except Exception:
                wrong = [traceback.format_exc(limit=-5)]
            if wrong:
                problems[saves] = "; ".join(wrong[:8])
    for place, loads in enumerate(asked["loads"]):
        with group(f"{number} loads {place}", int(loads[0])) as mine:
            if not mine:
                continue
            try:
                wrong = check_loaded(path, loads, sizes, one_group)
            except Exception:
                wrong = [traceback.format_exc(limit=-5)]
            if wrong:
                problems[f"{saves} → {loads}"] = "; ".join(wrong[:8])
    return problems


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for number in count():
        question = folder / f"{number}.json"
        while not question.exists():
            time.sleep(0.005)
        asked = json.loads(question.read_text())
        if asked is None:
            return
        reply = folder / f"{number}-{process_rank()}.json"
        found = json.dumps(answer(folder, number, asked))
        reply.with_suffix(".new").write_text(found)
        reply.with_suffix(".new").rename(reply)
        if number and process_rank() == 0:  # all have answered the one before
            shutil.rmtree(folder / f"checkpoint-{number - 1}", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
