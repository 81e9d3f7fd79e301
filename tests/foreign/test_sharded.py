"""Ranks of a real job fill a sharded model from checkpoints of other libraries, each byte read once for the node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from foreign_models import model, same
from mpirun import MPIEXEC, environment
from ranks import run_ranks
from sharded_job import stepped
from torch.distributed.checkpoint.state_dict import get_state_dict

import ckptengine as ce

HERE = Path(__file__).parent


def sources(folder: Path) -> list[str]:
    """Write the model in every format; return their names."""
    tensors = dict(model(1).state_dict())
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "hub").mkdir()
    items = list(tensors.items())
    weights = {}
    for number, part in enumerate((items[:3], items[3:]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file(dict(part), folder / "hub" / name)
        weights |= dict.fromkeys(dict(part), name)
    (folder / "hub" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    torch.save(tensors, folder / "model.pt")
    dcp.save({"net": tensors}, checkpoint_id=folder / "dcp", no_dist=True)
    net, optimizer = stepped(model(1))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "trained.pt")
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"net": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "trained", no_dist=True)
    return ["model.safetensors", "hub", "model.pt", "dcp"]


def run(ranks: int, folder: Path, *names: str) -> list[dict[str, dict[str, int]]]:
    environment = {"PYTHONPATH": f"{HERE.parent.parent}:{HERE}"}
    job = run_ranks(ranks, HERE / "sharded_job.py", folder, *names, env=environment)
    assert job.returncode == 0, job.stdout[-8000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_format_fills_a_sharded_model_and_the_node_reads_each_byte_once(tmp_path: Path, ranks: int) -> None:
    names = sources(tmp_path)
    reports = run(ranks, tmp_path, "write", f"dcp-{ranks}", *names, "trained.pt", "trained")
    for name in (f"dcp-{ranks}", *names):
        assert sum(report[name]["read"] for report in reports) <= reports[0][name]["node"]


def test_what_four_ranks_of_dcp_wrote_is_filled_on_two(tmp_path: Path) -> None:
    run(4, tmp_path, "write")
    run(2, tmp_path, "dcp-4")


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_the_command_shares_the_files_between_the_processes_of_a_launcher(tmp_path: Path, launcher: str) -> None:
    tensors = {f"w{number}": np.full(10_000, float(number)) for number in range(4)}
    ce.save(tmp_path / "point", {"model": tensors})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    mpiexec = [MPIEXEC, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, "-m"]
    start = torchrun if launcher == "torchrun" else mpiexec
    arguments = [str(tmp_path / "point"), str(tmp_path / "hub"), "--max-shard-size", "80KB", "--rename", "model="]
    command = [*start, "ckptengine", "export", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 files, 4 arrays") == 1  # told once
    for name, array in ce.load(tmp_path / "hub").items():
        assert np.array_equal(array, tensors[name])


def test_ranks_share_the_files_of_an_export(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": f"{HERE.parent.parent}:{HERE}"}
    job = run_ranks(2, HERE / "export_job.py", tmp_path, env=environment)
    assert job.returncode == 0, job.stdout[-8000:]
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    sizes = [(tmp_path / "hf" / file).stat().st_size for file in reports[0]["files"][:-1]]
    assert sum(report["written"] for report in reports) == sum(sizes)
    assert all(report["written"] > 0 for report in reports)
    expected = dict(model(1).state_dict())
    loaded = {}
    for file in reports[0]["files"][:-1]:
        loaded |= safetensors.torch.load_file(tmp_path / "hf" / file)
    same(loaded, expected)
    same(torch.load(tmp_path / "model.pt", weights_only=True), {"net": expected, "step": 3})
